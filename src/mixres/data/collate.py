"""Samples -> one Batch: the only place that pads or packs.

Promise: valid tokens are copied bit for bit; every padded slot is zero. Cost: one copy of each sample's tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixres.batch import Batch, Sample
from mixres.data.plan import Layout, Rounding, rounded


def collate(
    samples: Sequence[Sample],
    *,
    indices: Sequence[int],
    weights: Sequence[float],
    layout: Layout,
    rounding: Rounding = Rounding(),  # noqa: B008 - an immutable pair of ones
) -> Batch:
    """One microbatch in `layout`; `indices` and `weights` belong to the samples, see `Batch`.

    Rows are padded to the longest, rounded up by `rounding`.
    """
    images = [torch.cat([s.target_latents, *s.control_latents]) for s in samples]
    texts = [s.prompt_embeds for s in samples]
    text_lengths = tuple(len(text) for text in texts)
    target_lengths = tuple(len(s.target_latents) for s in samples)
    latents, starts = _pad(images, rounding.image) if layout == "padded" else _pack(images)
    prompt_embeds, _ = _pad(texts, rounding.text) if layout == "padded" else _pack(texts)
    pooled = [s.pooled_embeds for s in samples if s.pooled_embeds is not None]
    assert len(pooled) in (0, len(samples)), [s.name for s in samples]
    padded_text = layout == "padded" and min(text_lengths) < prompt_embeds.shape[1]
    return Batch(
        layout=layout,
        indices=tuple(indices),
        names=tuple(s.name for s in samples),
        latents=latents,
        target_index=torch.cat([torch.arange(n) + first for n, first in zip(target_lengths, starts, strict=True)]),
        target_lengths=target_lengths,
        prompt_embeds=prompt_embeds,
        prompt_mask=_valid(text_lengths, prompt_embeds.shape[1]) if padded_text else None,
        text_lengths=text_lengths,
        img_shapes=tuple(s.img_shapes for s in samples),
        edit_mask=torch.cat([_edit_mask(s) for s in samples]),
        has_mask=tuple(s.edit_mask is not None for s in samples),
        sample_weights=tuple(weights),
        pooled_embeds=torch.stack(pooled) if pooled else None,
        text_before=tuple(s.text_before for s in samples),
    )


def _pad(rows: Sequence[Tensor], multiple: int) -> tuple[Tensor, list[int]]:
    """`(B, longest, ...)`, the longest rounded up, and where each row begins in its flattened form."""
    padded = pad_sequence(list(rows), batch_first=True)
    if missing := rounded(padded.shape[1], multiple) - padded.shape[1]:
        padded = torch.nn.functional.pad(padded, (0, 0, 0, missing))
    return padded, [b * padded.shape[1] for b in range(len(rows))]


def _pack(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """`(sum of lengths, 1, ...)`, and where each sample begins."""
    starts = [0]
    for row in rows[:-1]:
        starts.append(starts[-1] + len(row))
    return torch.cat(list(rows)).unsqueeze(1), starts


def _valid(lengths: Sequence[int], slots: int) -> Tensor:
    return torch.arange(slots) < torch.tensor(lengths)[:, None]


def _edit_mask(sample: Sample) -> Tensor:
    return torch.zeros(len(sample.target_latents)) if sample.edit_mask is None else sample.edit_mask
