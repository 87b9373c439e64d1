"""Per-sample 3D rotary positions for Qwen-Image: positions are data, frequencies are one table look-up.

Promise: every token of every sample gets the position it would get alone; padding gets the frequency 0+0j, so that a
padded query or key is the zero vector. Cost: three gathers once a forward call, nothing per block.

Positions follow the Qwen-Image report (Wu et al. 2025, arXiv 2508.02324, "MSRoPE"), as `QwenEmbedRope` in diffusers
computes them for one sample: the frame axis counts the images of the sample (target 0, controls 1, 2, ...), rows and
columns are centred on zero, and text runs along the diagonal from max(h // 2, w // 2) over the sample's images on.

Legend: B sample, S image token, T text token, L = T + S, H head, D head width.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixres.geometry import token_count
from mixres.models.attention import JointRotary
from mixres.models.rotation import rotate_complex

Shape = tuple[int, int, int]

TABLE_HALF = 4096  # the stock tables hold the positions -4096 .. 4095
PADDING_POSITION = TABLE_HALF  # one past the largest position: the row of zeros

apply_rotary_emb_qwen_batched = rotate_complex  # its public name


class PlannedShapes:
    """Rectangular `img_shapes` for the stock forward that carry what `pos_embed` returns for this call.

    Made inside the model's own pre-hook, never by a caller. No list: hooks that move a call's arguments to a device
    (accelerate's, diffusers' offloading) rebuild lists of any class from their items, and move what has `to`.
    """

    def __init__(self, shapes: list[list[Shape]], rotary: JointRotary | tuple[Tensor, Tensor]) -> None:
        self._shapes, self.rotary = shapes, rotary

    def __iter__(self) -> Iterator[list[Shape]]:
        return iter(self._shapes)

    def to(self, device: torch.device, non_blocking: bool = False) -> "PlannedShapes":
        """With its tensors on `device`."""
        if isinstance(self.rotary, JointRotary):
            return PlannedShapes(self._shapes, self.rotary.to(device, non_blocking))
        image, text = (freqs.to(device, non_blocking=non_blocking) for freqs in self.rotary)
        return PlannedShapes(self._shapes, (image, text))


def image_positions(shapes: Sequence[Shape]) -> Tensor:
    """`(S, 3)` int64 frame, row and column positions of all images of one sample, in token order."""
    grids = []
    for first_frame, (frames, rows, columns) in enumerate(shapes):
        axes = (
            torch.arange(frames) + first_frame,
            torch.arange(rows) - (rows - rows // 2),
            torch.arange(columns) - (columns - columns // 2),
        )
        grids.append(torch.cartesian_prod(*axes).reshape(-1, 3))
    return torch.cat(grids)


def text_start(shapes: Sequence[Shape]) -> int:
    """The position of the first text token of a sample: behind its largest image."""
    return max(max(rows // 2, columns // 2) for _, rows, columns in shapes)


def text_positions(shapes: Sequence[Shape], length: int) -> Tensor:
    """`(T, 3)` int64: the same number on all three axes, starting behind the largest image of the sample."""
    first = text_start(shapes)
    if first + length > TABLE_HALF:
        raise ValueError(f"{length} text tokens from position {first} on: the rotary table ends at {TABLE_HALF - 1}")
    return (torch.arange(length) + first)[:, None].expand(length, 3)


def as_shape_lists(img_shapes: Sequence[Shape | Sequence[Shape]]) -> list[list[Shape]]:
    """`img_shapes` as one list of `(frames, rows, columns)` per sample; a bare triple is a sample of one image."""
    return [_as_shapes(entry) for entry in img_shapes]


def _as_shapes(entry: Any) -> list[Shape]:
    images = [entry] if isinstance(entry[0], Integral) else entry  # NumPy's integers too
    return [(int(frames), int(rows), int(columns)) for frames, rows, columns in images]


class MultiResolutionRope(QwenEmbedRope):  # type: ignore[misc]
    """`QwenEmbedRope` that knows every sample's own positions. Neither parameters nor buffers: the state dict stays."""

    def __init__(self, stock: QwenEmbedRope) -> None:
        super().__init__(theta=stock.theta, axes_dim=list(stock.axes_dim), scale_rope=stock.scale_rope)
        self._tables: dict[torch.device, Tensor] = {}

    def frequencies(self, positions: Tensor, device: torch.device | None) -> Tensor:
        """`(..., 3)` integer positions -> `(..., D/2)` complex64 frequencies; `PADDING_POSITION` gives 0+0j."""
        table = self._table(torch.device("cpu") if device is None else device)
        rows = (positions + TABLE_HALF).to(table.device)
        halves = list(accumulate((dim // 2 for dim in self.axes_dim), initial=0))
        axes = [table[rows[..., axis], halves[axis] : halves[axis + 1]] for axis in range(3)]
        return torch.cat(axes, dim=-1)

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            zeros = self.pos_freqs.new_zeros(1, self.pos_freqs.shape[1])
            self._tables[device] = torch.cat([self.neg_freqs, self.pos_freqs, zeros]).to(device)
        return self._tables[device]

    def padded_frequencies(
        self, shapes: Sequence[Sequence[Shape]], image_tokens: int, text_tokens: int, device: torch.device | None
    ) -> tuple[Tensor, Tensor]:
        """Per-sample frequencies `(B, S, D/2)` and `(B, T, D/2)`, rows padded with 0+0j.

        One sample, and samples of equal shapes without padding, share the stock's 2D pair `(S, D/2)`, `(T, D/2)`.
        """
        same = all(list(sample) == list(shapes[0]) for sample in shapes)
        per_sample = [image_positions(sample) for sample in (shapes[:1] if same else shapes)]
        texts = [text_positions(sample, text_tokens) for sample in (shapes[:1] if same else shapes)]
        if same and len(per_sample[0]) == image_tokens:
            return self.frequencies(per_sample[0], device), self.frequencies(texts[0], device)
        padded = pad_sequence(per_sample, batch_first=True, padding_value=PADDING_POSITION)
        missing = image_tokens - padded.shape[1]
        padded = torch.nn.functional.pad(padded, (0, 0, 0, missing), value=PADDING_POSITION)
        return self.frequencies(padded, device), self.frequencies(torch.stack(texts), device)

    def forward(
        self,
        video_fhw: Sequence[Shape | Sequence[Shape]] | Shape | PlannedShapes,
        device: torch.device | None = None,
        max_txt_seq_len: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | JointRotary:
        """Inside a patched forward: the planned frequencies of the call. Called by hand: see `padded_frequencies`.

        Raises:
            ValueError: `max_txt_seq_len` is missing, or the text runs past the table.
        """
        if isinstance(video_fhw, PlannedShapes):
            return video_fhw.rotary
        if max_txt_seq_len is None:
            raise ValueError("`max_txt_seq_len` must be provided.")
        shapes = as_shape_lists([video_fhw] if isinstance(video_fhw, tuple) else video_fhw)
        longest = max(token_count(sample) for sample in shapes)
        return self.padded_frequencies(shapes, longest, int(max_txt_seq_len), device)


def joint_frequencies(image: Tensor, text: Tensor) -> Tensor:
    """`(S, D/2)` or `(B, S, D/2)` and `(T, D/2)` or `(B, T, D/2)` -> text before image, `(L, D/2)` or `(B, L, D/2)`."""
    if image.dim() != text.dim():  # one stream shared, the other per sample
        batch = max(x.shape[0] for x in (image, text) if x.dim() == 3)
        image, text = (x if x.dim() == 3 else x.expand(batch, -1, -1) for x in (image, text))
    return torch.cat([text, image], dim=-2)
