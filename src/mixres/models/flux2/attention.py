"""The attention processors of FLUX.2's multi-resolution patch; without a plan they are the stock ones.

Legend: B sample, S image token, T text token, L = T + S, C width. Packed states are one row of all tokens, B = 1.
"""

from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from torch import Tensor

from mixres.models.attention import JointAttention, JointRotary


class Flux2MultiResAttnProcessor(JointAttention, Flux2AttnProcessor):  # type: ignore[misc]
    """Of the double-stream blocks."""

    complex_rotation: ClassVar[bool] = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        plan: JointRotary | None = None,
    ) -> Any:
        """Attend over `(B, S, C)` image and `(B, T, C)` text states; returns both, in that order."""
        if plan is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        assert encoder_hidden_states is not None
        return self.attend_streams(attn, hidden_states, encoder_hidden_states, plan)


class Flux2MultiResParallelSelfAttnProcessor(JointAttention, Flux2ParallelSelfAttnProcessor):  # type: ignore[misc]
    """Of the single-stream blocks, whose linear layers hold attention and feed-forward side by side."""

    complex_rotation: ClassVar[bool] = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        plan: JointRotary | None = None,
    ) -> Any:
        """`(B, L, C)` -> `(B, L, C)`, text before image in each sample."""
        if plan is None:
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        fused = attn.to_qkv_mlp_proj(hidden_states)
        heads, mlp = fused.split([3 * attn.inner_dim, attn.mlp_mult_factor * attn.mlp_hidden_dim], dim=-1)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in heads.chunk(3, dim=-1))
        attended = self.attend(attn.norm_q(query), attn.norm_k(key), value, plan)
        return attn.to_out(torch.cat([attended, attn.mlp_act_fn(mlp)], dim=-1))
