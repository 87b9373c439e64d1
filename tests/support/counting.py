"""Bytes that a piece of work takes, counted tensor by tensor: no allocator rounds, no other thread disturbs."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mixres.inspection.memory import LiveStorages


class Counted(LiveStorages):
    """With what FSDP2 takes and frees by changing the size of a storage, which is no operation."""

    def __enter__(self) -> Any:
        plain = self.plain = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            before = self._sizes.setdefault(storage._cdata, storage.nbytes())
            done = plain(storage, size)
            self._sizes[storage._cdata] = size
            self.live += size - before
            self.peak = max(self.peak, self.live)
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self.plain  # type: ignore[method-assign]
        super().__exit__(*raised)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        super().add(tensor for tensor in tensors if not tensor.is_meta)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # these tensors have values
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes alive at once of those that `work` takes."""
    gc.collect()
    there = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor) and not value.is_meta]
    with Counted(value.to_local() if isinstance(value, DTensor) else value for value in there) as storages:
        work()
    return storages.peak
