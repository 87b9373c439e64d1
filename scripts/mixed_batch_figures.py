"""Draws the figures on buckets and batches of docs/multi_resolution.md, and counts the numbers beside them.

Usage: `python scripts/mixed_batch_figures.py`.

Promise: sizes and layouts come from the code that trains; the bucket rule that they are compared with
is that of `inspect`. It takes seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from mixres.batch import Batch, Sample
from mixres.data.collate import collate
from mixres.data.plan import Layout
from mixres.geometry import Size, control_size, target_size, token_grid
from mixres.inspection.buckets import bucket_shapes, crop_loss, nearest
from mixres.verification.batch_diagram import token_layout

IMAGES = Path(__file__).parents[1] / "docs" / "images"
AREA = 1024 * 1024
PIXELS_PER_TOKEN = 16
TEXT_ENCODER_PIXELS = 28 * 28  # of a control that one text token holds


class Pair(NamedTuple):
    """A target, its control, and the prompt in tokens, its template included."""

    name: str
    target: Size
    control: Size
    words: int


BATCH = (
    Pair("phone.jpg", Size(4000, 3000), Size(4000, 3000), 74),
    Pair("web.png", Size(640, 427), Size(640, 427), 95),
    Pair("portrait.jpg", Size(900, 1350), Size(1200, 1200), 70),
    Pair("panorama.jpg", Size(3000, 1000), Size(1500, 1000), 81),
)

SIZES = (
    Size(4000, 3000),
    Size(6000, 4000),
    Size(1920, 1080),
    Size(1080, 2400),
    Size(2048, 858),
    Size(1000, 1000),
    Size(2480, 3508),
    Size(640, 427),
)


class Crop(NamedTuple):
    """What a bucket does to an image: the size of the bucket, and the fraction of pixels that it cuts off."""

    bucket: Size
    lost: float


def bucket_crop(source: Size) -> Crop:
    """What the bucket rule of `mixres.inspection.buckets` does to an image, at 1024 x 1024 pixels of area."""
    bucket = nearest(source, bucket_shapes(AREA))
    return Crop(bucket, crop_loss(source, bucket))


def stretch(source: Size) -> float:
    """How far rounding changes a target's aspect in mixres, as a fraction."""
    size = target_size(source, max_pixels=AREA, multiple_of=16)
    return abs(size.width / size.height / (source.width / source.height) - 1)


def crop_table() -> list[str]:
    """The rows of the page's table."""
    rows = []
    for source in SIZES:
        crop, ours = bucket_crop(source), target_size(source, max_pixels=AREA, multiple_of=16)
        rows.append(f"| {source} | {crop.bucket} | {crop.lost:.1%} | {ours} | {stretch(source):.1%} |")
    return rows


def sample(pair: Pair) -> Sample:
    """As the cache would hold it for Qwen-Image-Edit, with zeros for latents and one channel."""
    sizes = [target_size(pair.target, max_pixels=AREA, multiple_of=16), control_size(pair.control, area=AREA)]
    target, control = (token_grid(size, PIXELS_PER_TOKEN) for size in sizes)
    text = pair.words + sizes[1].width * sizes[1].height // TEXT_ENCODER_PIXELS
    return Sample(
        name=pair.name,
        target_latents=torch.zeros(target.tokens, 1),
        control_latents=(torch.zeros(control.tokens, 1),),
        prompt_embeds=torch.zeros(text, 1),
        img_shapes=(target, control),
    )


def batch_in(layout: Layout) -> Batch:
    """`BATCH` as one microbatch."""
    samples = [sample(pair) for pair in BATCH]
    return collate(samples, indices=range(len(samples)), weights=[1.0] * len(samples), layout=layout)


def layout_figure() -> Image.Image:
    """The batch in both layouts, as `mixres verify` draws it."""
    return token_layout(batch_in("padded"), batch_in("packed"))


def crop_figure() -> Image.Image:
    """Every image at one scale of its longer side; red is what the bucket cuts off."""
    width, row, box = 900, 225, 150
    image = Image.new("RGB", (width, 50 + 2 * row), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text(
        (16, 12),
        "What buckets of 64-pixel steps cut off (red), of eight images",
        "#222222",
        ImageFont.load_default(17),
    )
    for number, source in enumerate(SIZES):
        crop = bucket_crop(source)
        scale = box / max(source)
        left, top = 30 + number % 4 * 215, 50 + number // 4 * row
        shown = (source.width * scale, source.height * scale)
        cover = max(crop.bucket.width / source.width, crop.bucket.height / source.height)
        kept = (crop.bucket.width / cover * scale, crop.bucket.height / cover * scale)
        draw.rectangle((left, top, left + shown[0], top + shown[1]), fill="#d9534f", outline="black")
        inset = ((shown[0] - kept[0]) / 2, (shown[1] - kept[1]) / 2)
        corner = (left + inset[0], top + inset[1])
        draw.rectangle((*corner, corner[0] + kept[0], corner[1] + kept[1]), fill="#9ec5e8", outline="black")
        draw.text((left, top + box + 6), f"{source}", "#222222", font)
        draw.text((left, top + box + 24), f"bucket {crop.bucket}: {crop.lost:.1%} lost", "#222222", font)
    return image


def numbers() -> dict[str, str]:
    """The numbers of the batch that the page states."""
    padded, packed = batch_in("padded"), batch_in("packed")
    longest = padded.tokens_computed // len(BATCH)
    return {
        "valid": f"{packed.tokens:,}",
        "padded": f"{padded.tokens_computed:,}",
        "row": f"{longest:,}",
        "padding": f"{1 - padded.tokens / padded.tokens_computed:.1%}",
        "buckets": str(len({bucket_crop(source).bucket for source in SIZES})),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the two figures, print the numbers."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/multi_resolution.md.")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR")
    out: Path = parser.parse_args(arguments).out
    layout_figure().save(out / "mixed_batch.png", optimize=True)
    crop_figure().save(out / "bucket_crops.png", optimize=True)
    sys.stdout.write("\n".join([*crop_table(), *(f"{name}: {value}" for name, value in numbers().items())]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
