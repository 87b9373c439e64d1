"""What is wrong with merged values against a schema, and what each key allows, in one line a key.

Promise: the line names the key, what was given (references as written, secrets never) and what is allowed; an unknown
key names the nearest known one. Cost: one validation; nothing here knows the keys of mixres.
"""

import difflib
import json
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mixres.config.source import KeyPath, Source, dotted, leaves, value_at

SHOWN_CHARACTERS = 120
Model = TypeVar("Model", bound=BaseModel)

# Dotted keys, what of their values clashes, and what fixes it.
Rule = tuple[tuple[str, ...], Callable[..., bool], str]

_BOUNDS: dict[type, tuple[str, str]] = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}
_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "text that is not empty", dict: "a section"}


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model class behind a field that is a section (or null), else None."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its dotted name, in its order; a section comes before what it holds."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = section_of(field)
        if section:
            yield from known_keys(section, f"{prefix}{name}.")


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The default of every key that has one, as plain JSON values."""
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section and field.is_required():
            values[name] = defaults(section)
        elif not field.is_required():
            default = field.get_default(call_default_factory=True)
            plain = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            values[name] = json.loads(json.dumps(plain))
    return values


def allowed(field: FieldInfo) -> str:
    """What a key takes, in words: type, choices and range."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    return _kind(field.annotation, field.metadata)


def _kind(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """`limits`: what holds of the annotation, or of the one choice of a union that is a number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0], [limit for field in arguments[1:] for limit in getattr(field, "metadata", ())])
    if origin in (Union, types.UnionType):
        return ", or ".join(_kind(argument, limits) for argument in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(argument) for argument in arguments)
    if origin is tuple:
        return "text or a list of texts, not empty"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section with " + ", ".join(annotation.model_fields)
    if annotation not in (int, float):
        return _TYPES[origin or annotation]
    bounds = [
        f"{sign} {_number(getattr(m, at))}" for m in limits for kind, (at, sign) in _BOUNDS.items() if type(m) is kind
    ]
    return " ".join([_TYPES[annotation], " and ".join(bounds)]).strip()


def _number(bound: float) -> str:
    return str(bound).removesuffix(".0")


def shown(source: Source, path: KeyPath) -> str:
    """The value as a message may print it: a reference as it was written, a section not at all."""
    value = value_at(source.written, path)
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "a nested list"
    text = (isinstance(value, float) and source.texts.get(path)) or json.dumps(value, ensure_ascii=False)
    if path in source.references and "oc.env" in text:
        text += ", and what an environment variable holds is text"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def schema_problems(
    model: type[BaseModel], source: Source, other_names: Mapping[str, str]
) -> list[tuple[KeyPath, str]]:
    """Every problem of the merged values against `model`, beside those that the source already has.

    `other_names`: what keys are called elsewhere; where such a name is written, the key is offered.
    """
    keys = dict(known_keys(model))
    reported = [path for path, _ in source.problems if path]
    problems: list[tuple[KeyPath, str]] = []
    errors = [
        (_given_part(source.resolved, error), error["type"]) for error in _validation_errors(model, source.resolved)
    ]
    for path, kind in errors:
        if any(nested(path, other) for other in reported) or (kind == "missing" and not source.file_is_read):
            continue
        if any(len(path) < len(other) and nested(path, other) for other, _ in errors):
            continue  # another choice of a union: the item inside says more
        if kind == "extra_forbidden":
            for line in unknown_keys(path, value_at(source.resolved, path), keys, other_names):
                problems.append((path, line))
            continue
        name, field = _field_at(path, keys)
        given = "not given" if kind == "missing" else f"given {shown(source, path)}"
        problems.append((path, f"{name}: {given}, allowed: {allowed(field)}"))
    problems = list(dict.fromkeys(problems))
    seen = [*reported, *(path for path, _ in problems)]
    for path, value in leaves(source.resolved):  # free sections hold any value, but never NaN or infinity
        if isinstance(value, float) and not math.isfinite(value) and not any(nested(path, other) for other in seen):
            problems.append((path, f"{dotted(path)}: given {shown(source, path)}, allowed: a finite number"))
    return problems


def conflicts(source: Source, rules: Iterable[Rule]) -> list[tuple[KeyPath, str]]:
    """The rules that are broken; a rule is asked only where each of its keys is right by itself."""
    wrong = [path for path, _ in source.problems if path]
    problems: list[tuple[KeyPath, str]] = []
    for names, clash, fix in rules:
        paths: list[KeyPath] = [tuple(name.split(".")) for name in names]
        if any(nested(path, other) for path in paths for other in wrong):
            continue
        if clash(*(value_at(source.resolved, path) for path in paths)):
            given = (f"{name}: given {shown(source, path)}" for name, path in zip(names, paths, strict=True))
            problems.append((paths[0], f"{' with '.join(given)}; {fix}"))
    return problems


def unknown_keys(
    path: KeyPath, value: Any, keys: Mapping[str, FieldInfo], other_names: Mapping[str, str]
) -> Iterator[str]:
    """A line for a key that the schema does not have, and for each key inside that the section meant has not either."""
    name = dotted(path)
    if name in keys:  # one YAML key that holds dots
        yield f"{name}: dots are for overrides; write it nested under '{name.rpartition('.')[0]}:' in the file"
        return
    near = _nearest(name, keys, other_names)
    if near:
        yield f"{name}: unknown key; did you mean '{near}'?"
    else:
        parent = keys.get(dotted(path[:-1]))
        section = section_of(parent) if parent else None
        known = section.model_fields if section else [key for key in keys if "." not in key]
        yield f"{name}: unknown key; known here: {', '.join(known)}"
    for part in value if isinstance(value, dict) else ():
        inside = f"{near or name}.{part}"
        if inside not in keys and (meant := _nearest(inside, keys, other_names)):
            yield f"{name}.{part}: unknown key; did you mean '{meant}'?"


def _nearest(name: str, keys: Iterable[str], other_names: Mapping[str, str]) -> str | None:
    """The key that is called so elsewhere, else one that is spelt nearly so, else one of another section."""
    others, last = [key for key in keys if not name.startswith(f"{key}.")], name.rpartition(".")[2]
    close = difflib.get_close_matches(name, others, n=1)
    same = (key for key in others if key.rpartition(".")[2] == last)
    return other_names.get(last) or next(iter(close), None) or next(same, None)


def _validation_errors(model: type[BaseModel], values: dict[str, Any]) -> list[Any]:
    try:
        validate(model, values)
    except ValidationError as error:
        return error.errors(include_url=False, include_input=False)
    return []


def _given_part(values: Any, error: Any) -> KeyPath:
    """Where in `values` the error is: pydantic names the choices of a union between the keys."""
    if error["type"] == "missing":
        return tuple(error["loc"])
    path: list[str | int] = []
    for part in error["loc"]:
        if isinstance(values, dict | list) and part in (values if isinstance(values, dict) else range(len(values))):
            values = values[part]
            path.append(part)
    return tuple(path)


def validate(model: type[Model], values: dict[str, Any]) -> Model:
    """Strict validation that still takes a JSON list for a tuple. Raises pydantic's own error."""
    return model.model_validate_json(json.dumps(values))


def nested(one: KeyPath, other: KeyPath) -> bool:
    """Whether one key path is the other or lies inside it."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _field_at(path: KeyPath, keys: dict[str, FieldInfo]) -> tuple[str, FieldInfo]:
    """The dotted name at `path` and the nearest key of the schema above it (a list's items are the list's)."""
    above = path
    while dotted(above) not in keys:
        above = above[:-1]
    return dotted(path), keys[dotted(above)]
