"""Samples of random tensors, as an encoder makes them; and what no reader may open."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from mixres.batch import Sample
from mixres.geometry import Grid


def make_sample(
    grids: tuple[Grid, ...] = (Grid(1, 3, 2), Grid(1, 2, 2)),
    *,
    name: str = "training_images/a.png",
    text: int = 5,
    empty: int = 0,
    mask: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    channels: int = 8,
    text_width: int = 6,
    pooled: int = 0,
) -> Sample:
    """A target of the first grid with a control for each other; prompts of `text` and `empty` tokens.

    `pooled` is the width of the prompts' pooled embeddings, 0 for none.
    """
    noise = torch.Generator().manual_seed(seed)
    latents = [torch.randn(grid.tokens, channels, generator=noise).to(dtype) for grid in grids]
    return Sample(
        name=name,
        target_latents=latents[0],
        control_latents=tuple(latents[1:]),
        prompt_embeds=torch.randn(text, text_width, generator=noise).to(dtype),
        img_shapes=grids,
        edit_mask=torch.rand(grids[0].tokens, generator=noise) if mask else None,
        empty_embeds=torch.randn(empty, text_width, generator=noise).to(dtype) if empty else None,
        pooled_embeds=torch.randn(pooled, generator=noise).to(dtype) if pooled else None,
        empty_pooled_embeds=torch.randn(pooled, generator=noise).to(dtype) if pooled and empty else None,
    )


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same(a: Sample, b: Sample) -> None:
    """All tensors are equal, bit for bit, and the grids and places of controls too."""
    assert (a.img_shapes, a.text_before) == (b.img_shapes, b.text_before)
    assert len(a.control_latents) == len(b.control_latents)
    for field in fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if field.name == "control_latents":
            assert all(map(same_bits, one, other))
        elif field.name not in ("name", "img_shapes", "text_before"):
            assert same_bits(one, other), field.name


def pickled_mkdir(folder: Path) -> bytes:
    """A pickle that makes `folder` when it is opened."""
    return f"cos\nmkdir\n(V{folder}\ntR.".encode()
