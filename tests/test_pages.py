"""What all pages and the README name is there: keys of the configuration, files of the repository, verbs."""

import itertools
import re
from pathlib import Path

import pytest

from mixres.cli_options import VERBS
from mixres.config import Config, load_config
from mixres.config_faults import known_keys
from pages import DOCS, REPOSITORY

KEYS = {name for name, _ in known_keys(Config)}
SECTIONS = {name.partition(".")[0] for name in KEYS if "." in name}
PAGES = {page.name: page for page in [*sorted(DOCS.glob("*.md")), REPOSITORY / "README.md"]}
FREE = ("optimizer.init_args.",)  # a section that holds any key
NO_KEYS = {"messages.md"}  # written by a script


def ours(text: str) -> str:
    """The page without the first column of the tables of those who switch: keys of other trainers stand there."""
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)


def spelled_out(key: str) -> list[str]:
    """`a.{b,c}.d` as `a.b.d` and `a.c.d`."""
    parts = re.split(r"\{([^}]*)\}", key)
    return ["".join(one) for one in itertools.product(*(p.split(",") if n % 2 else [p] for n, p in enumerate(parts)))]


def named_keys(text: str) -> list[str]:
    found = re.findall(rf"`((?:{'|'.join(sorted(SECTIONS))})\.[\w.{{}},]+)(?:[:=][^`]*)?`", text)
    keys = [key for name in found for key in spelled_out(name)]
    return [key for key in keys if not key.endswith((".py", ".jsonl", ".json", ".png"))]


@pytest.mark.parametrize("name", sorted(set(PAGES) - NO_KEYS))
def test_keys_that_a_page_names_exist(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    unknown = [key for key in named_keys(ours(text) if name == "start.md" else text) if key not in KEYS]
    assert not [key for key in unknown if not key.startswith(FREE)], f"{name} names keys that are not there"


def test_the_check_sees_keys() -> None:
    assert named_keys("`train.seed`, `model.lora.{r,use_dora}`, `data.train=x`, `train.py`, `resume: auto`") == [
        "train.seed",
        "model.lora.r",
        "model.lora.use_dora",
        "data.train",
    ]
    assert len(named_keys(ours(PAGES["start.md"].read_text(encoding="utf-8")))) > 50
    assert not named_keys(ours("| `train.num_epochs` | none |"))


@pytest.mark.parametrize("name", sorted(PAGES))
def test_files_that_a_page_names_exist(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    for file in re.findall(r"`((?:tests|scripts|configs|src|docs)/[\w./]+\.(?:py|yaml|md|png))`", text):
        assert (REPOSITORY / file).exists(), f"{name} names {file}"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_verbs_and_commands_of_a_page_exist(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    for verb in re.findall(r"train\.py (\w+)\b(?! changes)", text):
        assert verb in VERBS or verb == "VERB", f"{name}: train.py {verb}"
    for command in re.findall(r"^accelerate launch train\.py.*?(?=\n\n|\n```)", text, re.DOTALL | re.MULTILINE):
        words = command.replace("\\\n", " ").split()[3:]
        if words[0] == "--config" and words[1].startswith("configs/"):
            load_config(Path(REPOSITORY / words[1]), words[2:])
