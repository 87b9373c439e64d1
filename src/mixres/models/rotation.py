"""Rotation of queries and keys by their positions. Source: RoFormer, Su et al. 2021 (arXiv 2104.09864).

Neighbouring channels are pairs. Stock models multiply complex numbers or compute with cosines and sines; a patched
model does as its stock model does, so that a sample alone keeps its values to the last bit.
"""

import torch
from torch import Tensor


def rotate_complex(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate queries or keys by a product of complex numbers.

    Args:
        x: `(B, S, H, D)`.
        freqs_cis: complex `(S, D/2)`, shared by all samples, or `(B, S, D/2)`, one row of positions per sample.

    Returns:
        `(B, S, H, D)` in the dtype of `x`; the arithmetic is in fp32, or in float64 where `x` is.

    Raises:
        ValueError: `freqs_cis` fits neither form.
    """
    batch, length, _, width = x.shape
    if freqs_cis.shape not in ((length, width // 2), (1, length, width // 2), (batch, length, width // 2)):
        raise ValueError(
            f"rotary frequencies of shape {tuple(freqs_cis.shape)} do not fit x of shape {tuple(x.shape)}: expected "
            f"({length}, {width // 2}) or ({batch}, {length}, {width // 2})"
        )
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis.unsqueeze(-2)).flatten(-2).type_as(x)


def rotate_real(x: Tensor, cosines_sines: Tensor) -> Tensor:
    """The same rotation without complex numbers; `cosines_sines` is `([B,] S, D/2, 2)`."""
    wide = x if x.dtype == torch.float64 else x.float()
    cosine, sine = cosines_sines.unsqueeze(-3).unbind(-1)
    even, odd = wide.reshape(*wide.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).type_as(x)
