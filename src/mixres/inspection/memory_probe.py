"""The largest microbatch of a run, computed for real: does it fit, and how long does a step take?

Promise: the model, its adapters, precision and device are those of the run, the microbatch has the run's own sizes
(values are noise), and nothing of the run folder changes. Cost: loading the transformer, then a few forward and
backward passes.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from mixres.config.schema import Config
from mixres.errors import WorkError
from mixres.models.family import Family
from mixres.verification.setup import one_process, peak_memory, set_up, step_seconds
from mixres.verification.synthetic import SampleTokens, noise_batch

_ROUNDS = 3


def measure(config: Config, family: Family, largest: Sequence[SampleTokens]) -> dict[str, Any]:
    """Seconds of forward, backward and update over a microbatch; None where the device's memory is not enough.

    `peak_bytes` is on CUDA all that is allocated, on a CPU how far the process grew.

    Raises:
        UserError: the base cannot be loaded, or a launcher started several processes.
    """
    accelerator = one_process(config, "inspect --measure")
    setting = set_up(config, family, accelerator)
    batch = noise_batch(config, family, largest)
    divisor = setting.objective.divisor(len(largest), sum(batch.target_lengths))
    step = partial(step_seconds, setting, [batch], count=1, step=0, divisor=divisor)
    found = {"device": str(accelerator.device), "fits": False}
    try:
        step()  # the optimizer's state is made here
        peak = peak_memory(accelerator.device, step)
        seconds = [step() for _ in range(_ROUNDS)]
    except WorkError:  # there is not enough memory
        return found | dict.fromkeys(("seconds", "low", "high", "peak_bytes"))
    times = {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
    return found | {"fits": True, **times, "peak_bytes": peak}
