"""Packed samples through the stock forward: tokens ride the batch axis, modulation rows are expanded per token.

Promise: exactly the valid tokens are computed, no filler at all. Cost: modulation parameters are gathered to one row
per token in each block; the linear layers that make them still run once per sample.

Legend: B sample, S_total and T_total image and text tokens of the microbatch.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mixres.models.qwen_rope import (
    JointRotary,
    PackedLengths,
    PlannedShapes,
    Shape,
    image_positions,
    text_positions,
)


def plan_packed(
    model: nn.Module, call: dict[str, Any], shapes: list[list[Shape]], text_lengths: list[int]
) -> PlannedShapes:
    """Positions and lengths of a packed microbatch; the shapes handed to the stock forward are a stand-in.

    Raises:
        ValueError: a tensor does not hold the tokens that `img_shapes` and `txt_seq_lens` account for.
    """
    hidden, text, timestep = call["hidden_states"], call["encoder_hidden_states"], call["timestep"]
    image_lengths = [sum(f * h * w for f, h, w in sample) for sample in shapes]
    expected = {
        "hidden_states": (tuple(hidden.shape[:2]), (sum(image_lengths), 1)),
        "encoder_hidden_states": (tuple(text.shape[:2]), (sum(text_lengths), 1)),
        "timestep": (tuple(timestep.shape), (len(shapes),)),
        "txt_seq_lens": ((len(text_lengths),), (len(shapes),)),
    }
    for name, (given, needed) in expected.items():
        if given != needed:
            raise ValueError(
                f"packed batch: {name} has leading shape {given}, img_shapes and txt_seq_lens say {needed}"
            )
    if call.get("encoder_hidden_states_mask") is not None:
        raise ValueError("packed batch: encoder_hidden_states_mask must be None, nothing is padded")
    pairs = zip(shapes, text_lengths, strict=True)
    positions = chain.from_iterable((text_positions(s, n), image_positions(s)) for s, n in pairs)
    freqs = model.pos_embed.frequencies(torch.cat(list(positions)), hidden.device)
    lengths = _lengths(shapes, image_lengths, text_lengths, bool(model.zero_cond_t), hidden.device)
    model.norm_out.packed_rows = _sample_rows(image_lengths).to(hidden.device)
    return PlannedShapes([[(1, 1, 1)]], JointRotary(freqs, packed=lengths))


def _lengths(
    shapes: list[list[Shape]], image: list[int], text: list[int], zero_cond_t: bool, device: torch.device
) -> PackedLengths:
    image_rows = _sample_rows(image)
    if zero_cond_t:  # the second half of the modulation rows belongs to the controls, at timestep 0
        targets = [f * h * w for (f, h, w), *_ in shapes]
        control = [torch.arange(n) >= target for n, target in zip(image, targets, strict=True)]
        image_rows = image_rows + len(shapes) * torch.cat(control)
    joint = torch.tensor([0, *(t + s for t, s in zip(text, image, strict=True))], dtype=torch.int32)
    return PackedLengths(
        text=tuple(text),
        image=tuple(image),
        image_rows=image_rows.to(device),
        text_rows=_sample_rows(text).to(device),
        cumulative=joint.cumsum(0, dtype=torch.int32).to(device),
    )


def _sample_rows(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def install_packed_hooks(model: nn.Module) -> None:
    """Hooks that do nothing unless the call is packed. They survive adapters, which wrap the linears inside."""
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(_announce_rows, with_kwargs=True)
        block.register_forward_hook(_forget_rows, always_call=True)
        block.img_mod.register_forward_hook(_expand_output)
        block.txt_mod.register_forward_hook(_expand_output)
    model.norm_out.register_forward_pre_hook(_expand_conditioning)
    model.register_forward_hook(_forget_output_rows, always_call=True)


def _announce_rows(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell the block's modulations which rows to gather. Runs again when checkpointing recomputes the block."""
    names = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb",
             "joint_attention_kwargs", "modulate_index")  # fmt: skip
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    rotary = call.get("image_rotary_emb")
    if not isinstance(rotary, JointRotary) or rotary.packed is None:
        return None
    block.img_mod.packed_rows = rotary.packed.image_rows
    block.txt_mod.packed_rows = rotary.packed.text_rows
    call["modulate_index"] = None  # the rows say it
    return (), call


def _forget_rows(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    block.img_mod.packed_rows = block.txt_mod.packed_rows = None


def _expand_output(modulation: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    rows = getattr(modulation, "packed_rows", None)
    return output if rows is None else output.index_select(0, rows)


def _expand_conditioning(norm_out: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows = getattr(norm_out, "packed_rows", None)
    if rows is None:
        return None
    states, conditioning = args
    return states, conditioning.index_select(0, rows)


def _forget_output_rows(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    model.norm_out.packed_rows = None
