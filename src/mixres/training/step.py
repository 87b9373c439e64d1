"""One optimizer step over planned microbatches: sums, one global divisor, one clip, one update.

Promise: the update depends on which samples make the step, not on how they are split over microbatches, ranks or
layouts. Cost: nothing but forward, backward and the update; one host read of loss and norm at the end.

Gradients of the ranks are summed, see `distributed.py`, so each microbatch's numerator is divided by the divisor of
the whole step, see `diffusion/objective.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mixres.batch import Batch
from mixres.diffusion.objective import Objective
from mixres.errors import WorkError
from mixres.training.distributed import full_tensor, gather, gradient_sync


@dataclass(frozen=True)
class StepResult:
    """`loss` and tokens are of all ranks, `grad_norm` is before the clip; `stopping`: some rank was asked to stop.

    `skipped` names the samples of a step that updates nothing on any rank, as its numbers are not finite: those of the
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

    `divisor` is the whole step's, over all ranks; `step` keys the noise. `stop_requested` is this rank's; all ranks
    learn of it in the same step. Where loss or gradient is not finite on any rank, no rank updates.

    Raises:
        WorkError: the device has not enough memory for a microbatch.
    """
    losses: list[Tensor] = []
    names: list[tuple[str, ...]] = []
    tokens = tokens_computed = 0
    for position, batch in enumerate(microbatches):
        try:
            with gradient_sync(model, last=position == count - 1):
                losses.append(_forward_backward(accelerator, model, objective, batch, step=step, divisor=divisor))
        except torch.OutOfMemoryError as error:
            raise WorkError(_out_of_memory(batch, step, accelerator.device)) from error
        names.append(batch.names)
        tokens += batch.tokens if any(batch.sample_weights) else 0
        tokens_computed += batch.tokens_computed

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    own_loss, grad_norm = torch.stack(losses).sum(), float(norm)
    own = [tokens, tokens_computed, stop_requested, not math.isfinite(grad_norm)]
    sums = accelerator.reduce(torch.cat([own_loss[None], own_loss.new_tensor(own)]), "sum")
    loss, tokens_of_all, computed_of_all, stopping, bad = map(float, sums.cpu())

    skipped: tuple[str, ...] = ()
    if bad or not math.isfinite(loss):
        pairs = zip(losses, names, strict=True)
        suspects = gather([name for part, samples in pairs if not part.isfinite() for name in samples])
        found = suspects if any(suspects) else gather([name for samples in names for name in samples])
        skipped = tuple(name for rank in found for name in rank)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, int(tokens_of_all), int(computed_of_all), stopping=stopping > 0, skipped=skipped)


def _forward_backward(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batch: Batch, *, step: int, divisor: int
) -> Tensor:
    """The microbatch's part of the loss, float64, without its graph; its gradients are added to those there are."""
    with accelerator.autocast():
        part = objective.loss(model, batch.to(accelerator.device), step=step, divisor=divisor)
    torch.autograd.backward(part)
    return part.detach().double()


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
