"""The error of predicted velocities over valid target tokens, as a sum and a count.

Promise: padding and control tokens enter neither: target tokens are selected, nothing is multiplied by a mask. Sums
and counts of microbatches and ranks add up, so the divisor of a step is global and known before it runs. Cost: one
gather of the target tokens.

Legend: B sample, V valid target token of the batch, P packed channel.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mixres.batch import Batch, FlowSample


@dataclass(frozen=True)
class LossSum:
    """`total` is a scalar with gradient; `count` is this batch's part of the divisor."""

    total: Tensor
    count: int


def velocity_loss(
    velocity: Tensor,
    batch: Batch,
    flow: FlowSample,
    *,
    normalization: Literal["sample", "token"],
    foreground: float = 1.0,
    background: float = 1.0,
) -> LossSum:
    """Weighted squared error, averaged over channels.

    `velocity` is the model's output in the batch's layout, `(X, Y, P)`. `normalization`: `sample` adds each sample's
    mean over its own target tokens and counts samples; `token` adds tokens and counts tokens. Weights stand in the
    numerator only: each sample's own and, where it has an edit mask, those of its tokens, between `background` and
    `foreground`. Samples of weight 0 are left out; a batch of nothing else gives a zero that still reaches every
    parameter.
    """
    predicted = velocity.flatten(0, 1)[batch.target_index].to(flow.velocity.dtype)
    lengths = list(batch.target_lengths)
    outputs, targets = torch.split(predicted, lengths), torch.split(flow.velocity, lengths)
    token_weights = torch.split(_token_weights(batch.edit_mask, foreground, background).to(predicted.dtype), lengths)
    total, count = predicted[:0].sum(), 0
    for b, weight in enumerate(batch.sample_weights):
        if weight == 0:  # never computed: 0 x NaN would be NaN, in the gradient too
            continue
        errors = (outputs[b] - targets[b]).square().mean(dim=-1)
        if batch.has_mask[b]:
            errors = errors * token_weights[b]
        share = errors.mean() if normalization == "sample" else errors.sum()
        total = total + weight * flow.weights[b] * share
        count += 1 if normalization == "sample" else lengths[b]
    return LossSum(total, count)


def _token_weights(edit_mask: Tensor, foreground: float, background: float) -> Tensor:
    """`(V,)`: background + (foreground - background) x share; exact where the share is 0 or 1."""
    return torch.lerp(torch.full_like(edit_mask, background), torch.full_like(edit_mask, foreground), edit_mask)
