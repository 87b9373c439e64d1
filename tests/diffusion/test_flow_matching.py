"""Sigmas, noise and interpolant against closed forms and the stock scheduler, in any batch and any layout."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from mixres.batch import Batch, FlowSample
from mixres.data.collate import collate
from mixres.data.plan import Layout
from mixres.diffusion.flow_matching import (
    TimestepSampler,
    fixed_flow_sample,
    resolution_shift,
    sample_generator,
    shifted,
)
from support.steps import LAYOUTS, SHIFT, flow_of, make_sample, microbatch

SIGMAS = (0.1, 0.5, 1.0)


def fixed_of(batch: Batch, sigma: float, keys: Sequence[str] | None = None, **kw: Any) -> FlowSample:
    kw = {"dtype": torch.float64} | kw
    return fixed_flow_sample(batch, keys=keys or [f"key-{i}" for i in batch.indices], sigma=sigma, **kw)


def by_sample(batch: Batch, flow: FlowSample) -> dict[int, tuple[Tensor, ...]]:
    """Of each sample: sigma, noisy target tokens, velocity."""
    lengths = list(batch.target_lengths)
    noisy = flow.noisy_latents.flatten(0, 1)[batch.target_index].split(lengths)
    parts = zip(flow.sigmas, noisy, flow.velocity.split(lengths), strict=True)
    return dict(zip(batch.indices, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "draw",
    [
        partial(flow_of, step=3),
        partial(flow_of, step=3, density="uniform", shift="constant"),
        *(partial(fixed_of, sigma=sigma) for sigma in SIGMAS),
    ],
)
def test_a_samples_draws_do_not_depend_on_its_batch(draw: Callable[..., FlowSample], dtype: torch.dtype) -> None:
    alone = {i: by_sample(b, draw(b, dtype=dtype))[i] for i in range(6) if (b := microbatch([i]))}
    for indices in ([0, 1, 2, 3, 4, 5], [3, 0], [4, 2, 1, 0]):
        for layout in LAYOUTS:
            batch = microbatch(indices, layout)
            for i, parts in by_sample(batch, draw(batch, dtype=dtype)).items():
                assert all(torch.equal(a, b) for a, b in zip(parts, alone[i], strict=True)), (i, indices, layout)


def test_draws_change_with_seed_step_and_sample_and_with_nothing_else() -> None:
    batch = collate([make_sample(0)] * 2, indices=[1, 5], weights=[1.0] * 2, layout="padded")
    state = torch.get_rng_state()
    sigmas = {(seed, step): flow_of(batch, seed=seed, step=step).sigmas for seed in (0, 1) for step in (0, 1, 2)}
    assert torch.cat(list(sigmas.values())).unique().numel() == 2 * 6
    torch.manual_seed(1)
    assert torch.equal(flow_of(batch, seed=1, step=2).sigmas, sigmas[1, 2])
    torch.set_rng_state(state)
    flow_of(batch)
    assert torch.equal(torch.get_rng_state(), state)
    keys = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (2**63 - 1, 10**9, 10**9))
    noise = [torch.randn(3, generator=sample_generator(*key)) for key in keys]
    assert torch.stack(noise).unique().numel() == 15


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_interpolant_and_velocity(layout: Layout, stored: torch.dtype) -> None:
    """x_sigma = (1 - sigma) data + sigma noise, and its derivative; controls and padding stay as they are."""
    batch = microbatch([0, 1, 2, 3], layout)
    batch = replace(batch, latents=batch.latents.to(stored))
    original = batch.latents.flatten(0, 1).double()
    flow = flow_of(batch)
    assert {t.dtype for t in (flow.noisy_latents, flow.sigmas, flow.velocity)} == {torch.float64}
    before, after = batch.latents.flatten(0, 1).double(), flow.noisy_latents.flatten(0, 1)
    assert torch.equal(before, original), "the batch itself is not written to"
    others = torch.ones(len(before), dtype=torch.bool).index_fill(0, batch.target_index, value=False)
    assert others.any()
    assert torch.equal(after[others], before[others])
    clean, noisy = before[batch.target_index], after[batch.target_index]
    sigma = flow.sigmas.repeat_interleave(torch.tensor(batch.target_lengths))[:, None]
    noise = noisy + (1 - sigma) * flow.velocity
    torch.testing.assert_close(noisy, (1 - sigma) * clean + sigma * noise, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow.velocity, noise - clean, rtol=0, atol=1e-14)
    for index, tokens in zip(batch.indices, noise.split(list(batch.target_lengths)), strict=True):
        generator = sample_generator(0, 0, index)
        torch.randn(1, generator=generator)  # sigma
        drawn = torch.randn(tokens.shape, generator=generator)
        torch.testing.assert_close(tokens, drawn.double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tokens", [1, 256, 1000, 4096, 8192, 20_000])
def test_resolution_shift_is_the_stock_schedulers(tokens: int) -> None:
    mu = calculate_shift(tokens, *SHIFT.values())
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    sigma = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    ours = shifted(sigma, resolution_shift(tokens, SHIFT))
    torch.testing.assert_close(ours, scheduler.time_shift(mu, 1.0, sigma), rtol=1e-13, atol=0)
    assert shifted(torch.tensor(0.0), 3.0) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift": "none", "logit_mean": -0.7, "logit_std": 0.5},
        {"shift": "none", "density": "uniform"},
        {"shift": "none", "density": "mode"},
        {"density": "mode", "mode_scale": -0.9},
        {"shift": "constant"},
        {"shift": "constant", "shift_value": 0.3},
    ],
)
def test_sigmas_are_drawn_from_the_density_and_shifted_as_configured(settings: dict[str, Any]) -> None:
    """The densities are those of `diffusers`."""
    batch, t = microbatch(range(6)), TimestepSampler(**settings)
    found = flow_of(batch, seed=3, step=2, dtype=torch.float32, **settings).sigmas
    assert found.min() >= 0 and found.max() <= 1
    for sigma, index, tokens in zip(found, batch.indices, batch.target_lengths, strict=True):
        draw = sample_generator(3, 2, index)
        (drawn,) = compute_density_for_timestep_sampling(
            t.density, 1, t.logit_mean, t.logit_std, t.mode_scale, generator=draw
        )
        shifts = {"resolution": resolution_shift(tokens, SHIFT), "constant": t.shift_value, "none": 1}
        torch.testing.assert_close(sigma, shifted(drawn, shifts[t.shift]))


def test_fixed_noise_is_a_function_of_key_and_sigma() -> None:
    state, noises = torch.get_rng_state(), []
    batch, clean = microbatch([4]), make_sample(4).target_latents.double()
    for key in "ab":
        for s in SIGMAS:
            sigma, noisy, velocity = by_sample(batch, fixed_of(batch, s, [key]))[4]
            assert sigma == s
            torch.testing.assert_close(noisy - sigma * velocity, clean, rtol=0, atol=1e-6)
            noises.append((velocity + clean).flatten())
    assert 0.9 < float(torch.cat(noises).std()) < 1.1
    noises.append((flow_of(batch).velocity + clean).flatten())
    assert torch.cat(noises).unique().numel() == sum(map(len, noises)), "another key or sigma, or training: other noise"
    assert torch.equal(torch.get_rng_state(), state)
