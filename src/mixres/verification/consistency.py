"""How far samples in one batch are from the same samples alone: in outputs, and in gradients of the training loss.

Promise: every run uses the objective of training. A sample has the same noise and the same sigma in every batch mode.
Cost: one forward and one backward a run; outputs and gradients are kept on the CPU.

Measures: an output's error is ||d|| / ||reference|| over all image tokens of a sample, a gradient's is
||d|| / max(||g||, 1e-6 ||g_all||) for each trainable tensor. Both are in float64, and the worst of each counts. The
floor leaves out tensors whose gradient is nothing but rounding.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixres.batch import Batch, Sample
from mixres.data.collate import collate
from mixres.geometry import token_count
from mixres.training.setup import TrainState

BatchMode = Literal["alone", "padded", "packed"]
_FLOOR = 1e-6


@dataclass(frozen=True)
class Outcome:
    """The results of one run, on the CPU."""

    outputs: list[Tensor]  # of each sample (S, P), in the model's dtype
    gradients: dict[str, Tensor | None]


@dataclass(frozen=True)
class Errors:
    """Worst sample and worst tensor; `unequal` names the tensors that only one of the two runs gives a gradient."""

    forward: float
    gradient: float
    unequal: tuple[str, ...]


def batches_of(samples: Sequence[Sample], mode: BatchMode) -> list[Batch]:
    """The samples alone, one batch each, or all in one batch."""
    if mode == "alone":
        return [collate([s], indices=[i], weights=[1.0], layout="padded") for i, s in enumerate(samples)]
    return [collate(samples, indices=range(len(samples)), weights=[1.0] * len(samples), layout=mode)]


def run(setup: TrainState, samples: Sequence[Sample], mode: BatchMode, *, autocast: bool) -> Outcome:
    """Forward and backward of the step's loss over all samples. No weight changes, no gradient is left behind."""
    model, parameters, accelerator = setup.transformer, setup.parameters, setup.accelerator
    outputs: list[Tensor] = []

    def predict(
        model: nn.Module, batch: Batch, noisy_latents: Tensor, sigmas: Tensor, guidance: Tensor | None
    ) -> Tensor:
        velocity = setup.objective.predict_velocity(model, batch, noisy_latents, sigmas, guidance)
        outputs.extend(_per_sample(velocity.detach().cpu(), batch))
        return velocity

    objective = replace(setup.objective, predict_velocity=predict)
    batches = batches_of(samples, mode)
    divisor = objective.divisor(len(samples), sum(sum(batch.target_lengths) for batch in batches))
    try:
        for batch in batches:
            with accelerator.autocast() if autocast else nullcontext():
                loss = objective.loss(model, batch.to(accelerator.device), step=0, divisor=divisor)
            torch.autograd.backward(loss)
        gradients = {name: None if p.grad is None else p.grad.detach().cpu() for name, p in parameters.items()}
    finally:
        for parameter in parameters.values():
            parameter.grad = None
    return Outcome(outputs, gradients)


def errors(got: Outcome, reference: Outcome) -> Errors:
    """Of `got` against `reference`, which may be of higher precision."""
    forward = max(_relative(a, b, 0.0) for a, b in zip(got.outputs, reference.outputs, strict=True))
    norms = [float(g.double().norm()) for g in reference.gradients.values() if g is not None]
    floor = _FLOOR * float(torch.tensor(norms, dtype=torch.float64).norm())
    unequal, worst = [], 0.0
    for name, b in reference.gradients.items():
        a = got.gradients[name]
        if _kind(a) != _kind(b):
            unequal.append(name)
        elif a is not None and b is not None:
            worst = max(worst, _relative(a, b, floor))
    return Errors(forward, worst, tuple(unequal))


@contextmanager
def reordered_sums() -> Iterator[None]:
    """Within it linear layers and attention add in the reverse order, which is as valid as the usual one.

    In backward too. How far results move is the model's own rounding. Torch's own functions are replaced, so nothing of
    the patch, of collate or of the objective has a part in it; a mode of torch would not reach the recomputation of
    blocks. Quantised weights keep their order.
    """
    linear, attention = F.linear, F.scaled_dot_product_attention

    def reversed_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if type(weight) not in (Tensor, nn.Parameter):
            return linear(input, weight, bias)
        x, w, b = (None if v is None else v.flip(tuple(range(v.dim()))) for v in (input, weight, bias))
        assert x is not None and w is not None
        return linear(x, w, b).flip(tuple(range(input.dim())))

    def reversed_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if (mask := options.get("attn_mask")) is not None:  # of queries by keys, or of keys alone
            options["attn_mask"] = mask.flip((-2, -1))
        return attention(query.flip(-2), key.flip(-2), value.flip(-2), **options).flip(-2)

    vars(F).update(linear=reversed_linear, scaled_dot_product_attention=reversed_attention)
    try:
        yield
    finally:
        vars(F).update(linear=linear, scaled_dot_product_attention=attention)


@contextmanager
def in_dtype(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Within it `parameters` have a wider dtype. Widening is exact, so they come back bit for bit."""
    before = [p.dtype for p in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, own in zip(parameters, before, strict=True):
            parameter.data = parameter.data.to(own)


def _per_sample(velocity: Tensor, batch: Batch) -> list[Tensor]:
    lengths = [token_count(grids) for grids in batch.img_shapes]
    if batch.layout == "packed":
        return list(torch.split(velocity[:, 0], lengths))
    return [row[:tokens] for row, tokens in zip(velocity, lengths, strict=True)]


def _relative(got: Tensor, reference: Tensor, floor: float) -> float:
    difference = float((got.double() - reference.double()).norm())
    scale = max(float(reference.double().norm()), floor)
    error = difference / scale if scale else difference
    return error if math.isfinite(error) else math.inf  # a NaN would be lost in the maximum


def _kind(gradient: Tensor | None) -> str:
    return "none" if gradient is None else "some" if bool(gradient.any()) else "zero"
