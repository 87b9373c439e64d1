"""What the README shows: its code runs, and the files it names are there."""

import contextlib
import io
import re
from pathlib import Path

from mixres.config import load_config

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_example_is_python() -> None:
    assert len(python_blocks()) == 4
    for number, block in enumerate(python_blocks()):
        compile(block, f"README example {number}", "exec")


def test_the_patch_alone_gives_what_the_readme_says() -> None:
    (block,) = (block for block in python_blocks() if "patch_qwen_model_for_multi_resolution(model)" in block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    errors = [float(line.split()[-1]) for line in printed.getvalue().splitlines()]
    assert len(errors) == 4
    assert max(errors) < 1e-6


def test_the_files_it_names_are_there() -> None:
    tree = README.split("## What is where")[1].split("```")[1].strip().splitlines()
    folder = ""
    for line in tree:
        names = re.split(r"\s{2,}|(?<=\.py) (?=[a-z])", line.strip())[0].split(", ")
        parent = "src/mixres/" if line.startswith("  ") else ""
        for name in names:
            if parent and "/" in name:
                folder = name.rpartition("/")[0] + "/"
            inside = REPOSITORY / parent / (name if "/" in name else folder + name)
            assert inside.exists() or (REPOSITORY / parent / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_the_commands_name_keys_that_exist() -> None:
    for command in re.findall(r"accelerate launch train\.py.*?(?=\n\n|\n```)", README, re.DOTALL):
        words = command.replace("\\\n", " ").split()[3:]
        if words[0] == "--config" and words[1].startswith("configs/"):
            load_config(REPOSITORY / words[1], words[2:])
