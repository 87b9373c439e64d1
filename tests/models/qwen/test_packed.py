"""A packed batch equals its samples alone, computes exactly the valid tokens and leaves nothing behind."""

import functools
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from mixres.models.qwen.packed import PackedModulation, expand_rows
from support.mixes import (
    EVERY_LINEAR,
    FORWARDS,
    MIXES,
    Result,
    assert_identical,
    assert_same,
    forward_error,
    forward_packed,
    gradient_error,
    loss,
    main_mix,
    make_mix,
    packed_call,
    padded_call,
    patched_model,
    run,
    stock_model,
)


@functools.cache
def alone(name: str, zero_cond_t: bool) -> Result:
    return run(stock_model(zero_cond_t, EVERY_LINEAR), MIXES[name](), "alone")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_packed_batch_equals_each_sample_alone(name: str, zero_cond_t: bool, checkpointing: bool) -> None:
    """With adapters on every linear layer, those of the modulations and of the output too."""
    model = patched_model(zero_cond_t, EVERY_LINEAR)
    if checkpointing:
        model.enable_gradient_checkpointing()
    assert_same(run(model, MIXES[name](), "packed"), alone(name, zero_cond_t))


def test_in_float64_the_layouts_agree_to_float64() -> None:
    """Against the patched model on one sample: the stock model rotates in fp32 even then."""
    mix, model = main_mix().to("cpu", torch.float64), patched_model(True, EVERY_LINEAR).to(torch.float64)
    reference = run(model, mix, "alone")
    for layout in ("padded", "packed"):
        measured = run(model, mix, layout)
        assert forward_error(measured, reference) < 1e-10
        assert gradient_error(measured, reference) < 1e-10


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_exactly_the_valid_tokens_are_computed(zero_cond_t: bool) -> None:
    mix, model = main_mix(), patched_model(zero_cond_t)
    rows: dict[str, int] = {}

    def count(name: str, layer: torch.nn.Linear, args: tuple[Any, ...]) -> None:
        rows[name] = args[0].numel() // layer.in_features

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(functools.partial(count, name))
    forward_packed(model, mix)
    image, text, samples = 512 + 770 + 560, 19 + 7 + 40, 3
    for name, found in rows.items():
        if "img_mod" in name or "timestep_embedder" in name:
            expected = samples * (2 if zero_cond_t else 1)
        elif "txt_mod" in name or "norm_out" in name:
            expected = samples
        else:
            expected = text if any(part in name for part in ("txt_", "add_")) else image
        assert found == expected, name
    assert len(rows) == 2 * 14 + 6


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host; on a GPU each of them waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_no_layer_reads_a_value_from_the_device(zero_cond_t: bool) -> None:
    """Lengths are Python integers from the call on; what is read is read once a call, not once a layer."""
    mix, model = main_mix(), patched_model(zero_cond_t, EVERY_LINEAR)
    found: dict[str, int] = {}
    model.enable_gradient_checkpointing()
    for layout in ("packed", "padded"):
        with HostReads() as reads:
            outputs = FORWARDS[layout](model, mix)
            loss(outputs, mix).backward()
        found[layout] = reads.count
    with HostReads() as reads:
        assert torch.ones(1).sum().item() == 1
    assert reads.count == 1
    assert found["packed"] == 0 and found["padded"] <= 1  # padded asks once whether the text mask hides anything


def test_wrong_lengths_are_refused() -> None:
    mix, model = main_mix(), patched_model()
    call, mask = packed_call(mix), torch.ones(3, 40)
    wrong = {
        "hidden_states has leading shape": {"hidden_states": call["hidden_states"][1:]},
        "hidden_states has leading shape .1, 1842.": {"hidden_states": call["hidden_states"].transpose(0, 1)},
        "encoder_hidden_states has leading shape": {"encoder_hidden_states": call["encoder_hidden_states"][1:]},
        "timestep has leading shape": {"timestep": mix.timesteps[:2]},
        "txt_seq_lens": {"attention_kwargs": {"txt_seq_lens": [19, 47]}},
        "encoder_hidden_states_mask must be None": {"encoder_hidden_states_mask": torch.ones(66, 1)},
        "attention_mask must be None": {"attention_kwargs": {"txt_seq_lens": [19, 7, 40], "attention_mask": mask}},
        "image_rotary_emb must be None": {"image_rotary_emb": (torch.ones(1), torch.ones(1))},
        "img_shapes is missing": {"img_shapes": None},
    }  # fmt: skip
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(**{**call, **change})
    assert_nothing_left(model)


def assert_nothing_left(model: QwenImageTransformer2DModel) -> None:
    for name, module in model.named_modules():
        assert getattr(module, "packed_runs", None) is None, name
        assert getattr(module, "packed_handle", None) is None, name
    assert not model.norm_out.linear._forward_hooks


@pytest.mark.parametrize(
    "where", ["txt_in", "transformer_blocks.1.img_mod.1", "transformer_blocks.1.img_mlp", "norm_out.norm"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind_by_a_call_that_fails(where: str, checkpointing: bool) -> None:
    mix, model = main_mix(), patched_model(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    before = run(model, mix, "packed")
    assert_nothing_left(model)

    def fail(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        raise MemoryError("planted")

    hook = model.get_submodule(where).register_forward_pre_hook(fail)
    for call in (packed_call(mix), padded_call(mix)):
        with pytest.raises(MemoryError, match="planted"):
            model(**call)
        assert_nothing_left(model)
    hook.remove()
    assert_same(run(model, mix, "padded"), before)
    assert_identical(run(model, mix, "packed"), before)


def test_samples_of_one_token() -> None:
    mix = make_mix([[(1, 1, 1)], [(1, 3, 2), (1, 1, 1)]], [1, 1])
    assert_same(run(patched_model(True), mix, "packed"), run(stock_model(True), mix, "alone"))


def test_modulation_rows_expand_where_the_block_has_split_them() -> None:
    rows = torch.arange(36.0).reshape(2, 18).requires_grad_()
    runs = ((1, 2), (0, 1), (1, 3))
    taken = [1, 1, 0, 1, 1, 1]
    found = [part.chunk(3, dim=-1) for part in PackedModulation(rows, runs).chunk(2, dim=-1)]
    expected = [part.chunk(3, dim=-1) for part in rows[taken].chunk(2, dim=-1)]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    expand_rows(rows, runs).sum().backward()
    assert rows.grad is not None and rows.grad[:, 0].tolist() == [1.0, 5.0]
