"""What training minimises: numerator, weights and divisor of the loss, side by side.

    loss = 1/D  sum_b  w_b  omega(sigma_b)  R_t  m_bt  mean_p (v_hat - v)^2

    w_b    1, or `prior_loss_weight` for a regularization sample; 0 for the dummy that keeps the ranks in step
    omega  weight of the sample's sigma: none (1), sigma_sqrt (1 / sigma^2) or cosmap
    R_t    mean over the sample's own target tokens (`sample`), or their sum (`token`)
    m_bt   1, or with an edit mask between `background` and `foreground`
    D      samples (`sample`) or target tokens (`token`) of the whole step, over all microbatches and ranks

Promise: padding and control tokens enter neither numerator nor divisor: target tokens are selected, nothing is
multiplied by a padding mask. Weights stand in the numerator only. Numerators of microbatches and ranks add up, and the
divisor is known from the plan before the step runs. Cost: one gather of the target tokens.

Source of omega: Esser et al. 2024 (arXiv 2403.03206), as `diffusers.training_utils` has it.

Legend: B sample, V valid target token of the batch, P packed channel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn

from mixres.batch import Batch, FlowSample
from mixres.diffusion.flow_matching import TimestepSampler, make_flow_sample

Normalization = Literal["sample", "token"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]
PredictVelocity = Callable[[nn.Module, Batch, Tensor, Tensor, Tensor | None], Tensor]

# The last of the 1000 sigmas that the stock schedulers train on: 1 / sigma^2 has no mean without a smallest one.
MIN_WEIGHTED_SIGMA = 1e-3


@dataclass(frozen=True)
class Objective:
    """Everything between a batch and its loss that stays the same over a run."""

    predict_velocity: PredictVelocity
    timesteps: TimestepSampler
    shift_constants: Mapping[str, float]
    weighting: Weighting
    normalization: Normalization
    foreground: float
    background: float
    seed: int
    dtype: torch.dtype  # of noise, targets and errors: float32, or float64 over a float64 base
    guidance: float | None = None  # where the transformer takes one

    def loss(self, model: nn.Module, batch: Batch, *, step: int, divisor: int) -> Tensor:
        """The batch's part of the loss of optimizer step `step`; the parts of a step add up to its loss."""
        return self.loss_sum(model, batch, step) / divisor

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """The batch's part of the numerator in optimizer step `step`."""
        flow = make_flow_sample(
            batch, seed=self.seed, step=step, timesteps=self.timesteps, constants=self.shift_constants, dtype=self.dtype
        )
        velocity = self.predict(model, batch, flow)
        return velocity_loss(
            velocity,
            batch,
            flow,
            normalization=self.normalization,
            weighting=self.weighting,
            foreground=self.foreground,
            background=self.background,
        )

    def predict(self, model: nn.Module, batch: Batch, flow: FlowSample) -> Tensor:
        """v_hat in the layout of the batch."""
        guidance = None if self.guidance is None else torch.full_like(flow.sigmas, self.guidance)
        return self.predict_velocity(model, batch, flow.noisy_latents, flow.sigmas, guidance)

    def divisor(self, samples: int, target_tokens: int) -> int:
        """D, from the counts of a whole step; a regularization sample counts as any other."""
        return samples if self.normalization == "sample" else target_tokens


def velocity_loss(
    velocity: Tensor,
    batch: Batch,
    flow: FlowSample,
    *,
    normalization: Normalization,
    weighting: Weighting = "none",
    foreground: float = 1.0,
    background: float = 1.0,
) -> Tensor:
    """The batch's part of the numerator, a scalar; `velocity` is the model's output in the batch's layout, `(X, Y, P)`.

    Samples of weight 0 are left out. A batch of nothing else gives a zero that still reaches every parameter.
    """
    predicted = velocity.flatten(0, 1)[batch.target_index].to(flow.velocity.dtype)
    lengths = list(batch.target_lengths)
    outputs, targets = torch.split(predicted, lengths), torch.split(flow.velocity, lengths)
    token_weights = torch.split(_token_weights(batch.edit_mask, foreground, background).to(predicted.dtype), lengths)
    weights = sigma_weights(flow.sigmas, weighting)
    total = predicted[:0].sum()
    for b, weight in enumerate(batch.sample_weights):
        if weight == 0:  # never computed: 0 x NaN would be NaN, in the gradient too
            continue
        errors = (outputs[b] - targets[b]).square().mean(dim=-1)
        if batch.has_mask[b]:
            errors = errors * token_weights[b]
        own = errors.mean() if normalization == "sample" else errors.sum()
        total = total + weight * weights[b] * own
    return total


def sample_weight(*, regularization: bool, prior_loss_weight: float) -> float:
    """w_b, which the plan carries into `Batch.sample_weights`."""
    return prior_loss_weight if regularization else 1.0


def sigma_weights(sigmas: Tensor, weighting: Weighting) -> Tensor:
    """omega, `(B,)`, in the dtype of `sigmas`; finite at sigma 0 too."""
    weights: Tensor = compute_loss_weighting_for_sd3(weighting, sigmas=sigmas.clamp(min=MIN_WEIGHTED_SIGMA))
    return weights.to(sigmas.dtype)  # some come as float32


def _token_weights(edit_mask: Tensor, foreground: float, background: float) -> Tensor:
    """m, `(V,)`: background + (foreground - background) x mask; exact where the mask is 0 or 1."""
    return torch.lerp(torch.full_like(edit_mask, background), torch.full_like(edit_mask, foreground), edit_mask)
