"""Every number of the README and the pages is what its source gives: results, the code, or others who are named."""

import re

import pytest

from support.pages import script

NUMBERS = script("page_numbers")
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in NUMBERS.pages().items()}
per_page = pytest.mark.parametrize("name", TEXTS)


@per_page
def test_a_page_is_what_its_sources_give(name: str) -> None:
    assert NUMBERS.written(name, TEXTS[name]) == TEXTS[name], "run scripts/page_numbers.py"


@per_page
def test_every_number_of_a_page_has_a_source(name: str) -> None:
    assert NUMBERS.unsourced(TEXTS[name]) == []
    # A line that begins with a comment ends the paragraph.
    assert not re.findall(r"^\s*<!-- [^>]*-->\d.*", TEXTS[name], re.MULTILINE)


def test_figures_of_others_are_beside_their_source() -> None:
    for name, text in TEXTS.items():
        sections = [part for part in re.split(r"^#", text, flags=re.MULTILINE) if "<!-- cited -->" in part]
        assert all(re.search(r"\[\d+\]|\]\(http|arXiv|SimpleTuner|s3fs", part) for part in sections), name


def test_numbers_without_a_source_are_seen_and_others_are_written_anew() -> None:
    name = "distributed.md"
    for number in ("0.25", "1e-4", "12 %", "3 GB", "1.5 times", "20 ms", "33.0 dB", "7 minutes", "1,000 s"):
        planted = TEXTS[name] + f"\nIt took {number} more.\n"
        assert len(NUMBERS.unsourced(planted)) == 1, number
        assert NUMBERS.unsourced(planted.replace("took ", "took <!-- given -->")) == []
    marked = NUMBERS.MARK.search(TEXTS[name])
    assert marked and marked[4] == "0.2"
    assert NUMBERS.written(name, TEXTS[name].replace("-->0.2 s", "-->0.3 s")) == TEXTS[name]
    for wrong in ("report.no_such_key", "scripts/page_numbers.py"):
        with pytest.raises(LookupError):
            NUMBERS.written(name, TEXTS[name] + f"\nIt took <!-- {wrong} .1f -->0.123456 s.\n")
