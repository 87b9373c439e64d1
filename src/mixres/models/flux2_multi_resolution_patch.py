"""One call that lets a stock `Flux2Transformer2DModel` batch samples of different sizes.

Promise: a patched model is still the stock model: same state dict, same files, same results for the calls it always
took. Positions and masks come from the arguments of each call, so there is nothing to set before it, nothing to
forget, and no state left behind. Cost: one rewriting of the arguments per forward call, none per block.

After the patch the stock call accepts
  (a) the stock arguments, except positions of each sample's own, of which stock takes sample 0's for all;
  (b) padded and (c) packed samples, any number of images each: `mixres.models.position_ids` has the arguments.

How: the attention processors are swapped, and hooks rewrite arguments. No forward is replaced.
"""

from typing import Any

from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

from mixres.models.attention import replace_stock_processors
from mixres.models.family import PatchState
from mixres.models.flux2.attention import Flux2MultiResAttnProcessor, Flux2MultiResParallelSelfAttnProcessor
from mixres.models.flux2.packed import announce_packed, install_packed_hooks
from mixres.models.mixed_call import Call, argument_names, by_name, require_whole
from mixres.models.position_ids import plan_mixed_call

_FORWARD_NAMES = argument_names(Flux2Transformer2DModel.forward)


def patch_flux2_model_for_multi_resolution(model: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    """Patch a stock transformer in place and return it. Idempotent; the attention backend is kept.

    Raises:
        TypeError: `model` is not a `Flux2Transformer2DModel`.
        ValueError: its processors are not the stock ones, as with a key-value cache.
    """
    if not isinstance(model, Flux2Transformer2DModel):
        raise TypeError(f"the patch is for Flux2Transformer2DModel, not {type(model).__name__}")
    replace_stock_processors(model.transformer_blocks, Flux2AttnProcessor, Flux2MultiResAttnProcessor)
    replace_stock_processors(
        model.single_transformer_blocks, Flux2ParallelSelfAttnProcessor, Flux2MultiResParallelSelfAttnProcessor
    )
    if not _has_hooks(model):
        install_packed_hooks(model)
        model.register_forward_pre_hook(_plan_call, with_kwargs=True)
    return model


def patch_state(model: Flux2Transformer2DModel) -> PatchState:
    """How much of the patch `model` carries."""
    double = [isinstance(b.attn.processor, Flux2MultiResAttnProcessor) for b in model.transformer_blocks]
    single = [
        isinstance(b.attn.processor, Flux2MultiResParallelSelfAttnProcessor) for b in model.single_transformer_blocks
    ]
    return PatchState(sum(double) + sum(single), len(double) + len(single), _has_hooks(model))


def _has_hooks(model: Any) -> bool:
    return _plan_call in model._forward_pre_hooks.values()


def _plan_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Call] | None:
    """Forward pre-hook: turn a mixed call into arguments that the stock forward takes."""
    call = by_name(_FORWARD_NAMES, args, kwargs)
    plan = plan_mixed_call(model, call)
    if plan is None:
        return None
    require_whole(patch_state(model), patch_flux2_model_for_multi_resolution)
    if call.get("kv_cache") is not None or call.get("kv_cache_mode") is not None:
        raise ValueError("a batch of mixed sizes cannot use kv_cache or kv_cache_mode: leave them out")
    if plan.packed is not None:
        announce_packed(model, call, plan.packed)
    return (), call
