"""The attention processor of Z-Image's multi-resolution patch; in stock calls it is the stock one.

Legend: B sample, L token, C width. Packed states are one row of all tokens, B = 1.
"""

from typing import Any, ClassVar

from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor

from mixres.models.attention import JointAttention, JointRotary


class ZImageMultiResAttnProcessor(JointAttention, ZSingleStreamAttnProcessor):  # type: ignore[misc]
    """Of the refiners and of the layers over both streams."""

    complex_rotation: ClassVar[bool] = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | JointRotary | None = None,
    ) -> Tensor:
        """`(B, L, C)` -> `(B, L, C)`; a packed call has its plan in place of the frequencies."""
        if isinstance(freqs_cis, JointRotary):
            plan = freqs_cis
        elif freqs_cis is not None and not freqs_cis.is_complex():  # of a compiled block
            plan = JointRotary(freqs_cis, None if attention_mask is None else attention_mask[:, None, None])
        else:
            stock: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
            return stock
        return self.attend_stream(attn, hidden_states, plan)

    def _rotate(self, x: Tensor, freqs: Tensor) -> Tensor:
        """In float32, as the stock processor: in float64 too."""
        return super()._rotate(x.float(), freqs).type_as(x)
