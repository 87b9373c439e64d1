"""Writes docs/configuration.md from the schema: `python scripts/configuration_page.py`.

Promise: every key of `mixres.config.schema.Config` with its type, range, default and meaning, as the schema has
them; only the introduction is written by hand. `tests/docs/test_pages.py` compares the page with it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from mixres.config.problems import MISSING, as_written, defaults, known_keys, section_of, value_at
from mixres.config.schema import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
TYPES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "text that is not empty",
    "object": "a section",
    "null": "null",
}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

INTRODUCTION = """\
# Configuration

Every key, as the schema has it. `scripts/configuration_page.py` writes this page, and a test compares the two.

- **Where values come from.** Defaults, then the YAML file after `--config`, then `section.key=value` on the command
  line; the later one wins, key by key. A list replaces a list.
- **A value may refer to another:** `${section.key}`, `${oc.env:NAME}` or `${oc.env:NAME,default}`. The value of an
  environment variable is text; it is never written to a message or to the run folder.
- **Scalars are those of YAML 1.2:** `no`, `012` and `3:30` are text, `true` and `false` are the two truth values.
- **Nothing is guessed.** An unknown key, a wrong type, a value out of range, a key given twice and values that do not
  fit each other are refused. All of them are listed at once, before any model is loaded (exit code 2). An unknown key
  names the nearest known one, or the one that other trainers call so: `learning_rate`, `batch_size`, `rank`.
- **What a run has used** is in `config.yaml` of its run folder, with all defaults filled in.

Paths are relative to the folder in which the command runs. `configs/qwen_image_edit_lora.yaml` in the repository is a
file that names every key.
"""


def page() -> str:
    """The whole page; the keys outside of sections come last."""
    keys = dict(known_keys(Config))
    sections = [name for name, field in keys.items() if section_of(field)]
    return "\n".join([INTRODUCTION, *(_section(section, keys) for section in [*sections, ""])])


def _section(section: str, keys: Mapping[str, FieldInfo]) -> str:
    own = {name: field for name, field in keys.items() if name.rpartition(".")[0] == section and not section_of(field)}
    lines = [f"{'#' * (2 + section.count('.'))} {section or 'Resuming'}", ""]
    if section:
        lines += [str(keys[section].description), ""]
    if own:
        lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {takes(field)} | {_default(name)} | {field.description} |" for name, field in own.items()]
    return "\n".join(lines) + ("\n" if own else "")


def takes(field: FieldInfo) -> str:
    """What a key takes, in words: type, choices and range."""
    return _words(TypeAdapter(Annotated[field.annotation, field]).json_schema())


def _words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(map(_words, schema["anyOf"]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        items = _words(schema["items"])
        return "text or a list of texts, not empty" if items == TYPES["string"] else f"a list, each {items}"
    bounds = [
        f"{sign} {int(schema[name]) if schema[name] == int(schema[name]) else schema[name]}"
        for name, sign in BOUNDS.items()
        if name in schema
    ]
    return " ".join([TYPES[schema["type"]], " and ".join(bounds)]).strip()


def _default(name: str) -> str:
    value = value_at(defaults(), tuple(name.split(".")))
    return "required" if value == MISSING else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """A default as YAML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return as_written(value)


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
