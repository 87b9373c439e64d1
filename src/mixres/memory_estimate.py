"""Memory of a training step on one device, by formula, before any weight is loaded.

Promise: weights, gradients, optimizer state and moving average are counted on the very parameters that the run will
train, on the meta device; activations are those of `activations.py`. Cost: a skeleton of the model, and one step of
the optimizer's class on a parameter of 4,096 values.

Not counted: what a layer needs for a moment only, the encoders (they are gone by then), the allocator's rounding, and
the library's own few hundred MB on a GPU. `inspect --measure` runs the largest microbatch and says what it took.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from mixres.activations import ActivationBytes, Rows
from mixres.config import Config
from mixres.data.plan import Layout
from mixres.models.lora import add_lora, train_all, trainable_parameters
from mixres.models.quantize import stored_bytes
from mixres.training.optim import TRIAL_SIZE, optimizer_class, state_of_a_step

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

    def __init__(self, config: Config, family: ModuleType, *, ranks: int, cuda: bool) -> None:
        model = config.model
        skeleton = family.transformer_skeleton(model.pretrained_model_name_or_path, revision=model.revision)
        torch.nn.Module.to(skeleton, getattr(torch, model.dtype))  # not diffusers' own, which warns
        self._untrained: tuple[str, ...] = family.untrained_modules(skeleton)
        if model.lora:
            settings = model.lora.model_dump(exclude={"pretrained_weight"})
            add_lora(skeleton, **settings, untrained=self._untrained, seed=0)
        else:
            train_all(skeleton, untrained=self._untrained)
        self._config, self._skeleton, self._cuda = config, skeleton, cuda
        self._rounded_off = _rounded_off(config, skeleton)
        self._ranks = ranks if config.train.parallel == "fsdp2" else 1
        self.trained = sum(p.numel() for p in trainable_parameters(skeleton).values())
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
            "optimizer": round(optimizer_bytes(self._config) * self.trained),
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


def optimizer_bytes(config: Config) -> float:
    """Bytes of state that the optimizer keeps for each trained value, found by one step of it on the CPU.

    8 (two float32, as AdamW) where its class works on a GPU only.
    """
    kind = optimizer_class(config.optimizer.class_path, config.optimizer.init_args)
    try:
        state = state_of_a_step(kind, config.optimizer.init_args, device=torch.device("cpu"))
    except (RuntimeError, ValueError, NotImplementedError, AssertionError):
        return 8.0
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(value.numel() * value.itemsize for value in tensors) / TRIAL_SIZE**2
