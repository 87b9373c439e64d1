"""Size arithmetic by named cases and against diffusers' own; packing against the pipeline's own."""

import math
from functools import partial

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from hypothesis import given, strategies as st

from mixres.geometry import Grid, Size, control_size, pack_latents, target_size, token_count, token_grid, unpack_latents

MEGAPIXEL = 1024 * 1024
SIDES = st.integers(16, 12_000)


def test_target_size_rounds_by_resizing_and_never_passes_the_limit() -> None:
    size = partial(target_size, multiple_of=16)
    assert size(Size(71, 88), max_pixels=MEGAPIXEL) == size(Size(72, 104), max_pixels=MEGAPIXEL) == (64, 96), "to even"
    assert size(Size(4000, 3000), max_pixels=MEGAPIXEL) == (1184, 880), "one row of tokens less: it would be over"
    assert size(Size(1025, 1023), max_pixels=MEGAPIXEL) == (1024, 1024), "rounding alone suffices"
    assert size(Size(5, 300), max_pixels=MEGAPIXEL) == (16, 304)
    assert size(Size(1000, 3), max_pixels=4096) == (992, 16), "one token of height stays"
    assert size(Size(300, 451), max_pixels=65536, upscale=True) == (208, 304)


@given(SIDES, SIDES, st.integers(16 * 16, 2**22), st.sampled_from([16, 32, 64]), st.booleans())
def test_target_size_holds_its_promise(
    width: int, height: int, max_pixels: int, multiple_of: int, upscale: bool
) -> None:
    size = target_size(Size(width, height), max_pixels=max_pixels, multiple_of=multiple_of, upscale=upscale)
    assert size.width % multiple_of == 0
    assert size.height % multiple_of == 0
    assert min(size) >= multiple_of
    assert size.width * size.height <= max_pixels or min(size) == multiple_of
    mirrored = target_size(Size(height, width), max_pixels=max_pixels, multiple_of=multiple_of, upscale=upscale)
    assert mirrored == (size.height, size.width)
    rounded = target_size(Size(width, height), max_pixels=2**40, multiple_of=16)
    assert abs(rounded.width - width) <= 8 and abs(rounded.height - height) <= 8


@given(SIDES, SIDES, st.sampled_from([64 * 64, 128 * 128, 384 * 384, MEGAPIXEL]) | st.integers(1024, 2**22))
def test_control_size_is_what_the_stock_pipeline_computes(width: int, height: int, area: int) -> None:
    stock_width, stock_height, _ = pipeline_qwenimage_edit.calculate_dimensions(area, width / height)
    assert control_size(Size(width, height), area=area) == (max(32, stock_width), max(32, stock_height))


def test_grid_puts_rows_before_columns_and_counts_tokens() -> None:
    grid = token_grid(Size(width=320, height=64), 16)
    assert grid == (1, 4, 20) == Grid(frames=1, rows=4, columns=20)
    assert grid.tokens == 80
    assert token_count([grid, (1, 2, 3)]) == 86
    with pytest.raises(AssertionError):
        token_grid(Size(320, 65), 16)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_pack_is_the_pipelines_own_and_unpack_its_inverse(channels: int, rows: int, columns: int) -> None:
    shape = (channels, 1, 2 * rows, 2 * columns)
    latents = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    tokens = pack_latents(latents)
    stock = QwenImageEditPipeline._pack_latents(latents[None], 1, channels, 2 * rows, 2 * columns)
    assert torch.equal(tokens, stock[0])
    assert torch.equal(unpack_latents(tokens, Grid(1, rows, columns)), latents)
    unpacked = QwenImageEditPipeline._unpack_latents(tokens[None], 16 * rows, 16 * columns, 8)
    assert torch.equal(unpack_latents(tokens, Grid(1, rows, columns)), unpacked[0])
