"""Samples one behind the other along the token axis: their lengths, and the order in which attention sees them.

Legend: B sample, T_total and S_total text and image tokens of the microbatch, L_total both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]  # (row, tokens): so many tokens in a row share that row of parameters


@dataclass(frozen=True)
class PackedLengths:
    """How the samples of a packed microbatch follow each other. Python integers: no layer asks the device for them."""

    text: tuple[int, ...]
    image: tuple[int, ...]
    image_runs: Runs  # the row of the modulation parameters that each stretch of image tokens uses
    cumulative: Tensor  # (B + 1,) int32, where each sample's text and image begin, for variable-length kernels

    @property
    def joint(self) -> tuple[int, ...]:
        """Text and image tokens of each sample."""
        return tuple(t + s for t, s in zip(self.text, self.image, strict=True))

    @property
    def text_runs(self) -> Runs:
        return tuple(enumerate(self.text))

    @property
    def joint_runs(self) -> Runs:
        return tuple(enumerate(self.joint))


def packed_lengths(
    text: Sequence[int], image: Sequence[int], device: torch.device, image_runs: Runs | None = None
) -> PackedLengths:
    """Lengths of samples with one row of modulation parameters each, unless `image_runs` says otherwise."""
    joint = torch.tensor([0, *(t + s for t, s in zip(text, image, strict=True))], dtype=torch.int32)
    return PackedLengths(
        text=tuple(text),
        image=tuple(image),
        image_runs=tuple(enumerate(image)) if image_runs is None else image_runs,
        cumulative=joint.cumsum(0, dtype=torch.int32).to(device),
    )


def interleave(text: Tensor, image: Tensor, lengths: PackedLengths) -> Tensor:
    """`(1, T_total, ...)`, `(1, S_total, ...)` -> `(1, L_total, ...)`: each sample's text, then its image."""
    texts = torch.split(text, list(lengths.text), dim=1)
    images = torch.split(image, list(lengths.image), dim=1)
    return torch.cat(list(chain.from_iterable(zip(texts, images, strict=True))), dim=1)


def separate(joint: Tensor, lengths: PackedLengths) -> tuple[Tensor, Tensor]:
    """Inverse of `interleave`: `(1, L_total, ...)` -> `(1, T_total, ...)`, `(1, S_total, ...)`."""
    samples = torch.split(joint, list(lengths.joint), dim=1)
    text = torch.cat([x[:, :t] for x, t in zip(samples, lengths.text, strict=True)], dim=1)
    image = torch.cat([x[:, t:] for x, t in zip(samples, lengths.text, strict=True)], dim=1)
    return text, image
