"""One call that lets a stock `ZImageTransformer2DModel` pack samples of different sizes into one row of tokens.

Promise: a patched model is still the stock model: same state dict, same files, same results for the calls it always
took. What a packed call computes follows from its arguments, so there is nothing to set before it, nothing to forget,
and no state left behind. Cost: nothing in stock calls.

The stock call takes lists: `x` with the latents `(channels, 1, height, width)` of each sample, `cap_feats` with its
text `(T, D)`, `t (B,)`; it returns a list like `x`. That is the layout `padded`, and stock computes it correctly.
After the patch the same call with `joint_attention_kwargs={"packed": True}` is the layout `packed`: the same results
without the padding between samples. The learned padding of each sample is part of the model, and stays.

How: the attention processors are swapped, and hooks shadow methods of the model for the time of a packed call. No
forward is replaced.
"""

from typing import Any

from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

from mixres.models.attention import replace_stock_processors
from mixres.models.blocks import repeated_blocks
from mixres.models.family import PatchState
from mixres.models.mixed_call import Call, argument_names, by_name, require_whole
from mixres.models.z_image.attention import ZImageMultiResAttnProcessor
from mixres.models.z_image.packed import begin_packed, install_packed_hooks

_FORWARD_NAMES = argument_names(ZImageTransformer2DModel.forward)
_NOT_PACKED = ("controlnet_block_samples", "siglip_feats", "image_noise_mask")


def patch_z_image_model_for_multi_resolution(model: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    """Patch a stock transformer in place and return it. Idempotent; the attention backend is kept.

    Raises:
        TypeError: `model` is not a `ZImageTransformer2DModel`.
        ValueError: its processors are not the stock ones.
    """
    if not isinstance(model, ZImageTransformer2DModel):
        raise TypeError(f"the patch is for ZImageTransformer2DModel, not {type(model).__name__}")
    replace_stock_processors(
        repeated_blocks(model), ZSingleStreamAttnProcessor, ZImageMultiResAttnProcessor, name="attention"
    )
    if not _has_hooks(model):
        install_packed_hooks(model)
        model.register_forward_pre_hook(_plan_call, with_kwargs=True)
    return model


def patch_state(model: ZImageTransformer2DModel) -> PatchState:
    """How much of the patch `model` carries."""
    blocks: list[Any] = repeated_blocks(model)
    ours = [isinstance(block.attention.processor, ZImageMultiResAttnProcessor) for block in blocks]
    return PatchState(sum(ours), len(ours), _has_hooks(model))


def _has_hooks(model: Any) -> bool:
    return _plan_call in model._forward_pre_hooks.values()


def _plan_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Call] | None:
    """Forward pre-hook: begin a packed call."""
    call = by_name(_FORWARD_NAMES, args, kwargs)
    attention_kwargs = dict(call.get("joint_attention_kwargs") or {})
    if not attention_kwargs.pop("packed", False):
        return None
    require_whole(patch_state(model), patch_z_image_model_for_multi_resolution)
    for name in _NOT_PACKED:
        if call.get(name) is not None:
            raise ValueError(f"a packed batch cannot use ControlNet or several images a sample: leave out {name}")
    counts = len(call["x"]), len(call["cap_feats"]), len(call["t"])
    if counts[0] < 1 or len(set(counts)) > 1:
        raise ValueError(f"packed batch: x, cap_feats and t are of {counts} samples: give each one of all three")
    call["joint_attention_kwargs"] = attention_kwargs
    begin_packed(model)
    return (), call
