"""Rectified flow, per sample: what is drawn, what the model sees and what it is to predict.

    x_sigma = (1 - sigma) x_0 + sigma eps        x_0 clean latents, eps ~ N(0, 1), sigma in [0, 1]
    v       = d x_sigma / d sigma = eps - x_0    the target of the model's prediction v_hat(x_sigma, sigma)

    sigma   = s u / (1 + (s - 1) u)              u from the density, s the shift of the target's resolution

Promise: what a sample gets in a step is a function of (seed, step, sample) alone, drawn on the CPU from a generator of
its own. So neither batching nor the number of devices changes it. For evaluation it is a function of the sample's key
and a given sigma. Cost: one Gaussian draw per valid target token.

Sources: interpolant and velocity, Liu et al. 2022 (arXiv 2209.03003); densities, Esser et al. 2024 (arXiv 2403.03206),
as `diffusers.training_utils` has them; resolution shift, `calculate_shift` and the exponential `time_shift` of the
Qwen-Image pipelines' scheduler.

Legend: B sample, V valid target token of the batch, P packed channel.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import xxhash
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from mixres.batch import Batch, FlowSample


@dataclass(frozen=True)
class TimestepSampler:
    """How sigmas are drawn and shifted; fields as the configuration's `flow`."""

    density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: Literal["resolution", "constant", "none"] = "resolution"
    shift_value: float = 3.0


def sample_generator(seed: int, step: int, index: int) -> torch.Generator:
    """The CPU generator of sample `index` in optimizer step `step`."""
    mixed = xxhash.xxh3_64_intdigest(struct.pack("<QQQ", seed, step, index))
    return torch.Generator().manual_seed(mixed)


def resolution_shift(target_tokens: int, constants: Mapping[str, float]) -> float:
    """exp(mu), with mu linear in the target's token count between the scheduler's two anchor lengths.

    `constants`: base_seq_len, max_seq_len (tokens), base_shift, max_shift, as `calculate_shift` takes them. Where
    there is `long_from`, targets of more tokens have the line of long_base_shift and long_max_shift.
    """
    line = "long_" if target_tokens > constants.get("long_from", math.inf) else ""
    base, top = constants[f"{line}base_shift"], constants[f"{line}max_shift"]
    slope = (top - base) / (constants["max_seq_len"] - constants["base_seq_len"])
    return math.exp(base + slope * (target_tokens - constants["base_seq_len"]))


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """`shift * sigma / (1 + (shift - 1) * sigma)`; 1 leaves sigma as it is, larger values move it towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_flow_sample(
    batch: Batch,
    *,
    seed: int,
    step: int,
    timesteps: TimestepSampler,
    constants: Mapping[str, float],
    dtype: torch.dtype,
) -> FlowSample:
    """Add noise to the batch's target tokens; controls and padding stay. Tensors are on the batch's device, in `dtype`.

    `step` is the optimizer step; `constants` are those of `resolution_shift`.
    """
    sigmas, noises = [], []
    for index, tokens in zip(batch.indices, batch.target_lengths, strict=True):
        generator = sample_generator(seed, step, index)
        sigmas.append(_draw_sigma(generator, tokens, timesteps, constants))
        noises.append(torch.randn(tokens, batch.latents.shape[-1], generator=generator))
    return _interpolate(batch, torch.cat(sigmas).to(dtype), torch.cat(noises))


def fixed_flow_sample(batch: Batch, *, keys: Sequence[str], sigma: float, dtype: torch.dtype) -> FlowSample:
    """The batch at the given `sigma`; each sample's noise is a function of its key and sigma."""
    noises = []
    for key, tokens in zip(keys, batch.target_lengths, strict=True):
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{key} {sigma!r}".encode()))
        noises.append(torch.randn(tokens, batch.latents.shape[-1], generator=generator))
    return _interpolate(batch, torch.full((len(keys),), sigma, dtype=dtype), torch.cat(noises))


def _interpolate(batch: Batch, sigma: Tensor, noise: Tensor) -> FlowSample:
    """The equations above; `sigma` `(B,)` and `noise` `(V, P)` on the CPU. All results have the dtype of `sigma`."""
    device, dtype = batch.latents.device, sigma.dtype
    noise = noise.to(device=device, dtype=dtype)
    lengths = torch.tensor(batch.target_lengths)
    sigma_per_token = torch.repeat_interleave(sigma, lengths, output_size=len(noise))[:, None].to(device)
    latents = batch.latents.to(dtype)
    rows = latents.flatten(0, 1)
    clean = rows[batch.target_index]
    noisy = rows.index_copy(0, batch.target_index, torch.lerp(clean, noise, sigma_per_token))
    return FlowSample(noisy_latents=noisy.view_as(latents), sigmas=sigma.to(device), velocity=noise - clean)


def _draw_sigma(
    generator: torch.Generator, target_tokens: int, timesteps: TimestepSampler, constants: Mapping[str, float]
) -> Tensor:
    """`(1,)` sigma in [0, 1]."""
    sigma: Tensor = compute_density_for_timestep_sampling(
        timesteps.density,
        batch_size=1,
        logit_mean=timesteps.logit_mean,
        logit_std=timesteps.logit_std,
        mode_scale=timesteps.mode_scale,
        generator=generator,
    )
    if timesteps.shift == "resolution":
        return shifted(sigma, resolution_shift(target_tokens, constants))
    return shifted(sigma, timesteps.shift_value) if timesteps.shift == "constant" else sigma
