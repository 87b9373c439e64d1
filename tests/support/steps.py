"""Samples, models and recorded steps for the tests of this folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mixres.batch import Batch, FlowSample, Sample
from mixres.data.collate import collate
from mixres.data.plan import Layout
from mixres.diffusion.flow_matching import TimestepSampler, make_flow_sample
from mixres.diffusion.objective import Objective
from mixres.geometry import Grid
from mixres.models.lora import add_lora, fill_adapters, trainable_parameters
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.qwen.layers import untrained_modules
from mixres.training.distributed import make_accelerator
from mixres.training.ema import Ema
from mixres.training.step import StepResult, run_step
from support import mixes, samples

CHANNELS, TEXT_WIDTH = 64, 64
SHIFT = {"base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
LAYOUTS: tuple[Layout, ...] = ("padded", "packed")
NORMALIZATIONS = ("sample", "token")
SAMPLES = [  # grids of target and controls, text tokens
    ((Grid(1, 6, 9), Grid(1, 4, 4)), 9),
    ((Grid(1, 8, 5),), 4),
    ((Grid(1, 3, 4), Grid(1, 7, 6), Grid(1, 2, 5)), 13),
    ((Grid(1, 10, 6), Grid(1, 6, 10)), 6),
    ((Grid(1, 2, 2), Grid(1, 2, 2)), 1),
    ((Grid(1, 7, 7),), 11),
]
WHOLE = ((0, 1, 2, 3, 4, 5),)
ALONE = ((0,), (1,), (2,), (3,), (4,), (5,))
SPLITS = {
    "whole": WHOLE,
    "alone": ALONE,
    "other_order": ((5, 2, 0, 4, 1, 3),),
    "pairs": ((3, 0), (1, 5), (4, 2)),
    "uneven": ((4,), (5, 3, 1, 0), (2,)),
    "dummies": ((1, 2, 3), (-1 - 4,), (0, 4, 5), (-1 - 0,)),  # -1 - i: sample i with weight 0
}


def make_sample(index: int) -> Sample:
    shapes, text = SAMPLES[index]
    widths = {"channels": CHANNELS, "text_width": TEXT_WIDTH}
    return samples.make_sample(shapes, text=text, mask=index % 2 == 1, dtype=torch.float32, seed=index, **widths)


def microbatch(indices: Sequence[int], layout: Layout = "padded") -> Batch:
    real = [i if i >= 0 else -1 - i for i in indices]
    weights = [1.0 if i >= 0 else 0.0 for i in indices]
    return collate([make_sample(i) for i in real], indices=real, weights=weights, layout=layout)


def microbatches(split: Sequence[Sequence[int]], layout: Layout) -> list[Batch]:
    return [microbatch(indices, layout) for indices in split]


def divisor_of(objective: Objective) -> int:
    return objective.divisor(len(SAMPLES), sum(shapes[0].tokens for shapes, _ in SAMPLES))


def make_model(base: Path, dtype: torch.dtype) -> nn.Module:
    return with_adapters(QwenImageEdit(str(base)).load_transformer(dtype=dtype, device="cpu"))


def with_adapters(model: Any, **changes: Any) -> Any:
    """The model with adapters on attention and MLP, B filled: at zero it would hide all of A's gradients."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 4,
        "lora_dropout": 0,
        "target_modules": mixes.ATTENTION_AND_MLP,
        "seed": 0,
    }
    if "untrained" not in changes:
        settings["untrained"] = untrained_modules(model)
    add_lora(model, **(settings | changes))
    fill_adapters(trainable_parameters(model), seed=0)
    return model


def flow_of(batch: Batch, *, seed: int = 0, step: int = 0, dtype: torch.dtype = torch.float64, **kw: Any) -> FlowSample:
    return make_flow_sample(batch, seed=seed, step=step, timesteps=TimestepSampler(**kw), constants=SHIFT, dtype=dtype)


def build_objective(normalization: Literal["sample", "token"], dtype: torch.dtype, kind: type = Objective) -> Any:
    return kind(
        predict_velocity=QwenImageEdit("").predict_velocity,
        timesteps=TimestepSampler(),
        weighting="cosmap",
        shift_constants=SHIFT,
        normalization=normalization,
        foreground=3.0,
        background=0.5,
        seed=11,
        dtype=dtype,
    )


def new_accelerator(folder: Path) -> Accelerator:
    """As a run makes it, whatever another test has made."""
    AcceleratorState._reset_state(True)
    return make_accelerator(mixed_precision="no", report_to="none", folder=folder)


def moved_average(parameters: Sequence[nn.Parameter], size: float) -> Ema:
    """The average of `parameters` after three steps by noise of `size`, which leaves it behind them."""
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    ema = Ema(optimizer, 0.9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = size * torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return ema


@dataclass(frozen=True)
class Recorded:
    result: StepResult
    gradients: dict[str, Tensor | None]


def record(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batches: list[Batch], clip: float = 1e9
) -> Recorded:
    """A step whose update changes nothing, and the gradients that it saw."""
    parameters, gradients = trainable_parameters(model), {}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.update({name: p.grad for name, p in parameters.items()}))
    batches, count, divisor = iter(batches), len(batches), divisor_of(objective)
    result = run_step(
        accelerator, model, optimizer, objective, batches, count=count, step=5, divisor=divisor, max_grad_norm=clip
    )
    return Recorded(result, gradients)


def gradient_error(measured: Recorded, reference: Recorded) -> float:
    """As in `mixes`; no parameter is without a gradient."""
    assert mixes.vanished(measured.gradients) == mixes.vanished(reference.gradients) == {}
    return mixes.gradient_error(measured, reference)
