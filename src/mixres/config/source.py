"""Where configuration values come from: a YAML file, dotted overrides, and `${...}` references between them.

Promise: what is written is what is read (YAML 1.2 scalars: `no`, `012` and `3:30` stay text), all problems are
collected in one pass, nothing runs code or expands without bound, and no message holds the value behind a reference.
Cost: milliseconds; needs yaml and omegaconf, nothing of the schema.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

KeyPath = tuple[str | int, ...]

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
# Only these two references are read: another key of the configuration, or an environment variable (with a default).
_REFERENCE = re.compile(r"\$\{\s*(?:oc\.env\s*:\s*(?P<env>\w+)\s*(?:,[^${}]*)?|\.*[A-Za-z_][\w.\[\]]*\s*)\}", re.ASCII)
_ALLOWED_REFERENCES = "${section.key}, ${oc.env:NAME} or ${oc.env:NAME,default}"
_MAX_REFERENCES = 16  # each may name others: so many stand for some hundreds at most, without an end they fill memory


@dataclass
class Source:
    """The merged values, before any schema has seen them."""

    written: dict[str, Any]  # references as the user wrote them
    resolved: dict[str, Any] = field(default_factory=dict)  # references replaced; None where that failed
    references: set[KeyPath] = field(default_factory=set)  # where `written` holds a reference
    texts: dict[KeyPath, str] = field(default_factory=dict)  # of numbers, as the user wrote them: 1e3
    problems: list[tuple[KeyPath, str]] = field(default_factory=list)  # the key (() for none) and the whole message
    file_is_read: bool = True


def dotted(path: KeyPath) -> str:
    """`("a", "b", 0)` as `a.b[0]`, the way overrides and messages write a key."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value in nested dicts and lists that is neither, with its key path."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def read_source(path: Path, overrides: Sequence[str], defaults: Mapping[str, Any]) -> Source:
    """Merge `defaults` < the YAML file < `key=value` overrides, key by key, and resolve the references.

    Lists replace each other. Problems are collected in the result, the values they concern are None in `resolved`.
    """
    source = Source(written=dict(defaults))
    source.written = _merged(source.written, _read_file(path, source))
    for override in _with_values(overrides, source):
        source.written = _merged(source.written, _read_override(override, source))
    _resolve(source)
    return source


def _merged(base: Any, top: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {key: _merged(base[key], value) if key in base else value for key, value in top.items()}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no type information
    """YAML 1.2 core scalars. PyYAML's own 1.1 rules read `no` as False, `012` as 10, `3:30` as 210, `1e-4` as text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # they can grow without bound or point into themselves
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not read, write ${section.key} instead", problem_mark=mark)
        return super().compose_node(parent, index)


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    if _tag == "float":  # a leading zero is a code or a revision, not a number, unless a fraction follows: 0.5
        _pattern = rf"(?![-+]?0[0-9_])(?:{_pattern})"
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)


def _read_file(path: Path, source: Source) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        source.problems.append(((), f"--config {path}: cannot be read: {reason}; name another file"))
        source.file_is_read = False
        return {}
    before = len(source.problems)
    values = _parse(text, (), f"--config {path}", source)
    if isinstance(values, dict):
        return values
    source.file_is_read = (
        values is None and len(source.problems) == before
    )  # an empty file is read, a broken one is not
    if values is None:
        return {}
    source.problems.append(((), f"--config {path}: holds no `key: value` lines at its top level; write some"))
    return {}


def _with_values(overrides: Sequence[str], source: Source) -> Iterator[str]:
    """The overrides; a key and the word behind it, without a `=` in either, are one problem."""
    words = itertools.pairwise([*overrides, "="])
    for word, after in words:
        if word.endswith((".yaml", ".yml")) and "=" not in word:
            source.problems.append(((), f"{word}: is a file, not an override; write --config {word}"))
        elif "." not in word or not _KEY.fullmatch(word):
            yield word
        elif "=" in after:
            source.problems.append(((), f"{word}: has no value; write {word}=VALUE"))
        else:
            source.problems.append(((), f"{word}: has no value; put = between them: {word}={after}"))
            next(words, None)


def _read_override(override: str, source: Source) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        source.problems.append(((), f"{key or override!r}: not an override; write section.key=value"))
        return {}
    parts = tuple(key.split("."))
    value = _parse(text, parts, key, source)
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _parse(text: str, path: KeyPath, where: str, source: Source) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, path, source)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it holds a character that YAML does not take"
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        source.problems.append((path, f"{where}: not valid YAML: {problem}{at}; correct it"))
    except RecursionError:
        source.problems.append((path, f"{where}: nested too deeply; flatten it"))
    return None


def _plain(loader: _Loader, node: yaml.Node, path: KeyPath, source: Source) -> Any:
    """The node as dicts, lists and scalars. Its own constructor, so that each problem knows its dotted key."""
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and tag == "map":
        return _plain_section(loader, node, path, source)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_plain(loader, item, (*path, i), source) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and tag in ("null", "bool", "int", "float", "str"):
        source.texts[path] = node.value
        with contextlib.suppress(ValueError, KeyError):  # an integer of thousands of digits, `!!int x`, `!!bool x`
            return loader.construct_object(node)
    problem = "tagged or oversized; write text, a number, true, false or null"
    source.problems.append((path, f"{dotted(path)}: {problem}"))
    return None


def _plain_section(loader: _Loader, node: yaml.MappingNode, path: KeyPath, source: Source) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        at = (*path, key)
        if key in values:
            source.problems.append(
                (at, f"{dotted(at)}: given twice, again at line {key_node.start_mark.line + 1}; take one out")
            )
        values[key] = _plain(loader, value_node, at, source)
    return values


def _resolve(source: Source) -> None:
    bad: set[KeyPath] = set()
    count = 0
    for path, value in leaves(source.written):
        if not isinstance(value, str):
            continue
        count += value.count("${")
        problem = _text_problem(value)
        if not problem and "${" in value and count > _MAX_REFERENCES:
            problem = f"given {value}, allowed: {_MAX_REFERENCES} references in all: write some out"
        if problem:
            source.problems.append((path, f"{dotted(path)}: {problem}"))
            bad.add(path)
        elif "${" in value:
            source.references.add(path)
    clean = replaced(source.written, dict.fromkeys(bad))
    config = OmegaConf.create(clean)
    found: dict[KeyPath, Any] = {}
    for path in sorted(source.references, key=dotted):
        found[path], reason = _reference(config, path)
        if reason:
            source.problems.append((path, f"{dotted(path)}: given {value_at(source.written, path)}, {reason}"))
    source.resolved = replaced(clean, found)


def _text_problem(text: str) -> str | None:
    """Why a text can be no value at all, or None."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        return "not valid Unicode text; write it anew"
    if text == "???":
        return "given ???, which is no value yet; write one"
    if "${" not in text:
        return None
    if "${" in _REFERENCE.sub("", text):
        return f"given {text}, allowed in a reference: {_ALLOWED_REFERENCES}"
    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException:
        return f"given {text}, not a reference that can be read; allowed: {_ALLOWED_REFERENCES}"
    return None


def _reference(config: Any, path: KeyPath) -> tuple[Any, str | None]:
    """The value at `path`, or why there is none. OmegaConf's own messages are dropped: they quote values."""
    try:
        value = value_at(config, path)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value, None
    except InterpolationKeyError:
        return None, "which names a key that is not there; correct it"
    except OmegaConfBaseException as error:
        missing = re.search(r"Environment variable '(\w+)' not found", str(error))
        if missing:
            return None, f"but the environment variable {missing[1]} is not set; set it or write a default"
    return None, "which cannot be resolved; write a value"


def replaced(value: Any, new: Mapping[KeyPath, Any], path: KeyPath = ()) -> Any:
    """A copy of nested dicts and lists in which every value at a key path in `new` is the one from there."""
    if path in new:
        return new[path]
    if isinstance(value, dict):
        return {key: replaced(item, new, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, new, (*path, i)) for i, item in enumerate(value)]
    return value


def as_written(value: Any) -> str:
    """A value as a configuration writes it: null, true and false, not Python's words for them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def value_at(value: Any, path: KeyPath) -> Any:
    """The value at a key path in nested dicts and lists."""
    for part in path:
        value = value[part]
    return value
