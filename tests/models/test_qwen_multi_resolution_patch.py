"""The patch: its call forms (a) to (d), what is still stock, and that no call leaves anything for the next."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from mixres.models.qwen_multi_resolution_patch import (
    patch_qwen_forward_for_multi_resolution,
    patch_qwen_model_for_multi_resolution,
)
from support import mixes

EQUAL = mixes.make_mix([[(1, 6, 8), (1, 4, 4)]] * 3, [9, 9, 9])  # nothing to pad: what the stock model can batch


def equal_call(mask: Tensor | None) -> dict[str, Any]:
    return mixes.padded_call(EQUAL) | {"encoder_hidden_states_mask": mask}


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_equal_sizes_give_what_the_stock_model_gives_bit_for_bit(zero_cond_t: bool) -> None:
    stock, patched = mixes.stock_model(zero_cond_t), mixes.patched_model(zero_cond_t)
    ragged = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    for mask in (None, torch.ones(3, 9, dtype=torch.bool), torch.ones(3, 9), ragged, ragged.long()):
        call = equal_call(mask)
        assert torch.equal(patched(**call)[0], stock(**call)[0])
        positional = [call.pop(k) for k in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask")]
        rest = (call["timestep"], call["img_shapes"])
        assert torch.equal(patched(*positional, *rest).sample, stock(*positional, *rest).sample)
    bare = {**equal_call(None), "img_shapes": [[(1, 8, 8)]]}  # one entry stands for all, as do fewer equal ones
    assert torch.equal(patched(**bare)[0], stock(**bare)[0])
    if not zero_cond_t:
        fewer = {**equal_call(None), "img_shapes": EQUAL.shapes[:2]}
        assert torch.equal(patched(**fewer)[0], stock(**fewer)[0])


@pytest.mark.parametrize("mask", ["rank 2", "rank 4", "split"])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_precomputed_positions_and_mask(zero_cond_t: bool, mask: str) -> None:
    """Split: each of two masks hides what the other one shows, and together they are the joint mask."""
    mix, model = mixes.main_mix(), mixes.patched_model(zero_cond_t, mixes.EVERY_LINEAR)
    call = mixes.precomputed_call(mix)
    if zero_cond_t:
        with pytest.raises(ValueError, match="image_rotary_emb needs img_shapes too"):
            model(**call)
        call["img_shapes"] = mix.shapes
    joint = call["attention_kwargs"]["attention_mask"]
    if mask == "rank 4":
        call["attention_kwargs"] = {"attention_mask": joint[:, None, None]}
    if mask == "split":
        text_tokens = call["encoder_hidden_states"].shape[1]
        call["encoder_hidden_states_mask"] = joint[:, :text_tokens].clone()
        joint[:, :text_tokens] = True
    outputs = mixes.forward_padded(model, mix, **call)
    mixes.assert_same(mixes.backward(model, outputs, mixes.loss(outputs, mix)), mixes.alone("main", zero_cond_t))


def test_precomputed_positions_shared_by_all_samples() -> None:
    stock, patched = mixes.stock_model(), mixes.patched_model()
    pair = stock.pos_embed(EQUAL.shapes[:1], max_txt_seq_len=9, device=torch.device("cpu"))
    call = equal_call(None)
    expected = stock(**call)[0]
    del call["img_shapes"]
    for image, text in (pair, (pair[0][None], pair[1][None]), (pair[0].expand(3, -1, -1), pair[1])):
        assert torch.equal(patched(**call, image_rotary_emb=(image, text))[0], expected)


@pytest.mark.parametrize("layout", mixes.LAYOUTS)
def test_half_patch_takes_equal_sizes_and_refuses_the_rest(layout: str) -> None:
    stock, half = mixes.stock_model(), patch_qwen_forward_for_multi_resolution(mixes.stock_model())
    call = equal_call(torch.arange(9) < torch.tensor([9, 4, 6])[:, None])
    assert torch.equal(half(**call)[0], stock(**call)[0])
    one = mixes.make_mix([[(1, 5, 7), (1, 3, 3)]], [8])
    pair = stock.pos_embed(one.shapes, max_txt_seq_len=8, device=torch.device("cpu"))
    for image, text in (pair, (pair[0][None], pair[1][None])):
        call = {**mixes.padded_call(one), "img_shapes": None, "image_rotary_emb": (image, text)}
        assert torch.equal(half(**call)[0][0], mixes.FORWARDS["alone"](stock, one)[0])
    with pytest.raises(ValueError, match="call patch_qwen_model_for_multi_resolution"):
        mixes.FORWARDS[layout](half, mixes.main_mix())
    turned = mixes.make_mix([[(1, 4, 6)], [(1, 6, 4)]], [5, 5])  # equal lengths, other positions
    with pytest.raises(ValueError, match="call patch_qwen_model_for_multi_resolution"):
        mixes.FORWARDS[layout](half, turned)


def test_patched_model_is_still_the_stock_model(tmp_path: Path) -> None:
    stock, patched = mixes.stock_model(), mixes.stock_model()
    assert patch_qwen_model_for_multi_resolution(patched) is patched
    parts = (patched.pos_embed, patched.transformer_blocks[0].attn.processor, len(patched._forward_pre_hooks))
    patch_qwen_model_for_multi_resolution(patched)
    again = (patched.pos_embed, patched.transformer_blocks[0].attn.processor, len(patched._forward_pre_hooks))
    assert parts == again
    expected, found = stock.state_dict(), patched.state_dict()
    assert list(expected) == list(found) and all(torch.equal(expected[k], found[k]) for k in expected)
    patched.save_pretrained(tmp_path / "model")
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "model").train()
    mix = mixes.random_mix(5)
    outputs = mixes.run(patched, mix, "padded")
    mixes.assert_identical(mixes.run(loaded, mix, "alone"), mixes.run(stock, mix, "alone"))
    mixes.assert_identical(mixes.run(patch_qwen_model_for_multi_resolution(loaded), mix, "padded"), outputs)
    mixes.assert_identical(mixes.run(copy.deepcopy(patched), mix, "padded"), outputs)


def test_other_models_are_refused() -> None:
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1}
    other = SD3Transformer2DModel(**sizes, sample_size=4, joint_attention_dim=8, caption_projection_dim=8)
    with pytest.raises(TypeError, match="not SD3Transformer2DModel"):
        patch_qwen_model_for_multi_resolution(other)
    layered = QwenImageTransformer2DModel(**sizes, axes_dims_rope=(4, 2, 2), use_layer3d_rope=True)
    with pytest.raises(ValueError, match="QwenEmbedLayer3DRope"):
        patch_qwen_model_for_multi_resolution(layered)


def test_calls_that_cannot_be_meant_are_refused() -> None:
    model, mix = mixes.patched_model(), mixes.main_mix()
    call, pre, packed = mixes.padded_call(mix), mixes.precomputed_call(mix), mixes.packed_call(mix)
    image, text = pre["image_rotary_emb"]
    lengths = packed["attention_kwargs"]
    wrong: dict[str, dict[str, Any]] = {
        "img_shapes is missing": {**call, "img_shapes": None},
        "describes 2 samples, hidden_states holds 3": {**call, "img_shapes": mix.shapes[:2]},
        "sample 2: .* make 1000 tokens": {**call, "img_shapes": [*mix.shapes[:2], [(1, 10, 100)]]},
        "attention_mask of shape": {**pre, "attention_kwargs": {"attention_mask": torch.ones(3, 7)}},
        "image frequencies": {**pre, "image_rotary_emb": (image[:, 1:], text)},
        "text frequencies": {**pre, "image_rotary_emb": (image, text[:2])},
        "batch: hidden_states has leading shape": {**packed, "hidden_states": packed["hidden_states"][1:]},
        "shape .1, 1842.": {**packed, "hidden_states": packed["hidden_states"].transpose(0, 1)},
        "encoder_hidden_states has leading shape": {**packed, "encoder_hidden_states": torch.ones(65, 1, 24)},
        "timestep has leading shape": {**packed, "timestep": mix.timesteps[:2]},
        "txt_seq_lens .19, 47. are not one": {**packed, "attention_kwargs": {"txt_seq_lens": [19, 47]}},
        "encoder_hidden_states_mask must be None": {**packed, "encoder_hidden_states_mask": torch.ones(66, 1)},
        "attention_mask must be None": {**packed, "attention_kwargs": {**lengths, "attention_mask": torch.ones(3, 40)}},
        "image_rotary_emb must be None": {**packed, "image_rotary_emb": (image, text)},
        "img_shapes is missing: positions": {**packed, "img_shapes": None},
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    assert_nothing_left(model)


def assert_nothing_left(model: QwenImageTransformer2DModel) -> None:
    for name, module in model.named_modules():
        assert getattr(module, "packed_runs", None) is None, name
    assert len(model.norm_out.linear._forward_hooks) <= 1, "hooks do not pile up"


@pytest.mark.parametrize(
    "where", ["txt_in", "transformer_blocks.1.img_mod.1", "transformer_blocks.1.img_mlp", "norm_out.norm"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind_by_a_call_that_fails(where: str, checkpointing: bool) -> None:
    mix, model = mixes.random_mix(2), mixes.patched_model(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    before = {layout: mixes.run(model, mix, layout) for layout in mixes.LAYOUTS}
    assert_nothing_left(model)

    def fail(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        raise MemoryError("planted")

    hook = model.get_submodule(where).register_forward_pre_hook(fail)
    for call in (mixes.packed_call(mix), mixes.padded_call(mix)):
        with pytest.raises(MemoryError, match="planted"):
            model(**call)
        assert_nothing_left(model)
    hook.remove()
    for layout, result in before.items():
        mixes.assert_identical(mixes.run(model, mix, layout), result)
