"""README, pages, CONTRIBUTING and descriptions of keys use the words of the glossary in CONTRIBUTING.md."""

import re

from mixres.config.problems import known_keys
from mixres.config.schema import Config
from support.pages import DOCS, REPOSITORY

# Only what is unambiguous: "room" may be space on a disk, "caption" is the `.txt` file.
AVOIDED = re.compile(
    r"""\b(mend(s|ed|ing)?|fault[sy]?|fillers?|pictures?|(?<!for\ )examples?|items?|instructions?|noise[-\ ]levels?
    |tells|told|says|said|speaks?|go(es|ing)?\ on|went\ on|sisters?|rooms|workbench|(input|contact)\ sheets?|rehears\w*
    |(?-i:A\ look|What\ is\ not\ there\ yet|Several\ devices|One\ sample\ through\ a\ step|Other\ trainers))\b""",
    re.IGNORECASE | re.VERBOSE,
)
PAGES = [*(page for page in DOCS.glob("*.md") if page.name != "log.md"), *REPOSITORY.glob("[RC]*.md")]


def prose(text: str) -> str:
    """Markdown without code, addresses and quotations, whose words are not ours."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^>.*?$|\"[^\"]*\"", " ", text, flags=re.DOTALL | re.MULTILINE)


def found(text: str) -> list[str]:
    return [match[0] for match in AVOIDED.finditer(" ".join(prose(text).split()))]


def test_pages_and_descriptions_of_keys_use_the_words_of_the_glossary() -> None:
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    texts |= {name: field.description or "" for name, field in known_keys(Config)}
    assert not {name: words for name, text in texts.items() if (words := found(text))}
    planted = "A look at pictures: it goes on, and `filler` is told.\n> a fault\n"
    assert found(planted) == ["A look", "pictures", "goes on", "told"]
