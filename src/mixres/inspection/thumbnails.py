"""Small images beside the numbers of `inspect`: the samples at the ends, and those that cannot be used.

Cost: decoding and shrinking a few dozen images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mixres.data.images import SUFFIXES, BadImageError, Limits, read_image
from mixres.data.records import Picture, Problem
from mixres.data.scan import ScannedRecord
from mixres.inspection.statistics import Figures
from mixres.pages.page import data_uri, webp

_SIDE, _QUALITY = 240, 75
_MAX_PROBLEMS = 24
_MAX_WORDS = 160  # characters of a prompt


@dataclass(frozen=True)
class Thumbnail:
    """A sample or file: what is to be seen in it, its name, words about it, and its images, None for one without."""

    what: str
    name: str
    words: str
    images: tuple[str | None, ...]


def of_extremes(extremes: Sequence[Figures], train: Sequence[ScannedRecord], limits: Limits) -> list[Thumbnail]:
    """Target and first control of the samples in `extremes` of `inspect.json`, each sample once."""
    records, together = {scanned.record.name: scanned.record for scanned in train}, dict[str, list[Figures]]()
    for row in extremes:
        together.setdefault(row["name"], []).append(row)
    found = []
    for name, rows in together.items():
        record, size = records[name], f"{rows[0]['target']}, {rows[0]['all_tokens']:,} tokens"
        images = tuple(_thumbnail(path, limits) for path in (record.target, *record.controls[:1]))
        prompt = record.prompt[:_MAX_WORDS] + "…" * (len(record.prompt) > _MAX_WORDS)
        found.append(Thumbnail(", ".join(row["what"] for row in rows), name, f"{size}: {prompt}", images))
    return found


def of_problems(problems: Sequence[Problem], limits: Limits) -> list[Thumbnail]:
    """The images that problems are about, or those beside a caption; as far as they can be decoded at all."""
    bounds = replace(limits, max_aspect=math.inf, first_frame=True)
    return [
        Thumbnail("", problem.path, problem.reason, (_thumbnail(_image_of(Path(problem.path)), bounds),))
        for problem in problems[:_MAX_PROBLEMS]
    ]


def _image_of(path: Path) -> Path:
    beside = (path.with_suffix(suffix) for suffix in sorted(SUFFIXES)) if path.suffix == ".txt" else ()
    return next((image for image in beside if image.exists()), path)


def _thumbnail(path: Picture, limits: Limits) -> str | None:
    try:
        image: Image.Image = read_image(path, limits)
    except (BadImageError, OSError):
        return None
    return data_uri(webp(image, _SIDE, quality=_QUALITY))
