"""Where the tokens of Qwen-Image-2.1 lie: the blocks of a sample's sequence, their positions, what they attend to.

A sample is a sequence of blocks: text, control 1, text, control 2, ..., text, target. Attention is causal over it, and
all tokens of an image see each other. The transformer is given the text of all runs in one tensor, the target and then
the controls in another. It puts packed samples in the order of their sequences and leaves padded ones as they are:
positions and masks say what comes where.

Positions have three axes. Text is on the diagonal and counts on; an image has the position that the count has reached
as its frame, rows and columns centred on zero, and moves the count on by its longer side. So the frames rise along the
sequence from block to block, and a token sees exactly the tokens whose frame is not above its own.

Legend: B sample, S image token, T text token, L = T + S.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixres.geometry import Grid

TABLE = 8192  # positions of text and of frames are below; what stands at padding is this one


def positions(shapes: Sequence[Grid], text_runs: Sequence[int]) -> list[Tensor]:
    """`(tokens, 3)` int64 of each block of a sequence, which begins with text: frame, row and column of its tokens.

    `shapes` are `(1, rows, columns)`, target first; `text_runs` the text tokens before each control, then before the
    target.
    """
    blocks, count = [], 0
    for (_, rows, columns), tokens in zip((*shapes[1:], shapes[0]), text_runs, strict=True):
        blocks.append(torch.arange(count, count + tokens)[:, None].expand(-1, 3))
        count += tokens
        axes = (torch.arange(side) - (side - side // 2) for side in (rows, columns))
        blocks.append(torch.cartesian_prod(torch.tensor([count]), *axes))
        count += max(rows, columns)
    return blocks


def streams(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What is said of the tokens of each block, as these are given: of the text, and of target and controls."""
    return torch.cat([*blocks[::2]]), torch.cat([blocks[-1], *blocks[1:-1:2]])


def padded_positions(samples: Sequence[Sequence[Tensor]], slots: Sequence[int]) -> Tensor:
    """`(B, L, 3)` of the blocks of samples in rows of so many slots for text and for images, `TABLE` at padding."""
    rows = []
    for stream, length in zip(zip(*map(streams, samples), strict=True), slots, strict=True):
        longest = pad_sequence(list(stream), batch_first=True, padding_value=TABLE)
        rows.append(torch.nn.functional.pad(longest, (0, 0, 0, length - longest.shape[1]), value=TABLE))
    return torch.cat(rows, dim=1)


class Run(NamedTuple):
    """A block of a sample's sequence. Its queries see the keys from the sample's first to its own last one."""

    first: int
    end: int
    is_text: bool  # and then causal within itself


def runs_of(blocks: Sequence[Tensor]) -> tuple[Run, ...]:
    """The blocks of one sequence that are not empty. Python integers: no layer asks the device for them."""
    ends = pairwise(accumulate(map(len, blocks), initial=0))
    return tuple(Run(first, end, is_text=n % 2 == 0) for n, (first, end) in enumerate(ends) if end > first)
