"""What docs/multi_resolution.md states of rotation and axes, for the channels of Qwen-Image. The rest: test_rope.py."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor

from mixres.models.qwen.attention import QwenDoubleStreamAttnProcessor2_0_MultiRes
from mixres.models.qwen.rope import (
    JointRotary,
    MultiResolutionRope,
    apply_rotary_emb_qwen_batched,
    image_positions,
    text_positions,
)

AXES, WIDTH = (16, 56, 56), 128  # frame, row, column; channels a head of Qwen-Image


@pytest.fixture(scope="module")
def rope() -> MultiResolutionRope:
    return MultiResolutionRope(QwenEmbedRope(theta=10_000, axes_dim=list(AXES), scale_rope=True))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def rotated(rope: MultiResolutionRope, x: Tensor, position: tuple[int, int, int]) -> Tensor:
    """`(D,)` at one position."""
    freqs = rope.frequencies(torch.tensor([position]), None)
    return apply_rotary_emb_qwen_batched(x.view(1, 1, 1, -1), freqs).view(-1)


def test_the_channels_are_those_of_the_stock_model() -> None:
    stock = inspect.signature(QwenImageTransformer2DModel).parameters
    assert (stock["axes_dims_rope"].default, stock["attention_head_dim"].default) == (AXES, WIDTH)


def test_the_score_is_the_formula(rope: MultiResolutionRope) -> None:
    """It has the difference of two positions alone, and for each axis its own frequencies."""
    query, key = normal(2, WIDTH)
    at, other = (2, 5, -7), (0, -3, 4)
    frequencies = [10_000.0 ** (-2 * i / dim) for dim in AXES for i in range(dim // 2)]
    pair_axes = [axis for axis, dim in enumerate(AXES) for _ in range(dim // 2)]
    angles = [(at[axis] - other[axis]) * f for axis, f in zip(pair_axes, frequencies, strict=True)]
    pairs = torch.view_as_complex(query.view(-1, 2)) * torch.view_as_complex(key.view(-1, 2)).conj()
    stated = (pairs * torch.polar(torch.ones(64), torch.tensor(angles))).sum().real
    assert float(rotated(rope, query, at) @ rotated(rope, key, other)) == pytest.approx(float(stated), rel=1e-4)


def test_the_rotation_keeps_the_length_of_every_pair(rope: MultiResolutionRope) -> None:
    x = normal(WIDTH)
    pairs = rotated(rope, x, (1, 30, -17)).view(-1, 2).norm(dim=1)
    torch.testing.assert_close(pairs, x.view(-1, 2).norm(dim=1), rtol=1e-6, atol=1e-6)


def test_wavelengths(rope: MultiResolutionRope) -> None:
    angles = rope.frequencies(torch.ones(1, 3, dtype=torch.int64), None)[0].angle()
    assert 2 * math.pi / float(angles[8]) == pytest.approx(6.3, abs=0.05)  # the first pair of the row axis
    assert 2 * math.pi / float(angles[35]) == pytest.approx(45_000, rel=0.01)  # the last


def test_only_queries_and_keys_are_rotated(tiny_base: Path) -> None:
    """A common factor exp(j a) in all frequencies cancels between query and key; on a value it would stay."""
    model = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer", use_safetensors=True)
    image, text = normal(1, 20, model.inner_dim), normal(1, 6, model.inner_dim)
    places = torch.cat([text_positions([(1, 4, 5)], 6), image_positions([(1, 4, 5)])])
    freqs = MultiResolutionRope(model.pos_embed).frequencies(places, None)

    def attend(freqs: Tensor) -> Tensor:
        processor = QwenDoubleStreamAttnProcessor2_0_MultiRes()
        with torch.no_grad():
            attention = model.transformer_blocks[0].attn
            out_image, out_text = processor(attention, image, text, image_rotary_emb=JointRotary(freqs))
        return torch.cat([out_text, out_image], dim=1)

    reference = attend(freqs)
    turned = attend(freqs * torch.polar(torch.tensor(1.0), torch.tensor(1.0)))
    assert float((turned - reference).norm() / reference.norm()) < 1e-6
    moved = attend(freqs.roll(1, dims=0))
    assert float((moved - reference).norm() / reference.norm()) > 1e-2
