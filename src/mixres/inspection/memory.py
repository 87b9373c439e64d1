"""Memory of a training step on one device, by formula, before any weight is loaded.

Promise: weights, gradients, optimizer state and moving average are counted on the very parameters that the run will
train, on the meta device; activations are those of `activations.py`. Cost: a skeleton of the model, and three steps of
the optimizer's class on matrices of at most 128 x 128.

Not counted: what a layer needs for a moment only, the encoders (they are gone by then), the allocator's rounding, and
the library's own few hundred MB on a GPU. `inspect --measure` runs the largest microbatch and says what it took.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixres.config.schema import Config
from mixres.data.plan import Layout
from mixres.inspection.activations import ActivationBytes, Rows
from mixres.models.family import Family
from mixres.models.lora import add_lora, train_all, trainable_parameters
from mixres.models.quantize import stored_bytes
from mixres.training.distributed import dist_env
from mixres.training.optimizer import TRIAL_SIZE, optimizer_class, state_of_a_step, state_parts

_GATHERED_BLOCKS = 2  # with fsdp2: the block at work, and the next


@dataclass(frozen=True)
class Memory:
    """Bytes on each device; `total` is with the configuration's own setting of gradient checkpointing."""

    weights: int  # frozen ones
    trained_weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int  # with fsdp2: weights of blocks that are put together as they are used
    activations: int
    activations_with_checkpointing: int
    activations_without_checkpointing: int
    total: int


class MemoryEstimate:
    """Of one configuration on devices of one kind, for any microbatch.

    Raises:
        UserError: the base's configuration, the optimizer's class or an argument of it is wrong.
    """

    def __init__(self, config: Config, family: Family, *, ranks: int, cuda: bool) -> None:
        model = config.model
        skeleton = family.transformer_skeleton()
        torch.nn.Module.to(skeleton, getattr(torch, model.dtype))  # not diffusers' own, which warns
        self._untrained: tuple[str, ...] = family.untrained_modules(skeleton)
        if model.lora:
            settings = model.lora.model_dump(exclude={"pretrained_weight"})
            add_lora(skeleton, **settings, untrained=self._untrained, seed=0, presets=family.lora_presets)
        else:
            train_all(skeleton, untrained=self._untrained)
        self._config, self._skeleton, self._cuda = config, skeleton, cuda
        self._rounded_off = _rounded_off(config, skeleton)
        self._ranks = ranks if config.train.parallel == "fsdp2" else 1
        numbers = [p.numel() for p in trainable_parameters(skeleton).values()]
        self.trained, self._optimizer = sum(numbers), optimizer_bytes(config, numbers)
        self.parameters = sum(p.numel() for p in skeleton.parameters())
        self.activations = self.activations_in(config.batch.layout)

    def activations_in(self, layout: Layout) -> ActivationBytes:
        """The formula of activations in `layout`."""
        return ActivationBytes(
            self._skeleton,
            untrained=self._untrained,
            layout=layout,
            autocast=self._config.train.mixed_precision == "bf16",
            cuda=self._cuda,
            rounded=self._config.model.quantize in ("int8", "fp8"),
        )

    def memory(self, rows: Rows) -> Memory:
        """With `rows` in the largest microbatch."""
        trained = trainable_parameters(self._skeleton).values()
        learnt = sum(p.numel() * p.itemsize for p in trained)
        everything = sum(p.numel() * p.itemsize for p in self._skeleton.parameters())
        whole = {
            "weights": everything - learnt - self._rounded_off,
            "trained_weights": learnt,
            "gradients": learnt,
            "optimizer": self._optimizer,
            "ema": learnt if self._config.train.ema_decay else 0,
        }
        parts = {name: -(-count // self._ranks) for name, count in whole.items()}
        blocks = self._skeleton.transformer_blocks
        largest = max(sum(p.numel() * p.itemsize for p in block.parameters()) for block in blocks)
        parts["gathered"] = min(_GATHERED_BLOCKS, len(blocks)) * largest if self._ranks > 1 else 0
        own = self.activations.peak(rows, checkpointing=self._config.train.gradient_checkpointing)
        return Memory(
            **parts,
            activations=own,
            activations_with_checkpointing=self.activations.peak(rows, checkpointing=True),
            activations_without_checkpointing=self.activations.peak(rows, checkpointing=False),
            total=sum(parts.values()) + own,
        )


def _rounded_off(config: Config, skeleton: Any) -> int:
    """Bytes that `model.quantize` takes off the weights."""
    if config.model.quantize is None:
        return 0
    linears = [m for block in skeleton.transformer_blocks for n, m in block.named_modules() if ".lora_" not in n]
    weights = [m.weight for m in linears if type(m) is torch.nn.Linear]
    return sum(w.numel() * w.itemsize - stored_bytes(config.model.quantize, *w.shape) for w in weights)


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
