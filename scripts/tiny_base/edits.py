"""The ten edits that the tiny base knows, each a function of pixels, and how one asks for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601


@dataclass(frozen=True)
class Edit:
    """An edit of an image `(3, H, W)` in [0, 1]; values beyond are clipped by the caller."""

    apply: Callable[[Tensor], Tensor]
    prompts: tuple[str, str]  # English, Chinese


def _grey(image: Tensor) -> Tensor:
    return (image * _LUMA).sum(0, keepdim=True)


def _tint(red: float, green: float, blue: float) -> Callable[[Tensor], Tensor]:
    colour = torch.tensor([red, green, blue]).view(3, 1, 1)
    return lambda image: 0.55 * image + 0.45 * colour * (0.7 * _grey(image) + 0.3)


def _contrast(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda image: (image - 0.5) * factor + 0.5


def _blur(image: Tensor) -> Tensor:
    """A Gaussian of 1.6 pixels, cut at two."""
    line = torch.exp(-((torch.arange(5) - 2.0) ** 2) / (2 * 1.6**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = functional.pad(image[None], (2, 2, 2, 2), mode="reflect")
    return functional.conv2d(padded, kernel.expand(3, 1, 5, 5), groups=3)[0]


EDITS = {
    "unchanged": Edit(lambda x: x, ("keep it unchanged", "保持不变")),
    "brighter": Edit(lambda x: 1 - (1 - x) * 0.55, ("make it brighter", "调亮画面")),
    "darker": Edit(lambda x: x * 0.5, ("make it darker", "调暗画面")),
    "red": Edit(_tint(1.0, 0.1, 0.1), ("tint it red", "染成红色")),
    "green": Edit(_tint(0.1, 1.0, 0.1), ("tint it green", "染成绿色")),
    "blue": Edit(_tint(0.1, 0.2, 1.0), ("tint it blue", "染成蓝色")),
    "blur": Edit(_blur, ("blur it", "模糊画面")),
    "more contrast": Edit(_contrast(1.7), ("increase the contrast", "增加对比度")),
    "less contrast": Edit(_contrast(0.5), ("lower the contrast", "降低对比度")),
    "vivid": Edit(lambda x: _grey(x) + (x - _grey(x)) * 1.8, ("make it more vivid", "更加鲜艳")),
}
