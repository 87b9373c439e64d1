"""Packed samples through FLUX.2's stock forward: one row of all tokens, `(1, tokens, C)`.

The forward joins the two streams along the token axis, all texts before all images. In front of the single-stream
blocks they are reordered sample by sample, and behind them back, so that these blocks attend without reordering.

Promise: exactly the valid tokens are computed. Cost: modulation parameters of one row per token, which are three rows
for the whole model (6 C image, 6 C text, 3 C joint). With gradient checkpointing they expand inside the blocks, so that
nothing of them is kept: 13 C a token instead of 22 C in a model of 2 + 9 blocks.

Legend: B sample, S_total and T_total image and text tokens of the microbatch, C width.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock
from torch import Tensor

from mixres.models.mixed_call import Call, argument_names, by_name
from mixres.models.modulation import SampleRows, expand_linear_output, expand_rows
from mixres.models.packing import PackedLengths, Runs, interleave, separate
from mixres.models.position_ids import plan_of

_SINGLE_NAMES = argument_names(Flux2SingleTransformerBlock.forward)


def install_packed_hooks(model: Any) -> None:
    """Hooks that do nothing unless the call is packed."""
    for modulation in _modulations(model):
        modulation.register_forward_hook(_expand_modulation)
    model.single_transformer_blocks[0].register_forward_pre_hook(_interleave_streams, with_kwargs=True)
    model.single_transformer_blocks[-1].register_forward_hook(_separate_streams, with_kwargs=True)
    model.norm_out.register_forward_pre_hook(_lay_along_batch_axis)
    model.register_forward_hook(_forget_packed, always_call=True)
    forget_packed(model)


def announce_packed(model: Any, call: Call, lengths: PackedLengths) -> None:
    """Set how the modulations of this call expand, and lay its tokens along the token axis.

    What is set lies outside all blocks, which may be recomputed when another call has been made.
    """
    call["hidden_states"] = call["hidden_states"].transpose(0, 1)
    call["encoder_hidden_states"] = call["encoder_hidden_states"].transpose(0, 1)
    expand_linear_output(model.norm_out)
    in_blocks = torch.is_grad_enabled() and bool(model.gradient_checkpointing)
    runs = (lengths.image_runs, lengths.text_runs, lengths.joint_runs)
    for modulation, of_stream in zip(_modulations(model), runs, strict=True):
        modulation.packed_runs, modulation.packed_in_blocks = of_stream, in_blocks
    model.norm_out.packed_runs = lengths.image_runs


def forget_packed(model: Any) -> None:
    """Set all that packed hooks look at to that of a call that is not packed."""
    model.norm_out.packed_runs = None
    for modulation in _modulations(model):
        modulation.packed_runs, modulation.packed_in_blocks = None, False


def _forget_packed(model: Any, args: tuple[Any, ...], output: Any) -> None:
    forget_packed(model)


def _modulations(model: Any) -> tuple[Any, Any, Any]:
    """Of the image stream, the text stream and the joint one."""
    return model.double_stream_modulation_img, model.double_stream_modulation_txt, model.single_stream_modulation


def _expand_modulation(modulation: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | SampleRows | None:
    """`(B, k * C)` -> `(1, tokens, k * C)`."""
    runs: Runs | None = modulation.packed_runs
    if runs is None:
        return None
    return SampleRows(output[None], runs) if modulation.packed_in_blocks else expand_rows(output[None], runs)


def _interleave_streams(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Call] | None:
    call = by_name(_SINGLE_NAMES, args, kwargs)
    plan = plan_of(call)
    if plan is None or plan.packed is None:
        return None
    text, image = call["hidden_states"].split([sum(plan.packed.text), sum(plan.packed.image)], dim=1)
    call["hidden_states"] = interleave(text, image, plan.packed)
    return (), call


def _separate_streams(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    plan = plan_of(by_name(_SINGLE_NAMES, args, kwargs))
    if plan is None or plan.packed is None:
        return None
    return torch.cat(separate(output, plan.packed), dim=1)


def _lay_along_batch_axis(norm_out: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """`(1, S_total, C)` -> `(S_total, 1, C)`: this norm has one row of parameters for each row of the batch."""
    return None if norm_out.packed_runs is None else (args[0].transpose(0, 1), *args[1:])
