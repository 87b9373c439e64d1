"""Writes docs/configuration.md from the schema: `python scripts/configuration_page.py`.

Promise: every key of `mixres.config.schema.Config` with its type, range, default and meaning, as the schema has
them; nothing is written by hand but the introduction. `tests/test_configuration_page.py` holds the page against it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from mixres.config.aliases import RULES
from mixres.config.problems import allowed, defaults, known_keys, section_of
from mixres.config.schema import Config
from mixres.config.source import value_at

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

Every key, as the schema has it. `scripts/configuration_page.py` writes this page, and a test compares the two.

- **Where values come from.** Defaults, then the YAML file behind `--config`, then `section.key=value` on the command
  line; the later wins, key by key. A list replaces a list.
- **A value may refer to another:** `${section.key}`, `${oc.env:NAME}` or `${oc.env:NAME,default}`. What an environment
  variable holds is text, and is never written to a message or to the run folder.
- **Scalars are those of YAML 1.2:** `no`, `012` and `3:30` are text, `true` and `false` are the two truth values.
- **Nothing is guessed.** An unknown key, a wrong type, a value out of range and a key given twice are refused, all of
  them at once, before any model is loaded (exit code 2). Unknown keys name the nearest known one,
  or the one that other trainers call so: `learning_rate`, `batch_size`, `rank`.
- **What a run has used** lies in `config.yaml` of its run folder, with all defaults filled in.

Paths are relative to the folder in which the command runs. `configs/qwen_image_edit_lora.yaml` in the repository is a
file that names every key.
"""


def page() -> str:
    """The whole page."""
    keys = dict(known_keys(Config))
    sections = ["", *(name for name, field in keys.items() if section_of(field))]
    parts = [INTRODUCTION]
    for section in sorted(sections, key=lambda name: name == ""):  # the keys outside of sections come last
        parts.append(_section(section, keys))
    return "\n".join([*parts, _rules()])


def _section(section: str, keys: dict[str, FieldInfo]) -> str:
    prefix = f"{section}." if section else ""
    own = {name: field for name, field in keys.items() if _parent(name) == section and not section_of(field)}
    lines = [f"{'#' * (2 + section.count('.'))} {section or 'Resuming'}", ""]
    if section:
        lines += [str(keys[section].description), ""]
    if own:
        lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{prefix}{name.removeprefix(prefix)}` | {allowed(field)} | {_default(name)} | {field.description} |"
        for name, field in own.items()
    ]
    return "\n".join(lines) + ("\n" if own else "")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _default(name: str) -> str:
    try:
        return f"`{_plain(value_at(defaults(Config), tuple(name.split('.'))))}`"
    except KeyError:
        return "required"


def _plain(value: Any) -> str:
    """A default as YAML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _rules() -> str:
    lines = ["## Keys that must fit each other", "", "| keys | rule |", "|---|---|"]
    lines += _rule_rows()
    return "\n".join(lines) + "\n"


def _rule_rows() -> Iterator[str]:
    for names, _, fix in RULES:
        yield f"| {', '.join(f'`{name}`' for name in names)} | {fix} |"


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
