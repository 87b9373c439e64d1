"""Where the tokens of Qwen-Image-2.1 lie: positions of text and images, and the blocks of a packed row.

A sample is one sequence: text, control 1, text, control 2, ..., text, target. Attention is causal over it, and all
tokens of an image see each other. Its states lie otherwise: the text of all runs, then the target, then the controls.
Positions and masks say what comes where, so no state has to move but in the attention of packed samples.

Positions have three axes. Text is on the diagonal and counts on; an image has the position that the count has reached
as its frame, rows and columns centred on zero, and moves the count on by its longer side. So the frames rise along the
sequence from block to block, and a token sees exactly the tokens whose frame is not above its own.

Legend: B sample, S image token, T text token, L = T + S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixres.geometry import Grid

TABLE = 8192  # positions of text and of frames are below; what stands at padding is this one


def positions(shapes: Sequence[Grid], text_runs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`(T, 3)` and `(S, 3)` int64: frame, row and column of the tokens of one sample, as its states lie.

    `shapes` are `(1, rows, columns)`, target first; `text_runs` the text tokens before each control, then before the
    target.
    """
    texts, images, count = [], [], 0
    for (_, rows, columns), tokens in zip((*shapes[1:], shapes[0]), text_runs, strict=True):
        texts.append(torch.arange(count, count + tokens))
        count += tokens
        axes = (torch.arange(side) - (side - side // 2) for side in (rows, columns))
        images.append(torch.cartesian_prod(torch.tensor([count]), *axes))
        count += max(rows, columns)
    return torch.cat(texts)[:, None].expand(-1, 3), torch.cat([images[-1], *images[:-1]])


def padded_positions(samples: Sequence[tuple[Tensor, Tensor]], text_slots: int, image_slots: int) -> Tensor:
    """`(B, L, 3)` of samples in rows of so many slots, `TABLE` at padding."""
    streams = []
    for rows, slots in zip(zip(*samples, strict=True), (text_slots, image_slots), strict=True):
        longest = pad_sequence(list(rows), batch_first=True, padding_value=TABLE)
        streams.append(torch.nn.functional.pad(longest, (0, 0, 0, slots - longest.shape[1]), value=TABLE))
    return torch.cat(streams, dim=1)


class Run(NamedTuple):
    """A block of a sample's sequence. Its queries see the keys from the sample's first to its own last one."""

    first: int
    end: int
    is_text: bool  # and then causal within itself


@dataclass(frozen=True)
class PackedBlocks:
    """The blocks of a packed row. Python integers: no layer asks the device for them."""

    lengths: tuple[int, ...]  # as they lie: the text runs of all samples, then the images of all samples
    order: tuple[int, ...]  # their places in the sequences of all samples, one behind the other
    samples: tuple[tuple[Run, ...], ...]

    def sequences(self, states: Tensor) -> Tensor:
        """`(1, L_total, ...)` in the order of the samples' sequences."""
        blocks = torch.split(states, list(self.lengths), dim=1)
        return torch.cat([blocks[place] for place in self.order], dim=1)

    def as_they_lie(self, states: Tensor) -> Tensor:
        """Inverse of `sequences`."""
        blocks = torch.split(states, [self.lengths[place] for place in self.order], dim=1)
        back = sorted(range(len(blocks)), key=self.order.__getitem__)
        return torch.cat([blocks[place] for place in back], dim=1)


def packed_blocks(shapes: Sequence[Sequence[Grid]], text_runs: Sequence[Sequence[int]]) -> PackedBlocks:
    """The blocks of samples with these images, target first, and these runs of text."""
    text, image = 0, sum(map(len, text_runs))
    order: list[int] = []
    samples = []
    for grids, runs in zip(shapes, text_runs, strict=True):
        images = [*range(image + 1, image + len(grids)), image]
        order += chain.from_iterable(zip(range(text, text + len(runs)), images, strict=True))
        tokens = chain.from_iterable(zip(runs, map(prod, (*grids[1:], grids[0])), strict=True))
        ends = pairwise(accumulate(tokens, initial=0))
        samples.append(tuple(Run(first, end, is_text=n % 2 == 0) for n, (first, end) in enumerate(ends) if end > first))
        text, image = text + len(runs), image + len(grids)
    lengths = (*chain.from_iterable(text_runs), *(prod(grid) for grids in shapes for grid in grids))
    return PackedBlocks(lengths, tuple(order), tuple(samples))
