"""The attention processor of Qwen-Image-2.1's multi-resolution patch; without a plan it is the stock one.

Cost over the stock processor: padded, a mask of L x L booleans a sample, with which torch takes no flash kernel;
packed, queries, keys and values are put in the order of the sequences. On CUDA in half precision two variable-length
kernels run a layer, for which keys that several blocks see are copied for each; elsewhere one kernel a block, as stock.

Legend: B sample, L = T + S text and image tokens, H head, D head width, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mixres.models.attention import JointAttention, JointRotary
from mixres.models.modulation import expand_rows
from mixres.models.packing import Runs
from mixres.models.qwen21.layout import PackedBlocks, Run


class TokenRows:
    """What stands for the stock forward's `target_token_mask`: which row of the modulation each token uses.

    The stock layers write `torch.where(mask.view(1, -1, 1), rows[:-1], rows[-1:])`, for one layout in all samples.
    """

    def __init__(self, is_target: Tensor | None = None, runs: Runs = ()) -> None:
        """Padded: `(B, L, 1)` bool. Packed: the rows of the tokens as they lie."""
        self.is_target, self.runs = is_target, runs

    def view(self, *shape: int) -> "TokenRows":
        """What the stock layers hand to `torch.where`."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """`(B, 1, C)` of the targets and `(1, 1, C)` of all else -> `(B, L, C)`, or `(1, L_total, C)`."""
        assert function is torch.where and not kwargs, function
        rows, first, last = args
        if rows.is_target is not None:  # where offloading has moved the rest of the call, it moves here
            return torch.where(rows.is_target.to(first.device), first, last)
        return expand_rows(torch.cat([first.transpose(0, 1), last], dim=1), rows.runs)


@dataclass(frozen=True)
class BlockCausal(JointRotary):
    """Positions and mask `(B, 1, L, L)` of one forward call, or the blocks of a packed one, and its modulation."""

    blocks: PackedBlocks | None = None
    rows: TokenRows | None = None  # None: each sample's own, as stock

    @property
    def is_packed(self) -> bool:
        return self.blocks is not None


class Qwen21MultiResAttnProcessor(JointAttention, QwenImage21AttnProcessor):  # type: ignore[misc]
    """Takes a `BlockCausal` as `rotary_emb`."""

    complex_rotation: ClassVar[bool] = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        rotary_emb: Tensor | BlockCausal | None = None,
        **stock: Any,
    ) -> Tensor:
        """`(B, L, C)` -> `(B, L, C)`."""
        if not isinstance(rotary_emb, BlockCausal):
            found: Tensor = super().__call__(attn, hidden_states, attention_mask, rotary_emb, **stock)
            return found
        query, key, value = self.heads(attn, hidden_states)
        attended: Tensor = self.attend(query.to(value.dtype), key.to(value.dtype), value, rotary_emb)
        for layer in attn.to_out:
            attended = layer(attended)
        return attended

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, plan: JointRotary) -> Tensor:
        """See `JointAttention`: by block and sample."""
        assert isinstance(plan, BlockCausal) and plan.blocks is not None
        query, key, value = (plan.blocks.sequences(x) for x in (query, key, value))
        if (half := self._varlen_dtype(query)) is not None:
            attended = attend_varlen(query[0].to(half), key[0].to(half), value[0].to(half), plan.blocks)[None]
        else:
            lengths = [runs[-1].end for runs in plan.blocks.samples]
            streams = (torch.split(x, lengths, dim=1) for x in (query, key, value))
            samples = zip(*streams, plan.blocks.samples, strict=True)
            attended = torch.cat([self._attend_run(q, k, v, run) for q, k, v, runs in samples for run in runs], dim=1)
        return plan.blocks.as_they_lie(attended)

    def _attend_run(self, query: Tensor, key: Tensor, value: Tensor, run: Run) -> Tensor:
        mask = None
        if run.is_text:
            every = torch.ones(run.end - run.first, run.end, dtype=torch.bool, device=query.device)
            mask = every.tril(run.first)[None, None]
        return self._dispatch(query[:, run.first : run.end], key[:, : run.end], value[:, : run.end], mask)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, blocks: PackedBlocks) -> Tensor:
    """`(L_total, H, D)` in the order of the sequences: a kernel for all images and one for all runs of text."""
    starts = list(accumulate((runs[-1].end for runs in blocks.samples), initial=0))
    every = [(start, run) for start, runs in zip(starts, blocks.samples, strict=False) for run in runs]
    found: dict[tuple[int, Run], Tensor] = {}
    for is_text, window in ((False, (-1, -1)), (True, (-1, 0))):  # causal is aligned to the last query and key
        chosen = [(start, run) for start, run in every if run.is_text == is_text]
        if not chosen:
            continue
        queries, keys = [run.end - run.first for _, run in chosen], [run.end for _, run in chosen]
        seen = [slice(start, start + run.end) for start, run in chosen]
        attended = varlen_attn(
            torch.cat([query[start + run.first : start + run.end] for start, run in chosen]),
            torch.cat([key[part] for part in seen]),
            torch.cat([value[part] for part in seen]),
            _cumulative(queries, query.device),
            _cumulative(keys, query.device),
            max(queries),
            max(keys),
            window_size=window,
        )
        assert isinstance(attended, Tensor)  # a pair only where the log-sum-exp is asked for
        found |= dict(zip(chosen, torch.split(attended, queries), strict=True))
    return torch.cat([found[block] for block in every])


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
