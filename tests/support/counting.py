"""Bytes that a piece of work takes: counted tensor by tensor, or as torch's allocator records them."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from mixres.inspection.storages import LiveStorages


class _Outside(LiveStorages):
    """Without what a kernel makes inside itself, seen where a view of it is taken: gloo reduces in a copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view and not any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes alive at once of those that `work` takes: no allocator rounds, no other thread disturbs."""
    gc.collect()
    there = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor) and not value.is_meta]
    with _Outside(value.to_local() if isinstance(value, DTensor) else value for value in there) as storages:
        work()
    return storages.peak


def allocated_at_peak(work: Callable[[], Any]) -> int:
    """The same by the record of the CPU's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
