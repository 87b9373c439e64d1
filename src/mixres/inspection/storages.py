"""Bytes that tensors hold, counted as operations make and free them.

Torch's fake tensors (`FakeTensorMode`) have a shape, a type and a device, but no values. A storage is the memory behind
a tensor and all its views. `LiveStorages` sees every operation, and counts each storage from the operation that makes
it until nothing holds it. It works on real tensors as well.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mixres.models.quantize import plain_tensors

_CPU = torch.device("cpu")


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within its `with` block, the bytes on `device` of all storages that operations return, until they are freed.

    The storages of the tensors `known` are left out. FSDP2 gathers weights into storages whose size it changes, which
    is no operation; those are seen too.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, device: torch.device = _CPU) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = {storage._cdata: 0 for storage in _storages(known)}
        self._births: dict[int, int] = {}  # number of the operation that made a storage
        self._resized: set[int] = set()
        self._device, self._operations = device.type, 0
        self.live = self.peak = 0
        self.gathered = 0  # of the live ones, those whose size was changed
        self.wire = 0  # received from other ranks
        self.value = 0  # of each number that is read of a fake tensor
        self.at_peak = (0, 0)  # the number of the operation at the peak, and bytes gathered then

    def restart_peak(self) -> None:
        """Look for a peak from here on."""
        self.peak, self.at_peak = self.live, (self._operations, self.gathered)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these, as far as they are not counted yet."""
        for storage in _storages(tensor for tensor in tensors if _device_of(tensor).type == self._device):
            self._track(storage)
        self._look()

    def born(self, tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
        """For each storage of these its bytes, and the number of the operation that made it."""
        storages = {storage._cdata: storage for storage in _storages(tensors)}
        return [(storage.nbytes(), self._births.get(address, 0)) for address, storage in storages.items()]

    def _track(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address], self._births[address] = storage.nbytes(), self._operations
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, address).atexit = False

    def _look(self) -> None:
        if self.live > self.peak:
            self.restart_peak()

    def _free(self, address: int) -> None:
        size = self._sizes.pop(address)
        self.live -= size
        del self._births[address]
        if address in self._resized:
            self._resized.remove(address)
            self.gathered -= size

    def __enter__(self) -> Any:
        plain = self._plain = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            address = storage._cdata
            if storage.device.type in (self._device, "meta"):  # fake ones are on no device
                self._track(storage)
                before = self._sizes[address]
                self.gathered += size - (before if address in self._resized else 0)
                self._resized.add(address)
                self._sizes[address] = size
                self.live += size - before
                self._look()
            return plain(storage, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._plain  # type: ignore[method-assign]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the operations that it is made of come here again
        if func.namespace == "prim":  # such as asking for a device
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return bool(self.value) if dtype is torch.bool else (float if dtype.is_floating_point else int)(self.value)
        self._operations += 1
        if func.namespace == "c10d":
            self.wire += _received(func, args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.add((result,))
        else:
            self.add(value for value in tree_iter(result) if isinstance(value, Tensor))
        return result


def _received(func: Any, args: Any) -> int:
    """Bytes that a collective receives on each rank, as a ring of ranks does it."""
    name = func.overloadpacket.__name__
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        return int(abs(args[0].nbytes - args[1].nbytes))  # one is as many times the other as there are ranks
    return 2 * sum(tensor.nbytes for tensor in args[0]) if name == "allreduce_" else 0


def _device_of(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device  # the property is an operation


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        for part in plain_tensors(tensor._local_tensor if isinstance(tensor, DTensor) else tensor):
            yield part.untyped_storage()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors hold, quantised ones as they are stored."""
    return sum(storage.nbytes() for storage in _storages(tensors))
