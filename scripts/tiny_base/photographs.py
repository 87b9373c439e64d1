"""Random crops of the photographs that the tiny base learns from: only such whose licence allows it.

Promise: one seed, one sequence of crops; the photographs that the quickstart holds out are never read.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixres.quickstart.data import HELD_OUT_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, Photograph

_TEXTURES = (
    Photograph("brick", "skimage", "CC0", "CC0Textures, Bricks25"),
    Photograph("grass", "skimage", "CC0", "CC0Textures, Ground37"),
    Photograph("gravel", "skimage", "CC0", "CC0Textures, Gravel04"),
    Photograph("camera", "skimage", "CC0, Lav Varshney", "scikit-image, skimage.data.camera"),
)
_RETINA = Photograph("retina", "skimage", "CC0, Mikael Häggström", "scikit-image, skimage.data.retina")
# How often a crop comes from each.
WEIGHTS = {
    "astronaut": 2.0,
    "china": 2.0,
    "flower": 2.0,
    "rocket": 1.0,
    "hubble_deep_field": 0.5,
    "retina": 0.5,
    **{photograph.name: 0.25 for photograph in _TEXTURES},
}
PHOTOGRAPHS = (*TRAIN_PHOTOGRAPHS, _RETINA, *_TEXTURES)
_SCALES = (1.0, 0.7, 0.5, 0.35)
_SHORTEST = 100  # pixels, a side of a scaled photograph
assert not {photograph.name for photograph in PHOTOGRAPHS} & {photograph.name for photograph in HELD_OUT_PHOTOGRAPHS}


@dataclass(frozen=True)
class Augmentation:
    """Fractions of crops that are changed in colour, so that few photographs show many colours."""

    permuted: float = 0.2  # channels in another order
    inverted: float = 0.0
    scaled: float = 0.15  # each channel by its own factor
    tinted: float = 0.0  # grey, times a colour


class Crops:
    """Draws crops `(3, H, W)`, float32 in [0, 1]."""

    def __init__(self, seed: int, augmentation: Augmentation, photographs: Sequence[Photograph] = PHOTOGRAPHS) -> None:
        self._random = random.Random(seed)
        self._augmentation = augmentation
        self._pyramids = [pyramid(photograph) for photograph in photographs]
        self._weights = [WEIGHTS[photograph.name] for photograph in photographs]

    def draw(self, height: int, width: int) -> Tensor:
        """One crop, mirrored every second time."""
        while True:
            levels = self._random.choices(self._pyramids, self._weights)[0]
            image = self._random.choice(levels)
            if image.shape[1] >= height and image.shape[2] >= width:
                break
        top = self._random.randint(0, image.shape[1] - height)
        left = self._random.randint(0, image.shape[2] - width)
        crop = image[:, top : top + height, left : left + width].float() / 255
        if self._random.random() < 0.5:
            crop = crop.flip(2)
        return self._recoloured(crop).clamp(0, 1)

    def batch(self, count: int, height: int, width: int) -> Tensor:
        """`(count, 3, height, width)`."""
        return torch.stack([self.draw(height, width) for _ in range(count)])

    def _recoloured(self, crop: Tensor) -> Tensor:
        chances, draw = self._augmentation, self._random
        if draw.random() < chances.permuted:
            crop = crop[draw.sample(range(3), 3)]
        chance = draw.random()
        if chance < chances.inverted:
            return 1 - crop
        if chance < chances.inverted + chances.scaled:
            return crop * self._colour(0.5, 1.3)
        if chance < chances.inverted + chances.scaled + chances.tinted:
            return crop.mean(0, keepdim=True) * self._colour(0.7, 1.1)
        return crop

    def _colour(self, low: float, high: float) -> Tensor:
        return torch.tensor([self._random.uniform(low, high) for _ in range(3)]).view(3, 1, 1)


def pyramid(photograph: Photograph) -> list[Tensor]:
    """The photograph at several sizes, `(3, H, W)` uint8 each."""
    image = photograph.read().convert("RGB")
    sizes = [(int(image.width * scale), int(image.height * scale)) for scale in _SCALES]
    return [
        torch.from_numpy(np.array(image.resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1)
        for size in sizes
        if min(size) >= _SHORTEST
    ]


def held_out_crops(sizes: Sequence[tuple[int, int]], seed: int) -> list[Tensor]:
    """One crop of each `(height, width)`, in turn from each photograph that is never trained on."""
    draw = random.Random(seed)
    pyramids = [pyramid(photograph) for photograph in HELD_OUT_PHOTOGRAPHS]
    crops = []
    for index, (height, width) in enumerate(sizes):
        levels = [p for p in pyramids[index % len(pyramids)] if p.shape[1] >= height and p.shape[2] >= width]
        image = draw.choice(levels)
        top = draw.randint(0, image.shape[1] - height)
        left = draw.randint(0, image.shape[2] - width)
        crops.append(image[:, top : top + height, left : left + width].float() / 255)
    return crops


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    error = (image.clamp(0, 1) - reference.clamp(0, 1)).square().mean()
    return float(-10 * torch.log10(error + 1e-10))
