"""Packed samples through the stock forward: tokens lie along the batch axis, modulation rows are expanded per token.

Promise: exactly the valid tokens are computed, no padding at all. Cost: modulation parameters are expanded to one row
per token in each block; the linear layers that make them still run once per sample.

Legend: B sample, S_total and T_total image and text tokens of the microbatch.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mixres.geometry import token_count
from mixres.models.attention import JointRotary
from mixres.models.mixed_call import check_shapes
from mixres.models.modulation import SampleRows, expand_linear_output
from mixres.models.packing import PackedLengths, Runs, packed_lengths
from mixres.models.qwen.rope import PlannedShapes, Shape, image_positions, text_positions


def plan_packed(model: Any, call: dict[str, Any], shapes: list[list[Shape]], text_lengths: list[int]) -> PlannedShapes:
    """Positions and lengths of a packed microbatch; the shapes handed to the stock forward are a stand-in.

    Raises:
        ValueError: a tensor does not hold the tokens that `img_shapes` and `txt_seq_lens` account for.
    """
    image_lengths = [token_count(sample) for sample in shapes]
    if len(text_lengths) != len(shapes):
        raise ValueError(
            f"packed batch: txt_seq_lens {text_lengths} are not one number for each of {len(shapes)} samples"
        )
    check_shapes(call, image_lengths, text_lengths, packed=True, stated_by="img_shapes and txt_seq_lens")
    if call.get("encoder_hidden_states_mask") is not None:
        raise ValueError("packed batch: encoder_hidden_states_mask must be None, nothing is padded")
    pairs = zip(shapes, text_lengths, strict=True)
    positions = chain.from_iterable((text_positions(s, n), image_positions(s)) for s, n in pairs)
    freqs = model.pos_embed.frequencies(torch.cat(list(positions)), call["hidden_states"].device)
    lengths = _lengths(shapes, image_lengths, text_lengths, bool(model.zero_cond_t), call["hidden_states"].device)
    expand_linear_output(model.norm_out)
    model.norm_out.packed_runs = tuple(enumerate(image_lengths))
    return PlannedShapes([[(1, 1, 1)]], JointRotary(freqs, packed=lengths))


def _lengths(
    shapes: list[list[Shape]], image: list[int], text: list[int], zero_cond_t: bool, device: torch.device
) -> PackedLengths:
    runs = tuple(enumerate(image))
    if zero_cond_t:  # the second half of the modulation rows belongs to the controls, at timestep 0
        targets = [token_count(sample[:1]) for sample in shapes]
        pairs = (((b, targets[b]), (len(image) + b, n - targets[b])) for b, n in runs)
        runs = tuple(run for run in chain.from_iterable(pairs) if run[1])
    return packed_lengths(text, image, device, runs)


def install_packed_hooks(model: Any) -> None:
    """Hooks that do nothing unless the call is packed. They survive adapters, which wrap the linears inside.

    What they look at is there from the start: a block would be compiled anew once it has appeared.
    """
    model.norm_out.packed_runs = None
    for block in model.transformer_blocks:
        block.img_mod.packed_runs = block.txt_mod.packed_runs = None
        block.register_forward_pre_hook(_announce_runs, with_kwargs=True)
        block.register_forward_hook(_forget_block_runs, always_call=True)
        block.img_mod.register_forward_hook(_expand_modulation)
        block.txt_mod.register_forward_hook(_expand_modulation)
    model.register_forward_hook(_forget_output_runs, always_call=True)


def _announce_runs(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]] | None:
    """Set how the block's modulations expand. Runs again when checkpointing recomputes the block."""
    names = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb",
             "joint_attention_kwargs", "modulate_index")  # fmt: skip
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    rotary = call.get("image_rotary_emb")
    if not isinstance(rotary, JointRotary) or rotary.packed is None:
        return None
    block.img_mod.packed_runs = rotary.packed.image_runs
    block.txt_mod.packed_runs = rotary.packed.text_runs
    call["modulate_index"] = None  # the runs say it
    return (), call


def _forget_block_runs(block: Any, args: tuple[Any, ...], output: Any) -> None:
    block.img_mod.packed_runs = block.txt_mod.packed_runs = None


def _expand_modulation(modulation: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | SampleRows:
    runs: Runs | None = modulation.packed_runs
    return output if runs is None else SampleRows(output, runs, cuts=2)


def _forget_output_runs(model: Any, args: tuple[Any, ...], output: Any) -> None:
    model.norm_out.packed_runs = None
