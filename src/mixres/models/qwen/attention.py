"""The attention processor of the multi-resolution patch: joint text/image attention over padded or packed samples.

Promise: a query sees exactly the keys of its own sample. Cost over the stock processor: none where nothing is padded;
one boolean mask, built once a forward call, where something is; packed, one kernel for all samples on CUDA in half
precision, one call per sample elsewhere.

Legend: B sample, S image token, T text token, L = T + S, H head, D head width; packed tensors are (tokens, 1, ...).
"""

from itertools import chain
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from mixres.models.qwen.rope import (
    JointRotary,
    PackedLengths,
    apply_rotary_emb_qwen_batched,
    apply_rotary_emb_real,
    joint_frequencies,
)


def joint_mask(text_mask: Tensor | None, image_mask: Tensor | None, text_tokens: int, image: Tensor) -> Tensor | None:
    """`(B, 1, 1, L)` bool from the text's `(B, T)` and the image's `(B, S)`; None, where given, means all valid."""
    if text_mask is None and image_mask is None:
        return None
    batch, image_tokens = image.shape[:2]
    text = image.new_ones(batch, text_tokens, dtype=torch.bool) if text_mask is None else text_mask.bool()
    pixels = image.new_ones(batch, image_tokens, dtype=torch.bool) if image_mask is None else image_mask.bool()
    return torch.cat([text.to(image.device), pixels.to(image.device)], dim=1)[:, None, None, :]


class QwenDoubleStreamAttnProcessor2_0_MultiRes:
    """Drop-in for the stock double-stream processor that also takes per-sample positions, masks and packed samples.

    `image_rotary_emb` is a `JointRotary`, made once a call by the patched model, or the stock pair of frequencies
    `(S, D/2)`/`(B, S, D/2)` and `(T, D/2)`/`(B, T, D/2)`. Unlike the stock processor it accepts an `attention_mask`,
    bool `(B, L)` or `(B, 1, 1, L)`, text first.
    """

    _attention_backend: AttentionBackendName | str | None = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: JointRotary | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend over `(B, S, H * D)` image and `(B, T, H * D)` text states; returns both, in that order."""
        if encoder_hidden_states is None:
            raise ValueError("joint attention needs encoder_hidden_states, the text stream")
        image = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        text = _heads(
            attn,
            encoder_hidden_states,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
        )
        if isinstance(image_rotary_emb, JointRotary) and image_rotary_emb.packed is not None:
            text_out, image_out = self._attend_packed(text, image, image_rotary_emb, image_rotary_emb.packed)
        else:
            rotary = _as_joint(image_rotary_emb)
            mask = rotary.mask if rotary is not None else None
            if mask is None:
                mask = _call_mask(encoder_hidden_states_mask, attention_mask, text[0], image[0])
            text_out, image_out = self._attend_padded(text, image, rotary, mask)
        return _project_out(attn.to_out, image_out), attn.to_add_out(text_out)

    def _attend_padded(
        self, text: list[Tensor], image: list[Tensor], rotary: JointRotary | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        if rotary is not None:
            rotate = apply_rotary_emb_qwen_batched if rotary.freqs.is_complex() else apply_rotary_emb_real
            query, key = (rotate(x, rotary.freqs) for x in (query, key))
        joined = self._dispatch(query, key, value, mask).flatten(2, 3).to(query.dtype)
        text_tokens = text[0].shape[1]
        return joined[:, :text_tokens].contiguous(), joined[:, text_tokens:].contiguous()

    def _attend_packed(
        self, text: list[Tensor], image: list[Tensor], rotary: JointRotary, lengths: PackedLengths
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (
            _interleave(t.transpose(0, 1), i.transpose(0, 1), lengths) for t, i in zip(text, image, strict=True)
        )  # (1, L_total, H, D), samples one behind the other, text first in each
        query, key = (apply_rotary_emb_qwen_batched(x, rotary.freqs) for x in (query, key))
        half = self._varlen_dtype(query)
        if half is None:
            parts = zip(*(torch.split(x, list(lengths.joint), dim=1) for x in (query, key, value)), strict=True)
            samples = [self._dispatch(q, k, v, None)[0] for q, k, v in parts]
        else:
            joined = _attend_varlen(query[0].to(half), key[0].to(half), value[0].to(half), lengths)
            samples = list(torch.split(joined, list(lengths.joint)))
        samples = [x.flatten(1).to(query.dtype) for x in samples]
        text_out = torch.cat([x[:t] for x, t in zip(samples, lengths.text, strict=True)])
        image_out = torch.cat([x[t:] for x, t in zip(samples, lengths.text, strict=True)])
        return text_out[:, None], image_out[:, None]

    def _backend(self) -> AttentionBackendName:
        if self._attention_backend is None:  # then diffusers' own default, or its context manager, decides
            return _AttentionBackendRegistry.get_active_backend()[0]
        return AttentionBackendName(self._attention_backend)

    def _varlen_dtype(self, query: Tensor) -> torch.dtype | None:
        """The half precision in which torch's variable-length kernel takes `query`; None where it does not."""
        if not query.is_cuda or query.shape[-1] % 8 or self._parallel_config is not None:
            return None
        if self._backend() is not AttentionBackendName.NATIVE:
            return None
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else None

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


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, lengths: PackedLengths) -> Tensor:
    """`(L_total, H, D)` of all samples at once: lengths are on the device, the longest is a Python integer."""
    longest = max(lengths.joint)
    attended = varlen_attn(query, key, value, lengths.cumulative, lengths.cumulative, longest, longest)
    assert isinstance(attended, Tensor)  # a pair only where the log-sum-exp is asked for
    return attended


def _heads(
    attn: Attention, states: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]
) -> list[Tensor]:
    """Query, key and value `(B, tokens, H, D)` of one stream, query and key normalised."""
    width = attn.inner_dim // attn.heads
    heads = [project(states).unflatten(-1, (-1, width)) for project in projections]
    normed = [x if norm is None else norm(x) for x, norm in zip(heads, norms, strict=False)]
    return [*normed, heads[-1]]


def _as_joint(rotary: JointRotary | tuple[Tensor, Tensor] | None) -> JointRotary | None:
    if rotary is None or isinstance(rotary, JointRotary):
        return rotary
    return JointRotary(joint_frequencies(*rotary))


def _call_mask(text_mask: Tensor | None, attention_mask: Tensor | None, text: Tensor, image: Tensor) -> Tensor | None:
    """The mask of a processor that is called without a plan: as the stock one builds it, AND an explicit mask."""
    mask = joint_mask(text_mask, None, text.shape[1], image)
    if attention_mask is None:
        return mask
    explicit = attention_mask.bool().reshape(image.shape[0], 1, 1, -1)
    return explicit if mask is None else explicit & mask


def _interleave(text: Tensor, image: Tensor, lengths: PackedLengths) -> Tensor:
    """`(1, T_total, H, D)`, `(1, S_total, H, D)` -> `(1, L_total, H, D)`: each sample's text, then its image."""
    texts = torch.split(text, list(lengths.text), dim=1)
    images = torch.split(image, list(lengths.image), dim=1)
    return torch.cat(list(chain.from_iterable(zip(texts, images, strict=True))), dim=1)


def _project_out(to_out: nn.ModuleList, states: Tensor) -> Tensor:
    for layer in to_out:  # the projection, then a dropout that some configurations leave out
        states = layer(states)
    return states
