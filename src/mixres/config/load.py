"""The configuration of a run: read, merged, resolved, validated, and shown.

Promise: what is written is what is read (YAML 1.2 scalars: `no`, `012` and `3:30` stay text). All problems are reported
at once, before any model library loads. Nothing runs code or expands without bound, and values behind `${oc.env:...}`
stand in no message and no dump.
Cost: about 0.2 s, most of it the import of pydantic.
"""

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixres.config.problems import KeyPath, Source, all_problems, defaults, dotted, leaves, merged, validate, value_at
from mixres.config.recipes import recipes
from mixres.config.schema import Config
from mixres.errors import UserError, did_you_mean

FROZEN = "config.yaml"  # what a run leaves in its folder
_SECRET = re.compile(r"token|key|secret|password", re.IGNORECASE)
_FREE = ("optimizer", "init_args")
_BARE_REFERENCE = re.compile(r"\$\{[^,{}]*\}")
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
# Only these two references are read: another key of the configuration, or an environment variable (with a default).
_REFERENCE = re.compile(r"\$\{\s*(?:oc\.env\s*:\s*(?P<env>\w+)\s*(?:,[^${}]*)?|\.*[A-Za-z_][\w.\[\]]*\s*)\}", re.ASCII)
_ALLOWED_REFERENCES = "${section.key}, ${oc.env:NAME} or ${oc.env:NAME,default}"
_MAX_REFERENCES = 16  # each may name others: 16 expand to some hundreds of values, without a bound they fill memory


# Keys whose default has changed, with the default of runs whose own file does not know them yet.
_OLDER_DEFAULTS = {"data": {"resize": {"control": {"align": "never"}}}}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults < the YAML file < `section.key=value` overrides, validated; a resumed run keeps older defaults.

    Raises:
        UserError: with one line for every problem of the file and the overrides.
    """
    source = read_source(path, overrides)
    if problems := all_problems(source):
        raise UserError(problems)
    frozen = Path(source.resolved["logging"]["output_dir"]) / FROZEN
    if source.resolved["resume"] != "never" and (older := _older_defaults(frozen)):
        source = read_source(path, overrides, older)
    return _validated(source)


def load_run_config(folder: Path) -> Config:
    """The configuration that a run has left in its folder, with the defaults of its time. Raises as `load_config`."""
    source = read_source(folder / FROZEN, (), _older_defaults(folder / FROZEN))
    if problems := all_problems(source):
        raise UserError(problems)
    return _validated(source)


def _older_defaults(frozen: Path) -> dict[str, Any]:
    """Those of a run whose file lacks keys, or has their values since it was resumed; none where there is no file."""
    try:
        values = _read_file(frozen, Source(written={})) if frozen.is_file() else {}
        before = values["data"]["resize"]["control"].get("align", "never")
    except (OSError, KeyError, TypeError, AttributeError):  # a name that is too long, not the file of a run
        return {}
    return _OLDER_DEFAULTS if before == "never" else {}


def _validated(source: Source) -> Config:
    config = validate(source.resolved)
    config._references.update({path: value_at(source.written, path) for path in source.references})
    return config


def public_config(config: Config) -> dict[str, Any]:
    """All keys as plain values that may be shown: references as they were written, secrets as `***`."""
    values = config.model_dump(mode="json")
    for path, reference in config._references.items():
        _put(values, path, reference)
    for path, value in list(leaves(values)):  # only a free section can hold a secret
        if path[:2] == _FREE and _SECRET.search(dotted(path[2:])) and not _BARE_REFERENCE.fullmatch(str(value)):
            _put(values, path, "***")
    return values


def dump_config(config: Config) -> str:
    """`public_config` as YAML; `load_config` reads the same configuration back from it, unless a secret was hidden."""
    return OmegaConf.to_yaml(OmegaConf.create(public_config(config)))


def read_source(path: Path, overrides: Sequence[str], older: Mapping[str, Any] = {}) -> Source:
    """Merge the defaults, with those of an `older` run, the YAML file and the overrides, and resolve the references.

    Problems are collected in the result; where they concern a value, it is None in `resolved`.
    """
    source = Source(written=merged(defaults(), older))
    for layer in ([_read_file(path, source)], [*_read_overrides(overrides, source)]):
        source.written = reduce(merged, layer, _without_other_name(source.written, reduce(merged, layer, {})))
    _resolve(source)
    _add_other_name(source)
    return source


def _without_other_name(below: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What `values` are laid over: without the other name of a DoRA where they give one of the two alone."""
    model, own = below["model"], values.get("model")
    if not (isinstance(model, dict) and isinstance(own, dict)):
        return below
    lora, own_lora = model.get("lora"), own.get("lora", {})
    adapter, dora = "adapter" in own, isinstance(own_lora, dict) and "use_dora" in own_lora
    if adapter and not dora and isinstance(lora, dict):
        model = model | {"lora": {name: value for name, value in lora.items() if name != "use_dora"}}
    if dora and not adapter and model.get("adapter") in ("lora", "dora"):
        model = {name: value for name, value in model.items() if name != "adapter"}
    return {**below, "model": model}


def _add_other_name(source: Source) -> None:
    """Both names of a DoRA where one is given alone."""
    model = source.resolved["model"]
    if not isinstance(model, dict) or not isinstance(lora := model.get("lora"), dict):
        return
    adapter = model.setdefault("adapter", "dora" if lora.get("use_dora") is True else "lora")
    dora = lora.setdefault("use_dora", adapter == "dora")
    if isinstance(written := source.written["model"], dict):  # not a reference
        written.setdefault("adapter", adapter)
        if isinstance(written["lora"], dict):
            written["lora"].setdefault("use_dora", dora)


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
    # A leading zero is a code or a revision, not a number, unless a fraction follows: 0.5.
    "float": r"(?![-+]?0[0-9_])(?:[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)


def _read_file(path: Path, source: Source) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        near = did_you_mean(str(path), recipes(), "the recipe ") if isinstance(error, FileNotFoundError) else ""
        source.problems.append(((), f"--config {path}: cannot be read: {reason}{near or '; name another file'}"))
        return {}
    values = _parse(text, (), f"--config {path}", source)
    if values is not None and not isinstance(values, dict):
        source.problems.append(((), f"--config {path}: holds no `key: value` lines at its top level; write some"))
    return values if isinstance(values, dict) else {}


def _read_overrides(overrides: Sequence[str], source: Source) -> Iterator[dict[str, Any]]:
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals and word.endswith((".yaml", ".yml")):
            source.problems.append(((), f"{word}: is a file, not an override; write --config {word}"))
        elif not equals or not _KEY.fullmatch(key):
            source.problems.append(((), f"{key or word!r}: not an override; write section.key=value"))
        else:
            value = _parse(text, tuple(key.split(".")), key, source)
            for part in reversed(key.split(".")):
                value = {part: value}
            yield value


def _parse(text: str, path: KeyPath, where: str, source: Source) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, path, source)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it holds a character that YAML does not take"
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        is_sign = path and text.startswith(tuple("*&%@`"))  # an override, such as a glob
        fix = f"write {where}='\"{text}\"'" if is_sign else "correct it"
        source.problems.append((path, f"{where}: not valid YAML: {problem}{at}; {fix}"))
    except RecursionError:
        source.problems.append((path, f"{where}: nested too deeply; flatten it"))
    return None


def _plain(loader: _Loader, node: yaml.Node, path: KeyPath, source: Source) -> Any:
    """The node as dicts, lists and scalars. PyYAML's own constructor knows no paths and takes a key given twice."""
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and tag == "map":
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            at = (*path, key)
            if key in values:
                line = key_node.start_mark.line + 1
                source.problems.append((at, f"{dotted(at)}: given twice, again at line {line}; take one out"))
            values[key] = _plain(loader, value_node, at, source)
        return values
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_plain(loader, item, (*path, i), source) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and tag in ("null", "bool", "int", "float", "str"):
        # Half a surrogate pair, an integer of thousands of digits, `!!int x`, `!!bool x`.
        with contextlib.suppress(ValueError, KeyError):
            node.value.encode()
            return loader.construct_object(node)
    source.problems.append((path, f"{dotted(path)}: no plain value; write text, a number, true, false or null"))
    return None


def _resolve(source: Source) -> None:
    clean, count = copy.deepcopy(source.written), 0
    for path, text in leaves(source.written):
        if not (isinstance(text, str) and "${" in text):
            continue
        count += text.count("${")
        if _is_readable(text) and count <= _MAX_REFERENCES:
            source.references.append(path)
            continue
        _put(clean, path, None)
        rule = f"{_MAX_REFERENCES} in all; write some out" if _is_readable(text) else _ALLOWED_REFERENCES
        source.problems.append((path, f"{dotted(path)}: given {text}, allowed references: {rule}"))
    config = OmegaConf.create(clean)
    source.resolved = clean
    for path in source.references:
        try:
            value = value_at(config, path)
            _put(clean, path, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)
        except OmegaConfBaseException:  # whose own message quotes values
            _put(clean, path, None)
            reason = "which cannot be resolved: there is no such key, or the environment variable is not set"
            source.problems.append((path, f"{dotted(path)}: given {value_at(source.written, path)}, {reason}"))


def _is_readable(text: str) -> bool:
    """Whether every reference in a text is one of the two kinds that are read."""
    if "${" in _REFERENCE.sub("", text):
        return False
    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException:
        return False
    return True


def _put(values: Any, path: KeyPath, value: Any) -> None:
    value_at(values, path[:-1])[path[-1]] = value
