"""What Z-Image's patch has of its own: the methods that a packed call shadows, what it computes, planted problems."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    FinalLayer,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)

from mixres.models.family import PatchState
from mixres.models.packing import PackedLengths
from mixres.models.z_image.packed import HELPERS
from mixres.models.z_image_multi_resolution_patch import patch_z_image_model_for_multi_resolution
from support import mixes
from support.host_reads import HostReads
from support.kinds import KINDS

KIND = KINDS["z_image"]


def filled_up(lengths: list[int]) -> int:
    return sum(-(-n // SEQ_MULTI_OF) * SEQ_MULTI_OF for n in lengths)


def test_the_stock_forward_calls_what_a_packed_call_shadows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first test to fail when diffusers changes what the packed layout stands on."""
    model, calls = KIND.stock(), []
    for name in HELPERS:
        stock = getattr(model, name)

        def spy(*args: Any, name: str = name, stock: Any = stock, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            calls.append((name, len(args), tuple(kwargs), len(result)))
            return result

        monkeypatch.setitem(vars(model), name, spy)
    model(**KIND.padded_call(mixes.random_mix(2)))
    stream, samples = ("_prepare_sequence", 6, (), 5), len(mixes.random_mix(2).images)
    assert calls == [
        ("patchify_and_embed", 4, (), 7),
        stream,  # images
        stream,  # texts
        ("_build_unified_sequence", 14, (), 4),
        ("unpatchify", 5, (), samples),
    ]
    names = {name: list(inspect.signature(getattr(ZImageTransformer2DModel, name)).parameters) for name in HELPERS}
    assert names["_prepare_sequence"][1:5] == ["feats", "pos_ids", "inner_pad_mask", "pad_token"]
    assert names["_build_unified_sequence"][1:7] == [
        "x", "x_freqs", "x_seqlens", "x_noise_mask", "cap", "cap_freqs",
    ]  # fmt: skip
    # The lines that take modulation parameters of one row a sample, and get one row a token.
    for kind, lines in (
        (ZImageTransformerBlock, ["mod.unsqueeze(1).chunk(4, dim=2)"]),
        (FinalLayer, ["scale = 1.0 + self.adaLN_modulation(c)", "scale = scale.unsqueeze(1)", "(x) * scale"]),
    ):
        source = inspect.getsource(kind.forward)
        assert all(line in source for line in lines), kind


def test_exactly_the_tokens_of_the_samples_are_computed_in_a_packed_batch() -> None:
    """Their learned padding among them; no length is read from the device."""
    mix, model, rows = mixes.main_mix(), KIND.patched(), {}
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, layer in linear.items():
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: rows.update({name: args[0].numel() // layer.in_features})
        )
    with HostReads() as reads:
        KIND.forward(model, mix, "packed")
    image, text = filled_up([len(v) for v in mix.velocities]), filled_up([len(x) for x in mix.texts])
    for name, found in rows.items():
        if name.startswith("t_embedder") or "adaLN_modulation" in name:
            expected = 3
        elif name.startswith(("cap_embedder", "context_refiner")):
            expected = text
        else:
            expected = image if name.startswith(("all_x", "noise_refiner")) else image + text
        assert found == expected, name
    assert rows.keys() == linear.keys() and reads.count == 0


# Planted problems.


def positions_of_sample_0(images: list[Any], texts: list[Any]) -> None:
    images[:] = [images[0][torch.arange(len(ids)) % len(images[0])] for ids in images]


def next_frame(images: list[Any], texts: list[Any]) -> None:
    images[1] = images[1] + torch.tensor([1, 0, 0])


@pytest.mark.parametrize("layout", mixes.LAYOUTS)
@pytest.mark.parametrize("plant", [positions_of_sample_0, next_frame])
def test_the_measure_sees_wrong_positions(layout: str, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = ZImageTransformer2DModel.patchify_and_embed

    def planted(*args: Any) -> Any:
        result = stock(*args)
        plant(*result[3:5])
        return result

    monkeypatch.setattr(ZImageTransformer2DModel, "patchify_and_embed", planted)
    assert_seen(layout)


def test_the_measure_sees_a_lost_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HELPERS[1:3]:
        stock = getattr(ZImageTransformer2DModel, name)

        def planted(*args: Any, stock: Any = stock) -> Any:
            states, freqs, _, *rest = stock(*args)
            return states, freqs, None, *rest

        monkeypatch.setattr(ZImageTransformer2DModel, name, planted)
    assert_seen("padded")


def test_the_measure_sees_modulation_of_another_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = property(lambda lengths: tuple(((b + 1) % 3, n) for b, n in enumerate(lengths.joint)))
    monkeypatch.setattr(PackedLengths, "joint_runs", shifted)
    assert_seen("packed")


def assert_seen(layout: str) -> None:
    found, reference = KIND.run(KIND.patched(adapters=True), mixes.main_mix(), layout), KIND.alone("main")
    assert mixes.forward_error(found, reference) > 1e-3
    assert mixes.gradient_error(found, reference) > 1e-2


def test_a_lost_processor_is_never_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call, whole = KIND.patched(), KIND.packed_call(mixes.random_mix(3)), PatchState(1, 1, True)
    model.layers[1].attention.set_processor(ZSingleStreamAttnProcessor())
    with pytest.raises(ValueError, match="something has replaced attention processors: call patch_z_image"):
        model(**call)
    with monkeypatch.context() as unchecked:
        unchecked.setattr("mixres.models.z_image_multi_resolution_patch.patch_state", lambda model: whole)
        with pytest.raises(AttributeError, match="'JointRotary' object has no attribute"):
            model(**call)
    mixes.assert_same(
        KIND.run(KIND.patch(model), mixes.main_mix(), "packed"), KIND.run(KIND.stock(), mixes.main_mix(), "alone")
    )


# What is refused.


def test_calls_that_cannot_be_meant_are_refused() -> None:
    model, call = KIND.patched(), KIND.packed_call(mixes.main_mix())
    with pytest.raises(ValueError, match=r"x, cap_feats and t are of \(3, 2, 3\) samples"):
        model(**call | {"cap_feats": call["cap_feats"][1:]})
    with pytest.raises(ValueError, match=r"of \(3, 3, 1\) samples"):
        model(**call | {"t": call["t"][:1]})
    for name in ("controlnet_block_samples", "siglip_feats", "image_noise_mask"):
        with pytest.raises(ValueError, match=f"leave out {name}"):
            model(**call, **{name: {}})
    with pytest.raises(TypeError, match="not Linear"):
        patch_z_image_model_for_multi_resolution(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    other = KIND.stock()
    other.layers[0].attention.set_processor(torch.nn.Identity())
    with pytest.raises(ValueError, match="the patch replaces ZSingleStreamAttnProcessor, not Identity"):
        KIND.patch(other)
    assert not other._forward_pre_hooks
