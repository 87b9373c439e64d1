"""Noise levels, interpolant and velocity target of rectified flow, per sample.

Promise: what a sample gets in a step is a function of (seed, step, sample) alone, drawn on the CPU from a generator of
its own, so neither batching nor the number of devices changes it. For evaluation it is a function of the sample and a
given noise level. Cost: one Gaussian draw per valid target token.

Sources: interpolant and velocity, Liu et al. 2022 (arXiv 2209.03003); noise-level densities and weights, Esser et al.
2024 (arXiv 2403.03206), as `diffusers.training_utils` has them; resolution shift, `calculate_shift` and the
exponential `time_shift` of the Qwen-Image pipelines' scheduler.

Legend: B sample, V valid target token of the batch, P packed channel.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import xxhash
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from mixres.batch import Batch, FlowSample

# The last of the 1000 noise levels that the stock schedulers train on: 1 / sigma^2 has no mean without a smallest one.
SMALLEST_WEIGHTED_SIGMA = 1e-3


@dataclass(frozen=True)
class TimestepSampler:
    """How noise levels are drawn, shifted and weighted; fields as the configuration's `flow` and `loss.weighting`."""

    density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: Literal["resolution", "constant", "none"] = "resolution"
    shift_value: float = 3.0
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"


def sample_generator(seed: int, step: int, index: int) -> torch.Generator:
    """The CPU generator of sample `index` in optimizer step `step`."""
    mixed = xxhash.xxh3_64_intdigest(struct.pack("<QQQ", seed, step, index))
    return torch.Generator().manual_seed(mixed)


def resolution_shift(target_tokens: int, constants: Mapping[str, float]) -> float:
    """exp(mu), with mu linear in the target's token count between the scheduler's two anchor lengths.

    `constants`: base_seq_len, max_seq_len (tokens), base_shift, max_shift, as `calculate_shift` takes them.
    """
    slope = (constants["max_shift"] - constants["base_shift"]) / (constants["max_seq_len"] - constants["base_seq_len"])
    return math.exp(constants["base_shift"] + slope * (target_tokens - constants["base_seq_len"]))


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """`shift * sigma / (1 + (shift - 1) * sigma)`; 1 leaves sigma as it is, larger values move it towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_flow_sample(
    batch: Batch, *, seed: int, step: int, levels: TimestepSampler, constants: Mapping[str, float], dtype: torch.dtype
) -> FlowSample:
    """Noise the batch's target tokens; controls and filler stay. Tensors are on the batch's device, in `dtype`.

    `step` is the optimizer step; `constants` are those of `resolution_shift`.
    """
    sigmas, noises = [], []
    for index, tokens in zip(batch.indices, batch.target_lengths, strict=True):
        generator = sample_generator(seed, step, index)
        sigmas.append(_draw_sigma(generator, tokens, levels, constants))
        noises.append(torch.randn(tokens, batch.latents.shape[-1], generator=generator))
    sigma = torch.cat(sigmas).to(dtype)
    weights = compute_loss_weighting_for_sd3(levels.weighting, sigmas=sigma.clamp(min=SMALLEST_WEIGHTED_SIGMA))
    return _noised(batch, sigma, torch.cat(noises), weights)


def fixed_flow_sample(batch: Batch, *, keys: Sequence[str], sigma: float, dtype: torch.dtype) -> FlowSample:
    """The batch at the noise level `sigma`, each sample's noise a function of its key and the level; of weight 1."""
    noises = []
    for key, tokens in zip(keys, batch.target_lengths, strict=True):
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{key} {sigma!r}".encode()))
        noises.append(torch.randn(tokens, batch.latents.shape[-1], generator=generator))
    levels = torch.full((len(keys),), sigma, dtype=dtype)
    return _noised(batch, levels, torch.cat(noises), torch.ones_like(levels))


def _noised(batch: Batch, sigma: Tensor, noise: Tensor, weights: Tensor) -> FlowSample:
    """`sigma` and `weights` `(B,)` and `noise` `(V, P)` on the CPU; all that comes back has the dtype of `sigma`."""
    device, dtype = batch.latents.device, sigma.dtype
    noise = noise.to(device=device, dtype=dtype)
    lengths = torch.tensor(batch.target_lengths)
    sigma_per_token = torch.repeat_interleave(sigma, lengths, output_size=len(noise))[:, None].to(device)
    latents = batch.latents.to(dtype)
    rows = latents.flatten(0, 1)
    clean = rows[batch.target_index]
    noisy = rows.index_copy(0, batch.target_index, torch.lerp(clean, noise, sigma_per_token))
    return FlowSample(
        noisy_latents=noisy.view_as(latents),
        sigmas=sigma.to(device),
        velocity=noise - clean,
        weights=weights.to(device=device, dtype=dtype),
    )


def _draw_sigma(
    generator: torch.Generator, target_tokens: int, levels: TimestepSampler, constants: Mapping[str, float]
) -> Tensor:
    """`(1,)` noise level in [0, 1]."""
    sigma: Tensor = compute_density_for_timestep_sampling(
        levels.density,
        batch_size=1,
        logit_mean=levels.logit_mean,
        logit_std=levels.logit_std,
        mode_scale=levels.mode_scale,
        generator=generator,
    )
    if levels.shift == "resolution":
        return shifted(sigma, resolution_shift(target_tokens, constants))
    return shifted(sigma, levels.shift_value) if levels.shift == "constant" else sigma
