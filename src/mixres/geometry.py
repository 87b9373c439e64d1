"""Sizes, grids and token order: pixels <-> token grid <-> packed latents.

Promise: every size in mixres is computed here, once, with named fields (a swapped width and height cannot type-check
its way through). Cost: integer arithmetic, and one copy where latents are packed or unpacked.

Legend: C latent channel, P = 4 * C packed channel, h x w token grid, S = h * w tokens.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Align = Literal["auto", "always", "never"]  # when a control gets the token grid of its target
PATCH = 2  # latent pixels along a side of one token; `pack_latents` and the pixel arithmetic share it


class Size(NamedTuple):
    """Width and height in pixels, in PIL's order."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Grid(NamedTuple):
    """Token grid of one image: frames (1 for a still image), rows, columns. Equal to the `(1, h, w)` of diffusers."""

    frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns


def token_count(grids: Sequence[tuple[int, int, int]]) -> int:
    """Tokens of all images of one sample."""
    return sum(math.prod(grid) for grid in grids)


def target_size(source: Size, *, max_pixels: int, multiple_of: int, upscale: bool = False) -> Size:
    """Size of a training target: native, downscaled only above `max_pixels`, sides rounded to `multiple_of`.

    The image is resized to this size as a whole: nothing is cropped, and the aspect changes by rounding alone. With
    `upscale` a smaller image is enlarged to `max_pixels` too. The area never exceeds `max_pixels` unless one side
    has already reached `multiple_of`.
    """
    scale = target_scale(source, max_pixels=max_pixels, upscale=upscale)
    size = Size(*(_round_to(side * scale, multiple_of) for side in source))
    if size.width * size.height > max_pixels:
        size = Size(*(max(multiple_of, int(side * scale) // multiple_of * multiple_of) for side in source))
    return size


def target_scale(source: Size, *, max_pixels: int, upscale: bool = False) -> float:
    """What the sides of a target are multiplied by before they are rounded."""
    scale = control_scale(source, area=max_pixels)
    return scale if upscale else min(scale, 1.0)


def control_scale(source: Size, *, area: int) -> float:
    """What the sides of a control are multiplied by before they are rounded."""
    return math.sqrt(area / (source.width * source.height))


def control_size(source: Size, *, area: int, multiple_of: int = 32) -> Size:
    """Size that the stock Qwen-Image-Edit pipelines give a control image: `area` pixels at the source's aspect.

    Same arithmetic as `calculate_dimensions` in diffusers (pipeline_qwenimage_edit.py), so that training sees what
    sampling sees; a side that rounds to 0 there is one `multiple_of` here.
    """
    ratio = source.width / source.height
    width = math.sqrt(area * ratio)
    return Size(_round_to(width, multiple_of), _round_to(width / ratio, multiple_of))


def control_area(rule: int | Literal["target"], target: Size) -> int:
    """Pixels of a control by `data.resize.control.area`: a number, or as many as its own target has."""
    return target.width * target.height if rule == "target" else rule


def same_aspect(one: Size, other: Size, pixels: int = 1) -> bool:
    """Whether one image may be the other one scaled, each side then rounded up, down or to the nearest.

    Rounding to multiples of `pixels` moves a side by less than that, so w x h and W x H differ by
    |w H - h W| <= pixels * max(w, h, W, H) at most.
    """
    return abs(one.width * other.height - one.height * other.width) <= pixels * max(*one, *other)


def aligned_controls(rule: Align, target: Size, controls: Sequence[Size], own: bool | None = None) -> tuple[bool, ...]:
    """Which controls get the token grid of their target, from the sizes of the files.

    `rule` is `data.resize.control.align`; `own` is what the record itself says, for all its controls.
    """
    if own is not None or rule != "auto":
        return (rule == "always" if own is None else own,) * len(controls)
    return tuple(same_aspect(target, control) for control in controls)


def _round_to(side: float, multiple_of: int) -> int:
    return max(multiple_of, round(side / multiple_of) * multiple_of)


def token_grid(size: Size, pixels_per_token: int) -> Grid:
    """Token grid of an image whose sides are multiples of `pixels_per_token` (2 x the VAE's scale factor)."""
    assert size.width % pixels_per_token == 0 and size.height % pixels_per_token == 0, (size, pixels_per_token)
    return Grid(1, size.height // pixels_per_token, size.width // pixels_per_token)


def pack_latents(latents: Tensor) -> Tensor:
    """`(C, 1, 2h, 2w)` -> `(h * w, 4 * C)`: one token per 2x2 patch, row-major, channel outermost within a token.

    The order of `_pack_latents` in the Qwen-Image pipelines.
    """
    channels, frames, height, width = latents.shape
    assert frames == 1 and height % PATCH == 0 and width % PATCH == 0, tuple(latents.shape)
    patches = latents.reshape(channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(1, 3, 0, 2, 4).reshape((height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack_latents(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Inverse of `pack_latents`: `(h * w, 4 * C)` -> `(C, 1, 2h, 2w)`."""
    _, rows, columns = grid
    channels = tokens.shape[-1] // (PATCH * PATCH)
    patches = tokens.reshape(rows, columns, channels, PATCH, PATCH).permute(2, 0, 3, 1, 4)
    return patches.reshape(channels, 1, rows * PATCH, columns * PATCH)
