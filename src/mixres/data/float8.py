"""Text embeddings in 8 bits a value: e4m3 with a power of two for each token.

Promise: a value changes by at most 1/16 of itself, or by 2^-17 of the largest of its token where that is more; a token
with a value that is not finite becomes NaN as a whole. What is
read back is exact in bfloat16 and wider: rounding it once more changes nothing. Cost: a byte a value, and a scale of
the embeddings' own dtype a token, which keeps that dtype.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FORMAT = torch.float8_e4m3fn
NAMES = ("prompt_embeds", "empty_embeds")  # (T, D) each; the scales (T,) stand beside them under the name and `_scale`


def to_float8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an entry with those of `NAMES` in 8 bits, and their scales."""
    rounded = dict(tensors)
    for name in NAMES:
        if name in tensors:
            wide = tensors[name].double()
            largest = wide.abs().amax(-1)
            finite = largest.isfinite()
            wide = wide.where(finite[:, None], torch.nan)  # there is no infinity in 8 bits
            mantissas, exponents = torch.frexp(largest.where(finite, 1.0) / torch.finfo(FORMAT).max)
            scales = torch.ldexp(torch.ones_like(mantissas), exponents - (mantissas == 0.5).int())
            rounded |= {name: (wide / scales[:, None]).to(FORMAT), f"{name}_scale": scales.to(tensors[name].dtype)}
    return rounded


def from_float8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an entry without scales: what is in 8 bits in the dtype of its scales."""
    restored = dict(tensors)
    for name in NAMES:
        if (scales := restored.pop(f"{name}_scale", None)) is not None:
            restored[name] = _widened(tensors[name], scales.dtype).mul_(scales[:, None])
    return restored


def _widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As `values.to(dtype)`, by a table of all 256 values: on a CPU in half the time."""
    table = torch.arange(256, dtype=torch.uint8).view(FORMAT).to(dtype).view(torch.uint8).numpy()
    taken = table.view(f"i{dtype.itemsize}").take(values.view(torch.uint8).numpy())
    return torch.from_numpy(taken).view(dtype)
