"""The documentation site builds without a warning, fetches nothing, and a dead link stops it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from support.pages import DOCS, REPOSITORY

CONFIG = REPOSITORY / "mkdocs.yml"


def build(config: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = build(CONFIG, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser fetches to show a page: not where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "edit"):
            self.addresses.append(given.get("href") or "")
        elif tag in ("script", "img", "iframe", "source"):
            self.addresses.append(given.get("src") or "")


def test_no_page_fetches_from_a_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses
        for address in filter(None, loaded.addresses):
            assert "//" not in address, f"{page.name} fetches {address}"
            if page.name != "404.html":  # its addresses are from the root of a server
                assert (page.parent / address.partition("?")[0]).exists(), f"{page.name} wants {address}"
    for style in site.rglob("*.css"):
        fetched = re.findall(r"url\(['\"]?([^'\")]+)|@import\s+([^;]+)", style.read_text(encoding="utf-8"))
        assert not [address for pair in fetched for address in pair if re.match(r"['\"]?(https?:)?//", address)], style


def test_every_page_is_in_the_navigation() -> None:
    text = CONFIG.read_text(encoding="utf-8")
    named = re.findall(r"(\w+\.md)$", text, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))
    assert len(named) == len(set(named))


def test_every_picture_says_what_it_shows() -> None:
    for page in [*DOCS.glob("*.md"), REPOSITORY / "README.md"]:
        for alternative in re.findall(r"!\[(.*?)\]\(", page.read_text(encoding="utf-8"), re.DOTALL):
            assert len(alternative) > 20, f"{page.name}: '{alternative}' says too little"


def test_every_picture_is_shown() -> None:
    pages = [*DOCS.glob("*.md"), REPOSITORY / "README.md"]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert {path.name for path in (DOCS / "images").iterdir()} == set(re.findall(r"(?<!_)images/([\w.]+)\)", text))


DEAD = {
    "page": "[x](nowhere.md)",
    "heading": "[x](other.md#nowhere)",
    "own heading": "[x](#nowhere)",
    "picture": "![a picture](images/nowhere.png)",
    "root": "[x](/other.md)",
    "folder": "[x](../README.md)",
}


def test_dead_links_stop_the_build(tmp_path: Path) -> None:
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    del settings["nav"]
    settings["docs_dir"] = str(tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Other\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (tmp_path / "docs" / "index.md").write_text("# Index\n\n" + "\n\n".join(DEAD.values()), encoding="utf-8")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    for name, link in DEAD.items():
        target = link.partition("(")[2].rstrip(")")
        assert any("WARNING" in line and target in line for line in done.stderr.splitlines()), (name, done.stderr)


def test_the_readme_leads_to_pages_that_exist() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for target, _, heading in (link.partition("#") for link in re.findall(r"\]\((docs/[^)]+)\)", text)):
        page = REPOSITORY / target
        assert page.exists(), target
        if heading:
            slugs = {
                re.sub(r"[^\w]+", "-", line.lstrip("# ").lower()).strip("-") for line in page.read_text().splitlines()
            }
            assert heading in slugs, f"{target}#{heading}"
