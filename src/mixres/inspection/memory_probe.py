"""The largest microbatch of a run, computed for real: does it fit, and how long does a step take?

Promise: the model, its adapters, precision and device are those of the run, the microbatch has the run's own sizes
(values are noise), and nothing of the run folder changes. Cost: loading the transformer, then a few forward and
backward passes.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.data.cache import CacheEntry
from mixres.data.collate import collate
from mixres.data.plan import Lengths
from mixres.models.family import Family
from mixres.training.step import bare_step_seconds
from mixres.verification.setup import Setup, one_process, peak_memory, set_up
from mixres.verification.synthetic import noise_sample

_ROUNDS = 3


@dataclass(frozen=True)
class Measured:
    """Seconds of forward, backward and update over the microbatch; None where the device's memory was not enough."""

    device: str
    fits: bool
    seconds: float | None
    low: float | None
    high: float | None
    peak_bytes: int | None  # on CUDA all that is allocated, on a CPU how far the process grew


def measure(config: Config, family: Family, entries: Sequence[CacheEntry], lengths: Sequence[Lengths]) -> Measured:
    """Of a microbatch of these samples, each with the text of its `lengths`.

    Raises:
        UserError: the base cannot be loaded, or a launcher started several processes.
    """
    accelerator = one_process(config, "inspect --measure")
    setting = set_up(config, family, accelerator)
    batch = _noise_batch(setting, entries, lengths)
    step = partial(
        bare_step_seconds,
        accelerator,
        setting.trained.transformer,
        setting.trained.optimizer,
        setting.objective,
        [batch],
        step=0,
        divisor=setting.objective.divisor(len(entries), sum(batch.target_lengths)),
    )
    device = accelerator.device
    try:
        step()  # the optimizer's state is made here
        peak = peak_memory(device, step)
        seconds = [step() for _ in range(_ROUNDS)]
    except torch.OutOfMemoryError:
        return Measured(str(device), False, None, None, None, None)
    return Measured(str(device), True, statistics.median(seconds), min(seconds), max(seconds), peak)


def _noise_batch(setting: Setup, entries: Sequence[CacheEntry], lengths: Sequence[Lengths]) -> Batch:
    transformer: Any = setting.trained.transformer
    config, shape = setting.config, transformer.config
    noise = torch.Generator().manual_seed(config.train.seed)
    samples = [
        noise_sample(
            f"largest-{number}",
            entry.img_shapes,
            text=length.text,
            channels=shape.in_channels,
            text_width=shape.joint_attention_dim,
            dtype=getattr(torch, config.model.dtype),
            noise=noise,
        )
        for number, (entry, length) in enumerate(zip(entries, lengths, strict=True))
    ]
    weights = [1.0] * len(samples)
    return collate(samples, indices=range(len(samples)), weights=weights, layout=config.batch.layout)
