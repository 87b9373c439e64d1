"""Recomputed blocks: the gradients bit for bit, which blocks, and how many bytes are kept for backward."""

from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from mixes import (
    ATTENTION_AND_MLP,
    CHANNELS,
    FORWARDS,
    TEXT_WIDTH,
    Result,
    assert_identical,
    loss,
    main_mix,
    padded_call,
    random_mix,
    run,
)
from peft import LoraConfig
from torch import Tensor

from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from mixres.models.repeated_blocks import recompute_blocks, repeated_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS, HEADS, HEAD_WIDTH = 5, 2, 32


def small_model(blocks: int = BLOCKS) -> QwenImageTransformer2DModel:
    """Adapters on a frozen base."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=CHANNELS, out_channels=4, num_layers=blocks, attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(8, 12, 12),
    ).requires_grad_(False)  # fmt: skip
    model.add_adapter(LoraConfig(r=4, target_modules=ATTENTION_AND_MLP, init_lora_weights=False))
    return patch_qwen_model_for_multi_resolution(model)


def forward_calls(model: QwenImageTransformer2DModel, layout: str) -> tuple[Result, list[int]]:
    """A microbatch forward and back, and how often each block ran."""
    calls = [0] * len(repeated_blocks(model))

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    handles = [b.register_forward_pre_hook(count(i)) for i, b in enumerate(repeated_blocks(model))]
    result = run(model, random_mix(3), layout)
    for handle in handles:
        handle.remove()
    return result, calls


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("every", "calls"), [(1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1]), (60, [2, 1, 1, 1, 1])]
)
def test_every_nth_block_is_recomputed_and_the_gradients_stay(every: int, calls: list[int], layout: str) -> None:
    model = small_model()
    kept, once = forward_calls(model, layout)
    assert once == [1] * BLOCKS
    recompute_blocks(model, every=every)
    recomputed, found = forward_calls(model, layout)
    assert found == calls
    assert_identical(recomputed, kept)


def kept_bytes(model: QwenImageTransformer2DModel, layout: str = "padded") -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, without those of weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors stay, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    mix = main_mix()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(FORWARDS[layout](model, mix), mix)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_recomputed_block_keeps_its_inputs_alone() -> None:
    """The formula of docs/memory.md: one row of the model's width for each image and text token."""
    call = padded_call(main_mix())
    tokens = call["hidden_states"].shape[:2].numel() + call["encoder_hidden_states"].shape[:2].numel()
    inputs = 4 * tokens * HEADS * HEAD_WIDTH
    kept = {}
    for blocks in (BLOCKS, BLOCKS - 1):
        model = small_model(blocks)
        kept[blocks, 0] = kept_bytes(model)
        for every in (1, 2, 60):
            recompute_blocks(model, every=every)
            kept[blocks, every] = kept_bytes(model)
    assert kept[BLOCKS, 1] - kept[BLOCKS - 1, 1] == inputs
    assert 19 * inputs < kept[BLOCKS, 0] - kept[BLOCKS - 1, 0] < 20 * inputs
    assert kept[BLOCKS, 1] < kept[BLOCKS, 2] < kept[BLOCKS, 60] < kept[BLOCKS, 0]
    assert kept[BLOCKS, 2] - kept[BLOCKS, 1] > 2 * 18 * inputs
