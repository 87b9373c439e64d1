"""docs/configuration.md is what the schema says."""

import re

from mixres.config.problems import known_keys, section_of
from mixres.config.schema import Config
from support.pages import DOCS, script

PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_script_writes() -> None:
    assert script("configuration_page").page() == PAGE, "run scripts/configuration_page.py"


def test_every_key_has_a_row_with_its_meaning() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| .* \| ([^|]+) \|$", PAGE, re.MULTILINE))
    leaves = {name: field for name, field in known_keys(Config) if not section_of(field)}
    assert set(rows) >= set(leaves)
    for name, field in leaves.items():
        assert field.description and rows[name] == field.description
