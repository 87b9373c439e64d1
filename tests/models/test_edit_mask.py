"""An edit mask in pixels becomes the area mean of each token, in parts of pixels where a token's rectangle cuts one."""

import numpy as np
import pytest
import torch
from PIL import Image

from mixres.geometry import Grid
from mixres.models.edit_mask import mask_on_grid


@pytest.mark.parametrize(("width", "height"), [(96, 64), (100, 41)], ids=["whole_cells", "fractional_cells"])
def test_mask_is_the_area_mean_of_each_token(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    mask = mask_on_grid(Image.fromarray(pixels), Grid(1, 3, 6))
    # Each pixel cut into 3 x 6 equal parts makes every cell a whole number of parts.
    fine = np.kron(pixels / 255, np.ones((3, 6)))
    assert mask.dtype == torch.float32
    np.testing.assert_allclose(mask.numpy(), fine.reshape(3, height, 6, width).mean((1, 3)).flatten(), atol=1e-5)
