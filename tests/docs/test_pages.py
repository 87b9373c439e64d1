"""What the README, CONTRIBUTING and the pages name is there: keys, files, verbs and options. Their code runs."""

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
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (*DOCS.glob("*.md"), *REPOSITORY.glob("[RC]*.md"))}
FREE = ("optimizer.init_args.",)  # a section that holds any key
EXAMPLES = {"README.md": 2, "sampling.md": 4, "patch.md": 2}
per_page = pytest.mark.parametrize("name", sorted(PAGES))


def spelled_out(key: str) -> list[str]:
    """`a.{b,c}.d` as `a.b.d` and `a.c.d`."""
    parts = re.split(r"\{([^}]*)\}", key)
    return ["".join(one) for one in itertools.product(*(p.split(",") if n % 2 else [p] for n, p in enumerate(parts)))]


def named_keys(text: str) -> list[str]:
    found = re.findall(rf"`((?:{'|'.join(sorted(SECTIONS))})\.[\w.{{}},]+)(?:[:=][^`]*)?`", text)
    keys = [key for name in found for key in spelled_out(name)]
    return [key for key in keys if not key.endswith((".py", ".jsonl", ".json", ".png"))]


@per_page
def test_keys_that_a_page_names_exist(name: str) -> None:
    text = PAGES[name]
    if name == "comparison.md":  # the first column of its tables has keys of other trainers
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    assert not [key for key in named_keys(text) if key not in KEYS and not key.startswith(FREE)]


@per_page
def test_files_that_a_page_names_exist(name: str) -> None:
    files = re.findall(r"`((?:tests|scripts|configs|src|docs)/[\w./]*)`", PAGES[name])
    files += re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGES[name]) if (REPOSITORY / name).exists() else []
    assert not [file for file in files if not (REPOSITORY / file).exists()]


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
    if verb == "VERB":
        return []
    if verb not in VERBS:
        return [verb]
    options = [*re.findall(r"--[\w-]+", VERBS[verb].format_help()), "--cache"]
    keys = [word.lstrip("['").partition("=")[0] for word in words if "=" in word and not word.startswith("-")]
    unknown = [key for key in keys if key not in (*KEYS, "key") and not key.startswith(FREE)]
    return unknown + [word for word in words if word.startswith("--") and word not in options]


@per_page
def test_verbs_options_and_keys_of_every_command_exist(name: str) -> None:
    problems = {" ".join(words): command_problems(words) for words in commands(PAGES[name])}
    assert not {command: found for command, found in problems.items() if found}


@per_page
def test_the_recipes_take_what_every_command_overrides(name: str) -> None:
    """Values too: each is a configuration that a run begins with."""
    for words in commands(PAGES[name]):
        files = [word for before, word in itertools.pairwise(words) if before == "--config"]
        overrides = [word.strip("'") for word in words if "=" in word and not word.startswith("-")]
        if files and files[0].startswith("configs/"):
            load_config(REPOSITORY / files[0], overrides)


def test_the_checks_see_keys_and_commands() -> None:
    keys = named_keys("`train.seed`, `model.lora.{r,use_dora}`, `data.train=x`, `train.py`, `resume: auto`")
    assert keys == ["train.seed", "model.lora.r", "model.lora.use_dora", "data.train"]
    text = "a `train.py cache --verfy`\n\n```\npython train.py inspect --config F \\\n  data.tran=x 'data.train=[a]'\n"
    text += "```\n`mixres sample --lorra x`, `mixres frob x`, `mixres` and `train.py`\n"
    found = [problems for words in commands(text) if (problems := command_problems(words))]
    assert sorted(found) == [["--lorra"], ["--verfy"], ["data.tran"], ["frob"]]
    assert sum(len(commands(text)) for text in PAGES.values()) > 35


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_block_of_python_compiles(name: str) -> None:
    assert len(python_blocks(name)) == EXAMPLES[name]
    for number, block in enumerate(python_blocks(name)):
        compile(block, f"{name} block {number}", "exec")


def test_the_call_without_mixres_is_the_same_on_both() -> None:
    (block,) = (block for block in python_blocks("README.md") if "load_lora_weights" in block)
    assert block in python_blocks("sampling.md")


def test_the_patch_alone_gives_what_its_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    for block, count in zip(python_blocks("patch.md"), (4, 2), strict=True):
        exec(block, {})
        errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
        assert len(errors) == count and max(errors) < 1e-6
