"""The attention processor of Qwen-Image-2.1's multi-resolution patch; without a plan it is the stock one.

Cost over the stock processor: padded, a mask of L x L booleans a sample, with which torch takes no flash kernel;
packed, on CUDA in half precision, two variable-length kernels run a layer, for which keys that several blocks see are
copied for each; elsewhere one kernel a block, as stock.

Legend: B sample, L = T + S text and image tokens, H head, D head width, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor
from torch import Tensor

from mixres.geometry import Grid
from mixres.models.attention import JointAttention, JointRotary, attend_varlen
from mixres.models.modulation import expand_rows
from mixres.models.packing import Runs
from mixres.models.qwen21.layout import Run


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


@dataclass(frozen=True, kw_only=True)
class BlockCausal(JointRotary):
    """The plan of one forward call, with a mask `(B, 1, L, L)`, or with the blocks of packed samples.

    The stock forward is handed it for the images of a sample and for `img_mask`, which it would read from the device in
    five lines.
    """

    text: Tensor  # (T,) and (S,) int64, where in the joint states each token of the two streams is
    image: Tensor
    rows: TokenRows | None  # None: each sample's own, as stock
    samples: tuple[tuple[Run, ...], ...] = ()

    def __getitem__(self, index: int) -> Any:
        """The last image, whose slots the stock forward appends: none; else a sample's mask, or its repeats."""
        return Grid(1, 1, 0) if index == -1 else self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Repeats of the slots; where images are in the joint states; the joint states with room for images."""
        if function is torch.where:
            return args[0]
        if function is torch.repeat_interleave:
            return args[0].image
        assert function is Tensor.repeat_interleave and kwargs == {"dim": 1}, function
        text, plan = args
        joint = text.new_zeros(len(text), len(plan.text) + len(plan.image), text.shape[2])
        joint[:, plan.text] = text
        return joint

    @property
    def is_packed(self) -> bool:
        return bool(self.samples)


class Qwen21MultiResAttnProcessor(JointAttention, QwenImage21AttnProcessor):  # type: ignore[misc]
    """Takes a `BlockCausal` as `rotary_emb`."""

    complex_rotation: ClassVar[bool] = True

    def __call__(self, attn: Any, hidden_states: Tensor, *, rotary_emb: Any = None, **stock: Any) -> Tensor:
        """`(B, L, C)` -> `(B, L, C)`."""
        if not isinstance(rotary_emb, BlockCausal):
            found: Tensor = super().__call__(attn, hidden_states, rotary_emb=rotary_emb, **stock)
            return found
        return self.attend_stream(attn, hidden_states, rotary_emb)

    def heads(self, attn: Any, states: Tensor) -> list[Tensor]:
        """See `JointAttention`. The norms may widen."""
        query, key, value = super().heads(attn, states)
        return [query.to(value.dtype), key.to(value.dtype), value]

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, plan: JointRotary) -> Tensor:
        """See `JointAttention`: by block and sample."""
        assert isinstance(plan, BlockCausal)
        if (half := self._varlen_dtype(query)) is not None:
            return attend_blocks(query[0].to(half), key[0].to(half), value[0].to(half), plan.samples)[None]
        lengths = [runs[-1].end for runs in plan.samples]
        streams = (torch.split(x, lengths, dim=1) for x in (query, key, value))
        samples = zip(*streams, plan.samples, strict=True)
        return torch.cat([self._attend_run(q, k, v, run) for q, k, v, runs in samples for run in runs], dim=1)

    def _attend_run(self, query: Tensor, key: Tensor, value: Tensor, run: Run) -> Tensor:
        mask = None
        if run.is_text:
            every = torch.ones(run.end - run.first, run.end, dtype=torch.bool, device=query.device)
            mask = every.tril(run.first)[None, None]
        return self._dispatch(query[:, run.first : run.end], key[:, : run.end], value[:, : run.end], mask)


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, samples: Sequence[Sequence[Run]]) -> Tensor:
    """`(L_total, H, D)`: a kernel for the images of all samples and one for all runs of text."""
    starts = accumulate((runs[-1].end for runs in samples), initial=0)
    every = [(start, run) for start, runs in zip(starts, samples, strict=False) for run in runs]
    found: dict[tuple[int, Run], Tensor] = {}
    for is_text, window in ((False, (-1, -1)), (True, (-1, 0))):  # causal is aligned to the last query and key
        chosen = [(start, run) for start, run in every if run.is_text == is_text]
        if not chosen:
            continue
        seen = [slice(start, start + run.end) for start, run in chosen]
        queries, keys = [run.end - run.first for _, run in chosen], [run.end for _, run in chosen]
        attended = attend_varlen(
            torch.cat([query[start + run.first : start + run.end] for start, run in chosen]),
            torch.cat([key[part] for part in seen]),
            torch.cat([value[part] for part in seen]),
            _sequences(queries, query.device),
            _sequences(keys, query.device),
            window,
        )
        found |= dict(zip(chosen, torch.split(attended, queries), strict=True))
    return torch.cat([found[block] for block in every])


def _sequences(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device), max(lengths)
