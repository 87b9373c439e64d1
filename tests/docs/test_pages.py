"""What all pages and the README name is there: keys of the configuration, files of the repository, verbs.

And the other way round: every module stands in the tree of the architecture page.
"""

import itertools
import re

import pytest

from mixres.cli import parsers
from mixres.config.load import load_config
from mixres.config.problems import known_keys
from mixres.config.schema import Config
from support.pages import DOCS, REPOSITORY

VERBS = parsers()[1]
KEYS = {name for name, _ in known_keys(Config)}
SECTIONS = {name.partition(".")[0] for name in KEYS if "." in name}
PAGES = {page.name: page for page in [*sorted(DOCS.glob("*.md")), REPOSITORY / "README.md"]}
FREE = ("optimizer.init_args.",)  # a section that holds any key


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


@pytest.mark.parametrize("name", sorted(PAGES))
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
def test_verbs_of_a_page_exist(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    for verb in re.findall(r"train\.py (\w+)\b(?! changes)", text):
        assert verb in VERBS or verb == "VERB", f"{name}: train.py {verb}"


def tree() -> list[str]:
    """Files and folders that the tree of the architecture page names, from the root of the repository."""
    lines = PAGES["architecture.md"].read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    named, folder = [], ""
    for line in lines.strip().splitlines():
        parent = "src/mixres/" if line.startswith("  ") else ""
        for name in re.split(r"\s{2,}|(?<=\.py) (?=[a-z])", line.strip())[0].split(", "):
            head, slash, _ = name.rpartition("/")
            folder = head + slash if parent and slash else folder
            inside = parent + (name if slash else folder + name)
            named.append(inside if (REPOSITORY / inside).exists() else parent + name)
    return named


def test_the_tree_names_every_module_and_nothing_else() -> None:
    named = tree()
    assert not [name for name in named if not (REPOSITORY / name).exists()]
    source = REPOSITORY / "src" / "mixres"
    modules = {f"src/mixres/{path.relative_to(source).as_posix()}" for path in source.rglob("*.py")}
    assert {name for name in modules if not name.endswith("__init__.py")} <= set(named)
    assert len(named) == len(set(named))


def commands(text: str) -> list[list[str]]:
    """The words behind `train.py` or `mixres` in blocks and spans of code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    code = [*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))]
    lines = [line for block in code for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    found = [re.match(r"(?:[^\s:]+ )*?(?:train\.py|mixres) (?=[\w-])(.*?)(?:  |$)", line) for line in lines]
    begun = ("train.py", "mixres", "python", "accelerate", "torchrun")
    return [m[1].split() for line, m in zip(lines, found, strict=True) if m and line.split()[0] in begun]


def command_problems(words: list[str]) -> list[str]:
    verb = words[0] if not words[0].startswith("-") else "train"
    options = {*VERBS.get(verb, VERBS["train"])._option_string_actions, "--cache"}
    problems = [] if verb in VERBS or verb == "VERB" else [verb]
    problems += [word for word in words if word.startswith("--") and word not in options]
    if verb in ("sample", "export"):  # whose values may hold a `=`
        return problems
    keys = [word.lstrip("['").partition("=")[0] for word in words if "=" in word and not word.startswith("-")]
    return problems + [key for key in keys if key not in (*KEYS, "key") and not key.startswith(FREE)]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_options_and_keys_of_every_command_exist(name: str) -> None:
    problems = {" ".join(words): command_problems(words) for words in commands(PAGES[name].read_text(encoding="utf-8"))}
    assert not {command: found for command, found in problems.items() if found}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_recipes_take_what_every_command_overrides(name: str) -> None:
    """Values too: each is a configuration that a run begins with."""
    for words in commands(PAGES[name].read_text(encoding="utf-8")):
        files = [word for before, word in itertools.pairwise(words) if before == "--config"]
        overrides = [word.strip("'") for word in words if "=" in word and not word.startswith("-")]
        if files and files[0].startswith("configs/"):
            load_config(REPOSITORY / files[0], overrides)


def test_the_check_sees_commands() -> None:
    text = "a `train.py cache --verfy`\n\n```\npython train.py inspect --config F \\\n  data.tran=x 'data.train=[a]'\n"
    text += "```\n`mixres sample --lorra x`, `mixres frob x`, `mixres` and `train.py`\n"
    found = [problems for words in commands(text) if (problems := command_problems(words))]
    assert sorted(found) == [["--lorra"], ["--verfy"], ["data.tran"], ["frob"]]
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES.values()) > 40
