"""What the README shows, and the pages that it leaves the long examples to: their code runs, their files are there."""

import contextlib
import io
import re

import pytest

from support.pages import DOCS, REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAX_LINES = 280  # what is longer belongs on a page
EXAMPLES = {"README.md": 2, "sampling.md": 3, "patch.md": 1, "export.md": 1}


def page(name: str) -> str:
    return README if name == "README.md" else (DOCS / name).read_text(encoding="utf-8")


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)


def test_it_stays_short() -> None:
    assert README.count("\n") <= MAX_LINES


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_python(name: str) -> None:
    assert len(python_blocks(name)) == EXAMPLES[name]
    for number, block in enumerate(python_blocks(name)):
        compile(block, f"{name} example {number}", "exec")


def test_the_call_without_mixres_is_the_same_on_both() -> None:
    (block,) = (block for block in python_blocks("README.md") if "load_lora_weights" in block)
    assert block in python_blocks("sampling.md")


def test_the_patch_alone_gives_what_its_page_says() -> None:
    (block,) = python_blocks("patch.md")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    errors = [float(line.split()[-1]) for line in printed.getvalue().splitlines()]
    assert len(errors) == 4
    assert max(errors) < 1e-6


def test_the_files_it_names_are_there() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", README)
    assert len(targets) > 20
    for target in targets:
        assert (REPOSITORY / target).exists(), target
