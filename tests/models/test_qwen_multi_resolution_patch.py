"""A padded batch equals its samples alone, planted problems are seen, and a patched model is still the stock model."""

import copy
import functools
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
from support.mixes import (
    ATTENTION_AND_MLP,
    FORWARDS,
    MIXES,
    Mix,
    Result,
    assert_identical,
    assert_same,
    backward,
    forward_error,
    forward_padded,
    gradient_error,
    loss,
    main_mix,
    make_mix,
    padded_call,
    patched_model,
    precomputed_call,
    random_mix,
    run,
    stock_model,
)

LORA = ATTENTION_AND_MLP
EQUAL = make_mix([[(1, 6, 8), (1, 4, 4)]] * 3, [9, 9, 9])  # nothing to pad: what the stock model can batch


@functools.cache
def alone(name: str, zero_cond_t: bool) -> Result:
    return run(stock_model(zero_cond_t, LORA), MIXES[name](), "alone")


def equal_call(mask: Tensor | None, extra_samples: int = 0) -> dict[str, Any]:
    call = padded_call(EQUAL)
    call["encoder_hidden_states_mask"] = mask
    call["img_shapes"] = call["img_shapes"][: len(call["img_shapes"]) - extra_samples]
    return call


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_padded_batch_equals_each_sample_alone(name: str, zero_cond_t: bool, checkpointing: bool) -> None:
    model = patched_model(zero_cond_t, LORA)
    if checkpointing:
        model.enable_gradient_checkpointing()
    assert_same(run(model, MIXES[name](), "padded"), alone(name, zero_cond_t))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layouts", [("padded", "padded"), ("packed", "packed"), ("padded", "packed")])
def test_two_microbatches_go_forward_before_either_goes_back(layouts: tuple[str, str], checkpointing: bool) -> None:
    model = patched_model(True, LORA)
    if checkpointing:
        model.enable_gradient_checkpointing()
    mixes = [main_mix(), random_mix(5)]
    outputs = [FORWARDS[layout](model, mix) for layout, mix in zip(layouts, mixes, strict=True)]
    losses = [loss(out, mix) for out, mix in zip(outputs, mixes, strict=True)]
    for name, out, value in reversed(list(zip(("main", "random 5"), outputs, losses, strict=True))):
        assert_same(backward(model, out, value), alone(name, True))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_in_bf16_a_batch_is_as_near_to_fp32_as_a_sample_alone(layout: str) -> None:
    mix, dtype = main_mix().to("cpu", torch.bfloat16), torch.bfloat16
    measured = run(patched_model(False, LORA).to(dtype), mix, layout)
    single = run(stock_model(False, LORA).to(dtype), mix, "alone")
    reference = alone("main", False)
    assert forward_error(measured, reference) <= 1.5 * forward_error(single, reference)
    assert gradient_error(measured, reference) <= 1.5 * gradient_error(single, reference)


def planted(problem: str) -> Result:
    """The main mix with one problem, through precomputed frequencies and masks or through the loss."""
    model, mix, call = patched_model(False, LORA), main_mix(), precomputed_call(main_mix())
    image, text = call["image_rotary_emb"]
    if problem == "text positions of sample 0":
        call["image_rotary_emb"] = (image, text[0])
    if problem == "no mask":
        call["attention_kwargs"] = {}
    if not problem.startswith("loss"):
        outputs = forward_padded(model, mix, **call)
        return backward(model, outputs, loss(outputs, mix))
    output = model(**call)[0]
    lengths = {"loss over filler": [output.shape[1]] * 3, "loss over controls": [len(x) for x in mix.images]}
    long = [
        torch.nn.functional.pad(v, (0, 0, 0, n - len(v))) for v, n in zip(mix.velocities, lengths[problem], strict=True)
    ]
    value = loss(list(output), Mix(mix.shapes, mix.images, mix.texts, mix.timesteps, long))
    return backward(model, [row[: len(x)] for row, x in zip(output, mix.images, strict=True)], value)


def test_the_measure_sees_planted_problems() -> None:
    reference = alone("main", False)
    assert_same(planted("none"), reference)
    for problem in ("text positions of sample 0", "no mask"):
        assert forward_error(planted(problem), reference) > 1e-3, problem
        assert gradient_error(planted(problem), reference) > 1e-2, problem
    for problem in ("loss over filler", "loss over controls"):
        assert gradient_error(planted(problem), reference) > 1e-2, problem


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_equal_sizes_give_what_the_stock_model_gives_bit_for_bit(zero_cond_t: bool) -> None:
    stock, patched = stock_model(zero_cond_t), patched_model(zero_cond_t)
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
        fewer = equal_call(None, extra_samples=1)
        assert torch.equal(patched(**fewer)[0], stock(**fewer)[0])


@pytest.mark.parametrize("mask_rank", [2, 4])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_precomputed_positions_and_mask(zero_cond_t: bool, mask_rank: int) -> None:
    mix, model = main_mix(), patched_model(zero_cond_t, LORA)
    call = precomputed_call(mix)
    mask = call["attention_kwargs"]["attention_mask"]
    call["attention_kwargs"] = {"attention_mask": mask if mask_rank == 2 else mask[:, None, None]}
    if zero_cond_t:
        with pytest.raises(ValueError, match="image_rotary_emb needs img_shapes too"):
            model(**call)
        call["img_shapes"] = mix.shapes
    outputs = forward_padded(model, mix, **call)
    assert_same(backward(model, outputs, loss(outputs, mix)), alone("main", zero_cond_t))


def test_precomputed_mask_is_combined_with_the_text_mask() -> None:
    """Each of the two hides what the other one shows; together they are the joint mask."""
    mix, model = main_mix(), patched_model(False, LORA)
    call = precomputed_call(mix)
    mask = call["attention_kwargs"]["attention_mask"]
    text_tokens = call["encoder_hidden_states"].shape[1]
    call["encoder_hidden_states_mask"] = mask[:, :text_tokens].clone()
    mask[:, :text_tokens] = True
    outputs = forward_padded(model, mix, **call)
    assert_same(backward(model, outputs, loss(outputs, mix)), alone("main", False))


def test_precomputed_positions_shared_by_all_samples() -> None:
    stock, patched = stock_model(), patched_model()
    pair = stock.pos_embed(EQUAL.shapes[:1], max_txt_seq_len=9, device=torch.device("cpu"))
    call = equal_call(None)
    expected = stock(**call)[0]
    del call["img_shapes"]
    for image, text in (pair, (pair[0][None], pair[1][None]), (pair[0].expand(3, -1, -1), pair[1])):
        assert torch.equal(patched(**call, image_rotary_emb=(image, text))[0], expected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_half_patch_takes_equal_sizes_and_refuses_the_rest(layout: str) -> None:
    stock, half = stock_model(), patch_qwen_forward_for_multi_resolution(stock_model())
    call = equal_call(torch.arange(9) < torch.tensor([9, 4, 6])[:, None])
    assert torch.equal(half(**call)[0], stock(**call)[0])
    one = make_mix([[(1, 5, 7), (1, 3, 3)]], [8])
    pair = stock.pos_embed(one.shapes, max_txt_seq_len=8, device=torch.device("cpu"))
    for image, text in (pair, (pair[0][None], pair[1][None])):
        call = {**padded_call(one), "img_shapes": None, "image_rotary_emb": (image, text)}
        assert torch.equal(half(**call)[0][0], FORWARDS["alone"](stock, one)[0])
    with pytest.raises(ValueError, match="call patch_qwen_model_for_multi_resolution"):
        FORWARDS[layout](half, main_mix())
    turned = make_mix([[(1, 4, 6)], [(1, 6, 4)]], [5, 5])  # equal lengths, other positions
    with pytest.raises(ValueError, match="call patch_qwen_model_for_multi_resolution"):
        FORWARDS[layout](half, turned)


def test_patched_model_is_still_the_stock_model(tmp_path: Path) -> None:
    stock, patched = stock_model(), stock_model()
    assert patch_qwen_model_for_multi_resolution(patched) is patched
    parts = (patched.pos_embed, patched.transformer_blocks[0].attn.processor, len(patched._forward_pre_hooks))
    patch_qwen_model_for_multi_resolution(patched)
    again = (patched.pos_embed, patched.transformer_blocks[0].attn.processor, len(patched._forward_pre_hooks))
    assert parts == again
    expected, found = stock.state_dict(), patched.state_dict()
    assert list(expected) == list(found) and all(torch.equal(expected[k], found[k]) for k in expected)
    patched.save_pretrained(tmp_path / "model")
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "model").train()
    mix = random_mix(5)
    outputs = run(patched, mix, "padded")
    assert_identical(run(loaded, mix, "alone"), run(stock, mix, "alone"))
    assert_identical(run(patch_qwen_model_for_multi_resolution(loaded), mix, "padded"), outputs)
    assert_identical(run(copy.deepcopy(patched), mix, "padded"), outputs)


def test_other_models_are_refused() -> None:
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1}
    other = SD3Transformer2DModel(**sizes, sample_size=4, joint_attention_dim=8, caption_projection_dim=8)
    with pytest.raises(TypeError, match="not SD3Transformer2DModel"):
        patch_qwen_model_for_multi_resolution(other)
    layered = QwenImageTransformer2DModel(**sizes, axes_dims_rope=(4, 2, 2), use_layer3d_rope=True)
    with pytest.raises(ValueError, match="QwenEmbedLayer3DRope"):
        patch_qwen_model_for_multi_resolution(layered)


def test_size_warning_never_appears(size_warnings: list[str]) -> None:
    for layout in ("padded", "packed"):
        run(patched_model(), main_mix(), layout)
    patched_model()(**equal_call(None))
    assert size_warnings == []
    with pytest.raises(RuntimeError):  # the stock model says it, and then fails on the length of sample 1
        stock_model()(**padded_call(main_mix()))
    assert "variable-sized" in size_warnings[0]


def test_calls_in_any_order_give_identical_values() -> None:
    model = patched_model(True, LORA)
    mixes = {"main": main_mix(), "other": random_mix(6), "single": random_mix(2)}
    first: dict[tuple[str, str], Result] = {}
    calls = [(layout, name) for layout in ("padded", "packed", "alone") for name in mixes]
    for layout, name in [*calls, *reversed(calls), *calls[::2]]:
        result = run(model, mixes[name], layout)
        assert_identical(result, first.setdefault((layout, name), result))
        with torch.inference_mode():
            sampled = FORWARDS[layout](model.eval(), mixes[name])
        model.train()
        assert all(torch.equal(a, b) for a, b in zip(sampled, result.outputs, strict=True))


def test_calls_that_cannot_be_meant_are_refused() -> None:
    model, call, pre = patched_model(), padded_call(main_mix()), precomputed_call(main_mix())
    shapes = main_mix().shapes
    image, text = pre["image_rotary_emb"]
    wrong = {
        "img_shapes is missing": {**call, "img_shapes": None},
        "describes 2 samples, hidden_states holds 3": {**call, "img_shapes": shapes[:2]},
        "sample 2: .* make 1000 tokens": {**call, "img_shapes": [*shapes[:2], [(1, 10, 100)]]},
        "attention_mask of shape": {**pre, "attention_kwargs": {"attention_mask": torch.ones(3, 7)}},
        "image frequencies": {**pre, "image_rotary_emb": (image[:, 1:], text)},
        "text frequencies": {**pre, "image_rotary_emb": (image, text[:2])},
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(**arguments)
