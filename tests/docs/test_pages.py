"""What the README, CONTRIBUTING and the pages name is there: keys, files, verbs and options. Their code runs,
and they use the words of the glossary in CONTRIBUTING.md.
"""

import itertools
import json
import re
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from mixres.cli import parsers
from mixres.config.load import load_config
from mixres.config.problems import known_keys, section_of
from mixres.config.schema import Config
from mixres.data import records
from mixres.data.images import Limits
from mixres.data.scan import scan
from support.pages import DOCS, REPOSITORY, script

VERBS = parsers()[1]
KEYS = {name for name, _ in known_keys(Config)}
SECTIONS = {name.partition(".")[0] for name in KEYS if "." in name}
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (*DOCS.glob("*.md"), *REPOSITORY.glob("[RC]*.md"))}
FREE = ("optimizer.init_args.",)  # a section that holds any key
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


@per_page
def test_every_block_of_python_compiles(name: str) -> None:
    for number, block in enumerate(python_blocks(name)):
        compile(block, f"{name} block {number}", "exec")


def test_the_patch_alone_gives_what_its_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    for block, count in zip(python_blocks("patch.md"), (4, 2, 2, 2), strict=True):
        exec(block, {})
        errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
        assert len(errors) == count and max(errors) < 1e-6


def test_the_configuration_page_is_what_the_script_writes_and_gives_every_key_its_meaning() -> None:
    assert script("configuration_page").page() == PAGES["configuration.md"], "run scripts/configuration_page.py"
    rows = dict(re.findall(r"^\| `([\w.]+)` \| .* \| ([^|]+) \|$", PAGES["configuration.md"], re.MULTILINE))
    meanings = {name: field.description for name, field in known_keys(Config) if not section_of(field)}
    assert all(meanings.values()) and meanings.items() <= rows.items()


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGES["data.md"], re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


@pytest.mark.parametrize("title", ["A folder", "JSON lines and CSV"])
def test_the_layouts_of_the_data_page_are_read(tmp_path: Path, title: str) -> None:
    blocks = dict(re.findall(r"```(\w*)\n(.*?)```", section(title), re.DOTALL))
    folders: list[str] = []
    for line in blocks[""].splitlines():
        folders[(len(line) - len(line.lstrip())) // 2 :] = [re.split(r"\s{2,}", line.strip())[0]]
        path = tmp_path / "".join(folders)
        if folders[-1].endswith("/"):
            path.mkdir()
        elif path.suffix in (".txt", ".jsonl", ".csv"):
            path.write_text(blocks.get(path.suffix[1:], "make it blue"))
        else:
            Image.fromarray(skimage.data.chelsea()).resize((90, 60)).save(path)
    (root,) = tmp_path.iterdir()
    for source in [root] if title == "A folder" else [root / "my_pairs.jsonl", root / "my_pairs.csv"]:
        found = scan([str(source)], limits=Limits())
        assert found.problems == [] and len(found.records) >= 2
        assert {len(one.record.controls) for one in found.records} == ({1, 3} if title == "A folder" else {1, 2})
        assert any(one.record.mask for one in found.records)


# Only what is unambiguous: "room" may be space on a disk, "caption" is the `.txt` file.
AVOIDED = re.compile(
    r"""\b(mend(s|ed|ing)?|fault[sy]?|fillers?|pictures?|(?<!for\ )examples?|items?|instructions?|noise[-\ ]levels?
    |tells|told|says|said|speaks?|go(es|ing)?\ on|went\ on|sisters?|rooms|workbench|(input|contact)\ sheets?|rehears\w*
    |(?-i:A\ look|What\ is\ not\ there\ yet|Several\ devices|One\ sample\ through\ a\ step|Other\ trainers))\b""",
    re.IGNORECASE | re.VERBOSE,
)


def prose(text: str) -> str:
    """Markdown without code, addresses and quotations, whose words are not ours."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^>.*?$|\"[^\"]*\"", " ", text, flags=re.DOTALL | re.MULTILINE)


def avoided(text: str) -> list[str]:
    return [match[0] for match in AVOIDED.finditer(" ".join(prose(text).split()))]


def test_pages_and_descriptions_of_keys_use_the_words_of_the_glossary() -> None:
    texts = PAGES | {name: field.description or "" for name, field in known_keys(Config)}
    assert not {name: words for name, text in texts.items() if name != "log.md" and (words := avoided(text))}
    planted = "A look at pictures: it goes on, and `filler` is told.\n> a fault\n"
    assert avoided(planted) == ["A look", "pictures", "goes on", "told"]


def test_every_recipe_was_rehearsed() -> None:
    found = json.loads(script("hardware_table").RESULTS.read_text(encoding="utf-8"))
    recipes = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} - {"quickstart"}
    assert {row["recipe"] for row in found["rows"]} == recipes


def test_the_page_of_a_long_run_was_small_and_fast() -> None:
    found = json.loads(script("report_benchmark").RESULT.read_text(encoding="utf-8"))
    assert found["page_mb"] < 20 and found["open_s"][-1] < 2


def test_what_is_generated_for_a_million_records_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if mixres had written it."""
    million = script("million_entries")
    for module in (million, records):
        monkeypatch.setattr(module, "SETTLED_NS", 0)
    million.write_data(tmp_path, 1500)
    million.start(tmp_path, 1500)
    again = million.start(tmp_path, 1500)
    assert again["records"] == million.index_alone(tmp_path, 1500)["records"] == 1500
    assert [*million.real_files(tmp_path, 20)] == ["files", "first scan", "next scan"]
