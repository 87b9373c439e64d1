"""README, pages, CONTRIBUTING and descriptions of keys use the words of the glossary in CONTRIBUTING.md."""

import re

import pytest

from mixres.config.problems import known_keys
from mixres.config.schema import Config
from support.pages import DOCS, REPOSITORY

# Only what is unambiguous: "room" may be space on a disk, "caption" is the `.txt` file.
INSTEAD = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bfault[sy]?\b": "problem, error",
    r"\bfillers?\b": "padding, dummy microbatch",
    r"\bpictures?\b": "image",
    r"(?<!for )\bexamples?\b": "record (files), sample (tensors)",
    r"\bitems?\b": "record (files), sample (tensors)",
    r"\binstructions?\b": "prompt",
    r"\bnoise[- ]levels?\b": "sigma, timestep",
    r"\b(tells|told|says|said|speaks?)\b": "report, log, print",
    r"\bgo(es|ing)? on\b|\bwent on\b": "resume, continue",
    r"\bsisters?\b": "variant",
    r"\brooms\b": "packages, modules",
    r"\bworkbench\b": "setup",
    r"\b(input|contact) sheets?\b": "input preview, sample grid",
    r"\brehears\w*|(?-i:\bA look\b)": "dry run, smoke test",
    r"(?-i:What is not there yet)": "Limitations",
    r"(?-i:Several devices)": "Distributed training",
    r"(?-i:One sample through a step)": "Anatomy of a training step",
    r"(?-i:Other trainers)": "Comparison",
}
PAGES = [*(page for page in DOCS.glob("*.md") if page.name != "log.md"), *REPOSITORY.glob("[RC]*.md")]


def prose(text: str) -> str:
    """Markdown without code, addresses and quotations, whose words are not ours."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^>.*?$|\"[^\"]*\"", " ", text, flags=re.DOTALL | re.MULTILINE)


def found(text: str) -> list[str]:
    text = " ".join(text.split())
    hits = ((match[0], word) for pattern, word in INSTEAD.items() for match in re.finditer(f"(?i){pattern}", text))
    return [f"{hit!r}: say {word}" for hit, word in hits]


@pytest.mark.parametrize("name", sorted(page.relative_to(REPOSITORY).as_posix() for page in PAGES))
def test_a_page_uses_the_words_of_the_glossary(name: str) -> None:
    assert not found(prose((REPOSITORY / name).read_text(encoding="utf-8")))


def test_descriptions_of_keys_use_the_words_of_the_glossary() -> None:
    problems = {name: found(prose(field.description or "")) for name, field in known_keys(Config)}
    assert not {name: words for name, words in problems.items() if words}


def test_the_check_sees_words() -> None:
    assert len(found(prose("A look at pictures: it goes on, and `filler` is told.\n> a fault\n"))) == 4
