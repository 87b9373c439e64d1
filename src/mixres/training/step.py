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
from mixres.diffusion.flow_matching import NoiseLevels, make_flow_sample
from mixres.diffusion.loss import velocity_loss
from mixres.errors import WorkError
from mixres.training.distributed import gradient_sync, whole

PredictVelocity = Callable[[nn.Module, Batch, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimised: everything between a batch and a loss that stays the same over a run."""

    predict_velocity: PredictVelocity
    levels: NoiseLevels
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
    """`loss` and tokens are of all ranks, `grad_norm` is before the clip; `stopping`: some rank was asked to stop."""

    loss: float
    grad_norm: float
    tokens: int
    tokens_computed: int
    stopping: bool


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

    `divisor` is the whole step's, over all ranks; `step` keys the noise. `stop_requested`
    is this rank's word; all ranks learn of it in the same step.

    Raises:
        WorkError: loss or gradient is not finite; nothing has been updated.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums, names = _accumulate(accelerator, model, objective, microbatches, count=count, step=step, divisor=divisor)
    grad_norm = float(whole({"norm": torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)})["norm"])
    sums = torch.cat([sums, sums.new_tensor([stop_requested])])
    loss, tokens, tokens_computed, stops = accelerator.reduce(sums, "sum").tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise WorkError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: not finite; the last checkpoint is intact. "
            f"Samples of this process: {', '.join(names)}"
        )
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, int(tokens), int(tokens_computed), stopping=stops > 0)


def _accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    microbatches: Iterable[Batch],
    *,
    count: int,
    step: int,
    divisor: int,
) -> tuple[Tensor, list[str]]:
    """Gradients of this rank's microbatches, `(3,)` float64 loss, tokens, tokens computed, and the samples' names."""
    loss = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    tokens = tokens_computed = 0
    names: list[str] = []
    for position, batch in enumerate(microbatches):
        batch = batch.to(accelerator.device)
        with gradient_sync(model, last=position == count - 1):
            with accelerator.autocast():
                total = objective.loss_sum(model, batch, step)
            torch.autograd.backward(total / divisor)
        loss += total.detach().double() / divisor
        tokens += batch.tokens if any(batch.sample_weights) else 0
        tokens_computed += batch.tokens_computed
        names += batch.names
    return torch.cat([loss[None], loss.new_tensor([tokens, tokens_computed])]), names


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
