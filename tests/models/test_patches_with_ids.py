"""The patches of FLUX.2 and FLUX.1: what stays stock, what a mixed call computes, what is refused, nothing is left.

What holds of every patch is tested on those of Qwen-Image-2.1 and Z-Image too.
"""

import copy
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2ParallelSelfAttnProcessor,
)
from peft import LoraConfig

from mixres.models import mixed_call
from mixres.models.attention import JointRotary
from mixres.models.blocks import compile_blocks, fewer_blocks
from mixres.models.flux2_multi_resolution_patch import patch_flux2_model_for_multi_resolution, patch_state
from mixres.models.flux_multi_resolution_patch import patch_flux_model_for_multi_resolution
from mixres.models.z_image.packed import HELPERS
from support import mixes
from support.host_reads import HostReads
from support.kinds import KINDS, IdKind, Kind

NAMES = ("flux2", "flux")
EVERY = (*NAMES, "qwen21", "z_image")
EQUAL = mixes.make_mix([[(1, 6, 8), (1, 4, 4)]] * 3, [9, 9, 9])  # nothing to pad: what the stock model can batch


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> IdKind:
    chosen = KINDS[request.param]
    assert isinstance(chosen, IdKind)
    return chosen


@pytest.fixture(params=EVERY)
def any_kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


# Stock calls of Qwen-Image-2.1 are tested with its patch. Z-Image pads by itself.
BUT_QWEN21 = pytest.mark.parametrize("any_kind", [*NAMES, "z_image"], indirect=True)
BUT_Z_IMAGE = pytest.mark.parametrize("any_kind", [*NAMES, "qwen21"], indirect=True)


def stock_calls(kind: Kind) -> list[dict[str, Any]]:
    """Batches that the stock model takes."""
    if not isinstance(kind, IdKind):
        return [kind.padded_call(mixes.random_mix(5))]
    call = equal_call(kind)
    return [call, call | {name: call[name].expand(3, -1, -1) for name in ("img_ids", "txt_ids")}]


def equal_call(kind: IdKind) -> dict[str, Any]:
    """The stock call of a batch of equal sizes."""
    call = kind.padded_call(EQUAL)
    del call["joint_attention_kwargs"]
    return call | {"img_ids": call["img_ids"][0], "txt_ids": call["txt_ids"][0]}


def assert_nothing_left(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        assert getattr(module, "packed_runs", None) is None and getattr(module, "token_rows", None) is None, name
        assert not getattr(module, "packed_in_blocks", False), name
        assert vars(module).keys().isdisjoint(HELPERS), "no method is shadowed"
        if isinstance(module, torch.nn.Linear):
            assert len(module._forward_hooks) <= 1, "hooks do not pile up"


@BUT_QWEN21
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stock_calls_give_what_the_stock_model_gives_bit_for_bit(any_kind: Kind, checkpointing: bool) -> None:
    """Before and after mixed calls, forward and gradient, by name and by position, with ids of either rank."""
    kind, mix = any_kind, mixes.random_mix(2)
    stock, patched = kind.stock(adapters=True), kind.patched(adapters=True)
    if checkpointing:
        stock.enable_gradient_checkpointing(), patched.enable_gradient_checkpointing()
    calls = stock_calls(kind)
    for _ in range(2):
        for call in calls:
            pair = [(model, list(model(**call)[0])) for model in (stock, patched)]
            values = [torch.stack([x.square().mean() for x in outputs]).sum() for _, outputs in pair]
            results = [mixes.backward(*both, value) for both, value in zip(pair, values, strict=True)]
            mixes.assert_identical(results[1], results[0])
        for layout in mixes.LAYOUTS:
            kind.run(patched, mix, layout)
    first, call = mixed_call.argument_names(type(stock).forward)[:3], calls[0]
    positional, rest = [call[name] for name in first], {name: x for name, x in call.items() if name not in first}
    found, expected = (model(*positional, **rest)[0] for model in (patched, stock))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@BUT_QWEN21
def test_one_packed_sample_is_the_stock_one_bit_for_bit(any_kind: Kind) -> None:
    kind = any_kind
    mix = mixes.make_mix([[(1, 5, 7), (1, 3, 3)]], [8])
    expected = kind.run(kind.stock(adapters=True), mix, "alone")
    for layout in mixes.LAYOUTS:
        assert torch.equal(kind.run(kind.patched(adapters=True), mix, layout).outputs[0], expected.outputs[0])


def test_a_patched_model_is_still_the_stock_model(any_kind: Kind, tmp_path: Path) -> None:
    kind = any_kind
    stock, patched = kind.stock(), kind.stock()
    assert kind.patch(patched) is patched
    parts = hooks_and_processors(patched)
    kind.patch(patched)
    assert parts == hooks_and_processors(patched)
    expected, found = stock.state_dict(), patched.state_dict()
    assert list(expected) == list(found) and all(torch.equal(expected[k], found[k]) for k in expected)
    mix = kind.mix("random 5")
    result = kind.run(patched, mix, "packed")
    patched.save_pretrained(tmp_path / "model")
    loaded = type(stock).from_pretrained(tmp_path / "model").train()
    mixes.assert_identical(kind.run(kind.patch(loaded), mix, "packed"), result)
    copied = copy.deepcopy(patched)
    del patched
    mixes.assert_identical(kind.run(copied, mix, "packed"), result)


def hooks_and_processors(model: Any) -> list[Any]:
    return [
        (len(module._forward_pre_hooks), len(module._forward_hooks), id(getattr(module, "processor", None)))
        for module in model.modules()
    ]


@BUT_Z_IMAGE
def test_the_attention_backend_is_kept_and_reaches_the_processors(any_kind: Kind) -> None:
    kind = any_kind
    before, after = kind.stock(), kind.patched()
    before.transformer_blocks[0].attn.processor._attention_backend = "_native_math"
    kind.patch(before)
    assert before.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    after.transformer_blocks[0].attn.processor._attention_backend = "flash_varlen"
    with pytest.raises(ValueError, match=r"flash_varlen' keeps the wrong keys of a padded batch"):
        after(**kind.padded_call(kind.mix("random 3")))


@BUT_Z_IMAGE
@pytest.mark.parametrize("extra", [0, 5])
def test_junk_in_padded_slots_changes_nothing(any_kind: Kind, extra: int) -> None:
    """In latents, text and ids alike."""
    kind = any_kind
    mix, model, results = kind.mix("random 3"), kind.patched(adapters=True), []
    for value in (0.0, 1e3, -1e3):
        outputs = kind.forward_padded(model, mix, **kind.padded_call(mix, image=extra, text=extra, value=value))
        results.append(mixes.backward(model, outputs, mixes.loss(outputs, mix)))
    mixes.assert_identical(results[1], results[0])
    mixes.assert_identical(results[2], results[0])
    mixes.assert_same(results[0], kind.alone("random 3"))


def plan_of_call(kind: IdKind, model: Any, **call: Any) -> JointRotary:
    """What reaches the attention processors."""
    seen: list[JointRotary] = []
    attn = model.transformer_blocks[0].attn
    hook = attn.register_forward_pre_hook(lambda attn, args, kwargs: seen.append(kwargs["plan"]), with_kwargs=True)
    model(**call)
    hook.remove()
    return seen[0]


def test_the_mask_hides_exactly_the_padding_and_is_absent_without(kind: IdKind) -> None:
    mix, model = mixes.main_mix(), kind.patched()
    plan = plan_of_call(kind, model, **kind.padded_call(mix, image=3, text=3))
    valid = torch.cat([
        torch.arange(43) < torch.tensor([[19], [7], [40]]),
        torch.arange(773) < torch.tensor([[512], [770], [560]]),
    ], dim=1)  # fmt: skip
    assert plan.mask is not None and torch.equal(plan.mask, valid[:, None, None])
    assert plan.freqs is not None and torch.equal(plan.freqs.abs().sum(-1) > 0, valid)
    other_sizes = mixes.make_mix([[(1, 6, 8)], [(1, 8, 6)]], [9, 9])  # of equal length
    call = kind.padded_call(other_sizes)
    assert plan_of_call(kind, model, **call).mask is None
    shared = call | {"txt_ids": call["txt_ids"][0]}  # text positions of all samples
    assert torch.equal(model(**shared)[0], model(**call)[0])
    mixes.assert_same(kind.run(model, other_sizes, "padded"), kind.run(kind.stock(), other_sizes, "alone"))


def test_a_model_of_fewer_blocks_is_still_patched(any_kind: Kind) -> None:
    """As `verify` and `inspect` run one that does not fit: hooks hang on first and last blocks."""
    model, mix = any_kind.patched(adapters=True), any_kind.fitted(mixes.random_mix(3))
    with fewer_blocks(model, 3):
        for layout in mixes.LAYOUTS:
            mixes.assert_same(any_kind.run(model, mix, layout), any_kind.run(model, mix, "alone"))


def test_exactly_the_valid_tokens_are_computed_in_a_packed_batch(kind: IdKind) -> None:
    mix, model = mixes.main_mix(), kind.patched()
    rows: dict[str, int] = {}

    def count(name: str, layer: torch.nn.Linear, args: tuple[Any, ...]) -> None:
        rows[name] = args[0].numel() // layer.in_features

    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name in linear:
        model.get_submodule(name).register_forward_pre_hook(functools.partial(count, name))
    with HostReads() as reads:
        kind.forward(model, mix, "packed")
    image, text, samples = 512 + 770 + 560, 19 + 7 + 40, 3
    for name, found in rows.items():
        if re.search(r"^time_|modulation|norm\w*\.linear", name):
            expected = samples
        elif name.startswith("single"):
            expected = image + text
        else:
            expected = text if re.search("context|add_", name) else image
        assert found == expected, name
    assert rows.keys() == linear
    assert reads.count == 0, "lengths are Python integers from the call on"


def test_no_modulation_is_kept_per_token_where_blocks_are_recomputed() -> None:
    """FLUX.2 makes it outside its blocks; where they keep their activations, all share one expansion."""
    kind, mix = KINDS["flux2"], mixes.random_mix(3)
    model = kind.patched()
    text, image = (sum(len(x) for x in rows) for rows in (mix.texts, mix.images))
    expanded = {(tokens, pieces) for tokens, pieces in ((image, 6), (text, 6), (text + image, 3))}
    for checkpointing, expected in ((False, expanded), (True, set())):
        if checkpointing:
            model.enable_gradient_checkpointing()
        kept = kind.kept(model, mix, "packed")
        # Whole, as what a recomputed block was given, or in the pieces that a block has cut.
        pieces = [(x, x.untyped_storage().nbytes() // (x.element_size() * model.inner_dim)) for x in kept]
        found = {(x.shape[1], n // x.shape[1]) for x, n in pieces if x.dim() == 3 and not x.shape[-1] % model.inner_dim}
        assert found & expanded == expected


# Planted problems, in the padded layout.


def test_the_measure_sees_planted_problems(kind: IdKind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mix, reference = kind.patched(adapters=True), mixes.main_mix(), kind.alone("main")
    call = kind.padded_call(mix)
    first = call["img_ids"][:1].expand(3, -1, -1)
    everything = {"image_lengths": [770] * 3, "text_lengths": [40] * 3}
    planted = {"positions of sample 0": {"img_ids": first}, "no mask": {"joint_attention_kwargs": everything}}
    for name, change in planted.items():
        outputs = kind.forward_padded(model, mix, **(call | change))
        found = mixes.backward(model, outputs, mixes.loss(outputs, mix))
        assert mixes.forward_error(found, reference) > 1e-3, name
        assert mixes.gradient_error(found, reference) > 1e-2, name


# What is refused.


def test_a_lost_processor_is_never_a_wrong_answer(kind: IdKind, monkeypatch: pytest.MonkeyPatch) -> None:
    for block, stock in (("transformer_blocks", FluxAttnProcessor), ("single_transformer_blocks", FluxAttnProcessor)):
        model = kind.patched()
        if not isinstance(model, FluxTransformer2DModel):
            stock = Flux2AttnProcessor if block == "transformer_blocks" else Flux2ParallelSelfAttnProcessor
        getattr(model, block)[1].attn.set_processor(stock())
        for call in (kind.padded_call(mixes.random_mix(3)), kind.packed_call(mixes.random_mix(3))):
            with pytest.raises(ValueError, match="something has replaced attention processors: call patch_flux"):
                model(**call)
            with monkeypatch.context() as unchecked:
                for module in ("flux2", "flux"):
                    unchecked.setattr(f"mixres.models.{module}_multi_resolution_patch.patch_state", lambda model: WHOLE)
                with pytest.raises(RuntimeError, match=r"[Ss]izes? of tensor"):  # it has no positions to rotate by
                    model(**call)
        kind.patch(model)
        mix = mixes.random_mix(3)
        mixes.assert_same(kind.run(model, mix, "packed"), kind.run(kind.stock(), mix, "alone"))


WHOLE = patch_state(KINDS["flux2"].patched())


def test_calls_that_cannot_be_meant_are_refused(kind: IdKind) -> None:
    model, mix = kind.patched(), mixes.main_mix()
    padded, packed = kind.padded_call(mix), kind.packed_call(mix)
    bare = {**padded, "joint_attention_kwargs": None}
    lengths = padded["joint_attention_kwargs"]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("img_ids: samples have positions of their own", bare),
        ("needs both image_lengths and text_lengths", padded | {"joint_attention_kwargs": {"image_lengths": [1]}}),
        ("a positive number in both", padded | {"joint_attention_kwargs": {**lengths, "text_lengths": [19, 0, 40]}}),
        ("a positive number in both", packed | {"joint_attention_kwargs": {**lengths, "text_lengths": [19, 47]}}),
        ("hidden_states has leading shape .3, 770., .* .3, 771.",
         padded | {"joint_attention_kwargs": {**lengths, "image_lengths": [512, 771, 560]}}),
        ("encoder_hidden_states has leading shape", padded | {"encoder_hidden_states": torch.ones(3, 39, 24)}),
        ("img_ids has leading shape", padded | {"img_ids": padded["img_ids"][:2]}),
        ("txt_ids has leading shape", padded | {"txt_ids": padded["txt_ids"][0, 1:]}),
        ("timestep has leading shape", packed | {"timestep": mix.timesteps[:2]}),
        ("packed batch: hidden_states has leading shape", packed | {"hidden_states": packed["hidden_states"][1:]}),
        ("shape .1, 1842.", packed | {"hidden_states": packed["hidden_states"].transpose(0, 1)}),
        ("packed batch: encoder_hidden_states", packed | {"encoder_hidden_states": torch.ones(65, 1, 24)}),
        ("packed batch: txt_ids", packed | {"txt_ids": packed["txt_ids"][1:]}),
    ]  # fmt: skip
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            model(**call)
    assert_nothing_left(model)


def test_what_the_patches_do_not_know_is_refused_by_name() -> None:
    flux2, flux = (KINDS[name] for name in NAMES)
    mix = mixes.random_mix(2)
    for name, value in (("kv_cache_mode", "extract"), ("kv_cache", object())):
        with pytest.raises(ValueError, match="cannot use kv_cache or kv_cache_mode"):
            flux2.patched()(**flux2.padded_call(mix), **{name: value})
    call = flux.packed_call(mix)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        with pytest.raises(ValueError, match=f"cannot use ControlNet or IP-Adapter: leave out {name}"):
            flux.patched()(**call, **{name: [torch.ones(1)]})
    adapter = {**call["joint_attention_kwargs"], "ip_adapter_image_embeds": [torch.ones(1)]}
    with pytest.raises(ValueError, match="leave out ip_adapter_image_embeds"):
        flux.patched()(**(call | {"joint_attention_kwargs": adapter}))
    cached, adapted = flux2.stock(), flux.stock()
    cached.transformer_blocks[1].attn.set_processor(Flux2KVAttnProcessor())
    adapted.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(64, 8))
    for kind, model, processor in (
        (flux2, cached, "Flux2KVAttnProcessor"),
        (flux, adapted, "FluxIPAdapterAttnProcessor"),
    ):
        with pytest.raises(ValueError, match=f"not {processor}, which a key-value cache"):
            kind.patch(model)
        assert not model._forward_pre_hooks
    other = SD3Transformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=1, sample_size=4, joint_attention_dim=8,
        caption_projection_dim=8,
    )  # fmt: skip
    for patch in (patch_flux2_model_for_multi_resolution, patch_flux_model_for_multi_resolution):
        with pytest.raises(TypeError, match="not SD3Transformer2DModel"):
            patch(other)


PARTS = {
    **dict.fromkeys(NAMES, ("context_embedder", "transformer_blocks.1.ff", "single_transformer_blocks.1.attn")),
    "qwen21": ("txt_in", "transformer_blocks.1.img_mlp"),
    "z_image": ("cap_embedder", "noise_refiner.0.feed_forward", "layers.1.attention", "all_final_layer.2-1.linear"),
}


@pytest.mark.parametrize(("name", "where"), [(name, part) for name in PARTS for part in PARTS[name]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind_by_a_call_that_fails(name: str, where: str, checkpointing: bool) -> None:
    kind = KINDS[name]
    mix, model = kind.mix("random 2"), kind.patched()
    if checkpointing:
        model.enable_gradient_checkpointing()
    before = {layout: kind.run(model, mix, layout) for layout in mixes.LAYOUTS}
    assert_nothing_left(model)

    def fail(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        raise MemoryError("planted")

    hook = model.get_submodule(where).register_forward_pre_hook(fail)
    for call in (kind.packed_call(mix), kind.padded_call(mix)):
        with pytest.raises(MemoryError, match="planted"):
            model(**call)
        assert_nothing_left(model)
    hook.remove()
    for layout, result in before.items():
        mixes.assert_identical(kind.run(model, mix, layout), result)


def test_adapters_may_come_late_be_disabled_and_go(any_kind: Kind) -> None:
    kind = any_kind
    mix = kind.mix("random 3")
    plain, model = kind.run(kind.stock(), mix, "alone"), kind.patched()
    before = kind.run(model, mix, "packed")
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=linear, init_lora_weights=False))
    model.requires_grad_(True)
    stock = kind.stock()
    torch.manual_seed(0)
    stock.add_adapter(LoraConfig(r=4, target_modules=linear, init_lora_weights=False))
    expected = kind.run(stock.requires_grad_(True), mix, "alone")
    for layout in mixes.LAYOUTS:
        mixes.assert_same(kind.run(model, mix, layout), expected)
    assert mixes.forward_error(expected, plain) > 1e-3
    model.disable_adapters()
    with torch.no_grad():
        found = kind.forward(model, mix, "packed")
    assert all(torch.equal(a, b) for a, b in zip(found, before.outputs, strict=True))
    model.delete_adapters("default")
    after = kind.run(model.requires_grad_(True), mix, "packed")
    gradients = {name.replace(".base_layer", ""): g for name, g in after.gradients.items()}
    mixes.assert_identical(mixes.Result(after.outputs, gradients), before)
    assert_nothing_left(model)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), list(itertools.product(EVERY, (False, True))))
@pytest.mark.timeout(300)
def test_compiled_blocks_give_the_outputs_and_gradients_of_plain_ones(name: str, checkpointing: bool) -> None:
    """In padded batches: others are not compiled."""
    torch._dynamo.reset()
    kind = KINDS[name]
    mix = kind.mix("random 3")
    plain, compiled = kind.patched(), kind.patched()
    for model in (plain, compiled):
        if checkpointing:
            model.enable_gradient_checkpointing()
    compile_blocks(compiled, graphs=8, backend="aot_eager")
    ours, theirs = (kind.run(model, mix, "padded") for model in (compiled, plain))
    mixes.assert_same(ours, theirs)
    torch._dynamo.reset()
