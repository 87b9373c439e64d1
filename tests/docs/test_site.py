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


def test_it_builds_and_no_page_fetches_from_a_network(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "-f", str(CONFIG), "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert settings["strict"] and set(settings["validation"].values()) == {"warn"}, "else a dead link passes"
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        loaded = [match[0] for match in LOADED.finditer(page.read_text(encoding="utf-8"))]
        assert loaded and not [tag for tag in loaded if "//" in tag], page.name
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


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
