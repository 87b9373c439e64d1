"""One optimizer step over planned microbatches: sums, one global divisor, one clip, one update.

Promise: the update depends on which samples make the step, not on how they are split over microbatches, ranks or
layouts. Cost: nothing but forward, backward and the update; one host read of loss and norm at the end.

Gradients of the ranks are summed, see `distributed.py`, so each microbatch's sum is divided by the step's divisor.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixres.batch import Batch
from mixres.diffusion.flow_matching import TimestepSampler, make_flow_sample
from mixres.diffusion.loss import velocity_loss
from mixres.errors import WorkError
from mixres.training.distributed import full_tensors, gather, gradient_sync

PredictVelocity = Callable[[nn.Module, Batch, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimised: everything between a batch and a loss that stays the same over a run."""

    predict_velocity: PredictVelocity
    levels: TimestepSampler
    shift_constants: Mapping[str, float]
    normalization: Literal["sample", "token"]
    foreground: float
    background: float
    seed: int
    dtype: torch.dtype  # of noise, targets and errors: float32, or float64 over a float64 base

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """The batch's part of the loss's numerator in optimizer step `step`."""
        flow = make_flow_sample(
            batch, seed=self.seed, step=step, levels=self.levels, constants=self.shift_constants, dtype=self.dtype
        )
        velocity = self.predict_velocity(model, batch, flow.noisy_latents, flow.sigmas)
        return velocity_loss(
            velocity,
            batch,
            flow,
            normalization=self.normalization,
            foreground=self.foreground,
            background=self.background,
        ).total

    def divisor(self, samples: int, target_tokens: int) -> int:
        """What the sums of a whole step are divided by."""
        return samples if self.normalization == "sample" else target_tokens


@dataclass(frozen=True)
class StepResult:
    """`loss` and tokens are of all ranks, `grad_norm` is before the clip; `stopping`: some rank was asked to stop.

    `skipped` names samples of a step that was left out on all ranks, as its numbers are not finite: those of the
    microbatches whose loss is not, or all where only the gradient is not. It is empty after an update.
    """

    loss: float
    grad_norm: float
    tokens: int
    tokens_computed: int
    stopping: bool
    skipped: tuple[str, ...] = ()


def run_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    objective: Objective,
    microbatches: Iterable[Batch],
    *,
    count: int,
    step: int,
    divisor: int,
    max_grad_norm: float,
    stop_requested: bool = False,
) -> StepResult:
    """Forward and backward over this rank's `count` microbatches, then one clipped update.

    `divisor` is the whole step's, over all ranks; `step` keys the noise. `stop_requested` is this rank's word; all
    ranks learn of it in the same step. Where loss or gradient is not finite on any rank, no rank updates: only the
    schedule goes on, since it is a function of the step.

    Raises:
        WorkError: the device has not enough memory for a microbatch.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    done = _accumulate(accelerator, model, objective, microbatches, count=count, step=step, divisor=divisor)
    grad_norm = float(full_tensors({"norm": torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)})["norm"])
    flags = done.sums.new_tensor([stop_requested, not math.isfinite(grad_norm)])
    loss, tokens, tokens_computed, stops, bad = accelerator.reduce(torch.cat([done.sums, flags]), "sum").tolist()
    skipped: tuple[str, ...] = ()
    if bad or not math.isfinite(loss):
        suspects = gather(done.suspects)
        skipped = tuple(name for names in (suspects if any(suspects) else gather(done.names)) for name in names)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # else a first step that is skipped makes a warning
    else:
        optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, int(tokens), int(tokens_computed), stopping=stops > 0, skipped=skipped)


@dataclass(frozen=True)
class _Accumulated:
    """What a rank's microbatches gave beside gradients: `(3,)` float64 loss, tokens, tokens computed; the samples, and
    those in microbatches whose loss is not finite."""

    sums: Tensor
    names: list[str]
    suspects: list[str]


def _accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    microbatches: Iterable[Batch],
    *,
    count: int,
    step: int,
    divisor: int,
) -> _Accumulated:
    losses: list[Tensor] = []
    names: list[tuple[str, ...]] = []
    tokens = tokens_computed = 0
    for position, batch in enumerate(microbatches):
        try:
            with gradient_sync(model, last=position == count - 1):
                losses.append(_backward(accelerator, model, objective, batch, step=step, divisor=divisor))
        except torch.OutOfMemoryError as error:
            raise WorkError(_out_of_memory(batch, step, accelerator.device)) from error
        tokens += batch.tokens if any(batch.sample_weights) else 0
        tokens_computed += batch.tokens_computed
        names.append(batch.names)
    loss = torch.stack(losses).sum()
    suspects = []
    if not loss.isfinite():
        suspects = [name for one, samples in zip(losses, names, strict=True) if not one.isfinite() for name in samples]
    sums = torch.cat([loss[None], loss.new_tensor([tokens, tokens_computed])])
    return _Accumulated(sums, [name for samples in names for name in samples], suspects)


def _backward(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batch: Batch, *, step: int, divisor: int
) -> Tensor:
    """The microbatch's part of the loss, float64; its gradients are added to those there are."""
    with accelerator.autocast():
        total = objective.loss_sum(model, batch.to(accelerator.device), step)
    torch.autograd.backward(total / divisor)
    return total.detach().double() / divisor


def _out_of_memory(batch: Batch, step: int, device: torch.device) -> str:
    shapes = "; ".join(
        f"{name} {' + '.join(f'{grid.rows}x{grid.columns}' for grid in grids)}"
        for name, grids in zip(batch.names, batch.img_shapes, strict=True)
    )
    return (
        f"step {step + 1}: {device} is out of memory with {batch.tokens_computed} tokens in one microbatch (in tokens: "
        f"{shapes}); the last checkpoint is intact: lower batch.max_tokens, set train.gradient_checkpointing=true, or "
        "lower data.resize.target.max_pixels, and run the same command again"
    )


def bare_step_seconds(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    objective: Objective,
    microbatches: Sequence[Batch],
    *,
    step: int,
    divisor: int,
) -> float:
    """Seconds of forward, backward and update alone, on inputs made beforehand: what a training step cannot go below.

    Changes the weights; call it when they have been saved.
    """
    inputs = []
    for batch in microbatches:
        batch = batch.to(accelerator.device)
        flow = make_flow_sample(
            batch,
            seed=objective.seed,
            step=step,
            levels=objective.levels,
            constants=objective.shift_constants,
            dtype=objective.dtype,
        )
        inputs.append((batch, flow))
    _wait(accelerator.device)
    start = time.perf_counter()
    for batch, flow in inputs:
        with accelerator.autocast():
            velocity = objective.predict_velocity(model, batch, flow.noisy_latents, flow.sigmas)
            error = (velocity.flatten(0, 1)[batch.target_index].float() - flow.velocity).square().sum() / divisor
        torch.autograd.backward(error)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait(accelerator.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
