"""Random samples with the sizes of real edit data, for measuring without a data set.

Promise: a function of (configuration, count, seed). Sizes are drawn, then go through the same rules as real images, so
the configuration's limits hold. Cost: one Gaussian draw a sample.

Drawn are: the source's aspect, log-uniform in [1/2, 2]; its area, log-uniform in [1/4, 2] x `max_pixels` (what is over
is scaled down to it); the control's aspect, the target's own for half of the samples; the words, 10 to 150 tokens,
behind the control's tokens in the text encoder (28 x 28 pixels each).
"""

import math
import random

import torch

from mixres.batch import Sample
from mixres.config import Config
from mixres.geometry import Grid, Size, control_area, control_size, target_size, token_grid

_TEXT_PIXELS = 28 * 28


def synthetic_samples(
    config: Config, count: int, *, channels: int, text_width: int, pixels_per_token: int
) -> list[Sample]:
    """`count` samples in `model.dtype`: latents `(S, channels)`, prompt embeddings `(T, text_width)`."""
    draw = random.Random(config.train.seed)
    noise = torch.Generator().manual_seed(config.train.seed)
    dtype = getattr(torch, config.model.dtype)

    def gaussian(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=noise).to(dtype)

    samples = []
    for number in range(count):
        target, control = draw_sizes(config, draw, pixels_per_token)
        empty = control.tokens * pixels_per_token**2 // _TEXT_PIXELS
        text = draw.randint(10, 150) + empty
        samples.append(
            Sample(
                name=f"synthetic-{number}",
                target_latents=gaussian(target.tokens, channels),
                control_latents=(gaussian(control.tokens, channels),),
                prompt_embeds=gaussian(text, text_width),
                img_shapes=(target, control),
                empty_embeds=gaussian(max(1, empty), text_width) if config.data.caption_dropout else None,
            )
        )
    return samples


def draw_sizes(config: Config, draw: random.Random, pixels_per_token: int) -> tuple[Grid, Grid]:
    """Token grids of one target and its control."""
    rule = config.data.resize.target
    aspect = 2 ** draw.uniform(-1, 1)
    pixels = rule.max_pixels * 2 ** draw.uniform(-2, 1)
    target = target_size(
        _size(pixels, aspect), max_pixels=rule.max_pixels, multiple_of=rule.multiple_of, upscale=rule.upscale
    )
    area = control_area(config.data.resize.control.area, target)
    own = draw.random() < 0.5
    control = control_size(_size(area, 2 ** draw.uniform(-1, 1) if own else aspect), area=area)
    return token_grid(target, pixels_per_token), token_grid(control, pixels_per_token)


def _size(pixels: float, aspect: float) -> Size:
    width = math.sqrt(pixels * aspect)
    return Size(max(1, round(width)), max(1, round(width / aspect)))
