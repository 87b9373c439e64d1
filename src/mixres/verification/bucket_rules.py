"""What three trainers with aspect-ratio buckets make of an image's size, and of a bucket that fills no batch.

Promise: their published arithmetic with their defaults, written anew, and the middle of the image where they crop.
Their pixels are of models with 16 pixels a token: 64, 16 and 32 of them are 4, 1 and 2 tokens here, of any base.

Sources, all of 2026: `bghira/SimpleTuner` bc8e6ab (`helpers/multiaspect/image.py`, `image_manipulation/
training_sample.py`, `multiaspect/sampler.py`; `crop: false`, the default of its Qwen-Image-Edit guide),
`kohya-ss/musubi-tuner` 30c658c (`dataset/bucket.py`, `media_utils.py`), `ostris/ai-toolkit` 27a03a9
(`toolkit/buckets.py`, `dataloader_mixins.py`).

Batches. SimpleTuner fills the last batch of a bucket with other images of that bucket; a bucket under one batch it
refuses, unless `--allow_dataset_oversubscription` repeats its images, as here. musubi-tuner keeps a batch that is not
full. ai-toolkit fills it with its own images again; which images go together is drawn once for the whole run.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from PIL import Image

from mixres.geometry import Size

Fill = Literal["bucket", "rest", "none"]  # a short batch: with others of its bucket, with itself again, not at all


class Fit(NamedTuple):
    """An image is resized to `scaled`; `bucket` is cut out of its middle."""

    scaled: Size
    bucket: Size

    @property
    def cropped(self) -> float:
        """Fraction of the image's area that is cut off."""
        return 1 - self.bucket.width * self.bucket.height / (self.scaled.width * self.scaled.height)

    def apply(self, image: Image.Image, filters: tuple[Image.Resampling, Image.Resampling]) -> Image.Image:
        """The image as it is trained; `filters` to reduce and to enlarge."""
        if image.size != self.scaled:
            larger = self.scaled.width > image.width or self.scaled.height > image.height
            image = image.resize(self.scaled, filters[larger])
        left, top = (whole - part for whole, part in zip(self.scaled, self.bucket, strict=True))
        corner = left // 2, top // 2
        return image.crop((*corner, corner[0] + self.bucket.width, corner[1] + self.bucket.height))


class Rule(NamedTuple):
    """How a trainer fits images of all sizes into buckets; `fits(sizes, side, step)`, area and steps in pixels."""

    fits: Callable[[Sequence[Size], int, int], list[Fit]]
    step_tokens: int  # sides of buckets are multiples of so many
    shrinks_only: bool  # `side`, of a square, is the largest area; else that of every bucket
    own_control: bool  # a control is scaled to cover the bucket by itself; else to `scaled` of its target
    fill: Fill
    filters: tuple[Image.Resampling, Image.Resampling]
    fixed_batches: bool = False


def simpletuner(sizes: Sequence[Size], side: int, step: int) -> list[Fit]:
    """Every image gets the area of `side` squared; the first image of a rounded aspect decides its bucket."""
    known: dict[float, Size] = {}
    edge = _round(side, step)
    return [_simpletuner(size, edge, step, known) for size in sizes]


def _simpletuner(size: Size, edge: int, step: int, known: dict[float, Size]) -> Fit:
    aspect, ratio = round(size.width / size.height, 2), size.width / size.height
    if size.width == size.height:
        return Fit(Size(edge, edge), Size(edge, edge))
    bucket = Size(_round(edge * math.sqrt(aspect), step), _round(edge / math.sqrt(aspect), step))
    width, height = bucket
    if width < height:
        height = int(width / ratio)
    else:
        width = int(height * ratio)
    bucket = known.setdefault(round(bucket.width / bucket.height, 2), bucket)
    if bucket.width > width:
        width, height = bucket.width, height + int((bucket.width - width) / ratio)
    elif bucket.height > height:
        width, height = width + int((bucket.height - height) * ratio), bucket.height
    # Its integers may end a pixel short of the bucket, whose crop would then be smaller.
    return Fit(Size(max(width, bucket.width), max(height, bucket.height)), bucket)


def musubi_tuner(sizes: Sequence[Size], side: int, step: int) -> list[Fit]:
    """Widths and heights from half of `side` on, of at most its square in area; the nearest aspect, as a quotient."""
    first = max(side // 2 // step * step, step)
    widths = range(first, side + step, step)
    pairs = [(width, max(side * side // width // step * step, step)) for width in widths]
    buckets = sorted({Size(*pair) for pair in pairs} | {Size(*reversed(pair)) for pair in pairs})
    return [
        cover(size, min(buckets, key=lambda b: abs(b.width / b.height - size.width / size.height))) for size in sizes
    ]


def cover(size: Size, bucket: Size) -> Fit:
    """The smallest size of this aspect that covers the bucket, to the nearest pixel: musubi-tuner's."""
    scale = max(bucket.width / size.width, bucket.height / size.height)
    return Fit(Size(*(int(length * scale + 0.5) for length in size)), bucket)


def ai_toolkit(sizes: Sequence[Size], side: int, step: int) -> list[Fit]:
    """Each image's own size, reduced to the square of `side` at most, its sides rounded to keep the area."""
    return [_ai_toolkit(size, side * side, step) for size in sizes]


def _ai_toolkit(size: Size, most: int, step: int) -> Fit:
    pixels = size.width * size.height
    area = min(pixels, most)
    raw = [length * (area / pixels) ** 0.5 / step for length in size]
    down, up = ([rounded(side) * step for side in raw] for rounded in (math.floor, math.ceil))
    choices = [Size(width, height) for width in (down[0], up[0]) for height in (down[1], up[1])]
    choices = [one for one in choices if min(one) > 0 and one.width * one.height <= most]
    bucket = min(choices, key=lambda one: abs(one.width * one.height - area), default=None)
    bucket = bucket or Size(*(max(step, length) for length in down))
    scale = max(bucket.width / size.width, bucket.height / size.height)
    return Fit(Size(*(math.ceil(length * scale) for length in size)), bucket)


def _round(length: float, step: int) -> int:
    return max(round(length / step) * step, step)


_LANCZOS, _BOX, _BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.BICUBIC
RULES = {
    "simpletuner": Rule(simpletuner, 4, False, False, "bucket", (_LANCZOS, _LANCZOS)),
    "musubi_tuner": Rule(musubi_tuner, 1, False, True, "none", (_BOX, _LANCZOS)),  # BOX: INTER_AREA there
    "ai_toolkit": Rule(ai_toolkit, 2, True, False, "rest", (_BICUBIC, _BICUBIC), fixed_batches=True),
}
