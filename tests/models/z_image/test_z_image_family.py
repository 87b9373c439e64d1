"""What Z-Image has of its own: its shift, its prompts' lengths, its positions, its guidance, its layers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from mixres.batch import Sample
from mixres.data.collate import collate
from mixres.diffusion.flow_matching import resolution_shift, shifted
from mixres.errors import UserError
from mixres.geometry import Grid
from mixres.inference import export
from mixres.models.family import ControlSizes
from mixres.models.lora import trainable_parameters
from mixres.models.lora_file import lora_file
from mixres.models.registry import load_family
from mixres.models.z_image.family import ZImage
from support.family_cases import EVERY_CASE, PROMPTS, FamilyCase
from support.steps import with_adapters

CASE = EVERY_CASE["z_image"]
SYNTHETIC = load_family(None, ZImage.stock_bases[0], synthetic=True)


@pytest.fixture
def base(base_of: Callable[[FamilyCase], Path]) -> Path:
    return base_of(CASE)


@pytest.mark.parametrize("tokens", [1, 256, 4096, 16384])
def test_the_shift_is_the_schedulers_own_at_every_size(base: Path, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25], mu=0.7)  # the pipeline hands it a mu, which it ignores
    factor = resolution_shift(tokens, ZImage(str(base)).flow_shift())
    torch.testing.assert_close(shifted(torch.tensor([1.0, 0.5, 0.25, 0.0]), factor), scheduler.sigmas)


def test_prompts_are_counted_as_the_stock_pipeline_cuts_them(base: Path) -> None:
    family = ZImage(str(base))
    preprocessors, encoders = family.load_preprocessors(), family.load_encoders(dtype=torch.float32, device="cpu")
    longest = "é" * (family.max_prompt_tokens // 2)  # two bytes each
    for prompt in (*PROMPTS, "", longest, longest + "word" * 9):
        counted = family.text_tokens(preprocessors, prompt=prompt, sizes=ControlSizes())
        assert counted == len(family.encode_prompt(encoders, controls=[], prompt=prompt, sizes=ControlSizes()).tokens)
    assert counted == 512
    assert list(family.over_long([longest, longest + "e"])) == [longest + "e"]


def test_what_there_are_no_positions_for_is_refused(base: Path, tmp_path: Path) -> None:
    family = ZImage(str(base))  # 64 rows, 64 columns
    assert family.text_problem([Grid(1, 64, 64)], 512) is None
    for grid in (Grid(1, 65, 2), Grid(1, 2, 65)):
        with_too_much = family.text_problem([grid], 9)
        assert with_too_much is not None and "1022 tokens and 1024x1024 pixels that this base" in with_too_much
    short = shutil.copytree(base, tmp_path / "base")
    config = json.loads((short / "transformer" / "config.json").read_text())
    (short / "transformer" / "config.json").write_text(json.dumps(config | {"axes_lens": [98, 64, 64]}))
    family = ZImage(str(short))
    assert family.text_problem([Grid(1, 2, 2)], 96) is None and family.text_problem([Grid(1, 2, 2)], 97) is not None
    model = family.load_transformer(dtype=torch.float32, device="cpu")
    for tokens, fits in ((96, True), (97, False)):
        call = {"x": [torch.ones(16, 1, 4, 4)], "t": torch.ones(1), "cap_feats": [torch.ones(tokens, 32)]}
        if fits:
            model(**call)
        else:
            with pytest.raises(IndexError):
                model(**call)


def test_controls_have_no_sizes() -> None:
    with pytest.raises(UserError, match=r"^data\.resize\.control\.area: Z-Image takes no control images"):
        SYNTHETIC.control_areas(4096, None)
    assert SYNTHETIC.control_areas(1024 * 1024, None) == {}


def test_a_loss_over_padded_slots_is_seen(base: Path) -> None:
    """The padded layout has slots that the transformer never sees: their velocity is zero, and is not selected."""
    family, draw = ZImage(str(base)), torch.Generator().manual_seed(0)
    model = with_adapters(
        family.load_transformer(dtype=torch.float32, device="cpu"), untrained=(), target_modules=["attention"],
        presets=family.lora_presets,
    )  # fmt: skip
    grids, texts = [Grid(1, 4, 6), Grid(1, 2, 2)], [9, 40]
    samples = [
        Sample("a", torch.randn(g.tokens, 64, generator=draw), (), torch.randn(t, 32, generator=draw), (g,))
        for g, t in zip(grids, texts, strict=True)
    ]
    found = {}
    for layout in ("padded", "packed"):
        batch = collate(samples, indices=[0, 1], weights=[1.0, 1.0], layout=layout)
        velocity = family.predict_velocity(model, batch, batch.latents, torch.tensor([0.3, 0.8]))
        assert velocity.shape == batch.latents.shape
        for name, rows in (("valid", velocity.flatten(0, 1)[batch.target_index]), ("all", velocity.flatten(0, 1))):
            model.zero_grad()
            rows.square().mean().backward(retain_graph=True)
            gradients = [p.grad.flatten() for p in trainable_parameters(model).values() if p.grad is not None]
            found[layout, name] = torch.cat(gradients).clone()
    right = found["packed", "valid"]
    assert (found["padded", "valid"] - right).norm() <= 1e-5 * right.norm()
    assert (found["padded", "all"] - right).norm() > 1e-1 * right.norm()


def test_both_exports_of_a_lora_are_applied_as_trained_by_diffusers(base: Path, tmp_path: Path) -> None:
    """ComfyUI reads the second: the names of diffusers behind its prefix, and alpha, which is not r here."""
    family, call = ZImage(str(base)), {"x": [torch.randn(16, 1, 8, 12)], "t": torch.tensor([0.3])}
    call |= {"cap_feats": [torch.randn(7, 32)], "return_dict": False}
    trained = with_adapters(
        family.load_transformer(dtype=torch.float32, device="cpu"), untrained=(), target_modules=["all"], r=2,
        lora_alpha=6, presets=family.lora_presets,
    )  # fmt: skip
    lora, expected = tmp_path / "lora.safetensors", trained(**call)[0][0]
    recipe = {"format": 1, "family": family.name, "base": family.path}
    lora.write_bytes(lora_file(trainable_parameters(trained), trained, recipe))
    for form in ("diffusers", "comfyui"):
        out = tmp_path / f"{form}.safetensors"
        export.export(export.make_request(run=str(lora), format=form, out=str(out)))
        stock = CASE.load_stock(base, torch.float32)
        assert (stock.transformer(**call)[0][0] - expected).norm() > 1e-3 * expected.norm()
        stock.load_lora_weights(out)
        assert (stock.transformer(**call)[0][0] - expected).norm() < 2e-6 * expected.norm(), form
    layers = {name.removesuffix(".lora_A.weight") for name in load_file(out) if name.endswith(".lora_A.weight")}
    linear = {name for name, module in stock.transformer.named_modules() if isinstance(module, LoraLayer)}
    assert layers == {f"diffusion_model.{name}" for name in linear}


def test_the_shape_of_the_stock_bases_is_known_without_a_file() -> None:
    model = SYNTHETIC.transformer_skeleton()
    assert (len(model.layers), len(model.noise_refiner), len(model.context_refiner)) == (30, 2, 2)
    assert round(model.num_parameters() / 1e9, 2) == 6.15
    assert SYNTHETIC.token_widths() == (64, 2560) and SYNTHETIC.pixels_per_token() == 16


def test_every_preset_names_layers_that_there_are() -> None:
    linear = [
        name for name, module in SYNTHETIC.transformer_skeleton().named_modules() if isinstance(module, torch.nn.Linear)
    ]

    def covered(patterns: tuple[str, ...]) -> list[str]:
        return [name for name in linear if any(name == p or name.endswith(f".{p}") for p in patterns)]

    assert all(covered((pattern,)) for patterns in ZImage.lora_presets.values() for pattern in patterns)
    assert covered(ZImage.lora_presets["all"]) == linear
