"""The attention processor of Qwen-Image's multi-resolution patch.

Legend: B sample, S image token, T text token, L = T + S, H head, D head width; packed tensors are (tokens, 1, ...).
"""

from typing import ClassVar

from diffusers.models.attention_processor import Attention
from torch import Tensor

from mixres.models.attention import JointAttention, JointRotary, joint_mask
from mixres.models.qwen.rope import joint_frequencies


class QwenDoubleStreamAttnProcessor2_0_MultiRes(JointAttention):
    """Drop-in for the stock double-stream processor that also takes per-sample positions, masks and packed samples.

    `image_rotary_emb` is an `JointRotary`, made once a call by the patched model, or the stock pair of frequencies
    `(S, D/2)`/`(B, S, D/2)` and `(T, D/2)`/`(B, T, D/2)`. Unlike the stock processor it accepts an `attention_mask`,
    bool `(B, L)` or `(B, 1, 1, L)`, text first.
    """

    complex_rotation: ClassVar[bool] = True

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
        plan = _as_plan(image_rotary_emb)
        if plan.packed is not None:  # tokens lie along the batch axis
            streams = (hidden_states.transpose(0, 1), encoder_hidden_states.transpose(0, 1))
            image, text = self.attend_streams(attn, *streams, plan)
            return image.transpose(0, 1), text.transpose(0, 1)
        if plan.mask is None:
            mask = _call_mask(encoder_hidden_states_mask, attention_mask, encoder_hidden_states, hidden_states)
            plan = JointRotary(plan.freqs, mask)
        return self.attend_streams(attn, hidden_states, encoder_hidden_states, plan)


def _as_plan(rotary: JointRotary | tuple[Tensor, Tensor] | None) -> JointRotary:
    if isinstance(rotary, JointRotary):
        return rotary
    return JointRotary(None if rotary is None else joint_frequencies(*rotary))


def _call_mask(text_mask: Tensor | None, attention_mask: Tensor | None, text: Tensor, image: Tensor) -> Tensor | None:
    """The mask of a processor that is called without a plan: as the stock one builds it, AND an explicit mask."""
    mask = joint_mask(text_mask, None, text.shape[1], image)
    if attention_mask is None:
        return mask
    explicit = attention_mask.bool().reshape(image.shape[0], 1, 1, -1)
    return explicit if mask is None else explicit & mask
