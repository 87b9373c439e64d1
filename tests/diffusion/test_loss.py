"""The loss of a batch is the sum of its samples' losses, in both layouts, over target tokens and nothing else."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from mixres.batch import Batch, FlowSample, Sample
from mixres.data.collate import collate
from mixres.data.plan import Layout
from mixres.diffusion.flow_matching import TimestepSampler, make_flow_sample
from mixres.diffusion.loss import LossSum, velocity_loss
from mixres.geometry import Grid

CHANNELS = 4
LAYOUTS: tuple[Layout, ...] = ("padded", "packed")
NORMALIZATIONS: tuple[Literal["sample", "token"], ...] = ("sample", "token")
CONSTANTS = {"base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
GRIDS = [
    (Grid(1, 4, 6), Grid(1, 3, 5)),
    (Grid(1, 7, 3),),
    (Grid(1, 2, 2), Grid(1, 5, 5), Grid(1, 1, 3)),
    (Grid(1, 1, 1),),
]
MASKS = {"foreground": 3.0, "background": 0.25}
derandomized = settings(derandomize=True, deadline=None, database=None, max_examples=40)


def make_sample(index: int) -> Sample:
    draw = torch.Generator().manual_seed(index)
    shapes = GRIDS[index % len(GRIDS)]
    latents = [torch.randn(grid.tokens, CHANNELS, generator=draw) for grid in shapes]
    mask = torch.rand(shapes[0].tokens, generator=draw) if index % 2 else None
    text = torch.randn(2 + index % 3, 3, generator=draw)
    return Sample(str(index), latents[0], tuple(latents[1:]), text, shapes, mask)


def batch_of(indices: list[int], layout: Layout = "padded", weights: list[float] | None = None) -> Batch:
    made = [make_sample(i) for i in indices]
    return collate(made, indices=indices, weights=weights or [1.0] * len(made), layout=layout)


def flow_of(batch: Batch, **levels: Any) -> FlowSample:
    return make_flow_sample(
        batch, seed=0, step=0, levels=TimestepSampler(**levels), constants=CONSTANTS, dtype=torch.float64
    )


def outputs_of(batch: Batch) -> Tensor:
    """In place of a model's: a function of each token alone, for junk at filler and controls too."""
    tokens = batch.latents.double()
    return torch.sin(3 * tokens) + tokens.roll(1, dims=-1)


def loss_of(batch: Batch, outputs: Tensor | None = None, weighting: str = "none", **kw: Any) -> LossSum:
    return velocity_loss(
        outputs_of(batch) if outputs is None else outputs, batch, flow_of(batch, weighting=weighting), **kw
    )


def by_definition(index: int, normalization: str, weighting: str, foreground: float, background: float) -> float:
    """The loss of one sample, token by token."""
    batch = batch_of([index])
    flow, sample = flow_of(batch, weighting=weighting), make_sample(index)
    total = 0.0
    for t in range(len(sample.target_latents)):
        error = float((outputs_of(batch)[0, t] - flow.velocity[t]).square().mean())
        share = 0.0 if sample.edit_mask is None else float(sample.edit_mask[t])
        weight = 1.0 if sample.edit_mask is None else background + (foreground - background) * share
        total += weight * error
    return float(flow.weights[0]) * total / (len(sample.target_latents) if normalization == "sample" else 1)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("weighting", ["none", "cosmap"])
@derandomized
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True))
def test_padded_and_packed_and_the_sum_over_samples_alone(
    normalization: Literal["sample", "token"], weighting: str, indices: list[int]
) -> None:
    alone = sum(by_definition(i, normalization, weighting, **MASKS) for i in indices)
    count = len(indices) if normalization == "sample" else sum(batch_of(indices).target_lengths)
    for layout in LAYOUTS:
        loss = loss_of(batch_of(indices, layout), weighting=weighting, normalization=normalization, **MASKS)
        assert float(loss.total) == pytest.approx(alone, rel=1e-6)  # masks are stored in float32
        assert loss.count == count


def test_sample_counts_every_sample_the_same_and_token_every_token() -> None:
    """An error of 1 everywhere: each mean is 1, each sum is its number of tokens."""
    batch = batch_of([0, 2, 4])
    flow = flow_of(batch)
    outputs = torch.zeros(batch.latents.shape, dtype=torch.float64)
    outputs.flatten(0, 1)[batch.target_index] = flow.velocity + 1
    sample, token = (velocity_loss(outputs, batch, flow, normalization=n) for n in NORMALIZATIONS)
    assert float(sample.total) == pytest.approx(3) and sample.count == 3
    assert float(token.total) == pytest.approx(24 + 4 + 24) and token.count == 24 + 4 + 24


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("junk", [1e3, float("nan"), float("inf")])
def test_padding_and_control_tokens_never_enter(
    normalization: Literal["sample", "token"], layout: Layout, junk: float
) -> None:
    batch = batch_of([0, 1, 2, 3], layout)
    others = torch.ones(batch.latents.shape[:2], dtype=torch.bool)
    others.flatten()[batch.target_index] = False
    assert others.any()
    results = []
    for filled in (False, True):
        outputs = outputs_of(batch)
        if filled:
            outputs[others] = junk
        outputs.requires_grad_()
        loss = loss_of(batch, outputs, normalization=normalization, **MASKS)
        loss.total.backward()
        assert outputs.grad is not None and not outputs.grad[others].any()
        assert outputs.grad[~others].any(dim=-1).all()
        results.append((loss.total.detach(), outputs.grad))
    assert all(torch.equal(plain, junked) for plain, junked in zip(*results, strict=True))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_masks_weigh_the_numerator_only(normalization: Literal["sample", "token"]) -> None:
    batch = batch_of([1, 0])  # the first has a mask
    plain = loss_of(batch, normalization=normalization)
    for factor in (0.5, 4.0):
        weighed = loss_of(batch, normalization=normalization, foreground=factor, background=factor)
        assert weighed.count == plain.count
        only_second = loss_of(batch_of([0]), normalization=normalization).total
        first = plain.total - only_second
        torch.testing.assert_close(weighed.total, factor * first + only_second, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_weigh_the_numerator_only(normalization: Literal["sample", "token"], layout: Layout) -> None:
    indices, weights = [0, 1, 2, 3], [1.0, 0.25, 3.0, 1.0]
    weighed = loss_of(batch_of(indices, layout, weights), weighting="cosmap", normalization=normalization, **MASKS)
    alone = [by_definition(i, normalization, "cosmap", **MASKS) for i in indices]
    expected = sum(weight * loss for weight, loss in zip(weights, alone, strict=True))
    assert float(weighed.total) == pytest.approx(expected, rel=1e-6)
    assert float(weighed.total) != pytest.approx(sum(alone), rel=1e-3)
    assert weighed.count == loss_of(batch_of(indices, layout), normalization=normalization).count


def test_a_masks_ends_are_exactly_the_two_weights() -> None:
    batch = batch_of([1])
    flow = flow_of(batch)
    for share, weights in ((1.0, {"foreground": 0.1}), (0.0, {"background": 0.1})):
        ended = replace(batch, edit_mask=torch.full_like(batch.edit_mask, share))
        found = velocity_loss(outputs_of(batch), ended, flow, normalization="token", **weights).total
        plain = velocity_loss(outputs_of(batch), batch, flow, normalization="token").total
        torch.testing.assert_close(found, float(torch.tensor(0.1)) * plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_filler_is_left_out_and_its_nan_does_not_leak(
    normalization: Literal["sample", "token"], layout: Layout
) -> None:
    batch = batch_of([0, 1, 2], layout, weights=[1.0, 0.0, 1.0])
    lengths = list(batch.target_lengths)
    outputs = outputs_of(batch)
    outputs.flatten(0, 1)[batch.target_index.split(lengths)[1]] = float("nan")
    outputs.requires_grad_()
    loss = loss_of(batch, outputs, normalization=normalization, **MASKS)
    kept = loss_of(batch_of([0, 2], layout), normalization=normalization, **MASKS)
    torch.testing.assert_close(loss.total, kept.total, rtol=1e-12, atol=0)
    assert loss.count == kept.count
    loss.total.backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()
    first, filler, last = outputs.grad.flatten(0, 1)[batch.target_index].split(lengths)
    assert first.any() and last.any() and not filler.any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_batch_of_fillers_gives_zero_and_zero_gradients(normalization: Literal["sample", "token"]) -> None:
    batch = batch_of([0], weights=[0.0])
    layer = torch.nn.Linear(CHANNELS, CHANNELS, dtype=torch.float64)
    loss = loss_of(batch, layer(batch.latents.double()), normalization=normalization)
    assert loss.total.item() == 0 and loss.count == 0
    loss.total.backward()
    gradients = [p.grad for p in layer.parameters()]
    assert all(g is not None and not g.any() for g in gradients)  # a rank without them would hold up all others


def test_the_error_is_taken_in_the_targets_precision() -> None:
    batch = batch_of([0, 1])
    outputs = outputs_of(batch).bfloat16()
    assert loss_of(batch, outputs, normalization="sample").total.dtype == torch.float64
    whole = loss_of(batch, outputs.double(), normalization="sample").total
    assert torch.equal(loss_of(batch, outputs, normalization="sample").total, whole)
