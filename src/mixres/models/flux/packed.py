"""Packed samples through FLUX.1's stock forward: tokens lie along the batch axis, `(tokens, 1, C)`.

Each block joins the two streams along the token axis, which holds one token here. So the first single-stream block is
given the joint tokens, sample by sample, as its image stream beside an empty text stream; all others pass both on, and
behind the last one the streams are separated again.

Promise: exactly the valid tokens are computed. Cost: modulation parameters are expanded to one row per token in each
block; the linear layers that make them still run once per sample.

Legend: S_total, T_total and L_total image, text and joint tokens of the microbatch, C width.
"""

from typing import Any

from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor

from mixres.models.mixed_call import Call, argument_names, by_name
from mixres.models.modulation import expand_linear_output
from mixres.models.packing import PackedLengths, interleave, separate
from mixres.models.position_ids import plan_of

_DOUBLE_NAMES = argument_names(FluxTransformerBlock.forward)
_SINGLE_NAMES = argument_names(FluxSingleTransformerBlock.forward)
Arguments = tuple[tuple[()], Call]


def install_packed_hooks(model: Any) -> None:
    """Hooks that do nothing unless the call is packed.

    What they look at is there from the start: a block would be compiled anew once it has appeared.
    """
    model.norm_out.packed_runs = None
    model.register_forward_hook(_forget_output_runs, always_call=True)
    for block in model.transformer_blocks:
        block.norm1.packed_runs = block.norm1_context.packed_runs = None
        block.register_forward_pre_hook(_announce_double, with_kwargs=True)
        block.register_forward_hook(_forget_double, always_call=True)
    for block in model.single_transformer_blocks:
        block.norm.packed_runs = None
        block.register_forward_pre_hook(_announce_single, with_kwargs=True)
        block.register_forward_hook(_forget_single, always_call=True)
    model.single_transformer_blocks[0].register_forward_pre_hook(_interleave_streams, with_kwargs=True)
    model.single_transformer_blocks[-1].register_forward_hook(_separate_streams, with_kwargs=True)


def announce_packed(model: Any, lengths: PackedLengths) -> None:
    """Outside all blocks, once a call: hook linear layers that an adapter has put in since the last one."""
    for block in model.transformer_blocks:
        expand_linear_output(block.norm1)
        expand_linear_output(block.norm1_context)
    for block in model.single_transformer_blocks:
        expand_linear_output(block.norm)
    expand_linear_output(model.norm_out)
    model.norm_out.packed_runs = lengths.image_runs


def _forget_output_runs(model: Any, args: tuple[Any, ...], output: Any) -> None:
    model.norm_out.packed_runs = None


def _announce_double(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set how the block's modulations expand. Runs again when checkpointing recomputes the block."""
    plan = plan_of(by_name(_DOUBLE_NAMES, args, kwargs))
    if plan is not None and plan.packed is not None:
        block.norm1.packed_runs, block.norm1_context.packed_runs = plan.packed.image_runs, plan.packed.text_runs


def _forget_double(block: Any, args: tuple[Any, ...], output: Any) -> None:
    block.norm1.packed_runs = block.norm1_context.packed_runs = None


def _announce_single(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plan = plan_of(by_name(_SINGLE_NAMES, args, kwargs))
    if plan is not None and plan.packed is not None:
        block.norm.packed_runs = plan.packed.joint_runs


def _forget_single(block: Any, args: tuple[Any, ...], output: Any) -> None:
    block.norm.packed_runs = None


def _interleave_streams(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """`(T_total, 1, C)` text and `(S_total, 1, C)` image -> `(L_total, 0, C)` and `(L_total, 1, C)`."""
    call = by_name(_SINGLE_NAMES, args, kwargs)
    plan = plan_of(call)
    if plan is None or plan.packed is None:
        return None
    text, image = (call[name].transpose(0, 1) for name in ("encoder_hidden_states", "hidden_states"))
    joint = interleave(text, image, plan.packed).transpose(0, 1)
    call["encoder_hidden_states"], call["hidden_states"] = joint[:, :0], joint
    return (), call


def _separate_streams(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    plan = plan_of(by_name(_SINGLE_NAMES, args, kwargs))
    if plan is None or plan.packed is None:
        return None
    text, image = separate(output[1].transpose(0, 1), plan.packed)
    return text.transpose(0, 1), image.transpose(0, 1)
