"""Every message that reaches a user names what it is about and what mends it; the page that lists them is current."""

import re
from pathlib import Path
from types import ModuleType

import pytest

import pages
from mixres.cli_options import VERBS
from mixres.config import Config
from mixres.config_faults import known_keys

# A mend is a clause that begins with one of these words. What the user is to do comes first in it.
MENDS = (
    "add|cast|change|choose|connect|convert|copy|correct|cut|download|export|fetch|finish|flatten|free|give"
    "|install|keep|leave|let|load|lower|make|mend|move|name|number|pip install|put|python|quote|raise|remove"
    "|rename|run|save|scale|see|set|shorten|take|train|try|turn|wait|write"
)
CLAUSE = re.compile(rf"(?:[:;,.] |[:;,] or | or )(?:{MENDS})\b")
# Or the message offers what is known.
OFFER = re.compile(
    r"allowed: |allowed in a reference: |did you mean '|known here: |the verbs are: |it takes: |supported: "
)
# argparse names the argument itself.
FROM_LIBRARIES = {"…; see --help"}
# These pass on what others have said.
PASSING = {
    "assemble:check_early",
    "config:load_config",
    "data/dataset:inspect",
    "data/dataset:scan",
    "examples:_usable",
    "examples:look_for_examples",
    "precompute:family_of",
    "run_result:renamed",
}
KEYS = {name for name, _ in known_keys(Config)} | {"optimizer.init_args.lr"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/messages_page.py, which reads the messages off the source."""
    return pages.script("messages_page")


def name_fault(text: str) -> str | None:
    """Why a message does not say what it is about, or None."""
    head, colon, _ = text.partition(": ")
    words = head.split()
    if not colon:
        return "has no name before a colon"
    if "…" in head or head in KEYS or head in VERBS or words[0] in VERBS or head.startswith("--"):
        return None
    return None if head == "accelerate launch" or head.isupper() else f"'{head}' is no key, file, option or verb"


def mend_fault(text: str) -> str | None:
    """Why a message does not say what to do, or None."""
    behind = ": " + text.partition(": ")[2]
    return None if CLAUSE.search(behind) or OFFER.search(behind) else "has no mend"


def test_every_message_has_a_name_and_a_mend(script: ModuleType) -> None:
    messages = script.all_messages()
    assert len({message.text for message in messages}) > 130
    faults = [
        f"src/mixres/{message.module}.py:{message.line}: {message.text}\n    {fault}"
        for message in messages
        if message.text not in FROM_LIBRARIES
        for fault in (name_fault(message.text), mend_fault(message.text))
        if fault
    ]
    assert not faults, "\n".join(["write `key or file: what is wrong; what to do`:", *faults])


@pytest.mark.parametrize(
    ("text", "named", "mended"),
    [
        ("train.seed: given …, allowed: …", True, True),
        ("…: is empty (0 bytes); copy it again", True, True),
        ("…: is empty (0 bytes)", True, False),
        ("the disk is full: make room", False, True),
        ("train.sed: is odd; remove it", False, True),
        ("something went wrong", False, False),
        ("…: the given name does not add up", True, False),
    ],
)
def test_what_counts_as_a_name_and_a_mend(text: str, named: bool, mended: bool) -> None:
    assert (name_fault(text) is None, mend_fault(text) is None) == (named, mended)


PLANTED = """
LIMIT, WHERE = 3, "cache.cache_dir"

def direct(path):
    raise UserError(f"{path}: is wrong")

def collected(paths):
    faults = []
    for path in paths:
        if path:
            faults.append(f"{WHERE}: {path} is odd")
    faults += [f"{path} is even" for path in paths]
    options = _Faults(lacking(paths))
    noted(options)
    if faults or options:
        raise UserError(list(dict.fromkeys([*faults, *options])))

def lacking(paths):
    if not paths:
        yield "--paths: not given"

def noted(faults):
    faults.append("--paths: is noted")

def forwarded(path, reason):
    return Fault(path, reason)

def caller(path):
    yield forwarded(path, "is too large" if path else "is too small")

def reasons(path):
    if not path:
        yield f"holds {LIMIT} things"

def reader(path):
    for reason in reasons(path):
        raise BadImageError(reason)
    what = "new"
    raise WorkError(f"step {path}: {what} and {what}")
"""


def test_messages_are_found_however_they_are_made(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED, encoding="utf-8")
    found = {(message.text, message.exit_code) for message in script.Source(tmp_path).messages()}
    assert found == {
        ("…: is wrong", 2),
        ("cache.cache_dir: … is odd", 2),
        ("… is even", 2),
        ("--paths: not given", 2),
        ("--paths: is noted", 2),
        ("…: is too large", 2),
        ("…: is too small", 2),
        ("…: holds … things", 2),
        ("step …: new and new", 1),
    }


def test_no_site_is_overlooked(script: ModuleType) -> None:
    """Each `raise UserError(...)` and the like gives a message of its own, or passes on those of others."""
    source = script.Source()
    passing = []
    for function in source.functions:
        for call in function.calls:
            name = getattr(call.func, "id", None)
            if name not in ("UserError", "WorkError", "BadImageError", "BadCaptionError", "BadRowError"):
                continue
            texts = [text for text, _ in source._made(call, function)]
            assert texts, f"src/mixres/{function.module}.py:{call.lineno}: what it says is not found"
            if not any(script._says_something(text) for text in texts):
                passing.append(f"{function.module}:{function.node.name}")
    assert set(passing) == PASSING, "these sites say nothing that was found"


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    written = script.PAGE.read_text(encoding="utf-8")
    assert written == script.page(script.all_messages()), "run scripts/messages_page.py"
