"""Positions: the stock's for one sample, each sample's own in a batch, none for padding; rotation in fp32 or wider."""

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor

from mixres.models.qwen.rope import (
    PADDING_POSITION,
    TABLE_HALF,
    apply_rotary_emb_qwen_batched,
    as_shape_lists,
    image_positions,
    text_positions,
)
from support.mixes import patched_model, stock_model

CPU = torch.device("cpu")
SAMPLES = [[(1, 16, 32)], [(1, 24, 24), (1, 10, 14), (1, 6, 9)], [(1, 7, 5), (1, 1, 1)], [(3, 4, 5)], [(1, 20, 28)]]


@pytest.mark.parametrize("shapes", SAMPLES)
def test_one_sample_gets_the_stock_pair(shapes: list[tuple[int, int, int]]) -> None:
    stock, patched = stock_model().pos_embed, patched_model().pos_embed
    forms = ([shapes], [shapes, shapes], shapes, shapes[0]) if len(shapes) == 1 else ([shapes], [shapes, shapes])
    for form in forms:
        expected, found = (rope(form, max_txt_seq_len=11, device=CPU) for rope in (stock, patched))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert [x.dtype for x in found] == [torch.complex64] * 2
    without_device, tensor_length = patched([shapes], None, 11), patched([shapes], CPU, torch.tensor(11))
    assert torch.equal(without_device[1], found[1]) and torch.equal(tensor_length[1], found[1])


def test_each_sample_of_a_batch_gets_the_pair_it_gets_alone_and_padding_gets_zero() -> None:
    stock, patched = stock_model().pos_embed, patched_model().pos_embed
    image, text = patched(SAMPLES, max_txt_seq_len=11, device=CPU)
    for b, shapes in enumerate(SAMPLES):
        expected = stock([shapes], max_txt_seq_len=11, device=CPU)
        tokens = len(expected[0])
        assert torch.equal(image[b, :tokens], expected[0]) and torch.equal(text[b], expected[1])
        assert not image[b, tokens:].any()
    assert not torch.equal(text[0], text[1])
    assert not patched.frequencies(torch.full((2, 3), PADDING_POSITION), CPU).any()


def test_positions_are_centred_and_text_starts_behind_the_largest_image() -> None:
    shapes = [(1, 2, 3), (1, 1, 4)]
    expected = [[0, r, c] for r in (-1, 0) for c in (-2, -1, 0)] + [[1, -1, c] for c in (-2, -1, 0, 1)]
    assert image_positions(shapes).tolist() == expected
    assert text_positions(shapes, 3).tolist() == [[2] * 3, [3] * 3, [4] * 3]
    for triple in ((1, 2, 3), tuple(np.array([1, 2, 3]))):
        listed = as_shape_lists([triple, [[1, 2, 3], (1, 4, 5)]])
        assert listed == [[(1, 2, 3)], [(1, 2, 3), (1, 4, 5)]]
        assert all(type(side) is int for sample in listed for grid in sample for side in grid)


def test_text_beyond_the_table_is_refused() -> None:
    rope = patched_model().pos_embed
    text = rope([[(1, 4, 4)]], max_txt_seq_len=TABLE_HALF - 2, device=CPU)[1]
    assert text.shape[0] == TABLE_HALF - 2 and bool(text.abs().min() > 0)
    with pytest.raises(ValueError, match="the rotary table ends at 4095"):
        rope([[(1, 4, 4)]], max_txt_seq_len=TABLE_HALF - 1, device=CPU)
    with pytest.raises(ValueError, match="max_txt_seq_len"):
        rope([[(1, 4, 4)]], device=CPU)


def heads_and_frequencies(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    freqs, _ = patched_model().pos_embed(SAMPLES[:3], max_txt_seq_len=1, device=CPU)
    return torch.randn(3, freqs.shape[1], 2, 32, generator=noise).to(dtype), freqs


def test_rotation_equals_the_stock_one_sample_by_sample() -> None:
    x, freqs = heads_and_frequencies()
    batched = apply_rotary_emb_qwen_batched(x, freqs)
    for b in range(3):
        assert torch.equal(batched[b : b + 1], apply_rotary_emb_qwen(x[b : b + 1], freqs[b], use_real=False))
    shared = apply_rotary_emb_qwen_batched(x, freqs[1])
    assert torch.equal(shared, apply_rotary_emb_qwen(x, freqs[1], use_real=False))
    assert torch.equal(shared, apply_rotary_emb_qwen_batched(x, freqs[1:2]))
    across = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(batched, apply_rotary_emb_qwen_batched(across, freqs))
    with pytest.raises(ValueError, match="do not fit"):
        apply_rotary_emb_qwen_batched(x, freqs[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_fp32_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    x, freqs = heads_and_frequencies(dtype)
    rotated = apply_rotary_emb_qwen_batched(x, freqs)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, apply_rotary_emb_qwen_batched(x.float(), freqs).to(dtype))
    real, imag = x[0].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part.to(dtype)[:, None] for part in (freqs[0].real, freqs[0].imag))
    in_half = torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1).flatten(-2)
    assert not torch.equal(rotated[0], in_half)


def test_float64_is_rotated_in_float64() -> None:
    x, freqs = heads_and_frequencies(torch.float64)
    rotated = apply_rotary_emb_qwen_batched(x, freqs)
    exact = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * freqs.to(torch.complex128)[:, :, None])
    assert rotated.dtype == torch.float64
    assert float((rotated - exact.flatten(-2)).abs().max()) < 1e-14
    assert float((apply_rotary_emb_qwen_batched(x.float(), freqs) - rotated).abs().max()) > 1e-9
