"""An edit mask in pixels -> the foreground fraction of each token.

Promise: exact area means, in parts of pixels where a token's rectangle cuts one; PIL's box filter takes whole pixels
only. Cost: two small matrix products.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixres.geometry import Grid


def mask_on_grid(mask: Image.Image, grid: Grid) -> Tensor:
    """`(S,)` float32 in [0, 1]: the mean over each token's rectangle of the image."""
    pixels = torch.from_numpy(np.array(mask.convert("L"), dtype=np.float64) / 255)
    rows, columns = _coverage(grid.rows, mask.height), _coverage(grid.columns, mask.width)
    return (rows @ pixels @ columns.T).float().clamp_(0, 1).flatten()


def _coverage(cells: int, pixels: int) -> Tensor:
    """`(cells, pixels)` float64: the fraction of each cell of a line that each pixel takes up; rows sum to 1."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    left = torch.arange(pixels, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return overlap.clamp(min=0) * cells / pixels
