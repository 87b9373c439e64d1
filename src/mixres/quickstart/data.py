"""`mixres quickstart DIR` writes the quickstart's data: ordinary folders, as a user's own would be.

Promise: `DIR/train` and `DIR/held_out` hold an edit of freely licensed photographs; no photograph, no size and no
aspect is in both. The files are the same every time; each folder is complete or absent, and written once.
Cost: two seconds and 10 MB the first time, nothing after it.
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from mixres.errors import UserError
from mixres.geometry import Size, control_size

TRAIN_PAIRS = 72
HELD_OUT_PAIRS = 16
_DESCRIPTIONS = {
    "train": f"{TRAIN_PAIRS} pairs, every one its own size",
    "held_out": f"{HELD_OUT_PAIRS} pairs of other photographs in other sizes",
}
MULTIPLE_OF = 32  # the pipeline rounds the sides of controls to it; targets do the same, so that both have one grid
# The sizes after rounding. The tiny base has seen no other sizes either.
TRAIN_SIZES = (*(Size(w, h) for w in (64, 96, 128) for h in (64, 96, 128)), Size(160, 64), Size(64, 160))
HELD_OUT_SIZES = tuple(
    Size(*sides) for w, h in ((160, 96), (160, 128), (192, 160), (224, 96)) for sides in ((w, h), (h, w))
)
_JITTER = 8  # pixels, the maximum difference of a file's side from its rounded size
PARTS = tuple(_DESCRIPTIONS)
_MARKER = "demo.json"
_MARK = json.dumps({"written_by": "mixres.quickstart.data", "version": 2}).encode()
_Pixels = NDArray[np.uint8]
_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Photograph:
    """A photograph that a Python package contains, and its licence."""

    name: str
    package: str  # "skimage" or "sklearn"
    licence: str
    source: str

    def read(self) -> Image.Image:
        """The photograph, RGB.

        Raises:
            UserError: scikit-image or scikit-learn is not installed.
        """
        try:
            if self.package == "skimage":
                from skimage import data

                return Image.fromarray(getattr(data, self.name)())
            from sklearn.datasets import load_sample_image

            return Image.fromarray(load_sample_image(f"{self.name}.jpg"))
        except ImportError as error:
            raise UserError(f"the demo's photographs need {error.name}: pip install 'mixres[demo]'") from error


_FLICKR = "https://www.flickr.com/photos"
TRAIN_PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "public domain, NASA", "NASA Great Images, https://flic.kr/p/r9qvLn"),
    Photograph("china", "sklearn", "CC BY 2.0, danielbuechele", f"{_FLICKR}/danielbuechele/6061409035"),
    Photograph("flower", "sklearn", "CC BY 2.0, vultilion", f"{_FLICKR}/vultilion/6056698931"),
    Photograph("rocket", "skimage", "public domain, SpaceX", f"{_FLICKR}/spacexphotos/16511594820"),
    Photograph("hubble_deep_field", "skimage", "public domain, NASA/ESA", "https://hubblesite.org, release 2012-37"),
)
HELD_OUT_PHOTOGRAPHS = (
    Photograph("chelsea", "skimage", "CC0, Stefan van der Walt", "scikit-image, skimage.data.chelsea"),
    Photograph("coffee", "skimage", "CC0, Rachel Michetti", "scikit-image, skimage.data.coffee"),
)


PROMPTS = ("swap red and blue", "交换红色和蓝色")


def swap_red_and_blue(pixels: _Pixels) -> _Pixels:
    """The edit to be learnt; the base knows the names of the colours, but not this edit."""
    return pixels[..., ::-1]


@dataclass(frozen=True)
class Pair:
    """One training pair: both images show `box` of the photograph."""

    photograph: Photograph
    prompt: str
    box: _Box
    target_size: Size
    control_size: Size


def plan_pairs(
    photographs: Sequence[Photograph], resized: Sequence[Size], count: int, seed: int, taken: set[Size]
) -> list[Pair]:
    """`count` pairs whose targets become the sizes `resized`, in turn, when their sides are rounded to `MULTIPLE_OF`.

    As files, targets have sizes of their own, none in `taken`, to which they are added; controls are larger, each by
    its own factor.
    """
    rng = random.Random(seed)
    extents = {photograph: Size(*photograph.read().size) for photograph in photographs}
    pairs = []
    for index in range(count):
        photograph, size = photographs[index % len(photographs)], resized[index // len(photographs) % len(resized)]
        target, control = _draw_sizes(rng, size, taken)
        taken.add(target)
        box = _draw_box(rng, target, extents[photograph])
        pairs.append(Pair(photograph, rng.choice(PROMPTS), box, target, control))
    return pairs


def _draw_sizes(rng: random.Random, resized: Size, taken: set[Size]) -> tuple[Size, Size]:
    """Sizes of a target and a control file which both become `resized`."""
    while True:
        target = Size(*(side + rng.randint(-_JITTER, _JITTER) for side in resized))
        scale = rng.uniform(1.1, 1.8)
        control = Size(*(round(side * scale) for side in target))
        area = resized.width * resized.height
        if target not in taken and control_size(control, area=area, multiple_of=MULTIPLE_OF) == resized:
            return target, control


def _draw_box(rng: random.Random, size: Size, extent: Size) -> _Box:
    """A region with the aspect of `size`, which is scaled down by up to 2.5 and never enlarged."""
    zoom = rng.uniform(1, min(2.5, extent.width / size.width, extent.height / size.height))
    width, height = size.width * zoom, size.height * zoom
    left, top = rng.uniform(0, extent.width - width), rng.uniform(0, extent.height - height)
    return left, top, left + width, top + height


def write_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    """Write the folder layout: `training_images/` with captions, `control_images/`, and `ATTRIBUTION.md`."""
    targets, controls = folder / "training_images", folder / "control_images"
    targets.mkdir(parents=True)
    controls.mkdir()
    photographs = list(dict.fromkeys(pair.photograph for pair in pairs))
    images = {photograph: photograph.read() for photograph in photographs}
    for index, pair in enumerate(pairs):
        image, stem = images[pair.photograph], f"{index:03d}_{pair.photograph.name}"
        control = image.resize(pair.control_size, Image.Resampling.LANCZOS, box=pair.box)
        target = image.resize(pair.target_size, Image.Resampling.LANCZOS, box=pair.box)
        control.save(controls / f"{stem}.png")
        Image.fromarray(np.ascontiguousarray(swap_red_and_blue(np.asarray(target)))).save(targets / f"{stem}.png")
        (targets / f"{stem}.txt").write_text(pair.prompt + "\n", encoding="utf-8")
    lines = [f"- {photo.name}: {photo.licence}; {photo.source}" for photo in photographs]
    text = "# Photographs\n\nCropped, resized and recoloured from:\n\n" + "\n".join(lines) + "\n"
    (folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


def plan_parts() -> dict[str, list[Pair]]:
    """The pairs of both folders."""
    taken: set[Size] = set()
    return {
        "train": plan_pairs(TRAIN_PHOTOGRAPHS, TRAIN_SIZES, TRAIN_PAIRS, 0, taken),
        "held_out": plan_pairs(HELD_OUT_PHOTOGRAPHS, HELD_OUT_SIZES, HELD_OUT_PAIRS, 1, taken),
    }


def write_demo(root: Path) -> list[str]:
    """Write `train` and `held_out` into `root` where they are missing.

    Returns a readable line for each. A write that is killed leaves nothing under the final name; the next starts over.

    Raises:
        UserError: one of the two folders exists and is not this version's demo; a package is not installed.
    """
    root.mkdir(parents=True, exist_ok=True)
    lines = {part: f"{root / part}: there already" for part in PARTS}
    with FileLock(root / ".demo.lock"):
        for part in [part for part in PARTS if not _is_written(root / part)]:  # both are checked before a write
            _write_part(root / part, plan_parts()[part])
            lines[part] = f"{root / part}: {_DESCRIPTIONS[part]}"
    return list(lines.values())


def _is_written(folder: Path) -> bool:
    marker = folder / _MARKER
    if folder.exists() and not (marker.is_file() and marker.read_bytes() == _MARK):
        raise UserError(f"{folder} exists and is not this version's demo: name another folder, or move it away")
    return folder.exists()


def _write_part(folder: Path, pairs: Sequence[Pair]) -> None:
    tmp = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    write_pairs(tmp, pairs)
    (tmp / _MARKER).write_bytes(_MARK)
    tmp.rename(folder)
