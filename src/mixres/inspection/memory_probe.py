"""The largest microbatch of a run, computed for real: does it fit, and how long does a step take?

Promise: the model, its adapters, precision and device are those of the run, the microbatch has the run's own sizes
(values are noise), and nothing of the run folder changes. Cost: loading the transformer, then a few forward and
backward passes.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from mixres.config.schema import Config
from mixres.errors import WorkError
from mixres.geometry import Grid
from mixres.inspection.memory import noise_batch
from mixres.models.family import Family
from mixres.verification.setup import one_process, peak_memory, set_up, step_seconds

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


def measure(config: Config, family: Family, grids: Sequence[tuple[Grid, ...]], texts: Sequence[int]) -> Measured:
    """Of a microbatch of samples with these token grids and text tokens.

    Raises:
        UserError: the base cannot be loaded, or a launcher started several processes.
    """
    accelerator = one_process(config, "inspect --measure")
    setting = set_up(config, family, accelerator)
    batch = noise_batch(config, family, grids, texts)
    step = partial(
        step_seconds,
        setting,
        [batch],
        count=1,
        step=0,
        divisor=setting.objective.divisor(len(texts), sum(batch.target_lengths)),
    )
    device = accelerator.device
    try:
        step()  # the optimizer's state is made here
        peak = peak_memory(device, step)
        seconds = [step() for _ in range(_ROUNDS)]
    except WorkError:  # there is not enough memory
        return Measured(str(device), False, None, None, None, None)
    return Measured(str(device), True, statistics.median(seconds), min(seconds), max(seconds), peak)
