"""One call that lets a stock `FluxTransformer2DModel` (FLUX.1, Kontext) batch samples of different sizes.

Promise: a patched model is still the stock model: same state dict, same files, same results for the calls it always
took. Positions and masks come from the arguments of each call, so there is nothing to set before it, nothing to
forget, and no state left behind. Cost: one rewriting of the arguments per forward call, none per block.

After the patch the stock call accepts
  (a) the stock arguments, except positions of each sample's own, of which stock takes sample 0's for all;
  (b) padded and (c) packed samples, with or without a reference: `mixres.models.position_ids` has the arguments.

How: the attention processors are swapped, and hooks rewrite arguments. No forward is replaced.
"""

from typing import Any

from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from mixres.models.attention import replace_stock_processors
from mixres.models.family import PatchState
from mixres.models.flux.attention import FluxMultiResAttnProcessor
from mixres.models.flux.packed import announce_packed, install_packed_hooks
from mixres.models.mixed_call import Call, argument_names, by_name, require_whole
from mixres.models.position_ids import plan_mixed_call

_FORWARD_NAMES = argument_names(FluxTransformer2DModel.forward)
_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")


def patch_flux_model_for_multi_resolution(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Patch a stock transformer in place and return it. Idempotent; the attention backend is kept.

    Raises:
        TypeError: `model` is not a `FluxTransformer2DModel`.
        ValueError: its processors are not the stock ones, as with an IP-Adapter.
    """
    if not isinstance(model, FluxTransformer2DModel):
        raise TypeError(f"the patch is for FluxTransformer2DModel, not {type(model).__name__}")
    replace_stock_processors(_blocks(model), FluxAttnProcessor, FluxMultiResAttnProcessor)
    if not _has_hooks(model):
        install_packed_hooks(model)
        model.register_forward_pre_hook(_plan_call, with_kwargs=True)
    return model


def patch_state(model: FluxTransformer2DModel) -> PatchState:
    """How much of the patch `model` carries."""
    ours = [isinstance(block.attn.processor, FluxMultiResAttnProcessor) for block in _blocks(model)]
    return PatchState(sum(ours), len(ours), _has_hooks(model))


def _blocks(model: Any) -> list[Any]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def _has_hooks(model: Any) -> bool:
    return _plan_call in model._forward_pre_hooks.values()


def _plan_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Call] | None:
    """Forward pre-hook: turn a mixed call into arguments that the stock forward takes."""
    call = by_name(_FORWARD_NAMES, args, kwargs)
    plan = plan_mixed_call(model, call)
    if plan is None:
        return None
    require_whole(patch_state(model), patch_flux_model_for_multi_resolution)
    used = [name for name in _CONTROLNET if call.get(name) is not None]
    used += [name for name in call["joint_attention_kwargs"] if name.startswith("ip_")]
    if used:
        raise ValueError(f"a batch of mixed sizes cannot use ControlNet or IP-Adapter: leave out {', '.join(used)}")
    if plan.packed is not None:
        announce_packed(model, plan.packed)
    return (), call
