"""Memory of a training step on one device, counted before any weight is loaded.

Promise: bytes of the configured model with its adapters, precision, quantisation and recomputation, for the largest
microbatch. No layer is known here by name, and no GPU is needed. Cost: seconds.

How. Torch's fake tensors (`FakeTensorMode`) have a shape, a type and a device, but no values. The model is built of
them, and forward and backward run as in training. A storage is the memory behind a tensor and all its views.
`LiveStorages` sees every operation, and counts each storage from the operation that makes it until nothing holds it.

Equal blocks. Neighbouring blocks with equal parameters are a run, and each block of it adds the same bytes. Forward and
backward are counted with a few blocks of each run, and again with some more: the difference stands for all others.
Where every n-th block is recomputed (gradient checkpointing), runs grow by n blocks at a time. What is kept between
forward and backward and the peak of either are extended separately, which gives the figures of the whole model.

Not counted: what a kernel allocates inside itself, the encoders (they are gone by then), the allocator's rounding, the
library's own few hundred MB on a GPU, and copies that an optimizer makes while it updates. Weights of nf4 and bnb_int8
are counted by formula, as bitsandbytes' kernels have no fake form. `inspect --measure` runs the real thing.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.data.collate import collate
from mixres.geometry import Grid
from mixres.models.block_swap import frozen_matrices
from mixres.models.blocks import recompute_blocks, repeated_blocks
from mixres.models.family import Family
from mixres.models.lora import add_lora, promote, train_all, trainable_parameters
from mixres.models.quantize import empty_like, is_torchao, plain_tensors, quantize_blocks, stored_bytes
from mixres.training.distributed import dist_env
from mixres.training.optimizer import TRIAL_SIZE, optimizer_class, state_of_a_step
from mixres.training.setup import build_objective
from mixres.verification.synthetic import noise_sample

_GATHERED_BLOCKS = 2  # with fsdp2: the block at work, and the next
_KEPT_BLOCKS = 3  # of a run of equal ones: the first and the last may keep less than one between them
_PROBE = 64  # tokens of the microbatches by which the bytes of one token are found

SampleTokens = tuple[tuple[Grid, ...], int]  # of one sample: token grids, target first, and text tokens


class StepBytes(NamedTuple):
    """Bytes alive besides weights and gradients."""

    kept: int  # between forward and backward
    forward: int  # at the peak of the forward pass
    backward: int
    host: int = 0  # what the forward pass moves to host memory


class MemoryEstimate:
    """Of one configuration on this process's kind of device, for any microbatch.

    Raises:
        UserError: the base's configuration, the optimizer's class or an argument of it is wrong.
    """

    def __init__(self, config: Config, family: Family, *, ranks: int) -> None:
        self._config, self._family, self._device = config, family, dist_env().device
        self._objective = build_objective(config, family)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = self._fake_model()
        parameters, trained = list(self._model.parameters()), list(trainable_parameters(self._model).values())
        self._known = [*parameters, *(p.grad for p in trained if p.grad is not None)]
        self.trained, self.parameters = sum(p.numel() for p in trained), sum(p.numel() for p in parameters)
        blocks = repeated_blocks(self._model)
        self._blocks, self._runs = len(blocks), list(_runs_of_equal(self._model, blocks))
        learnt = bytes_of(trained)
        swapped, slots = self._swapped_bytes(blocks)
        self._host_bytes = swapped
        whole = {
            "weights": bytes_of(parameters)
            - learnt
            - self._saved_by_bitsandbytes(blocks)
            - swapped
            + slots,  # frozen ones
            "trained_weights": learnt,
            "gradients": learnt,
            "optimizer": optimizer_bytes(config, [p.numel() for p in trained]),
            "ema": learnt if config.train.ema_decay else 0,
        }
        train = config.train
        ranks = min(ranks, train.shard_size or ranks) if train.parallel == "fsdp2" else 1
        on_host = train.cpu_offload and ranks > 1
        self._parts = {name: 0 if on_host else -(-count // ranks) for name, count in whole.items()}
        largest = max(self._gathered_bytes(block) for block in blocks)
        self._parts["gathered"] = min(_GATHERED_BLOCKS, self._blocks) * largest if ranks > 1 else 0

    def figures(self, microbatch: Sequence[SampleTokens]) -> dict[str, Any]:
        """What `inspect.json` holds, for the largest microbatch."""
        train, (image_token, text_token) = self._config.train, self.token_bytes()
        offloaded = train.offload.activations
        return {
            "device": self._device.type,
            "parallel": train.parallel,
            "gradient_checkpointing": train.gradient_checkpointing,
            "bytes": self.memory(microbatch),
            "host_bytes": self._host_bytes + (self.count(self.batch(microbatch), True).host if offloaded else 0),
            "blocks": self._blocks,
            "bytes_of_an_image_token_in_a_block": image_token,
            "bytes_of_a_text_token_in_a_block": text_token,
        }

    def memory(self, microbatch: Sequence[SampleTokens]) -> dict[str, int]:
        """Bytes on each device, by what holds them.

        `gathered` are weights of blocks that fsdp2 puts together as they are used. `activations` are all that is alive
        besides, at the peak of forward and backward, with the configuration's own gradient checkpointing.
        """
        own, batch = self._config.train.gradient_checkpointing, self.batch(microbatch)
        counts = {setting: self.count(batch, setting) for setting in {True, False, own}}
        peaks = {setting: max(count.forward, count.backward) for setting, count in counts.items()}
        return {
            **self._parts,
            "activations": peaks[own],
            "activations_with_checkpointing": peaks[True],
            "activations_without_checkpointing": peaks[False],
            "total": sum(self._parts.values()) + peaks[own],
        }

    def count(self, batch: Batch, checkpointing: bool | int) -> StepBytes:
        """Of the whole model: of one with short runs, and what each run adds as it grows to its length."""
        period = max(1, int(checkpointing))
        missing = [max(0, len(blocks) - _KEPT_BLOCKS) // period for _, blocks in self._runs]  # periods of each run
        short = [len(blocks) - count * period for (_, blocks), count in zip(self._runs, missing, strict=True)]
        base = np.array(self._step(batch, checkpointing, short))
        total = base.copy()
        for i, count in enumerate(missing):
            if count:
                longer = [length + period * (i == j) for j, length in enumerate(short)]
                total += count * (np.array(self._step(batch, checkpointing, longer)) - base)
        return StepBytes(*total.tolist())

    def token_bytes(self) -> tuple[int, int]:
        """Bytes that one more block keeps of an image token and of a text token where it is not recomputed."""
        short = [min(_KEPT_BLOCKS, len(blocks)) for _, blocks in self._runs]
        some = short.index(max(short))
        fewer = [length - (i == some) for i, length in enumerate(short)]

        def kept_by_a_block(image: int, text: int) -> int:
            batch = self.batch([((Grid(1, image, _PROBE),), text * _PROBE)])
            return self._step(batch, False, short).kept - self._step(batch, False, fewer).kept

        base = kept_by_a_block(1, 1)
        return round((kept_by_a_block(2, 1) - base) / _PROBE), round((kept_by_a_block(1, 2) - base) / _PROBE)

    def batch(self, microbatch: Sequence[SampleTokens]) -> Batch:
        """Samples without values."""
        with self._fake:
            return noise_batch(self._config, self._family, microbatch).to(self._device)

    def _step(self, batch: Batch, checkpointing: bool | int, lengths: Sequence[int]) -> StepBytes:
        """Forward and backward with so many blocks of each run, its last among them: patches hang hooks on it."""
        for stack, _ in self._runs:
            del stack[:]
        for (stack, blocks), length in zip(self._runs, lengths, strict=True):
            stack.extend([*blocks[: length - 1], blocks[-1]] if length else [])  # patches hang hooks on the last one
        self._model.disable_gradient_checkpointing()
        if checkpointing:
            recompute_blocks(self._model, every=int(checkpointing))
        train, host = self._config.train, []
        autocast = train.mixed_precision == "bf16"

        def to_host(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            host.append(tensor.nbytes)
            return tensor.shape, tensor.dtype

        def from_host(packed: tuple[torch.Size, torch.dtype]) -> Tensor:
            return torch.empty(packed[0], dtype=packed[1], device=self._device)

        offloaded = train.offload.activations and checkpointing
        saved = saved_tensors_hooks(to_host, from_host) if offloaded else nullcontext()
        with self._fake, LiveStorages(self._known) as storages:
            storages.add(value for value in vars(batch).values() if isinstance(value, Tensor))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=autocast, cache_enabled=False), saved:
                loss = self._objective.loss_sum(self._model, batch, step=0)
            kept, forward = storages.live, storages.peak
            storages.peak = kept
            torch.autograd.backward(loss)
            return StepBytes(kept, forward, storages.peak, sum(host))

    def _swapped_bytes(self, blocks: Sequence[nn.Module]) -> tuple[int, int]:
        """Bytes of frozen matrices that wait in host memory, and of the slots on the device for some of them."""
        keep = self._config.train.offload.blocks
        if keep is None:
            return 0, 0
        sizes = [bytes_of(matrix for _, _, matrix in frozen_matrices(block)) for block in blocks]
        return sum(sizes), min(keep, len(sizes)) * max(sizes)

    def _gathered_bytes(self, block: nn.Module) -> int:
        if self._config.train.mixed_precision == "bf16":
            return 2 * sum(parameter.numel() for parameter in block.parameters())
        return bytes_of(block.parameters())

    def _saved_by_bitsandbytes(self, blocks: Sequence[nn.Module]) -> int:
        """Bytes that nf4 and bnb_int8 take off the weights."""
        method = self._config.model.quantize
        if method is None or is_torchao(method):
            return 0
        linears = [m for block in blocks for name, m in block.named_modules() if ".lora_" not in name]
        weights = [m.weight for m in linears if type(m) is nn.Linear]
        return sum(w.numel() * w.itemsize - stored_bytes(method, *w.shape) for w in weights)

    def _fake_model(self) -> Any:
        """Put together on the meta device as training does it; then its tensors become fake ones on the device."""
        model, family, dtype = self._config.model, self._family, getattr(torch, self._config.model.dtype)
        transformer = family.transformer_skeleton()
        nn.Module.to(transformer, dtype)  # not diffusers' own, which warns
        if model.quantize and is_torchao(model.quantize):
            quantize_blocks(transformer, model.quantize, dtype=dtype)
        untrained = family.untrained_modules(transformer)
        if model.lora:
            settings = model.lora.model_dump(exclude={"pretrained_weight"})
            add_lora(transformer, **settings, untrained=untrained, seed=0, presets=family.lora_presets)
        else:
            train_all(transformer, untrained=untrained)
            promote(transformer, dtype)
        with self._fake:
            for module in transformer.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    empty = empty_like(parameter.detach(), self._device)
                    setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
            for parameter in trainable_parameters(transformer).values():
                parameter.grad = torch.empty_like(parameter)  # of the microbatches before this one
        return transformer.train()


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within its `with` block, the bytes of all storages that operations return, until they are freed.

    The storages of the tensors `known` are left out.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = {storage._cdata: 0 for storage in _storages(known)}
        self.live = self.peak = 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these, as far as they are not counted yet."""
        for storage in _storages(tensors):
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata).atexit = False
        self.peak = max(self.peak, self.live)

    def _free(self, storage: int) -> None:
        self.live -= self._sizes.pop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(value, "__tensor_flatten__") for value in tree_iter((args, kwargs))):
            return NotImplemented  # the operations that it is made of come here again
        result = func(*args, **(kwargs or {}))
        self.add(value for value in tree_iter(result) if isinstance(value, Tensor))
        return result


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    return (part.untyped_storage() for tensor in tensors for part in plain_tensors(tensor))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors hold, quantised ones as they are stored."""
    return sum(storage.nbytes() for storage in _storages(tensors))


def noise_batch(config: Config, family: Family, microbatch: Sequence[SampleTokens]) -> Batch:
    """A microbatch of these sizes; its values are noise."""
    draw = partial(noise_sample, config, family, noise=torch.Generator().manual_seed(config.train.seed))
    samples = [draw(f"largest-{number}", *sizes) for number, sizes in enumerate(microbatch)]
    return collate(samples, indices=range(len(samples)), weights=[1.0] * len(samples), layout=config.batch.layout)


def _runs_of_equal(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[nn.ModuleList, list[nn.Module]]]:
    """Each run of neighbours whose parameters are alike, and the list that holds them, in the order of the model."""

    def kind(block: nn.Module) -> list[Any]:
        return [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]

    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and not set(blocks).isdisjoint(stack):
            yield from ((stack, list(run)) for _, run in groupby(list(stack), key=kind))


def optimizer_bytes(config: Config, numbers: Sequence[int]) -> int:
    """Bytes of state that the optimizer keeps for trained tensors of so many `numbers` each.

    From steps on three square matrices. A class may keep a fixed part once a tensor (8-bit classes: a map) beside one
    that grows with its numbers, and store small tensors otherwise.
    """
    few, some, more = (_state_bytes(config, size) for size in (TRIAL_SIZE // 2, TRIAL_SIZE, 2 * TRIAL_SIZE))
    square = TRIAL_SIZE**2
    each = (more - some) / (3 * square)
    once = some - each * square
    return round(sum(once + each * n if n >= square else few * n / (square / 4) for n in numbers))


def _state_bytes(config: Config, size: int) -> int:
    kind = optimizer_class(config.optimizer.class_path, config.optimizer.init_args)
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its update for a minute
        state = state_of_a_step(kind, config.optimizer.init_args, device=dist_env().device, size=size)
    return bytes_of(value for value in state.values() if isinstance(value, Tensor) and value.dim())
