"""Modulation parameters of packed samples: the linear layers run once per sample, their rows are shared by its tokens.

Promise: no layer computes modulation per token. Cost: each piece (shift, scale or gate) is expanded to one row a token
where a block uses it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixres.models.packing import Runs


def expand_rows(rows: Tensor, runs: Runs) -> Tensor:
    """`(..., rows, C)` -> `(..., tokens, C)`. Views joined, not a gather: its gradient is a plain sum, always alike."""
    shape = rows.shape
    return torch.cat([rows[..., row : row + 1, :].expand(*shape[:-2], tokens, shape[-1]) for row, tokens in runs], -2)


class SampleRows:
    """Modulation parameters `(..., rows, k * C)` that a stock block cuts like a tensor; pieces expand to tokens last.

    A block cuts its parameters in pieces (shift, scale, gate), in one or two steps. Expanding before the last step
    would copy all of them once more in the backward pass, and keep them alive together where autograd saves one.
    """

    def __init__(self, rows: Tensor, runs: Runs, cuts: int = 1) -> None:
        """`cuts` is the number of steps in which the block cuts them."""
        self.rows, self.runs, self.cuts = rows, runs, cuts

    @property
    def ndim(self) -> int:
        return self.rows.ndim

    def unsqueeze(self, dim: int) -> "SampleRows":
        """As `Tensor.unsqueeze` of `(B, k * C)`: the tokens of all samples are one row of the batch."""
        assert (self.ndim, dim) == (2, 1), (self.ndim, dim)
        return SampleRows(self.rows[None], self.runs, self.cuts)

    def chunk(self, chunks: int, dim: int = -1) -> tuple["SampleRows | Tensor", ...]:
        """As `Tensor.chunk` along the channels: the last step gives tensors of one row per token."""
        assert dim in (-1, self.ndim - 1), dim
        parts = self.rows.chunk(chunks, dim)
        if self.cuts == 1:
            return tuple(expand_rows(part, self.runs) for part in parts)
        return tuple(SampleRows(part, self.runs, self.cuts - 1) for part in parts)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """`torch.chunk(rows, ...)`, which some blocks write; anything else on the way would compute per sample."""
        assert function is torch.chunk, function
        return args[0].chunk(*args[1:], **(kwargs or {}))


class _ExpandOutput:
    """Forward hook on the linear layer of an adaptive norm whose `packed_runs` say how its rows expand."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def __call__(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> SampleRows | None:
        runs: Runs | None = self.norm.packed_runs
        if runs is None or self.norm.linear is not linear:  # an adapter now holds the layer, and has a hook of its own
            return None
        return SampleRows(output, runs)


def expand_linear_output(norm: Any) -> None:
    """Let `norm.linear` return rows that expand while `norm.packed_runs` is set.

    To be called before each packed call: an adapter may have taken the layer's place. Nothing is hooked twice.
    """
    if not any(isinstance(hook, _ExpandOutput) for hook in norm.linear._forward_hooks.values()):
        norm.linear.register_forward_hook(_ExpandOutput(norm))
