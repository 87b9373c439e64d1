"""Memory of a training step on one device, counted on a model without weights before anything is loaded.

Promise: the configured model, with its adapters, precision, quantisation and recomputation, runs forward and backward
over the largest microbatch on torch's fake tensors, and every storage is counted while it is alive. No layer is known
here by name, and no GPU is needed. Cost: seconds, as equal neighbouring blocks are not all run.

Equal blocks cost equally: a run of them is cut to its first few, one period of gradient checkpointing is added, and
the difference stands for all others. Forward and backward are extended separately, so the result is that of the whole
model, and so is the peak of both unless it moves inside one of them.

Not counted: what a kernel allocates inside itself, the encoders (they are gone by then), the allocator's rounding, the
library's own few hundred MB on a GPU, and copies that an optimizer makes while it updates. Weights of nf4 and bnb_int8
are counted by formula, as bitsandbytes' kernels have no fake form. `inspect --measure` runs the real thing.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.data.collate import collate
from mixres.geometry import Grid
from mixres.models.blocks import recompute_blocks, repeated_blocks
from mixres.models.family import Family
from mixres.models.lora import add_lora, train_all, trainable_parameters
from mixres.models.quantize import is_torchao, quantize_skeleton, stored_bytes
from mixres.training.distributed import dist_env
from mixres.training.optimizer import TRIAL_SIZE, optimizer_class, state_of_a_step, state_parts
from mixres.training.setup import build_objective
from mixres.verification.synthetic import noise_sample

_GATHERED_BLOCKS = 2  # with fsdp2: the block at work, and the next
_KEPT_BLOCKS = 3  # of a run of equal ones: the first and the last may keep less than one between them
_PROBE = 64  # tokens of the microbatches by which the bytes of one token are found


@dataclass(frozen=True)
class Memory:
    """Bytes on each device; `total` is with the configuration's own setting of gradient checkpointing."""

    weights: int  # frozen ones
    trained_weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int  # with fsdp2: weights of blocks that are put together as they are used
    activations: int  # all that is alive besides, at the peak of forward and backward
    activations_with_checkpointing: int
    activations_without_checkpointing: int
    total: int


class StepBytes(NamedTuple):
    """Bytes alive besides weights and gradients."""

    kept: int  # between forward and backward
    forward: int  # at the peak of the forward pass
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations return, but for those in `known`, until they are freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {storage._cdata for tensor in known for storage in storages(tensor)}
        self._sizes: dict[int, int] = {}
        self.live = self._peak = 0

    def take_peak(self) -> int:
        """The most since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    def add(self, tensor: Tensor) -> None:
        for storage in storages(tensor):
            key = storage._cdata
            if key not in self._known and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self._peak = max(self._peak, self.live)
                weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(value, "__tensor_flatten__") for value in tree_iter((args, kwargs))):
            return NotImplemented  # the operations that it is made of come here again
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # values are not known; the one that is asked for is whether a mask hides nothing
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def storages(tensor: Any) -> Iterator[torch.UntypedStorage]:
    """One, or those of the tensors that a quantised weight is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors hold, quantised ones as they are stored."""
    return sum(storage.nbytes() for tensor in tensors for storage in storages(tensor))


class MemoryEstimate:
    """Of one configuration on devices of one kind, for any microbatch.

    Raises:
        UserError: the base's configuration, the optimizer's class or an argument of it is wrong.
    """

    def __init__(self, config: Config, family: Family, *, ranks: int, device: torch.device) -> None:
        self._config, self._family, self._device = config, family, device
        self._objective = build_objective(config, family)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = self._fake_model(family)
        trained = list(trainable_parameters(self._model).values())
        with self._fake:
            for parameter in trained:  # of the microbatches before this one
                parameter.grad = torch.empty_like(parameter)
        parameters, blocks = list(self._model.parameters()), repeated_blocks(self._model)
        self._known = [*parameters, *(p.grad for p in trained if p.grad is not None)]
        self._runs = list(_runs_of_equal(self._model, blocks))
        self.trained, self.parameters = sum(p.numel() for p in trained), sum(p.numel() for p in parameters)
        self.blocks = len(blocks)
        learnt = bytes_of(trained)
        self._ranks = ranks if config.train.parallel == "fsdp2" else 1
        whole = {
            "weights": bytes_of(parameters) - learnt - self._saved_by_bitsandbytes(blocks),
            "trained_weights": learnt,
            "gradients": learnt,
            "optimizer": optimizer_bytes(config, [p.numel() for p in trained]),
            "ema": learnt if config.train.ema_decay else 0,
        }
        largest = max(bytes_of(block.parameters()) for block in blocks)
        self._parts = {name: -(-count // self._ranks) for name, count in whole.items()}
        self._parts["gathered"] = min(_GATHERED_BLOCKS, self.blocks) * largest if self._ranks > 1 else 0

    def memory(self, grids: Sequence[tuple[Grid, ...]], texts: Sequence[int]) -> Memory:
        """With the samples of these token grids and text tokens in the largest microbatch."""
        own, batch = self._config.train.gradient_checkpointing, self.batch(grids, texts)
        peaks = {setting: self.count(batch, setting).peak for setting in {True, False, own}}
        return Memory(
            **self._parts,
            activations=peaks[own],
            activations_with_checkpointing=peaks[True],
            activations_without_checkpointing=peaks[False],
            total=sum(self._parts.values()) + peaks[own],
        )

    def count(self, batch: Batch, checkpointing: bool | int, *, whole: bool = False) -> StepBytes:
        """Of the whole model, extended from shortened runs of equal blocks unless all are to be run (`whole`)."""
        period = max(1, int(checkpointing))
        missing = [0 if whole else max(0, len(run) - _KEPT_BLOCKS) // period for _, run in self._runs]
        short = [len(run) - gone * period for (_, run), gone in zip(self._runs, missing, strict=True)]
        found = base = self._step(batch, checkpointing, short)
        for i, gone in enumerate(missing):
            if gone:
                longer = self._step(batch, checkpointing, [n + period * (i == j) for j, n in enumerate(short)])
                found = StepBytes(*(f + gone * (x - b) for f, x, b in zip(found, longer, base, strict=True)))
        return found

    def token_bytes(self) -> tuple[int, int]:
        """Bytes that one more block keeps of an image token and of a text token where it is not recomputed."""
        short = [min(_KEPT_BLOCKS, len(run)) for _, run in self._runs]
        some = short.index(max(short))
        fewer = [n - (i == some) for i, n in enumerate(short)]
        found = []
        for rows, text in ((1, 1), (2, 1), (1, 2)):
            batch = self.batch([(Grid(1, rows, _PROBE),)], [text * _PROBE])
            found.append(self._step(batch, False, short).kept - self._step(batch, False, fewer).kept)
        return round((found[1] - found[0]) / _PROBE), round((found[2] - found[0]) / _PROBE)

    def batch(self, grids: Sequence[tuple[Grid, ...]], texts: Sequence[int]) -> Batch:
        """Samples without values."""
        with self._fake:
            return noise_batch(self._config, self._family, grids, texts).to(self._device)

    def _step(self, batch: Batch, checkpointing: bool | int, lengths: Sequence[int]) -> StepBytes:
        """Forward and backward with so many blocks of each run."""
        for stack, _ in self._runs:
            del stack[:]
        for (stack, run), length in zip(self._runs, lengths, strict=True):
            stack.extend(run[:length])
        self._model.disable_gradient_checkpointing()
        if checkpointing:
            recompute_blocks(self._model, every=int(checkpointing))
        autocast = self._config.train.mixed_precision == "bf16"
        with self._fake, LiveStorages(self._known) as counter:
            for value in vars(batch).values():
                if isinstance(value, Tensor):
                    counter.add(value)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=autocast):
                loss = self._objective.loss_sum(self._model, batch, step=0)
            kept, forward = counter.live, counter.take_peak()
            torch.autograd.backward(loss)
            return StepBytes(kept, forward, counter.take_peak())

    def _saved_by_bitsandbytes(self, blocks: Sequence[nn.Module]) -> int:
        """Bytes that nf4 and bnb_int8 take off the weights."""
        method = self._config.model.quantize
        if method is None or is_torchao(method):
            return 0
        linears = [m for block in blocks for name, m in block.named_modules() if ".lora_" not in name]
        weights = [m.weight for m in linears if type(m) is nn.Linear]
        return sum(w.numel() * w.itemsize - stored_bytes(method, *w.shape) for w in weights)

    def _fake_model(self, family: Family) -> Any:
        """Put together on the meta device as training does it; then its tensors become fake ones on the device."""
        model, dtype = self._config.model, getattr(torch, self._config.model.dtype)
        transformer = family.transformer_skeleton()
        nn.Module.to(transformer, dtype)  # not diffusers' own, which warns
        if model.quantize and is_torchao(model.quantize):
            quantize_skeleton(transformer, model.quantize, dtype=dtype)
        untrained = family.untrained_modules(transformer)
        if model.lora:
            settings = model.lora.model_dump(exclude={"pretrained_weight"})
            add_lora(transformer, **settings, untrained=untrained, seed=0, presets=family.lora_presets)
        else:
            train_all(transformer, untrained=untrained)
        with self._fake:
            for module in transformer.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    empty = _empty_like(parameter.detach(), self._device)
                    setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
        return transformer.train()


def noise_batch(config: Config, family: Family, grids: Sequence[tuple[Grid, ...]], texts: Sequence[int]) -> Batch:
    """A microbatch of these token grids, target first, and text tokens."""
    noise = torch.Generator().manual_seed(config.train.seed)
    channels, text_width = family.token_widths()
    samples = [
        noise_sample(
            f"largest-{number}",
            sizes,
            text=text,
            channels=channels,
            text_width=text_width,
            dtype=getattr(torch, config.model.dtype),
            noise=noise,
        )
        for number, (sizes, text) in enumerate(zip(grids, texts, strict=True))
    ]
    weights = [1.0] * len(samples)
    return collate(samples, indices=range(len(samples)), weights=weights, layout=config.batch.layout)


def _runs_of_equal(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[nn.ModuleList, list[nn.Module]]]:
    """The list that holds them, and neighbours in it whose parameters are alike, in the order of the model."""
    known = {id(block) for block in blocks}

    def kind(block: nn.Module) -> list[Any]:
        return [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]

    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and any(id(block) in known for block in stack):
            yield from ((stack, list(run)) for _, run in groupby(list(stack), key=kind))


def _empty_like(tensor: Any, device: torch.device) -> Any:
    """On `device`; the parts of a quantised tensor too."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return torch.empty_like(tensor, device=device)
    names, context = tensor.__tensor_flatten__()
    parts = {name: _empty_like(getattr(tensor, name), device) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def optimizer_bytes(config: Config, numbers: Sequence[int]) -> int:
    """Bytes of state that the optimizer keeps for trained tensors of so many `numbers` each.

    By steps on small matrices: 8-bit classes leave the smallest as they are and keep a map for each of the others. 8 a
    number (two float32, as AdamW) where its class cannot step here.
    """
    try:
        few, some, more = (_state_bytes(config, size) for size in (TRIAL_SIZE // 2, TRIAL_SIZE, 2 * TRIAL_SIZE))
    except (RuntimeError, ValueError, NotImplementedError, AssertionError):
        return 8 * sum(numbers)
    square = TRIAL_SIZE**2
    each = (more - some) / (3 * square)
    once = some - each * square
    return round(sum(once + each * n if n >= square else few * n / (square / 4) for n in numbers))


def _state_bytes(config: Config, size: int) -> int:
    kind = optimizer_class(config.optimizer.class_path, config.optimizer.init_args)
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its update for a minute
        state = state_of_a_step(kind, config.optimizer.init_args, device=dist_env().device, size=size)
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()}
    return sum(part.nbytes for name, value in tensors.items() for part in state_parts(name, value).values())
