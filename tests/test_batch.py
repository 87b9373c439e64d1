"""Fields of a batch by sample, and token grids from every form in which embeddings state them."""

from typing import Any

import numpy as np
import pytest
import torch

from mixres.batch import extract_batch_field, image_shapes_from_embeddings
from mixres.geometry import Grid
from support.steps import microbatch

FIELDS: dict[str, tuple[Any, Any]] = {
    "list": ([64, 96], 96),
    "list of 0-d tensors": ([torch.tensor(64), torch.tensor(96)], 96),
    "tensor": (torch.tensor([64, 96]), 96),
    "0-d tensor is shared": (torch.tensor(96), 96),
    "scalar is shared": (96, 96),
    "string is a scalar": ("text", "text"),
}


@pytest.mark.parametrize(("value", "expected"), FIELDS.values(), ids=FIELDS)
def test_field_of_sample_1(value: Any, expected: Any) -> None:
    found = extract_batch_field({"x": value}, "x", 1)
    assert found == expected
    assert type(found) is type(expected)


def test_field_keeps_the_rows_of_a_matrix_and_a_short_or_absent_one_is_an_error() -> None:
    matrix = torch.arange(6).reshape(2, 3)
    assert torch.equal(extract_batch_field({"x": matrix}, "x", 1), matrix[1])
    assert torch.equal(extract_batch_field({"x": [matrix, matrix + 1]}, "x", 1), matrix + 1)
    for short in ([1], torch.tensor([1])):
        with pytest.raises(IndexError):
            extract_batch_field({"x": short}, "x", 1)
    with pytest.raises(KeyError, match=r"no field 'width'.*height, x"):
        extract_batch_field({"x": 1, "height": 2}, "width", 0)


CONTROLS = {
    "height": 256, "width": 512, "height_control": 32, "width_control": 48,
    "height_control_1": [64, None], "width_control_1": [80, None],
    "height_control_2": torch.tensor([96, 0]), "width_control_2": torch.tensor([112, 0]),
}  # fmt: skip
PIXELS: dict[str, tuple[dict[str, Any], Any]] = {
    "NumPy and a tensor": (
        {"height": [np.int64(256), np.int64(384)], "width": torch.tensor([512, 320])},
        [[(1, 16, 32)], [(1, 24, 20)]],
    ),
    "scalars": ({"height": 256, "width": torch.tensor(512)}, [[(1, 16, 32)]] * 2),
    "one control": (
        {"height": [256, 384], "width": 512, "height_control": 64, "width_control": [32, 96]},
        [[(1, 16, 32), (1, 4, 2)], [(1, 24, 32), (1, 4, 6)]],
    ),
    "three and one": (CONTROLS, [[(1, 16, 32), (1, 2, 3), (1, 4, 5), (1, 6, 7)], [(1, 16, 32), (1, 2, 3)]]),
}


@pytest.mark.parametrize(("fields", "expected"), PIXELS.values(), ids=PIXELS)
def test_shapes_from_pixel_fields(fields: dict[str, Any], expected: list[Any]) -> None:
    assert_plain(image_shapes_from_embeddings(fields, 2), expected)
    halved = [[(1, rows // 2, columns // 2) for _, rows, columns in sample[:1]] for sample in expected]
    sides = {"height": fields["height"], "width": fields["width"]}
    assert image_shapes_from_embeddings(sides, 2, pixels_per_token=32) == halved


SHAPES = [[(1, 16, 32), (1, 2, 3)], [(1, 24, 20), (1, 4, 5)]]
FORMS: dict[str, Any] = {
    "tuples": SHAPES,
    "grids and lists": [[Grid(*grid) for grid in SHAPES[0]], [list(grid) for grid in SHAPES[1]]],
    "tensor": torch.tensor(SHAPES),
    "lists of NumPy": [[np.array(grid) for grid in shapes] for shapes in SHAPES],
}


@pytest.mark.parametrize("img_shapes", FORMS.values(), ids=FORMS)
def test_img_shapes_win_over_pixel_fields(img_shapes: Any) -> None:
    assert_plain(image_shapes_from_embeddings({"img_shapes": img_shapes, "height": 16, "width": 16}, 2), SHAPES)
    ragged = [*SHAPES[:1], [(1, 4, 4)]]
    assert image_shapes_from_embeddings({"img_shapes": ragged}, 2) == ragged


def assert_plain(shapes: Any, expected: Any) -> None:
    assert shapes == expected
    assert all(type(side) is int for sample in shapes for grid in sample for side in grid)


def test_missing_fields_and_sides_that_make_no_whole_token_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"sample 1: height_control x width_control = 64 x 33 .* 16"):
        image_shapes_from_embeddings({"height": 64, "width": 64, "height_control": 64, "width_control": [32, 33]}, 2)
    for fields, name in (({}, "height"), ({"height": 64, "width": 64, "height_control": 64}, "width_control")):
        with pytest.raises(KeyError, match=f"no field '{name}'"):
            image_shapes_from_embeddings(fields, 1)


def test_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = microbatch([0, 1])
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        found = getattr(moved, name)
        assert found.device.type == "meta" if isinstance(value, torch.Tensor) else found == value, name
