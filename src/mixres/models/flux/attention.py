"""The attention processor of FLUX.1's multi-resolution patch; without a plan it is the stock one.

Legend: B sample, S image token, T text token, L = T + S, C width; packed states are (tokens, 1, C).
"""

from typing import Any, ClassVar

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from mixres.models.attention import JointAttention, JointRotary


class FluxMultiResAttnProcessor(JointAttention, FluxAttnProcessor):  # type: ignore[misc]
    """Of the double-stream and of the single-stream blocks."""

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
        """Attend over `(B, S, C)` image and `(B, T, C)` text states, or over `(B, L, C)` joint ones, not projected."""
        if plan is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if plan.packed is None:
            return self._attend(attn, hidden_states, encoder_hidden_states, plan)
        # Tokens lie along the batch axis.
        text = None if encoder_hidden_states is None else encoder_hidden_states.transpose(0, 1)
        attended = self._attend(attn, hidden_states.transpose(0, 1), text, plan)
        return attended.transpose(0, 1) if text is None else tuple(x.transpose(0, 1) for x in attended)

    def _attend(self, attn: Any, states: Tensor, text: Tensor | None, plan: JointRotary) -> Any:
        if text is not None:
            return self.attend_streams(attn, states, text, plan)
        query, key, value = self.heads(attn, states)
        return self.attend(query, key, value, plan)
