"""The loss of a batch is the sum of its samples' losses, in both layouts, over target tokens and nothing else."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from mixres.batch import Batch
from mixres.data.plan import Layout
from mixres.diffusion.objective import (
    MIN_WEIGHTED_SIGMA,
    Normalization,
    Weighting,
    sample_weight,
    sigma_weights,
    velocity_loss,
)
from support.steps import LAYOUTS, NORMALIZATIONS, build_objective, flow_of, make_sample, microbatch

MASKS = {"foreground": 3.0, "background": 0.25}
both_normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def outputs_of(batch: Batch) -> Tensor:
    """In place of a model's: a function of each token alone, not zero at padding and controls either."""
    tokens = batch.latents.double()
    return torch.sin(3 * tokens) + tokens.roll(1, dims=-1)


def loss_of(batch: Batch, outputs: Tensor | None = None, **kw: Any) -> Tensor:
    return velocity_loss(outputs_of(batch) if outputs is None else outputs, batch, flow_of(batch), **kw)


def by_definition(
    index: int, *, normalization: Normalization, weighting: Weighting, foreground: float, background: float
) -> float:
    """The loss of one sample, token by token."""
    batch, sample = microbatch([index]), make_sample(index)
    flow, total = flow_of(batch), 0.0
    for t in range(len(sample.target_latents)):
        error = float((outputs_of(batch)[0, t] - flow.velocity[t]).square().mean())
        mask = 0.0 if sample.edit_mask is None else float(sample.edit_mask[t])
        total += error * (1.0 if sample.edit_mask is None else background + (foreground - background) * mask)
    weight = float(sigma_weights(flow.sigmas, weighting)[0])
    return weight * total / (len(sample.target_latents) if normalization == "sample" else 1)


@both_normalizations
@pytest.mark.parametrize("weighting", ["none", "cosmap"])
@settings(derandomize=True, deadline=None, database=None, max_examples=40)
@given(st.dictionaries(st.integers(0, 5), st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=1))
def test_a_batch_is_the_weighted_sum_of_its_samples(
    normalization: Normalization, weighting: Weighting, weights: dict[int, float]
) -> None:
    settings: dict[str, Any] = {"normalization": normalization, "weighting": weighting, **MASKS}
    alone = sum(weight * by_definition(i, **settings) for i, weight in weights.items())
    for layout in LAYOUTS:
        batch = replace(microbatch(list(weights), layout), sample_weights=tuple(weights.values()))
        assert float(loss_of(batch, **settings)) == pytest.approx(alone, rel=1e-6)  # masks are stored in float32


def test_the_divisor_counts_samples_or_target_tokens_and_no_weight() -> None:
    """With an error of 1 everywhere the loss is 1, whatever the sizes; weights and masks change the numerator alone."""
    batch = microbatch([0, 2, 4])
    flow = flow_of(batch)
    outputs = torch.zeros(batch.latents.shape, dtype=torch.float64)
    outputs.flatten(0, 1)[batch.target_index] = flow.velocity + 1
    for normalization, count in (("sample", 3), ("token", sum(batch.target_lengths))):
        objective = build_objective(normalization, torch.float64)
        assert objective.divisor(3, sum(batch.target_lengths)) == count
        assert float(velocity_loss(outputs, batch, flow, normalization=normalization)) == pytest.approx(count)
    assert sample_weight(regularization=True, prior_loss_weight=0.2) == 0.2
    assert sample_weight(regularization=False, prior_loss_weight=0.2) == 1.0


@both_normalizations
@both_layouts
@pytest.mark.parametrize("junk", [1e3, float("nan"), float("inf")])
def test_padding_controls_and_dummies_never_enter(normalization: Normalization, layout: Layout, junk: float) -> None:
    batch = microbatch([0, 1, -1 - 2, 3], layout)
    others = torch.ones(batch.latents.shape[:2], dtype=torch.bool)
    first, second, _, last = batch.target_index.split(list(batch.target_lengths))
    others.flatten()[torch.cat([first, second, last])] = False
    results = []
    for filled in (False, True):
        outputs = outputs_of(batch)
        if filled:
            outputs[others] = junk
        outputs.requires_grad_()
        loss = loss_of(batch, outputs, normalization=normalization, **MASKS)
        torch.autograd.backward(loss)
        assert outputs.grad is not None and not outputs.grad[others].any()
        assert outputs.grad[~others].any(dim=-1).all()
        results.append((loss.detach(), outputs.grad))
    assert all(torch.equal(plain, junked) for plain, junked in zip(*results, strict=True))


def test_the_error_is_computed_in_the_targets_precision() -> None:
    batch = microbatch([0, 1])
    outputs = outputs_of(batch).bfloat16()
    loss = loss_of(batch, outputs, normalization="sample")
    assert loss.dtype == torch.float64
    assert torch.equal(loss, loss_of(batch, outputs.double(), normalization="sample"))


def test_sigma_weights_are_those_of_the_paper_and_finite_at_zero() -> None:
    """torch.rand gives 0 once in 2^24 draws: 1 / sigma^2 would end the run there, and again at each resume."""
    sigma = torch.linspace(0.01, 1, 60, dtype=torch.float64)
    cosmap = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    for weighting, expected in (("none", torch.ones(60)), ("sigma_sqrt", sigma**-2), ("cosmap", cosmap)):
        torch.testing.assert_close(sigma_weights(sigma, weighting), expected.double(), rtol=1e-6, atol=0)
    assert sigma_weights(torch.zeros(1), "sigma_sqrt").tolist() == pytest.approx([MIN_WEIGHTED_SIGMA**-2])
