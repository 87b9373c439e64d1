"""Fields of a batch by sample, and token grids from every form in which embeddings state them."""

from typing import Any

import pytest
import torch

from mixres.batch import Batch, extract_batch_field, image_shapes_from_embeddings
from mixres.geometry import Grid


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param([64, 96], 96, id="list"),
        pytest.param((64, 96), 96, id="tuple"),
        pytest.param([torch.tensor(64), torch.tensor(96)], 96, id="list_of_0d_tensors"),
        pytest.param(torch.tensor([64, 96]), 96, id="tensor"),
        pytest.param(torch.tensor(96), 96, id="0d_tensor_is_shared"),
        pytest.param(96, 96, id="scalar_is_shared"),
        pytest.param("text", "text", id="string_is_a_scalar"),
        pytest.param([None, None], None, id="none_in_a_list"),
    ],
)
def test_field_of_sample_1(value: Any, expected: Any) -> None:
    found = extract_batch_field({"x": value}, "x", 1)
    assert found == expected
    assert type(found) is type(expected)


def test_field_keeps_the_rows_of_a_matrix() -> None:
    matrix = torch.arange(6).reshape(2, 3)
    assert torch.equal(extract_batch_field({"x": matrix}, "x", 1), matrix[1])
    assert torch.equal(extract_batch_field({"x": [matrix, matrix + 1]}, "x", 1), matrix + 1)


def test_absent_field_names_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no field 'width'.*height, prompt"):
        extract_batch_field({"prompt": 1, "height": 2}, "width", 0)


@pytest.mark.parametrize("value", [[1], (1,), torch.tensor([1])], ids=["list", "tuple", "tensor"])
def test_a_field_shorter_than_the_batch_is_an_error(value: Any) -> None:
    with pytest.raises(IndexError):
        extract_batch_field({"x": value}, "x", 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            {"height": [256, 384], "width": [512, 320]},
            [[(1, 16, 32)], [(1, 24, 20)]],
            id="lists",
        ),
        pytest.param(
            {"height": torch.tensor([256, 384]), "width": torch.tensor([512, 320])},
            [[(1, 16, 32)], [(1, 24, 20)]],
            id="tensors",
        ),
        pytest.param({"height": 256, "width": torch.tensor(512)}, [[(1, 16, 32)]] * 2, id="scalars"),
        pytest.param(
            {"height": [256, 384], "width": 512, "height_control": 64, "width_control": [32, 96]},
            [[(1, 16, 32), (1, 4, 2)], [(1, 24, 32), (1, 4, 6)]],
            id="one_control",
        ),
        pytest.param(
            {
                "height": 256,
                "width": 512,
                "height_control": 32,
                "width_control": 48,
                "height_control_1": [64, None],
                "width_control_1": [80, None],
                "height_control_2": torch.tensor([96, 0]),
                "width_control_2": torch.tensor([112, 0]),
            },
            [[(1, 16, 32), (1, 2, 3), (1, 4, 5), (1, 6, 7)], [(1, 16, 32), (1, 2, 3)]],
            id="three_controls_and_one",
        ),
    ],
)
def test_shapes_from_pixel_fields(fields: dict[str, Any], expected: list[Any]) -> None:
    assert image_shapes_from_embeddings(fields, 2) == expected


@pytest.mark.parametrize(
    "img_shapes",
    [
        pytest.param([[(1, 16, 32), (1, 2, 3)], [(1, 24, 20), (1, 4, 5)]], id="tuples"),
        pytest.param([[Grid(1, 16, 32), Grid(1, 2, 3)], [[1, 24, 20], [1, 4, 5]]], id="grids_and_lists"),
        pytest.param(torch.tensor([[[1, 16, 32], [1, 2, 3]], [[1, 24, 20], [1, 4, 5]]]), id="tensor"),
        pytest.param(
            [torch.tensor([[1, 16, 32], [1, 2, 3]]), torch.tensor([[1, 24, 20], [1, 4, 5]])], id="list_of_tensors"
        ),
        pytest.param(
            [[torch.tensor([1, 16, 32]), (1, 2, 3)], [torch.tensor([1, 24, 20]), (1, 4, 5)]], id="tensors_in_lists"
        ),
    ],
)
def test_img_shapes_win_over_pixel_fields(img_shapes: Any) -> None:
    shapes = image_shapes_from_embeddings({"img_shapes": img_shapes, "height": 16, "width": 16}, 2)
    assert shapes == [[(1, 16, 32), (1, 2, 3)], [(1, 24, 20), (1, 4, 5)]]
    assert all(type(side) is int for shape in shapes for grid in shape for side in grid)


def test_img_shapes_may_hold_different_numbers_of_controls() -> None:
    ragged = [[(1, 4, 4)], [(1, 2, 2), (1, 3, 3), (1, 5, 5)]]
    assert image_shapes_from_embeddings({"img_shapes": ragged}, 2) == ragged


def test_pixels_per_token_is_the_callers() -> None:
    fields = {"height": 256, "width": 512}
    assert image_shapes_from_embeddings(fields, 1, pixels_per_token=32) == [[(1, 8, 16)]]


def test_sides_that_make_no_whole_token_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"sample 1: height_control x width_control = 64 x 33 .* 16"):
        image_shapes_from_embeddings({"height": 64, "width": 64, "height_control": 64, "width_control": [32, 33]}, 2)


@pytest.mark.parametrize("fields", [{}, {"height": 64}, {"height": 64, "width": 64, "height_control": 64}])
def test_missing_pixel_field_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match=r"no field '(height|width|width_control)'"):
        image_shapes_from_embeddings(fields, 1)


def test_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = Batch(
        layout="padded", indices=(0,),
        names=("a",), latents=torch.zeros(1, 2, 4), target_index=torch.tensor([0]), target_lengths=(1,),
        prompt_embeds=torch.zeros(1, 3, 5), prompt_mask=None, text_lengths=(3,), img_shapes=((Grid(1, 1, 2),),),
        edit_mask=torch.ones(1), has_mask=(False,), sample_weights=(1.0,),
    )  # fmt: skip
    moved = batch.to("meta")
    assert {moved.latents.device.type, moved.target_index.device.type, moved.edit_mask.device.type} == {"meta"}
    assert moved.prompt_mask is None
    assert (moved.names, moved.img_shapes) == (batch.names, batch.img_shapes)
