"""What is wrong with the values of a configuration, in one line a key.

Promise: the line names the key, what was given (references as written, so no secret) and what is allowed; an unknown
key names the nearest known one.
"""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mixres.config.aliases import OTHER_NAMES
from mixres.config.schema import Config
from mixres.errors import without_secrets

KeyPath = tuple[str | int, ...]
Problem = tuple[KeyPath, str]  # the key, () for none, and the line
MISSING = "???"  # OmegaConf's mark of a value that is not given yet
_SHOWN_CHARACTERS = 120


@dataclass
class Source:
    """The merged values, before the schema has seen them."""

    written: dict[str, Any]  # with references as the user wrote them
    resolved: dict[str, Any] = field(default_factory=dict)  # references replaced; None where that failed
    references: list[KeyPath] = field(default_factory=list)  # where `written` holds some
    problems: list[Problem] = field(default_factory=list)

    def shown(self, path: KeyPath) -> str:
        """The value as a message may print it: a reference as it was written, and nothing of a section."""
        value: Any = self.written
        for part in path:
            value = value if isinstance(value, str) else value[part]  # inside of a reference: that reference
        if isinstance(value, dict):
            return "a section"  # whose values may be secrets
        if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
            return "a nested list"
        text = without_secrets(json.dumps(value, ensure_ascii=False))
        if "${oc.env" in text:
            text += " (what an environment variable holds is text)"
        return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def dotted(path: KeyPath) -> str:
    """`("a", "b", 0)` as `a.b[0]`, the way overrides and messages write a key."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value in nested dicts and lists that is neither, with its key path."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*path, key))
    else:
        yield path, value


def value_at(value: Any, path: KeyPath) -> Any:
    """The value at a key path in nested dicts and lists."""
    for part in path:
        value = value[part]
    return value


def merged(base: Any, top: Any) -> Any:
    """`top` over `base`, key by key; lists replace each other."""
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {key: merged(base[key], value) if key in base else value for key, value in top.items()}


def as_written(value: Any) -> str:
    """A value as a configuration writes it: null, true and false, not Python's words for them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The model class behind a field that is a section (or null), else None."""
    kinds = (info.annotation, *get_args(info.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its dotted name, in its order; a section comes before what it holds."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        if section := section_of(info):
            yield from known_keys(section, f"{prefix}{name}.")


def defaults() -> dict[str, Any]:
    """The default of every key as plain values, `MISSING` for the keys that have none."""
    required = {"model": {"pretrained_model_name_or_path": MISSING}, "data": {"train": MISSING}}
    return dict(merged(Config.model_validate(required).model_dump(mode="json"), required))


def validate(values: Mapping[str, Any], extra: Literal["forbid", "ignore"] = "forbid") -> Config:
    """Strict validation that still takes a JSON list for a tuple. Raises pydantic's own error."""
    return Config.model_validate_json(json.dumps(values), extra=extra)


def all_problems(source: Source) -> list[str]:
    """A line for every problem: of the source, of a key or its value, and of values that do not fit each other."""
    problems = list(source.problems)
    if unreadable := [path for path, value in leaves(source.resolved) if not _is_utf8(f"{dotted(path)}{value}")]:
        # Of a variable of the environment, or an escape; the schema would refuse the whole without naming a key.
        problems += [
            (path, f"{dotted(path)}: has a character that UTF-8 does not have; correct it") for path in unreadable
        ]
        return [line for _, line in problems]
    for find in (_key_problems, _leaf_problems, _clashes):
        problems += find(source, [path for path, _ in problems])
    return list(dict.fromkeys(line for _, line in problems))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _key_problems(source: Source, wrong: Sequence[KeyPath]) -> list[Problem]:
    """What the schema says of keys and values that are not in `wrong`: pydantic's words, and the nearest key."""
    keys, problems = dict(known_keys(Config)), []
    reasons: dict[KeyPath, list[str]] = {}
    for error in _errors(source.resolved):
        path: KeyPath = error["loc"]
        if error["type"] == "clash" or _meets(path, wrong):
            continue
        if error["type"] == "extra_forbidden":
            problems += [(path, line) for line in _unknown(path, value_at(source.resolved, path), keys)]
        elif error["type"] == "missing":
            problems.append((path, f"{dotted(path)}: not given; write one"))
        else:
            while dotted(path) not in keys:  # an item of a list, or pydantic's name for a choice of a union
                path = path[:-1]
            reasons.setdefault(path, []).append(error["msg"].partition(" ")[2])
    for path, texts in reasons.items():
        text = ", or ".join(dict.fromkeys(texts))
        problems.append((path, f"{dotted(path)}: given {source.shown(path)}, {text}"))
    return problems


def _leaf_problems(source: Source, wrong: Sequence[KeyPath]) -> Iterator[Problem]:
    """Values that no section refuses: one that is not given yet, one that is not finite in a free section."""
    file_is_broken = any(line.startswith("--config") for _, line in source.problems)
    for path, value in leaves(source.resolved):
        if _meets(path, wrong):
            continue
        if value == MISSING and not file_is_broken:
            yield path, f"{dotted(path)}: not given; write one"
        elif isinstance(value, float) and not math.isfinite(value):
            yield path, f"{dotted(path)}: given {source.shown(path)}, should be a finite number"


def _clashes(source: Source, wrong: Sequence[KeyPath]) -> Iterator[Problem]:
    """Rules between keys whose values are right, each by itself; those that are wrong have their defaults here."""
    for error in _errors(merged(defaults(), _without(source.resolved, wrong)), extra="ignore"):
        for keys, fix in error["ctx"]["clashes"]:
            paths: list[KeyPath] = [tuple(key.split(".")) for key in keys]
            if not any(_meets(path, wrong) for path in paths):
                given = (f"{dotted(path)}: given {source.shown(path)}" for path in paths)
                yield paths[0], f"{' with '.join(given)}; {fix}"


def _errors(values: Mapping[str, Any], extra: Literal["forbid", "ignore"] = "forbid") -> list[Any]:
    try:
        validate(values, extra)
    except ValidationError as error:
        return error.errors(include_url=False, include_input=False)
    return []


def _without(values: Mapping[str, Any], wrong: Sequence[KeyPath], path: KeyPath = ()) -> dict[str, Any]:
    """A copy without the values at the paths in `wrong`, and without lists that hold one of them."""
    return {
        key: _without(value, wrong, (*path, key)) if isinstance(value, dict) else value
        for key, value in values.items()
        if (*path, key) not in wrong and not (isinstance(value, list) and _meets((*path, key), wrong))
    }


def _meets(path: KeyPath, others: Iterable[KeyPath]) -> bool:
    """Whether one of the others is `path`, lies inside it, or holds it."""
    return any(all(a == b for a, b in zip(path, other, strict=False)) for other in others if other)


def _unknown(path: KeyPath, value: Any, keys: Mapping[str, FieldInfo]) -> Iterator[str]:
    """A line for a key that the schema does not have, and for each such key inside it."""
    name = dotted(path)
    if name in keys:  # one YAML key that holds dots
        yield f"{name}: dots are for overrides; write it nested under '{name.rpartition('.')[0]}:' in the file"
        return
    near = _nearest(name, keys)
    section = section_of(keys[dotted(path[:-1])]) if path[1:] else Config
    known = ", ".join(section.model_fields) if section else ""
    yield f"{name}: unknown key; " + (f"did you mean '{near}'?" if near else f"known here: {known}")
    for part in value if isinstance(value, dict) else ():
        if f"{near or name}.{part}" not in keys and (meant := _nearest(f"{near or name}.{part}", keys)):
            yield f"{name}.{part}: unknown key; did you mean '{meant}'?"


def _nearest(name: str, keys: Iterable[str]) -> str | None:
    """The key that other trainers call so, else one that is spelt nearly so, else one of another section."""
    others, last = [key for key in keys if not name.startswith(f"{key}.")], name.rpartition(".")[2]
    same = [key for key in others if key.rpartition(".")[2] == last]
    return OTHER_NAMES.get(last) or next(iter([*difflib.get_close_matches(name, others, n=1), *same]), None)
