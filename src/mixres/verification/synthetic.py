"""Random samples with the sizes of real edit data, for measuring without a data set.

Promise: samples are a function of configuration (with its seed), family and count. Sizes are drawn, then go through
the same rules as real images, so the configuration's limits hold. Cost: one Gaussian draw a sample.

These are drawn: the source's aspect, log-uniform in [1/2, 2]; its area, log-uniform in [1/4, 2] x `max_pixels` (larger
ones are scaled down); a control's aspect, for half of them the target's own; the prompt, 10 to 150 tokens behind the
controls' tokens in the text encoder (28 x 28 pixels each), unless the family pads prompts to one length. The numbers of
controls that the family takes alternate, up to 3 where it takes any.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from mixres.batch import Batch, Sample
from mixres.config.schema import Config
from mixres.data.collate import collate
from mixres.geometry import Grid, Size, control_area, target_size
from mixres.models.family import Family
from mixres.preprocessing.training_data import stated_areas

_TEXT_PIXELS = 28 * 28
_MAX_CONTROLS = 3
_PROMPT = 150  # tokens of the longest prompts that are drawn

SampleTokens = tuple[tuple[Grid, ...], int]  # of one sample: token grids, target first, and text tokens


def synthetic_samples(config: Config, family: Family, count: int) -> list[Sample]:
    """`count` samples in `model.dtype`, with the token widths of the base and as many controls as the family takes."""
    draw = random.Random(config.train.seed)
    noise = torch.Generator().manual_seed(config.train.seed)
    pixels_per_token = family.pixels_per_token()
    text_area = stated_areas(config, family).get("text_area")
    fewest, most = family.controls
    counts = (_MAX_CONTROLS if most is None else most) - fewest + 1

    samples = []
    for number in range(count):
        grids = draw_sizes(config, draw, family, controls=fewest + number % counts)
        areas = [text_area if isinstance(text_area, int) else g.tokens * pixels_per_token**2 for g in grids[1:]]
        empty = sum(pixels // _TEXT_PIXELS for pixels in areas)
        text, empty = (family.padded_text,) * 2 if family.padded_text else (draw.randint(10, _PROMPT) + empty, empty)
        sample = noise_sample(config, family, f"synthetic-{number}", grids, text, noise=noise)
        if config.data.caption_dropout:
            width, dtype = sample.prompt_embeds.shape[1], sample.prompt_embeds.dtype
            without = _gaussian(max(1, empty), width, dtype, noise)
            sample = replace(sample, empty_embeds=without, empty_pooled_embeds=_pooled(config, family, noise))
        samples.append(sample)
    return samples


def noise_sample(
    config: Config, family: Family, name: str, grids: tuple[Grid, ...], text: int, *, noise: torch.Generator
) -> Sample:
    """A sample with these token grids, target first, and `text` text tokens; its values are drawn from `noise`."""
    (channels, text_width), dtype = family.token_widths(), getattr(torch, config.model.dtype)
    target, *controls = (_gaussian(grid.tokens, channels, dtype, noise) for grid in grids)
    embeds = _gaussian(text, text_width, dtype, noise)
    pooled = _pooled(config, family, noise)
    # Where controls stand within the text, all of it is behind them.
    before = (0,) * len(controls)
    return Sample(name, target, tuple(controls), embeds, grids, pooled_embeds=pooled, text_before=before)


def noise_batch(config: Config, family: Family, microbatch: Sequence[SampleTokens]) -> Batch:
    """A microbatch of these sizes; its values are noise."""
    draw = partial(noise_sample, config, family, noise=torch.Generator().manual_seed(config.train.seed))
    samples = [draw(f"largest-{number}", *sizes) for number, sizes in enumerate(microbatch)]
    return collate(samples, indices=range(len(samples)), weights=[1.0] * len(samples), layout=config.batch.layout)


def largest_microbatch(config: Config, family: Family) -> list[SampleTokens]:
    """As many of the largest samples as `batch` allows: a square target of `max_pixels` with a control where the family
    takes one, and a prompt of 150 tokens, or as many as every prompt has.
    """
    rule, control_rule = config.data.resize.target, config.data.resize.control
    target = target_size(_size(rule.max_pixels, 1), **rule.model_dump())
    sources = [_size(control_area(control_rule.area, target), 1)] * (family.controls[1] != 0)
    aligned = [control_rule.align != "never"] * len(sources)
    sizes = family.control_sizes(target, sources, stated_areas(config, family), aligned)
    grids = family.grids(target, sizes)
    seen = 0 if family.prompts_alone else sum(size.width * size.height // _TEXT_PIXELS for size in sizes.text)
    text = family.padded_text or _PROMPT + seen
    tokens = sum(grid.tokens for grid in grids) + text
    return [(grids, text)] * max(1, min(config.batch.samples_per_step, config.batch.max_tokens // tokens))


def _pooled(config: Config, family: Family, noise: torch.Generator) -> torch.Tensor | None:
    """`(W,)` of a prompt, where the transformer takes one."""
    width = family.pooled_width()
    return _gaussian(1, width, getattr(torch, config.model.dtype), noise)[0] if width else None


def _gaussian(rows: int, columns: int, dtype: torch.dtype, noise: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=noise).to(dtype)


def draw_sizes(config: Config, draw: random.Random, family: Family, *, controls: int) -> tuple[Grid, ...]:
    """Token grids of one target and its controls."""
    rule, control_rule = config.data.resize.target, config.data.resize.control
    aspect = 2 ** draw.uniform(-1, 1)
    target = target_size(_size(rule.max_pixels * 2 ** draw.uniform(-2, 1), aspect), **rule.model_dump())
    area, sources, aligned = control_area(control_rule.area, target), [], []
    for _ in range(controls):
        own = draw.random() < 0.5
        sources.append(_size(area, 2 ** draw.uniform(-1, 1) if own else aspect))
        aligned.append(control_rule.align == "always" or (control_rule.align == "auto" and not own))
    return family.grids(target, family.control_sizes(target, sources, stated_areas(config, family), aligned))


def _size(pixels: float, aspect: float) -> Size:
    width = math.sqrt(pixels * aspect)
    return Size(max(1, round(width)), max(1, round(width / aspect)))
