"""The configuration of a mixres run: its sections put together, loaded, and shown; no other room changes it.

Promise: a `Config` that exists is valid; what is wrong is reported all at once, one line a key, naming what was given
and what is allowed, before any model library loads. Values behind `${oc.env:...}` never stand in a message or dump.
Cost: about 0.2 s, most of it the import of pydantic.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixres.config.aliases import OTHER_NAMES, RULES
from mixres.config.problems import conflicts, defaults, known_keys, schema_problems, validate
from mixres.config.schema import Config
from mixres.config.source import leaves, read_source, replaced, value_at
from mixres.errors import UserError

SECRET = re.compile(r"token|key|secret|password", re.IGNORECASE)
_BARE_REFERENCE = re.compile(r"\$\{[^,{}]*\}")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults < the YAML file < `section.key=value` overrides, validated.

    Raises:
        UserError: with one line for every problem of the file and the overrides.
    """
    source = read_source(path, overrides, defaults(Config))
    source.problems += schema_problems(Config, source, OTHER_NAMES)
    source.problems += conflicts(source, RULES)
    if source.problems:
        raise UserError(list(dict.fromkeys(message for _, message in source.problems)))
    config = validate(Config, source.resolved)
    config._references.update({at: value_at(source.written, at) for at in source.references})
    return config


def public_config(config: Config) -> dict[str, Any]:
    """All keys as plain values that may be shown: references as they were written, secrets as `***`."""
    values = replaced(config.model_dump(mode="json"), config._references)
    declared = {name.rpartition(".")[2] for name, _ in known_keys(Config)}
    hidden = {
        at: "***"
        for at, value in leaves(values)
        if any(SECRET.search(str(part)) and part not in declared for part in at)
        and not _BARE_REFERENCE.fullmatch(str(value))
    }
    return dict(replaced(values, hidden))


def dump_config(config: Config) -> str:
    """`public_config` as YAML; `load_config` reads the same configuration back from it, unless a secret was hidden."""
    return OmegaConf.to_yaml(OmegaConf.create(public_config(config)))
