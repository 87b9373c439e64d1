"""Sampling: images of any sizes, denoised in one packed forward call a step, each as the stock pipeline makes it alone.

    x_0 = noise,   x_(i+1) = x_i + (sigma_(i+1) - sigma_i) v_hat(x_i, sigma_i)        by the pipeline's own scheduler

Promise: every image has its own noise, its own sigmas with the shift of its size, its own prompt, controls and
guidance; nothing of it depends on the images beside it. The prompt that guidance leads away from is one more row of
the same call. Embeddings and latents of controls are those of training. Cost: the transformer once a step and
microbatch; no text encoder.

Source: Euler's method on the rectified flow, Liu et al. 2022 (arXiv 2209.03003).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mixres.batch import Batch, Sample, TextEmbeds
from mixres.data.collate import collate
from mixres.diffusion.flow_matching import resolution_shift
from mixres.geometry import Size, token_count
from mixres.models.family import ControlSizes, Family


@dataclass(frozen=True)
class ImageInputs:
    """What one image is made from."""

    sample: Sample  # its target is the noise that is denoised
    negative: Sample | None = None  # the same, with the prompt to lead away from
    guidance: float | None = None  # above 1 with a negative prompt, or what the transformer embeds

    @property
    def rows(self) -> tuple[Sample, ...]:
        """Those of the transformer's batch."""
        return (self.sample,) if self.negative is None else (self.sample, self.negative)

    @property
    def tokens(self) -> int:
        """Tokens that the transformer computes in one step."""
        return sum(token_count(row.img_shapes) + len(row.prompt_embeds) for row in self.rows)


def from_noise(family: Family, pipeline: Any, sample: Sample, *, seed: int) -> Sample:
    """The sample with the noise of this seed as its target."""
    noise = family.noise(sample.img_shapes[0], seed=seed, dtype=pipeline.transformer.dtype)
    return replace(sample, target_latents=noise)


def image_inputs(
    family: Family,
    pipeline: Any,
    *,
    controls: Sequence[Image.Image],
    text: TextEmbeds,
    size: Size,
    sizes: ControlSizes,
    seed: int,
    negative: TextEmbeds | None = None,
    guidance: float | None = None,
) -> ImageInputs:
    """Those of an image of `size` pixels, its controls at `sizes`; `text` is of these very controls.

    With `guidance` above 1 it leads away from `negative`, unless the transformer embeds it.
    """
    embedded = family.embedded_guidance()
    guidance = guidance or (embedded.sampling if embedded else 1.0)
    assert (negative is not None) == (embedded is None and guidance > 1), guidance
    grids = family.grids(size, sizes)
    latents = tuple(family.control_latents(pipeline, controls, sizes))
    noise = family.noise(grids[0], seed=seed, dtype=pipeline.transformer.dtype)
    sample = Sample("", noise, latents, text.tokens, grids).with_text(text)
    return ImageInputs(sample, negative and sample.with_text(negative), guidance)


def microbatches(tokens: Sequence[int], max_tokens: int) -> Iterator[range]:
    """Positions of neighbours that are made together: as many as fit into `max_tokens`, at least one."""
    first = total = 0
    for position, count in enumerate(tokens):
        if position > first and total + count > max_tokens:
            yield range(first, position)
            first, total = position, 0
        total += count
    if tokens:
        yield range(first, len(tokens))


def make_images(
    family: Family,
    pipeline: Any,
    images: Sequence[ImageInputs],
    *,
    steps: int,
    stepped: Callable[[float], None] = lambda part: None,
) -> list[Image.Image]:
    """The images, all in one batch; the transformer's mode and its weights are left as they are.

    `pipeline` is that of `Family.load_sampling_pipeline`, around the patched transformer. `steps` is at least 2: the
    terminal shift of some schedulers divides by zero on one. `stepped` gets the part of all steps that each was.
    """
    assert steps >= 2, steps
    transformer = pipeline.transformer
    was_training = transformer.training
    transformer.eval()
    try:
        latents = _denoise(family, pipeline, images, steps, stepped)
    finally:
        transformer.train(was_training)
    grids = (image.sample.img_shapes[0] for image in images)
    return [family.decode_latents(pipeline, each, grid) for each, grid in zip(latents, grids, strict=True)]


@torch.no_grad()
def _denoise(
    family: Family, pipeline: Any, images: Sequence[ImageInputs], steps: int, stepped: Callable[[float], None]
) -> list[Tensor]:
    """Clean latents `(S, P)` of each image."""
    device = pipeline._execution_device  # not that of its modules where they are offloaded
    rows = [row for image in images for row in image.rows]
    batch = collate(rows, indices=range(len(rows)), weights=[1.0] * len(rows), layout="packed").to(device)
    latents = [image.sample.target_latents.to(device) for image in images]
    schedulers = [_scheduler(family, pipeline, len(each), steps) for each in latents]
    embedded = None if family.embedded_guidance() is None else [image.guidance for image in images]
    guidance = None if embedded is None else torch.tensor(embedded, device=device)
    count = len(schedulers[0].timesteps)
    for step in range(count):
        times = [scheduler.timesteps[step] for scheduler in schedulers]
        velocities = iter(_velocities(family, pipeline.transformer, batch, images, latents, times, guidance))
        for position, (image, scheduler, time) in enumerate(zip(images, schedulers, times, strict=True)):
            velocity = next(velocities)
            if image.negative is not None:
                assert image.guidance is not None
                velocity = family.guide(velocity, next(velocities), image.guidance)
            latents[position] = scheduler.step(velocity, time, latents[position], return_dict=False)[0]
        stepped(1 / count)
    return latents


def _scheduler(family: Family, pipeline: Any, tokens: int, steps: int) -> Any:
    """That of one image of so many tokens."""
    scheduler, sigmas, constants = family.schedule(pipeline, steps)
    mu = math.log(resolution_shift(tokens, constants))
    given = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
    scheduler.set_timesteps(**given, mu=mu, device=pipeline._execution_device)
    scheduler.set_begin_index(0)  # so that it asks no device where it stands
    return scheduler


def _velocities(
    family: Family,
    transformer: Any,
    batch: Batch,
    images: Sequence[ImageInputs],
    latents: Sequence[Tensor],
    times: Sequence[Tensor],
    guidance: Tensor | None,
) -> Sequence[Tensor]:
    """`(S, P)` at the target tokens of each row of the batch."""
    noisy = [x for image, x in zip(images, latents, strict=True) for _ in image.rows]
    counts = torch.tensor([len(image.rows) for image in images], device=batch.latents.device)
    rows = batch.latents.flatten(0, 1)
    rows = rows.index_copy(0, batch.target_index, torch.cat(noisy).to(rows.dtype))
    # In the precision of the latents, as the pipelines hold them.
    sigmas = torch.stack(list(times)).to(latents[0].dtype) / 1000
    sigmas = sigmas.repeat_interleave(counts, output_size=len(noisy))
    if guidance is not None:
        guidance = guidance.repeat_interleave(counts, output_size=len(noisy))
    velocity = family.predict_velocity(transformer, batch, rows.view_as(batch.latents), sigmas, guidance)
    return torch.split(velocity.flatten(0, 1)[batch.target_index], list(batch.target_lengths))
