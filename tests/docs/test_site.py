"""The documentation site builds without a warning and fetches nothing. A dead link stops it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from support.pages import DOCS, REPOSITORY

CONFIG = REPOSITORY / "mkdocs.yml"
PAGES = {page: page.read_text(encoding="utf-8") for page in (*DOCS.glob("*.md"), REPOSITORY / "README.md")}
# What a browser loads to show a page: scripts, images, styles and icons, but not the links that a reader follows.
LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[^>]*>|<link\b(?![^>]*rel=.?(?:prev|next|edit))[^>]*>")


def build(config: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "-f", str(config), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)


def test_it_builds_and_no_page_fetches_from_a_network(tmp_path: Path) -> None:
    done = build(CONFIG, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        loaded = [match[0] for match in LOADED.finditer(page.read_text(encoding="utf-8"))]
        assert loaded and not [tag for tag in loaded if "//" in tag], page.name
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_page_is_in_the_navigation_once() -> None:
    named = re.findall(r"(\w+\.md)$", CONFIG.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_every_image_is_shown_and_described() -> None:
    text = "".join(PAGES.values())
    shown = re.findall(r"!\[(.*?)\]\((?:docs/)?(.*?)\)", text, re.DOTALL)
    assert {f"images/{path.name}" for path in (DOCS / "images").iterdir()} == {target for _, target in shown}
    assert not [target for words, target in shown if len(words) < 20]


def test_the_readmes_links_lead_to_headings() -> None:
    for target, heading in re.findall(r"\]\((docs/[^)#]+)#([^)]+)\)", PAGES[REPOSITORY / "README.md"]):
        lines = PAGES[REPOSITORY / target].splitlines()
        slugs = {re.sub(r"[^\w]+", "-", line.lstrip("# ").lower()).strip("-") for line in lines if line.startswith("#")}
        assert heading in slugs, f"{target}#{heading}"


DEAD = ["nowhere.md", "other.md#nowhere", "#nowhere", "images/nowhere.png", "/other.md", "../README.md"]


def test_dead_links_stop_the_build(tmp_path: Path) -> None:
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8")) | {"docs_dir": str(tmp_path / "docs")}
    del settings["nav"]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    links = "\n\n".join(f"{'!' * link.endswith('.png')}[x]({link})" for link in DEAD)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Other\n", encoding="utf-8")
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n{links}", encoding="utf-8")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    for link in DEAD:
        assert any(link in line for line in warnings), (link, done.stderr)
