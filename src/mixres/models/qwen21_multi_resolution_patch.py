"""One call that lets a stock `QwenImage21Transformer2DModel` batch samples of different layouts.

Promise: a patched model is still the stock model: same state dict, same files, same results for the calls that stock
computes rightly. Positions and masks come from the arguments of each call, so there is nothing to set before it,
nothing to forget, and no state left behind. Cost: one rewriting of the arguments per forward call.

After the patch the stock call accepts
  (a) the stock arguments, except samples of different layouts, which stock computes with sample 0's;
  (b) padded samples: `hidden_states (B, S, P)`, `encoder_hidden_states (B, T, D)`;
  (c) packed samples: `hidden_states (S_total, 1, P)`, `encoder_hidden_states (T_total, 1, D)`.
In (b) and (c) a sample's image tokens are target, then controls, and its text tokens are those of the text alone: what
the text encoder returns at image slots reaches nothing. `img_shapes` lists its `(1, rows, columns)`, target first, and
`attention_kwargs={"text_runs": [...]}` its text tokens before each control and before the target, in this order.
`timestep (B,)` is by sample; `img_mask` and `encoder_hidden_states_mask` are left out. What is returned lies as
`hidden_states`: image tokens only.

How: the order of tokens is free, since positions and mask are data. Padded, all text comes before all images; packed,
each sample's blocks are in the order of its sequence. The stock forward is handed the plan of the call where it looks
for the images and their mask; its position module passes that on to the attention processors, and hooks rewrite
arguments. No forward is replaced, and none reads a value from the device.
"""

from math import prod
from typing import Any

import numpy as np
import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AdaLayerNormContinuous,
    QwenImage21AttnProcessor,
    QwenImage21Rope,
    QwenImage21TransformerBlock,
)
from torch import Tensor

from mixres.geometry import Grid
from mixres.models.attention import replace_stock_processors
from mixres.models.family import PatchState
from mixres.models.mixed_call import Call, argument_names, by_name, check_shapes, require_whole
from mixres.models.qwen21.attention import BlockCausal, Qwen21MultiResAttnProcessor, TokenRows
from mixres.models.qwen21.layout import padded_positions, positions, runs_of, streams

_FORWARD_NAMES = argument_names(QwenImage21Transformer2DModel.forward)
_BLOCK_NAMES = argument_names(QwenImage21TransformerBlock.forward)
_NORM_NAMES = argument_names(QwenImage21AdaLayerNormContinuous.forward)


def _token_metadata(image_pad_mask: Any, img_shapes: list[Grid] | BlockCausal) -> tuple[Any, Any]:
    """As the stock model's own; in a planned call it is counted and cut. No tensor: fake ones have no sum."""
    if isinstance(img_shapes, BlockCausal):
        return np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)
    found: tuple[Tensor, Tensor] = QwenImage21Transformer2DModel.build_token_metadata(image_pad_mask, img_shapes)
    return found


class MultiResolutionRope(QwenImage21Rope):  # type: ignore[misc]
    """The stock positions, or the plan of the call."""

    def __init__(self, stock: QwenImage21Rope) -> None:
        super().__init__(stock.theta, stock.axes_dim)

    def forward(self, img_shapes: list[Grid] | BlockCausal, image_pad_mask: Tensor, device: torch.device) -> Any:
        """See the stock class."""
        if isinstance(img_shapes, BlockCausal):
            return img_shapes
        return super().forward(img_shapes, image_pad_mask, device)

    def frequencies(self, places: Tensor) -> Tensor:
        """`(..., 3)` positions -> `(..., D/2)` complex64."""
        self.freqs: list[Tensor] = [table.to(places.device) for table in self.freqs]
        return torch.cat([table[place] for table, place in zip(self.freqs, places.unbind(-1), strict=True)], dim=-1)


def patch_qwen21_model_for_multi_resolution(model: QwenImage21Transformer2DModel) -> QwenImage21Transformer2DModel:
    """Patch a stock transformer in place and return it. Idempotent; the attention backend is kept.

    Raises:
        TypeError: `model` is not a `QwenImage21Transformer2DModel`.
        ValueError: its processors are not the stock ones, as with flex attention.
    """
    if not isinstance(model, QwenImage21Transformer2DModel):
        raise TypeError(f"the patch is for QwenImage21Transformer2DModel, not {type(model).__name__}")
    replace_stock_processors(model.transformer_blocks, QwenImage21AttnProcessor, Qwen21MultiResAttnProcessor)
    if not isinstance(model.pos_embed, MultiResolutionRope):
        model.pos_embed = MultiResolutionRope(model.pos_embed)
        model.build_token_metadata = _token_metadata
        model.register_forward_pre_hook(_plan_call, with_kwargs=True)
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(_rows_of_block, with_kwargs=True)
        model.norm_out.register_forward_pre_hook(_rows_of_norm, with_kwargs=True)
        model.register_forward_hook(_image_tokens, with_kwargs=True)
        model.register_forward_hook(_forget, always_call=True)
        model.norm_out.token_rows = None
    return model


def patch_state(model: QwenImage21Transformer2DModel) -> PatchState:
    """How much of the patch `model` carries."""
    ours = [isinstance(block.attn.processor, Qwen21MultiResAttnProcessor) for block in model.transformer_blocks]
    return PatchState(sum(ours), len(ours), isinstance(model.pos_embed, MultiResolutionRope))


def _plan_call(model: Any, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call] | None:
    """Forward pre-hook: turn a mixed call into arguments that the stock forward takes."""
    call = by_name(_FORWARD_NAMES, args, kwargs)
    attention_kwargs = dict(call.get("attention_kwargs") or {})
    text_runs = attention_kwargs.pop("text_runs", None)
    if text_runs is None:
        _refuse_own_layouts(call)
        return None
    require_whole(patch_state(model), patch_qwen21_model_for_multi_resolution)
    for name in ("kv_cache", "kv_cache_mode", "img_mask", "encoder_hidden_states_mask"):
        if call.get(name) is not None:
            raise ValueError(f"a batch of mixed layouts cannot use {name}: leave it out")
    shapes = [[Grid(*map(int, grid)) for grid in sample] for sample in call["img_shapes"]]
    runs = [[int(tokens) for tokens in sample] for sample in text_runs]
    packed = call["hidden_states"].shape[1] == call["encoder_hidden_states"].shape[1] == 1
    if not shapes or list(map(len, shapes)) != list(map(len, runs)):
        raise ValueError(f"text_runs {runs} do not fit img_shapes {shapes}: each sample needs one for each image")
    images, texts = [sum(map(prod, sample)) for sample in shapes], [sum(sample) for sample in runs]
    check_shapes(call, images, texts, packed=packed, stated_by="img_shapes and text_runs")
    blocks = [positions(*sample) for sample in zip(shapes, runs, strict=True)]
    plan = (_packed_plan if packed else _padded_plan)(model, call, blocks)
    model.norm_out.token_rows = plan.rows
    return (), {**call, "img_shapes": [plan], "img_mask": plan, "attention_kwargs": attention_kwargs}


def _refuse_own_layouts(call: Call) -> None:
    """The samples of a stock call have one layout: else all but the first would be computed wrongly, or not at all."""
    shapes = [[tuple(grid) for grid in sample] for sample in call["img_shapes"]]
    masks = [call.get(name) for name in ("img_mask", "encoder_hidden_states_mask")]
    if any(sample != shapes[0] for sample in shapes) or any(
        mask is not None and len(mask) > 1 and not torch.equal(mask[1:], mask[:-1]) for mask in masks
    ):
        raise ValueError(
            "samples have layouts of their own (img_shapes, img_mask or text lengths), and the stock forward takes "
            "sample 0's for all: call it with one sample each, or give text_runs in attention_kwargs"
        )


def _padded_plan(model: Any, call: Call, samples: list[list[Tensor]]) -> BlockCausal:
    device, rows = call["hidden_states"].device, None
    slots = [call[name].shape[1] for name in ("encoder_hidden_states", "hidden_states")]
    places = padded_positions(samples, slots).to(device)
    text, image = torch.split(torch.arange(sum(slots), device=device), slots)
    if model.config.causal_condition:
        ends = slots[0] + torch.tensor([[len(blocks[-1])] for blocks in samples], device=device)
        at = torch.cat([text, image])
        rows = TokenRows(((at >= slots[0]) & (at < ends))[..., None])
    frames = places[:, None, :, 0]
    mask = frames[..., None] >= frames[..., None, :]
    return BlockCausal(model.pos_embed.frequencies(places), mask, text=text, image=image, rows=rows)


def _packed_plan(model: Any, call: Call, samples: list[list[Tensor]]) -> BlockCausal:
    for name in ("hidden_states", "encoder_hidden_states"):
        call[name] = call[name].transpose(0, 1)
    device, every = call["hidden_states"].device, [block for blocks in samples for block in blocks]
    places, rows = torch.cat(every).to(device), []
    for b, blocks in enumerate(samples):
        # Text and controls have the row of t = 0, which is the last, behind those of the samples.
        still = len(samples) if model.config.causal_condition else b
        rows += [*((still, len(block)) for block in blocks[:-1]), (b, len(blocks[-1]))]
    tokens = iter(torch.split(torch.arange(len(places)), list(map(len, every))))
    at = zip(*(streams([next(tokens) for _ in blocks]) for blocks in samples), strict=True)
    text, image = (torch.cat(stream).to(device) for stream in at)
    return BlockCausal(
        model.pos_embed.frequencies(places),
        text=text,
        image=image,
        rows=TokenRows(runs=tuple(rows)),
        samples=tuple(runs_of(blocks) for blocks in samples),
    )


def _rows_of_block(block: Any, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call] | None:
    call = by_name(_BLOCK_NAMES, args, kwargs)
    if not isinstance(call["rotary_emb"], BlockCausal):
        return None
    return (), {**call, "target_token_mask": call["rotary_emb"].rows}


def _rows_of_norm(norm_out: Any, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call] | None:
    if norm_out.token_rows is None:
        return None
    return (), {**by_name(_NORM_NAMES, args, kwargs), "target_token_mask": norm_out.token_rows}


def _image_tokens(model: Any, args: tuple[Any, ...], kwargs: Call, output: Any) -> Any:
    """Forward hook: of what a mixed call returns the image tokens, as its `hidden_states` lay."""
    plan = kwargs["img_shapes"][0]
    if not isinstance(plan, BlockCausal):
        return None
    images = output[0][:, plan.image]
    images = images.transpose(0, 1) if plan.is_packed else images
    return Transformer2DModelOutput(sample=images) if kwargs.get("return_dict", True) else (images,)


def _forget(model: Any, args: tuple[Any, ...], output: Any) -> None:
    model.norm_out.token_rows = None
