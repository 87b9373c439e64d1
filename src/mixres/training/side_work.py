"""Work beside the training that may fail: sample grids and evaluations.

Promise: whatever fails there (memory, a disk, a file that has changed) is one line, on any number of ranks, and the run
continues. No rank waits for another one in a collective of the devices, which would time out: see `distributed.gather`.
"""

import gc
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from mixres.errors import WorkError, one_line
from mixres.training.distributed import control_group, gather

_LOCKSTEP_WAIT = timedelta(minutes=5)  # far more than ranks in lockstep are ever apart
T = TypeVar("T")


def attempt(act: Callable[[], T], *, lockstep: bool = False) -> list[T] | str:
    """What `act` gives on each rank; where it fails on one or more, the first reason. All ranks must call it.

    `lockstep`: within `act` the ranks need each other, as split weights are gathered in every call. Then all of them
    must fail alike: where only some do, the others wait in there, and only the end of the run can free them.

    Raises:
        RuntimeError: after minutes, in lockstep, where not all ranks have come to the end of `act`.
    """
    result, reason = None, None
    try:
        result = act()
    except Exception as error:  # whatever it is: the training is worth more
        reason = reason_of(error)
    if reason:
        gc.collect()  # what the failed call held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if lockstep and dist.is_initialized():
        dist.monitored_barrier(control_group(), timeout=_LOCKSTEP_WAIT)
    found: list[tuple[T, str | None]] = gather((result, reason))
    return next((reason for _, reason in found if reason), None) or [result for result, _ in found]


def prepared(prepare: Callable[[], T], *, stop_requested: bool, lockstep: bool) -> T | None:
    """What `prepare` gives, before `act` computes with it; None where the run is to stop. In lockstep all ranks agree.

    Raises:
        WorkError: in lockstep on all ranks, where `prepare` fails on one.
    """
    if not lockstep:
        return None if stop_requested else prepare()
    kept: list[T] = []

    def keep() -> bool:
        kept.append(prepare())
        return stop_requested

    stops = attempt(keep)
    if isinstance(stops, str):
        raise WorkError(stops)
    return None if any(stops) else kept[0]


def reason_of(error: Exception) -> str:
    """The first line of an error, behind its class where that is not one of mixres' own, which explain themselves."""
    first = one_line((str(error).splitlines() or [""])[0])
    return first if isinstance(error, WorkError) else f"{type(error).__name__}: {first}"
