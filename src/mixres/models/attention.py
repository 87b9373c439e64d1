"""Joint attention of text and image over samples of different sizes, padded or packed.

Promise: a query sees exactly the keys of its own sample. Cost over a stock processor: none where nothing is padded;
one boolean mask, built once a forward call, where something is; packed, one kernel for all samples on CUDA in half
precision, one call per sample elsewhere.

Legend: B sample, S image token, T text token, L = T + S, H head, D head width, C = H * D. Packed tensors are one row
of all tokens: B = 1, S = S_total, T = T_total.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from mixres.models.packing import PackedLengths, interleave, separate
from mixres.models.rotation import rotate_complex, rotate_real

MAX_VARLEN_WIDTH = 256  # of a head


@dataclass(frozen=True)
class JointRotary:
    """Positions, mask and lengths of one forward call, handed through the blocks to the attention processors.

    The frequencies are complex64 on purpose: mixed-precision wrappers cast fp32 tensors in their inputs to bf16, and
    leave complex ones alone.
    """

    freqs: Tensor | None  # (L, D/2), (B, L, D/2), or packed (L_total, D/2), text before image; None: nothing rotates
    mask: Tensor | None = None  # (B, 1, 1, L) bool, True where a key may be attended to; None: nothing is padded
    packed: PackedLengths | None = None

    @property
    def is_packed(self) -> bool:
        return self.packed is not None

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """With its tensors on `device`: hooks that offload a model move the arguments of its modules so."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        packed = self.packed
        if packed is not None:
            packed = replace(packed, cumulative=packed.cumulative.to(device, non_blocking=non_blocking))
        moved: dict[str, Any] = {name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()}
        return replace(self, packed=packed, **moved)

    def without_complex(self) -> "JointRotary":
        """With cosines and sines `(..., D/2, 2)` for compiled blocks: there is no code for complex numbers."""
        return self if self.freqs is None else replace(self, freqs=torch.view_as_real(self.freqs))


def valid_slots(lengths: Sequence[int], slots: int, device: torch.device) -> Tensor | None:
    """`(B, slots)` bool, True at the first tokens of each row; None where that is all of them."""
    if min(lengths) == slots:
        return None
    return torch.arange(slots, device=device) < torch.tensor(lengths, device=device)[:, None]


def joint_mask(text_mask: Tensor | None, image_mask: Tensor | None, text_tokens: int, image: Tensor) -> Tensor | None:
    """`(B, 1, 1, L)` bool from the text's `(B, T)` and the image's `(B, S)`; None, where given, means all valid."""
    if text_mask is None and image_mask is None:
        return None
    batch, image_tokens = image.shape[:2]
    text = image.new_ones(batch, text_tokens, dtype=torch.bool) if text_mask is None else text_mask.bool()
    pixels = image.new_ones(batch, image_tokens, dtype=torch.bool) if image_mask is None else image_mask.bool()
    return torch.cat([text.to(image.device), pixels.to(image.device)], dim=1)[:, None, None, :]


def takes_varlen(dtype: torch.dtype, *, head_width: int, capability: tuple[int, int]) -> bool:
    """Whether torch's variable-length kernel (FlashAttention 2) takes such heads on a card of this compute capability.

    Cards before Ampere (8.0) have no such kernel.
    """
    fits = head_width % 8 == 0 and head_width <= MAX_VARLEN_WIDTH
    return fits and capability >= (8, 0) and dtype in (torch.bfloat16, torch.float16)


class JointAttention:
    """What the attention processors of all patched transformers share."""

    complex_rotation: ClassVar[bool]  # whether the stock processor rotates by a product of complex numbers

    _attention_backend: AttentionBackendName | str | None = None
    _parallel_config: Any = None

    def attend_streams(self, attn: Any, image: Tensor, text: Tensor, plan: JointRotary) -> tuple[Tensor, Tensor]:
        """Attend over `(B, S, C)` image and `(B, T, C)` text states; returns both projected, in that order."""
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_heads = _heads(attn, text, added, (attn.norm_added_q, attn.norm_added_k))
        pairs = zip(text_heads, self.heads(attn, image), strict=True)
        if plan.packed is None:
            query, key, value = (torch.cat(pair, dim=1) for pair in pairs)
            joined = self.attend(query, key, value, plan)
            text_out, image_out = joined[:, : text.shape[1]].contiguous(), joined[:, text.shape[1] :].contiguous()
        else:
            query, key, value = (interleave(*pair, plan.packed) for pair in pairs)
            joined = self.attend(query, key, value, plan)
            text_out, image_out = separate(joined, plan.packed)
        return _project_out(attn.to_out, image_out), attn.to_add_out(text_out)

    def attend_stream(self, attn: Any, states: Tensor, plan: JointRotary) -> Tensor:
        """Attend over `(B, L, C)` states, projected."""
        query, key, value = self.heads(attn, states)
        return _project_out(attn.to_out, self.attend(query, key, value, plan))

    def heads(self, attn: Any, states: Tensor) -> list[Tensor]:
        """Query, key and value `(B, tokens, H, D)` of `(B, tokens, C)`, not rotated yet."""
        return _heads(attn, states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: JointRotary) -> Tensor:
        """`(B, L, H, D)`, text before image in each sample, not rotated yet -> `(B, L, C)`."""
        if plan.freqs is not None:
            query, key = (self._rotate(x, plan.freqs) for x in (query, key))
        if plan.is_packed:
            joined = self.attend_packed(query, key, value, plan)
        else:
            joined = self._dispatch(query, key, value, plan.mask)
        return joined.flatten(2, 3).to(query.dtype)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, plan: JointRotary) -> Tensor:
        """`(1, L_total, H, D)`, rotated, to the same form: each sample attends to itself."""
        assert plan.packed is not None
        if (half := self._varlen_dtype(query)) is not None:
            samples = plan.packed.cumulative, max(plan.packed.joint)
            return attend_varlen(query[0].to(half), key[0].to(half), value[0].to(half), samples, samples)[None]
        streams = zip(*(torch.split(x, list(plan.packed.joint), dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([self._dispatch(q, k, v, None) for q, k, v in streams], dim=1)

    def _rotate(self, x: Tensor, freqs: Tensor) -> Tensor:
        if not freqs.is_complex():
            return rotate_real(x, freqs)
        return rotate_complex(x, freqs) if self.complex_rotation else rotate_real(x, torch.view_as_real(freqs))

    def _backend(self) -> AttentionBackendName:
        if self._attention_backend is None:  # then diffusers' own default, or its context manager, decides
            return _AttentionBackendRegistry.get_active_backend()[0]
        return AttentionBackendName(self._attention_backend)

    def _varlen_dtype(self, query: Tensor) -> torch.dtype | None:
        """The half precision in which torch's variable-length kernel takes `query`; None where it does not."""
        if not query.is_cuda or self._parallel_config is not None:
            return None
        if self._backend() is not AttentionBackendName.NATIVE:
            return None
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        capability = torch.cuda.get_device_capability(query.device)
        return dtype if takes_varlen(dtype, head_width=query.shape[-1], capability=capability) else None

    def _dispatch(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and "varlen" in self._backend().value:
            # These kernels keep the first N keys, N the number of valid ones: wrong wherever text is padded too.
            raise ValueError(
                f"attention backend '{self._backend().value}' keeps the wrong keys of a padded batch: use "
                "batch.layout packed, or a backend that takes a mask (native, flex)"
            )
        attended: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attended


def replace_processor(attn: Any, kind: type[JointAttention]) -> None:
    """Give `attn` a processor of this kind, unless it has one; the attention backend is kept."""
    if not isinstance(attn.processor, kind):
        processor = kind()
        processor._attention_backend = attn.processor._attention_backend
        processor._parallel_config = attn.processor._parallel_config
        attn.set_processor(processor)


def replace_stock_processors(
    blocks: Iterable[Any], stock: type[Any], kind: type[JointAttention], *, name: str = "attn"
) -> None:
    """Give the attention module of this name of all blocks a processor of this kind for their `stock` one.

    Raises:
        ValueError: a processor is neither, and nothing has been replaced: it does what the patch does not know.
    """
    modules = [getattr(block, name) for block in blocks]
    for attn in modules:
        if not isinstance(attn.processor, kind) and type(attn.processor) is not stock:
            raise ValueError(
                f"the patch replaces {stock.__name__}, not {type(attn.processor).__name__}, which a key-value cache, "
                "an IP-Adapter or another tool has put there: load the model without it"
            )
    for attn in modules:
        replace_processor(attn, kind)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: tuple[Tensor, int],
    keys: tuple[Tensor, int],
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`(L_total, H, D)` of all sequences at once, each of so many queries and keys.

    `queries` and `keys` are where sequences begin, `(B + 1,)` on the device, and the longest, a Python integer.
    """
    (starts, longest), (key_starts, longest_keys) = queries, keys
    attended = varlen_attn(query, key, value, starts, key_starts, longest, longest_keys, window_size=window)
    assert isinstance(attended, Tensor)  # a pair only where the log-sum-exp is asked for
    return attended


def _heads(
    attn: Any, states: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]
) -> list[Tensor]:
    """Query, key and value `(B, tokens, H, D)` of one stream, query and key normalised."""
    width = attn.inner_dim // attn.heads
    heads = [project(states).unflatten(-1, (-1, width)) for project in projections]
    normed = [x if norm is None else norm(x) for x, norm in zip(heads, norms, strict=False)]
    return [*normed, heads[-1]]


def _project_out(to_out: nn.ModuleList, states: Tensor) -> Tensor:
    for layer in to_out:  # the projection, then a dropout that some configurations leave out
        states = layer(states)
    return states
