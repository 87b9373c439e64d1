"""One call that lets a stock `QwenImageTransformer2DModel` batch samples of different sizes.

Promise: a patched model is still the stock model: same state dict, same files, same results for the calls it always
took. Positions and masks come from the arguments of each call, so there is nothing to set before it, nothing to
forget, and no state left behind. Cost: one rewriting of the arguments per forward call, none per block.

After the patch the stock call accepts
  (a) the stock arguments;
  (b) padded `hidden_states` with per-sample `img_shapes`, and `encoder_hidden_states_mask` where text is padded;
  (c) `image_rotary_emb=(image freqs, text freqs)` precomputed, with `attention_kwargs={"attention_mask": bool}`;
  (d) packed `hidden_states (S_total, 1, C)`, `encoder_hidden_states (T_total, 1, D)`, `timestep (B,)`, per-sample
      `img_shapes` and `attention_kwargs={"txt_seq_lens": [...]}`.

How: `pos_embed` and the attention processors are swapped, and pre-hooks rewrite arguments. No forward is replaced.
"""

import inspect
from typing import Any

from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformer2DModel
from torch import Tensor

from mixres.geometry import token_count
from mixres.models.attention import JointRotary, joint_mask, replace_processor, valid_slots
from mixres.models.family import PatchState
from mixres.models.qwen.attention import QwenDoubleStreamAttnProcessor2_0_MultiRes
from mixres.models.qwen.packed import install_packed_hooks, plan_packed
from mixres.models.qwen.rope import (
    MultiResolutionRope,
    PlannedShapes,
    Shape,
    apply_rotary_emb_qwen_batched,
    as_shape_lists,
    joint_frequencies,
)

__all__ = [
    "QwenDoubleStreamAttnProcessor2_0_MultiRes",
    "apply_rotary_emb_qwen_batched",
    "patch_qwen_forward_for_multi_resolution",
    "patch_qwen_model_for_multi_resolution",
]

# In `attention_kwargs`: the caller knows that the mask of the text hides something, so the device need not be asked.
TEXT_IS_PADDED = "text_is_padded"
_FORWARD_NAMES = tuple(inspect.signature(QwenImageTransformer2DModel.forward).parameters)[1:]


def patch_qwen_model_for_multi_resolution(model: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """Patch a stock transformer in place and return it. Idempotent; the attention backend is kept.

    Raises:
        TypeError: `model` is not a `QwenImageTransformer2DModel`.
        ValueError: the model uses the layered position embedding, whose positions differ.
    """
    patch_qwen_forward_for_multi_resolution(model)
    for block in model.transformer_blocks:
        replace_processor(block.attn, QwenDoubleStreamAttnProcessor2_0_MultiRes)
    return model


def patch_qwen_forward_for_multi_resolution(model: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """The forward half of the patch: `pos_embed` and the pre-hook, with the stock attention processors left in place.

    Alone it gives form (a) and, for one sample and without a mask, form (c). Raises as the whole patch does.
    """
    if not isinstance(model, QwenImageTransformer2DModel):
        raise TypeError(f"the patch is for QwenImageTransformer2DModel, not {type(model).__name__}")
    if not isinstance(model.pos_embed, QwenEmbedRope):
        raise ValueError(f"the patch does not know the positions of {type(model.pos_embed).__name__}")
    if not isinstance(model.pos_embed, MultiResolutionRope):
        model.pos_embed = MultiResolutionRope(model.pos_embed)
        model.register_forward_pre_hook(_plan_call, with_kwargs=True)
        install_packed_hooks(model)
    return model


def patch_state(model: QwenImageTransformer2DModel) -> PatchState:
    """How much of the patch `model` carries."""
    ours = [isinstance(b.attn.processor, QwenDoubleStreamAttnProcessor2_0_MultiRes) for b in model.transformer_blocks]
    return PatchState(sum(ours), len(ours), isinstance(model.pos_embed, MultiResolutionRope))


def _plan_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Forward pre-hook: turn forms (a) to (d) into arguments that the stock forward takes."""
    call = {**dict(zip(_FORWARD_NAMES, args, strict=False)), **kwargs}
    attention_kwargs = dict(call.get("attention_kwargs") or {})
    explicit_mask = attention_kwargs.pop("attention_mask", None)
    text_is_padded = attention_kwargs.pop(TEXT_IS_PADDED, False)
    text_lengths = attention_kwargs.pop("txt_seq_lens", None)
    rotary_pair = call.pop("image_rotary_emb", None)
    call["attention_kwargs"] = attention_kwargs
    shapes = None if call.get("img_shapes") is None else as_shape_lists(call["img_shapes"])
    if shapes is None and (rotary_pair is None or text_lengths is not None):
        raise ValueError("img_shapes is missing: positions come from each sample's (1, rows, columns) grids")
    if shapes is not None and text_lengths is not None:
        _require_patched_processors(model, "a packed batch")
        if explicit_mask is not None or rotary_pair is not None:
            name = "attention_mask" if rotary_pair is None else "image_rotary_emb"
            raise ValueError(f"packed batch: {name} must be None, the lengths and img_shapes are enough")
        call["img_shapes"] = plan_packed(model, call, shapes, [int(n) for n in text_lengths])
    else:
        text_mask = call.get("encoder_hidden_states_mask")
        if text_mask is not None and not text_is_padded and bool(text_mask.all()):
            call["encoder_hidden_states_mask"] = None  # a mask that hides nothing only costs time
        call["img_shapes"] = _plan_padded(model, call, shapes, rotary_pair, explicit_mask)
    return (), call


def _plan_padded(
    model: Any,
    call: dict[str, Any],
    shapes: list[list[Shape]] | None,
    rotary_pair: tuple[Tensor, Tensor] | None,
    explicit_mask: Tensor | None,
) -> PlannedShapes:
    hidden, text = call["hidden_states"], call["encoder_hidden_states"]
    image_tokens, text_tokens = hidden.shape[1], text.shape[1]
    text_mask, image_mask = call.get("encoder_hidden_states_mask"), None
    if shapes is not None:
        shapes = _one_per_sample(shapes, hidden)
        image_mask = valid_slots([token_count(sample) for sample in shapes], image_tokens, hidden.device)
    elif model.zero_cond_t:
        raise ValueError("with zero_cond_t, image_rotary_emb needs img_shapes too: they separate target and controls")
    if rotary_pair is None:
        rotary_pair = model.pos_embed.padded_frequencies(shapes, image_tokens, text_tokens, hidden.device)
    image_freqs, text_freqs = _checked_pair(rotary_pair, hidden, text)
    if not _has_patched_processors(model):
        per_sample = image_freqs.dim() == 3 or text_freqs.dim() == 3
        if image_mask is not None or explicit_mask is not None or per_sample:
            _require_patched_processors(model, "a batch of different sizes")
        return PlannedShapes(shapes or [], (image_freqs, text_freqs))
    if text_mask is not None:  # padding of any kind has the zero frequency
        text_freqs = text_freqs * text_mask.to(text_freqs.device).bool()[..., None]
    mask = joint_mask(text_mask, image_mask, text_tokens, hidden)
    if explicit_mask is not None:
        mask = _combined(mask, explicit_mask, hidden, text_tokens + image_tokens)
    call["encoder_hidden_states_mask"] = None  # it is part of the joint mask
    freqs = joint_frequencies(image_freqs, text_freqs)
    return PlannedShapes(_rectangular(shapes, image_tokens), JointRotary(freqs, mask))


def _one_per_sample(shapes: list[list[Shape]], hidden: Tensor) -> list[list[Shape]]:
    batch, image_tokens = hidden.shape[:2]
    if all(sample == shapes[0] for sample in shapes):  # the stock forward lets the first entry stand for all
        shapes = shapes[:1] * batch
    if len(shapes) != batch:
        raise ValueError(f"img_shapes describes {len(shapes)} samples, hidden_states holds {batch}")
    for b, sample in enumerate(shapes):
        tokens = token_count(sample)
        if tokens > image_tokens:
            raise ValueError(
                f"sample {b}: img_shapes {sample} make {tokens} tokens, hidden_states holds {image_tokens}"
            )
    return shapes


def _rectangular(shapes: list[list[Shape]] | None, image_tokens: int) -> list[list[Shape]]:
    """Append a padding grid to each short sample: with `zero_cond_t` the stock forward counts tokens from the grids."""
    rows = []
    for sample in shapes or []:
        missing = image_tokens - token_count(sample)
        rows.append([*sample, (1, 1, missing)] if missing else sample)
    return rows


def _checked_pair(pair: tuple[Tensor, Tensor], hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    checked = []
    for name, freqs, states in zip(("image", "text"), pair, (hidden, text), strict=True):
        batch, tokens = states.shape[:2]
        if freqs.shape[-2] != tokens or (freqs.dim() == 3 and freqs.shape[0] not in (1, batch)):
            raise ValueError(
                f"image_rotary_emb: {name} frequencies {tuple(freqs.shape)} do not fit {batch} samples of {tokens} "
                "tokens"
            )
        freqs = freqs[0] if freqs.dim() == 3 and freqs.shape[0] == 1 else freqs
        checked.append(freqs.to(states.device))
    return checked[0], checked[1]


def _combined(mask: Tensor | None, explicit: Tensor, hidden: Tensor, tokens: int) -> Tensor | None:
    batch = hidden.shape[0]
    if explicit.shape not in ((batch, tokens), (batch, 1, 1, tokens)):
        raise ValueError(
            f"attention_mask of shape {tuple(explicit.shape)}: expected ({batch}, {tokens}) or "
            f"({batch}, 1, 1, {tokens}), text first"
        )
    explicit = explicit.to(hidden.device).bool().reshape(batch, 1, 1, tokens)
    mask = explicit if mask is None else mask & explicit
    return None if bool(mask.all()) else mask


def _has_patched_processors(model: Any) -> bool:
    return isinstance(model.transformer_blocks[0].attn.processor, QwenDoubleStreamAttnProcessor2_0_MultiRes)


def _require_patched_processors(model: Any, what: str) -> None:
    if not _has_patched_processors(model):
        raise ValueError(f"{what} needs the whole patch: call patch_qwen_model_for_multi_resolution(model)")
