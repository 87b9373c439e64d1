"""What docs/position_encoding.md states, each fact on the real components."""

import importlib.util
import inspect
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, apply_rotary_emb_qwen
from PIL import Image
from torch import Tensor

from mixres.models.qwen.attention import QwenDoubleStreamAttnProcessor2_0_MultiRes
from mixres.models.qwen.rope import (
    FILLER_POSITION,
    TABLE_HALF,
    JointRotary,
    MultiResolutionRope,
    apply_rotary_emb_qwen_batched,
    image_positions,
    text_positions,
)

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "position_encoding.md"
WIDTH = 128  # channels a head of Qwen-Image
SAMPLE = [(1, 8, 12), (1, 6, 6), (1, 5, 9)]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """scripts/position_figures.py, which draws the page's pictures."""
    spec = importlib.util.spec_from_file_location("position_figures", REPOSITORY / "scripts" / "position_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rope(figures: ModuleType) -> MultiResolutionRope:
    found: MultiResolutionRope = figures.qwen_rope()
    return found


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def rotated(rope: MultiResolutionRope, x: Tensor, position: tuple[int, int, int]) -> Tensor:
    """`(D,)` at one position."""
    freqs = rope.frequencies(torch.tensor([position]), None)
    return apply_rotary_emb_qwen_batched(x.view(1, 1, 1, -1), freqs).view(-1)


@pytest.mark.parametrize("offset", [(1, 0, 0), (0, 7, 0), (0, 0, -9), (3, -20, 40), (20, 500, 500)])
def test_the_score_depends_on_the_relative_position_only(
    rope: MultiResolutionRope, offset: tuple[int, int, int]
) -> None:
    query, key = normal(2, WIDTH)
    at, other = (1, -4, 3), (0, 2, -6)

    def score(shift: tuple[int, int, int]) -> float:
        p, s = (tuple(a + b for a, b in zip(place, shift, strict=True)) for place in (at, other))
        return float(rotated(rope, query, p) @ rotated(rope, key, s))

    assert score(offset) == pytest.approx(score((0, 0, 0)), abs=2e-3, rel=1e-4)
    moved_alone = float(rotated(rope, query, (1, -4, 4)) @ rotated(rope, key, other))
    assert abs(moved_alone - score((0, 0, 0))) > 0.1


def test_the_score_is_the_formula(rope: MultiResolutionRope) -> None:
    query, key = normal(2, WIDTH)
    at, other = (2, 5, -7), (0, -3, 4)
    angles = [
        (a - b) * 10_000.0 ** (-2 * i / dim)
        for a, b, dim in zip(at, other, (16, 56, 56), strict=True)
        for i in range(dim // 2)
    ]
    pairs = torch.view_as_complex(query.view(-1, 2)) * torch.view_as_complex(key.view(-1, 2)).conj()
    stated = (pairs * torch.polar(torch.ones(64), torch.tensor(angles))).sum().real
    assert float(rotated(rope, query, at) @ rotated(rope, key, other)) == pytest.approx(float(stated), rel=1e-4)


def test_only_queries_and_keys_are_rotated(tiny_base: Path) -> None:
    """A common factor exp(j a) in all frequencies cancels between query and key; on a value it would stay."""
    model = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer", use_safetensors=True)
    attention = model.transformer_blocks[0].attn
    image, text = normal(1, 20, model.inner_dim), normal(1, 6, model.inner_dim)
    model_rope = MultiResolutionRope(model.pos_embed)
    places = torch.cat([text_positions([(1, 4, 5)], 6), image_positions([(1, 4, 5)])])
    freqs = model_rope.frequencies(places, None)
    processor = QwenDoubleStreamAttnProcessor2_0_MultiRes()

    def attend(freqs: Tensor) -> Tensor:
        with torch.no_grad():
            out_image, out_text = processor(attention, image, text, image_rotary_emb=JointRotary(freqs))
        return torch.cat([out_text, out_image], dim=1)

    reference = attend(freqs)
    turned = attend(freqs * torch.polar(torch.tensor(1.0), torch.tensor(1.0)))
    assert float((turned - reference).norm() / reference.norm()) < 1e-6
    moved = attend(freqs.roll(1, dims=0))
    assert float((moved - reference).norm() / reference.norm()) > 1e-2


def test_complex_and_real_form_agree(rope: MultiResolutionRope) -> None:
    x = normal(1, 5, 3, WIDTH)
    freqs = rope.frequencies(image_positions([(1, 1, 5)]), None)
    ours = apply_rotary_emb_qwen_batched(x, freqs)
    cos, sin = freqs.real, freqs.imag
    real, imaginary = x[..., 0::2], x[..., 1::2]
    by_hand = torch.stack(
        [real * cos[:, None] - imaginary * sin[:, None], real * sin[:, None] + imaginary * cos[:, None]], dim=-1
    )
    torch.testing.assert_close(ours, by_hand.flatten(-2), rtol=1e-6, atol=1e-6)
    stock_real = apply_rotary_emb_qwen(
        x.transpose(1, 2), (cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)), use_real=True
    )
    torch.testing.assert_close(ours, stock_real.transpose(1, 2), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours, apply_rotary_emb_qwen(x, freqs, use_real=False))


def test_the_rotation_keeps_the_length(rope: MultiResolutionRope) -> None:
    x = normal(WIDTH)
    pairs = rotated(rope, x, (1, 30, -17)).view(-1, 2).norm(dim=1)
    torch.testing.assert_close(pairs, x.view(-1, 2).norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_rotation_is_in_float32_and_keeps_the_dtype(rope: MultiResolutionRope, dtype: torch.dtype) -> None:
    x = normal(1, 12, 2, WIDTH).to(dtype)
    freqs = rope.frequencies(image_positions([(1, 3, 4)]) + torch.tensor([0, 100, 100]), None)
    out = apply_rotary_emb_qwen_batched(x, freqs)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert out.dtype is dtype
    assert torch.equal(out, apply_rotary_emb_qwen_batched(x.to(wide), freqs).to(dtype))


def test_bfloat16_cannot_tell_1000_from_1001() -> None:
    assert torch.tensor(1000.0).bfloat16() == torch.tensor(1001.0).bfloat16()


def test_channels_of_a_head_per_axis(rope: MultiResolutionRope) -> None:
    stock = inspect.signature(QwenImageTransformer2DModel).parameters
    assert (stock["axes_dims_rope"].default, stock["attention_head_dim"].default) == ((16, 56, 56), 128)
    for axis, (first, dim) in enumerate([(0, 16), (8, 56), (36, 56)]):
        step = torch.zeros(1, 3, dtype=torch.int64)
        step[0, axis] = 1
        angles = rope.frequencies(step, None)[0].angle()
        own = angles[first : first + dim // 2]
        expected = torch.tensor([10_000.0 ** (-2 * i / dim) for i in range(dim // 2)])
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)
        assert own[0] == pytest.approx(1.0)
        assert angles.count_nonzero() == dim // 2


def test_wavelengths() -> None:
    assert 2 * math.pi == pytest.approx(6.3, abs=0.05)
    assert 2 * math.pi * 10_000 ** (54 / 56) == pytest.approx(45_000, rel=0.01)


def test_the_frame_axis_counts_images() -> None:
    frames = [grid[:, 0].unique().tolist() for grid in image_positions(SAMPLE).split([96, 36, 45])]
    assert frames == [[0], [1], [2]]


@pytest.mark.parametrize(("sides", "expected"), [(8, (-4, 3)), (5, (-3, 1)), (6, (-3, 2)), (1, (-1, -1))])
def test_rows_and_columns_are_centred(sides: int, expected: tuple[int, int]) -> None:
    for axis, shape in ((1, (1, sides, 3)), (2, (1, 3, sides))):
        along = image_positions([shape])[:, axis]
        assert (int(along.min()), int(along.max())) == expected == (-(sides - sides // 2), sides // 2 - 1)


@pytest.mark.parametrize(
    ("shapes", "first"),
    [([(1, 8, 12), (1, 6, 6)], 6), ([(1, 16, 6), (1, 8, 8)], 8), ([(1, 4, 4), (1, 4, 31)], 15), ([(1, 1, 1)], 0)],
)
def test_text_begins_outside_all_images_of_its_sample(shapes: list[tuple[int, int, int]], first: int) -> None:
    assert text_positions(shapes, 3).tolist() == [[first + i] * 3 for i in range(3)]


def test_positions_are_those_of_diffusers_for_each_sample(rope: MultiResolutionRope) -> None:
    stock = QwenEmbedRope(theta=10_000, axes_dim=[16, 56, 56], scale_rope=True)
    batch = [SAMPLE, [(1, 16, 6), (1, 8, 8)], [(1, 3, 3)]]
    images, texts = rope.padded_frequencies(batch, 177, 9, None)
    for b, shapes in enumerate(batch):
        image, text = stock([shapes], device=torch.device("cpu"), max_txt_seq_len=9)
        assert torch.equal(images[b, : len(image)], image)
        assert torch.equal(texts[b], text)
        assert not images[b, len(image) :].any()
    assert not torch.equal(texts[0], texts[1])


def test_the_tables_end_and_filler_is_zero(rope: MultiResolutionRope) -> None:
    assert (-TABLE_HALF, TABLE_HALF - 1) == (-4096, 4095)
    ends = torch.tensor([[0, -4096, -4096], [4095, 4095, 4095]])
    assert (rope.frequencies(ends, None).abs() - 1).abs().max() < 1e-6
    assert not rope.frequencies(torch.full((1, 3), FILLER_POSITION), None).any()


def test_sample_0_positions_spoil_the_others_and_the_patch_does_not(figures: ModuleType, tiny_base: Path) -> None:
    errors = figures.measure(tiny_base)
    for values in vars(errors).values():
        assert values[0] < 1e-6
    for low, high, values in (
        (0.05, 0.20, errors.text_of_sample_0),
        (0.25, 0.40, errors.image_of_sample_0),
        (0.25, 0.40, errors.stock),
    ):
        assert all(low < value < high for value in values[1:]), values
    assert max(errors.patched) < 1e-6


def test_the_pictures_of_the_page_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = {line.split("(images/")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert {"frequencies.png", "image_grids.png", "text_offset.png", "sample_0_positions.png"} == names
    for name in names:
        with Image.open(REPOSITORY / "docs" / "images" / name) as picture:
            picture.verify()


def test_the_pictures_are_what_the_script_draws(figures: ModuleType) -> None:
    for name in ("frequencies", "image_grids", "text_offset"):
        draw = {
            "frequencies": figures.frequencies_figure,
            "image_grids": figures.grids_figure,
            "text_offset": figures.text_figure,
        }[name]
        with Image.open(REPOSITORY / "docs" / "images" / f"{name}.png") as picture:
            assert picture.convert("RGB").tobytes() == draw().tobytes(), f"run scripts/position_figures.py: {name}"
