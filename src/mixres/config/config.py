"""The configuration of a mixres run: its sections put together, loaded, and shown; no other room changes it.

Promise: a `Config` that exists is valid; what is wrong is reported all at once, one line a key, naming what was given
and what is allowed, before any model library loads. Values behind `${oc.env:...}` never stand in a message or dump.
Cost: about 0.2 s, most of it the import of pydantic.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, PrivateAttr

from mixres.config.aliases import OTHER_NAMES, RULES
from mixres.config.load import KeyPath, leaves, read_source, replaced, value_at
from mixres.config.problems import conflicts, defaults, known_keys, schema_problems, validate
from mixres.config.schema import (
    BatchConfig,
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    FlowConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    SchedulerConfig,
    Section,
    TrainConfig,
    as_tuple,
)
from mixres.errors import UserError

SECRET = re.compile(r"token|key|secret|password", re.IGNORECASE)
_BARE_REFERENCE = re.compile(r"\$\{[^,{}]*\}")

# What a checkpoint fixes and a resumed run may change all the same; the adapters' shape it cannot.
Changeable = Literal[
    "model.pretrained_model_name_or_path",
    "model.revision",
    "model.dtype",
    "model.quantize",
    "model.lora.lora_alpha",
    "optimizer.class_path",
    "train.seed",
    "batch.samples_per_step",
    "data.caption_dropout",
    "data.train",
    "data.regularization",
]


class Config(Section):
    """A whole run. Load it with `load_config`; what may be shown of it comes from `public_config`."""

    model: ModelConfig = Field(description="The base model and what is trained of it.")
    data: DataConfig = Field(description="What is trained on, and what an image file may be.")
    batch: BatchConfig = Field(BatchConfig(), description="How many samples make a step, and a microbatch.")
    flow: FlowConfig = Field(FlowConfig(), description="Noise levels of flow matching.")
    loss: LossConfig = Field(LossConfig(), description="How errors are added up.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    lr_scheduler: SchedulerConfig = Field(SchedulerConfig(), description="The learning rate over the run.")
    train: TrainConfig = Field(TrainConfig(), description="The training loop.")
    cache: CacheConfig = Field(CacheConfig(), description="Where encoded samples lie.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When the run is saved.")
    sample: SampleConfig = Field(SampleConfig(), description="Pictures of held-out pairs while training.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Loss on held-out samples while training.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Where the run writes and reports.")
    resume: Literal["auto", "required", "never"] = Field(
        "auto", description="Go on from the newest checkpoint: if there is one, or fail, or start afresh."
    )
    resume_allow_changes: Annotated[tuple[Changeable, ...], BeforeValidator(as_tuple)] = Field(
        (),
        description="Keys that may differ from the checkpoint's; without this such a change is refused.",
        json_schema_extra={"allowed": f"a list of: {', '.join(get_args(Changeable))}"},
    )
    _references: dict[KeyPath, str] = PrivateAttr(default_factory=dict)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Deproblems < the YAML file < `section.key=value` overrides, validated.

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
