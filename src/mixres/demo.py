"""`python -m mixres.demo DIR` writes the quickstart's base model and data: ordinary folders, as a user's own would be.

Promise: `DIR/base` is a tiny random pipeline; `DIR/train` and `DIR/held_out` hold edits of freely licensed photographs,
no photograph and no size in both; the same files every time; each folder is whole or absent, and written once.
Cost: five seconds and 20 MB the first time, nothing after it.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from mixres.errors import UserError
from mixres.geometry import Size

PARTS = ("base", "train", "held_out")
TRAIN_PAIRS = 72
HELD_OUT_PAIRS = 15
SHORTEST, LONGEST = 64, 320  # pixels, a side of a target
_MAX_ASPECT = 2.5
_MARKER = "demo.json"
_VERSION = 1  # of what is written: a folder with another one is written anew
_Pixels = NDArray[np.uint8]
_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Photograph:
    """A photograph that comes inside a Python package, and its licence."""

    name: str
    package: str  # "skimage" or "sklearn"
    licence: str
    source: str

    def read(self) -> Image.Image:
        """The whole photograph, RGB.

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


def _swap_red_and_blue(pixels: _Pixels) -> _Pixels:
    return pixels[..., ::-1]


def _sepia(pixels: _Pixels) -> _Pixels:
    # The W3C's sepia filter: https://www.w3.org/TR/filter-effects-1/#sepiaEquivalent
    matrix = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    sepia: _Pixels = (pixels @ matrix.T).round().clip(0, 255).astype(np.uint8)
    return sepia


def _brighter(pixels: _Pixels) -> _Pixels:
    curve: _Pixels = (255 * (np.arange(256) / 255) ** 0.6).round().astype(np.uint8)
    return curve[pixels]


def _black_and_white(pixels: _Pixels) -> _Pixels:
    luma = (pixels @ np.array([0.299, 0.587, 0.114])).round().clip(0, 255).astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=-1)


@dataclass(frozen=True)
class Edit:
    """An edit of pixels, position by position, and the ways to ask for it."""

    apply: Callable[[_Pixels], _Pixels]
    instructions: tuple[str, str]  # English, Chinese


_SWAP = Edit(_swap_red_and_blue, ("swap red and blue", "交换红色和蓝色"))
_OTHERS = (
    Edit(_sepia, ("turn it into a sepia photograph", "变成棕褐色老照片")),
    Edit(_brighter, ("make it brighter", "把画面调亮")),
    Edit(_black_and_white, ("make it black and white", "变成黑白照片")),
)


@dataclass(frozen=True)
class Pair:
    """Where one training pair comes from. The target shows the largest centred crop of the control with its aspect."""

    photograph: Photograph
    edit: Edit
    instruction: str
    target_size: Size
    target_box: _Box  # of the photograph's pixels
    control_size: Size
    control_box: _Box


def plan_pairs(photographs: Sequence[Photograph], count: int, seed: int, taken: set[Size]) -> list[Pair]:
    """`count` pairs with target sizes of their own, none in `taken`, to which they are added.

    Every third control is wider or taller than its target and has another scale; the others show the same region at
    the same size. Three of four pairs swap red and blue.
    """
    rng = random.Random(seed)
    extents = {photograph: Size(*photograph.read().size) for photograph in photographs}
    pairs = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        edit = _OTHERS[index // 4 % len(_OTHERS)] if index % 4 == 3 else _SWAP
        size, region, wide = _draw_regions(rng, extents[photograph], taken, widen=index % 3 == 2)
        taken.add(size)
        control_size = size
        if wide != region:
            scale = rng.uniform(0.8, 1.2) * size.width / region[0]
            control_size = Size(*(max(SHORTEST, round(side * scale)) for side in wide))
        instruction = rng.choice(edit.instructions)
        middle = [rng.uniform(side / 2, full - side / 2) for side, full in zip(wide, extents[photograph], strict=True)]
        target_box, control_box = (_box_around(middle, sides) for sides in (region, wide))
        pairs.append(Pair(photograph, edit, instruction, size, target_box, control_size, control_box))
    return pairs


def _box_around(middle: Sequence[float], sides: Sequence[float]) -> _Box:
    (x, y), (width, height) = middle, sides
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _draw_regions(
    rng: random.Random, extent: Size, taken: set[Size], *, widen: bool
) -> tuple[Size, tuple[float, float], tuple[float, float]]:
    """A target size not taken, the sides of its region, and the sides of the control's region around it."""
    while True:
        size = Size(rng.randint(SHORTEST, LONGEST), rng.randint(SHORTEST, LONGEST))
        zoom = rng.uniform(1, 2.5)  # photograph pixels to one target pixel: never enlarged
        stretch = rng.uniform(1.3, 1.7) if widen else 1.0
        across = rng.random() < 0.5
        region = size.width * zoom, size.height * zoom
        wide = (region[0] * stretch, region[1]) if across else (region[0], region[1] * stretch)
        fits = all(side <= full for side, full in zip(wide, extent, strict=True))
        if fits and size not in taken and all(max(s) / min(s) <= _MAX_ASPECT for s in (size, wide)):
            return size, region, wide


def write_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    """Writes the folder layout: `training_images/` with captions, `control_images/`, and `ATTRIBUTION.md`."""
    targets, controls = folder / "training_images", folder / "control_images"
    targets.mkdir(parents=True)
    controls.mkdir()
    photographs = list(dict.fromkeys(pair.photograph for pair in pairs))
    pictures = {photograph: photograph.read() for photograph in photographs}
    for index, pair in enumerate(pairs):
        picture, stem = pictures[pair.photograph], f"{index:03d}_{pair.photograph.name}"
        control = picture.resize(pair.control_size, Image.Resampling.LANCZOS, box=pair.control_box)
        target = picture.resize(pair.target_size, Image.Resampling.LANCZOS, box=pair.target_box)
        control.save(controls / f"{stem}.png")
        Image.fromarray(np.ascontiguousarray(pair.edit.apply(np.asarray(target)))).save(targets / f"{stem}.png")
        (targets / f"{stem}.txt").write_text(pair.instruction + "\n", encoding="utf-8")
    lines = [f"- {photo.name}: {photo.licence}; {photo.source}" for photo in photographs]
    text = "# Photographs\n\nCropped, resized and recoloured from:\n\n" + "\n".join(lines) + "\n"
    (folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


def _write_base(folder: Path) -> None:
    from mixres.models.tiny_pipeline import write_tiny_pipeline  # seconds of imports, needed once

    prompts = [instruction for edit in (_SWAP, *_OTHERS) for instruction in edit.instructions]
    write_tiny_pipeline(folder, prompts)


def _writers() -> dict[str, tuple[Callable[[Path], None], str]]:
    """How each folder is written, and a description of it."""
    taken: set[Size] = set()
    train = plan_pairs(TRAIN_PHOTOGRAPHS, TRAIN_PAIRS, 0, taken)
    held_out = plan_pairs(HELD_OUT_PHOTOGRAPHS, HELD_OUT_PAIRS, 1, taken)
    return {
        "base": (_write_base, "a tiny random Qwen-Image-Edit pipeline"),
        "train": (lambda folder: write_pairs(folder, train), f"{TRAIN_PAIRS} pairs, every one its own size"),
        "held_out": (lambda folder: write_pairs(folder, held_out), f"{HELD_OUT_PAIRS} pairs of other photographs"),
    }


def write_demo(root: Path) -> list[str]:
    """Writes `base`, `train` and `held_out` into `root` where they are missing or of an older version.

    Returns a readable line for each. A write that was killed leaves nothing under the final name and is begun anew.

    Raises:
        UserError: one of the three names is taken by something this did not write; a package is not installed.
    """
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".demo.lock"):
        missing = [part for part in PARTS if not _is_written(root / part)]
        writers = _writers() if missing else {}
        for part in missing:
            _write_part(root / part, writers[part][0])
    return [f"{root / part}: {writers[part][1] if part in missing else 'there already'}" for part in PARTS]


def _is_written(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        version = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} exists and is not the demo's: name another folder, or move it away") from error
    return bool(version == _VERSION)


def _write_part(folder: Path, write: Callable[[Path], None]) -> None:
    tmp, old = (folder.with_name(f".tmp-{folder.name}-{kind}") for kind in ("new", "old"))
    for leftover in (tmp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(tmp)
    (tmp / _MARKER).write_text(json.dumps({"written_by": "mixres.demo", "version": _VERSION}), encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    tmp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mixres.demo", description="Write the quickstart's base and data.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where base/, train/ and held_out/ go")
    try:
        lines = write_demo(parser.parse_args(arguments).folder)
    except UserError as error:
        sys.stderr.writelines(f"mixres: error: {message}\n" for message in error.messages)
        return 2
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
