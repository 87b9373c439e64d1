"""Training on a device that cannot hold the base: frozen matrices, and what backward needs, wait in host memory.

Promise: outputs and gradients are bit for bit those without. Of the frozen matrices of the repeated blocks, at most
`keep` blocks' are on the device at any moment, in forward, recomputation, backward and sampling: they live in `keep`
slots, allocated once. Outside its block's call a parameter is its host copy, so that nothing ever sees an empty tensor.
Cost: host memory for these matrices (pinned, for CUDA). A microbatch of a model of L blocks copies 2 (L - keep) blocks
to the device, none back. With `keep` of 2 or more, blocks are copied ahead, while others compute.

How. A block about to run has its own matrices put in place, waits for their copy on the device, and starts the copies
of those that come next: following blocks in forward, previous ones in backward. A copy into a slot waits until the
device has finished what was issued before, so also the block that used the slot.

Why that is enough in backward: a recomputed block leaves what its backward needs in its slot. Autograd runs the
operations of later blocks first, so the next block to be recomputed means that the backward of this one is issued. A
block that is not recomputed would lose its weights: gradient checkpointing of all blocks is required.
"""

import math
import mmap
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from mixres.errors import WorkError
from mixres.models.blocks import repeated_blocks
from mixres.models.quantize import empty_like, plain_tensors

_ALIGNMENT = 512  # bytes; CUDA's allocator aligns tensors so
Origin = list[tuple[int, torch.dtype, int]]  # of the values in a slot: address, type and version of each tensor


def frozen_matrices(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """What is swapped of a block: each matrix with its module and its name there. Vectors are too small to be worth it.

    The weights of norms are vectors; where autograd keeps a parameter itself for backward, it is one of these.
    """
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad and parameter.dim() == 2:
                yield module, name, parameter


@dataclass
class _Slot:
    """Device memory for the matrices of one block at a time."""

    memory: Tensor  # bytes
    block: int | None = None
    origin: Origin = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    ready: Any = None  # the event behind the copy


class BlockSwap:
    """Swaps the blocks of `transformer`, which may lie in host memory; all else of it is moved to `device`."""

    def __init__(self, transformer: nn.Module, *, keep: int, device: torch.device) -> None:
        """Quantised weights become new parameters, on the device with parts on the host.

        Raises:
            WorkError: host memory cannot be pinned.
        """
        assert transformer.gradient_checkpointing, "blocks that are not recomputed lose their weights before backward"
        blocks = repeated_blocks(transformer)
        self._device, self._backend = device, torch.get_device_module(device)
        self._stream = self._backend.Stream()
        swapped: set[int] = set()
        self._parts = []  # of each block, the plain tensors behind its matrices
        for block in blocks:
            parts: list[Tensor] = []
            for module, name, parameter in list(frozen_matrices(block)):
                inside = list(plain_tensors(parameter))
                if inside[0] is not parameter:  # the device of a quantised weight cannot be changed later
                    parameter = nn.Parameter(empty_like(parameter.detach(), device), requires_grad=False)
                    setattr(module, name, parameter)
                    for new, old in zip(plain_tensors(parameter), inside, strict=True):
                        new.data = old.data
                swapped.add(id(parameter))
                parts += plain_tensors(parameter)
            self._parts.append(parts)
        self._hosts = [_move_to_host(parts, pin=device.type == "cuda") for parts in self._parts]
        if device.type == "cuda":
            weakref.finalize(self, _unpin, [host.data_ptr() for host in self._hosts]).atexit = False
        for tensor in chain(transformer.parameters(), transformer.buffers()):
            if id(tensor) not in swapped:
                tensor.data = tensor.data.to(device)
        size = max(host.nbytes for host in self._hosts)
        self._slots = [_Slot(self._allocate(size)) for _ in range(min(keep, len(blocks)))]
        self._outside: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of blocks at work, what their tensors were before
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, number), prepend=True)
            block.register_forward_hook(partial(self._leave, number), always_call=True)

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _enter(self, number: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        compute = self._backend.current_stream(self._device)
        self._fetch(self._wanted(number), compute)
        slot = next(slot for slot in self._slots if slot.block == number)
        compute.wait_event(slot.ready)
        self._outside[number] = [(part, part.data) for part in self._parts[number]]
        for part, view in zip(self._parts[number], slot.views, strict=True):
            part.data = view

    def _leave(self, number: int, *_: Any) -> None:
        """Also where recomputation stops early, once it has all that backward needs."""
        for part, host in self._outside.pop(number, ()):
            part.data = host

    def _wanted(self, number: int) -> list[int]:
        """The blocks to have on the device while block `number` runs, most urgent first: those it is run with next."""
        count = len(self._parts)
        if torch._C._current_graph_task_id() != -1:  # recomputed in backward
            order = [*range(number, -1, -1), *range(number + 1, count)]
        elif torch.is_grad_enabled():  # backward will begin with the last blocks
            order = [*range(number, count), *range(number - 1, -1, -1)]
        else:  # the next call begins with the first block: some stay, the others go through one slot
            order = list(dict.fromkeys([number, (number + 1) % count, *range(count)]))
        return order[: len(self._slots)]

    def _fetch(self, wanted: Sequence[int], compute: Any) -> None:
        """Start the copies of those that are not there, in this order."""
        origins = {number: _origin(self._parts[number]) for number in wanted}
        for slot in self._slots:
            if slot.block in origins and slot.origin != origins[slot.block]:
                slot.block = None  # the values have changed since
        missing = [number for number in wanted if number not in {slot.block for slot in self._slots}]
        if missing:
            self._stream.wait_event(compute.record_event())  # all that was issued may use the slots
        for number, slot in zip(missing, [slot for slot in self._slots if slot.block not in origins], strict=False):
            self._copy(number, slot)
            slot.block, slot.origin = number, origins[number]

    def _copy(self, number: int, slot: _Slot) -> None:
        parts = self._parts[number]
        if (needed := _laid_out(parts)) > slot.memory.nbytes:  # the values are wider than they were
            self._backend.synchronize(self._device)  # a copy may still be under way into what is freed
            slot.memory = self._allocate(needed)
        slot.views = _views(slot.memory, parts)
        with self._backend.stream(self._stream), torch.no_grad():
            for view, part in zip(slot.views, parts, strict=True):
                view.copy_(part, non_blocking=True)
            slot.ready = self._stream.record_event()


def _origin(parts: Sequence[Tensor]) -> Origin:
    return [(part.data_ptr(), part.dtype, part._version) for part in parts]


def _laid_out(parts: Sequence[Tensor]) -> int:
    """Bytes that these take one behind the other."""
    return sum(math.ceil(part.nbytes / _ALIGNMENT) * _ALIGNMENT for part in parts)


def _views(memory: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like these, one behind the other in `memory`."""
    views, start = [], 0
    for part in parts:
        views.append(memory[start : start + part.nbytes].view(part.dtype).view(part.shape))
        start += _laid_out([part])
    return views


def _move_to_host(parts: Sequence[Tensor], *, pin: bool) -> Tensor:
    """Give these tensors one piece of host memory, which is returned."""
    host = _host_memory(_laid_out(parts), pin=pin)
    for part, view in zip(parts, _views(host, parts), strict=True):
        view.copy_(part.data)
        part.data = view
    return host


def _host_memory(size: int, *, pin: bool) -> Tensor:
    """Bytes of exactly this size: torch's own allocator of pinned memory rounds up to a power of two."""
    problem = f"train.offload.blocks: {size / 1e9:.1f} GB of host memory for one block could not be"
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise WorkError(f"{problem} allocated ({error.strerror}): free some memory, or set it to null") from error
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux may give each process of the loader a copy of what is pinned
        memory.madvise(mmap.MADV_DONTFORK)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    if pin:
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if code := int(cuda.cudaHostRegister(host.data_ptr(), size, 0)):
            raise WorkError(f"{problem} pinned (CUDA error {code}): raise the limit of `ulimit -l`, or set it to null")
    return host


def _unpin(addresses: Sequence[int]) -> None:
    torch.cuda.synchronize()  # blocks may still be copied ahead
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for address in addresses:
        cuda.cudaHostUnregister(address)


def save_activations_on_host(transformer: nn.Module, device: torch.device) -> None:
    """What a forward pass keeps for backward is copied to host memory (pinned, for CUDA), and back when it is needed.

    With gradient checkpointing these are the inputs of the blocks. What a block recomputes stays on the device.
    """
    contexts: list[save_on_cpu] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        context = save_on_cpu(pin_memory=device.type == "cuda")
        context.__enter__()
        contexts.append(context)

    def leave(*_: Any) -> None:
        if contexts:
            contexts.pop().__exit__()

    transformer.register_forward_pre_hook(enter, prepend=True)
    transformer.register_forward_hook(leave, always_call=True)
