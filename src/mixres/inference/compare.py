"""What `sample --compare` shows: control images, the image of the base, that of what was trained, and the target.

Promise: the page stands alone. It asks no network for anything, and texts in it are escaped. Cost: each image once in
the page, at no more than 1600 pixels a side, small ones exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from mixres.pages.page import data_uri, template, webp
from mixres.training.sample_sheets import Row, image_grid

BASE, TARGET = "base", "target"
_MAX_SIDE, _QUALITY = 1600, 90
_EXACT = 2**18  # pixels; of larger images a lossless copy is a megabyte


@dataclass(frozen=True)
class Comparison:
    """Of one image that was made: it and those beside it by their headings, in order."""

    name: str
    images: Mapping[str, Image.Image]
    prompt: str
    note: str


def comparison_grid(rows: Sequence[Comparison]) -> Image.Image:
    """A row for each, with a column for every heading that one of them has."""
    fullest = max(rows, key=lambda row: len([name for name in row.images if name != TARGET]))
    has_target = any(TARGET in row.images for row in rows)
    headings = [*(name for name in fullest.images if name != TARGET), *([TARGET] if has_target else [])]
    return image_grid(
        headings,
        [Row(tuple(map(row.images.get, headings)), row.prompt, f"{row.name}, {row.note}") for row in rows],
    )


def comparison_page(rows: Sequence[Comparison], title: str) -> str:
    """An HTML page with a slider between two images of each row, at first the base's and the last but the target."""
    shown = []
    for row in rows:
        names = list(row.images)
        left = names.index(BASE)
        images = [
            (name, data_uri(webp(image, _MAX_SIDE, quality=_QUALITY, exact=_EXACT)))
            for name, image in row.images.items()
        ]
        width, height = row.images[names[left + 1]].size
        shown.append({"row": row, "images": images, "left": left, "right": left + 1, "size": (width, height)})
    return template("mixres.inference", "compare.html.j2").render(title=title, rows=shown)
