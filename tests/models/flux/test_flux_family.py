"""What FLUX.1 and Kontext have of their own: sizes of references, positions, guidance, long prompts, layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS, calculate_shift
from PIL import Image
from torch import Tensor

from mixres.diffusion.flow_matching import resolution_shift
from mixres.errors import UserError
from mixres.geometry import Grid, Size
from mixres.models.family import ControlSizes
from mixres.models.flux.family import Flux, FluxKontext
from mixres.models.lora import add_lora, trainable_parameters
from mixres.models.registry import load_family
from support.family_cases import EVERY_CASE

KONTEXT = EVERY_CASE["flux_kontext"]
AREA = 1024 * 1024


@pytest.mark.parametrize(
    ("source", "area", "expected"),
    [
        (Size(1024, 1024), AREA, Size(1024, 1024)),
        (Size(100, 100), AREA, Size(1024, 1024)),  # the pipeline enlarges too
        (Size(1920, 1080), AREA, Size(1392, 752)),
        (Size(200, 2000), AREA, Size(672, 1568)),  # stretched, not cropped
        (Size(1920, 1080), 512 * 512, Size(688, 384)),
        (Size(100, 100), 512 * 512, Size(512, 512)),
    ],
)
def test_a_reference_has_a_size_that_kontext_was_trained_on_or_its_own_aspect(
    source: Size, area: int, expected: Size
) -> None:
    rules = {"control_area": area}
    assert FluxKontext("").control_sizes(Size(512, 256), [source], rules).vae == (expected,)
    assert FluxKontext("").control_sizes(Size(512, 256), [source], rules, [True]).vae == (Size(512, 256),)
    assert FluxKontext("").control_sizes(Size(512, 256), [], rules) == ControlSizes()
    if area == AREA:
        assert tuple(expected) in PREFERRED_KONTEXT_RESOLUTIONS
        assert FluxKontext("").default_size(source) == expected


@pytest.fixture(scope="module")
def kontext(base_of: Callable[[Any], Path]) -> FluxKontext:
    return FluxKontext(str(base_of(KONTEXT)))


@pytest.fixture(scope="module")
def encoders(kontext: FluxKontext) -> Any:
    return kontext.load_encoders(dtype=torch.float32, device="cpu")


class _StopError(Exception):
    """Ends the stock call where the sizes are known."""


def test_at_the_stock_area_a_reference_is_that_of_an_unchanged_stock_call(kontext: FluxKontext, encoders: Any) -> None:
    image = Image.effect_noise((300, 170), 90).convert("RGB")
    seen: list[Tensor] = []

    def keep(image: Tensor, *_: Any, **__: Any) -> Any:
        seen.append(image)
        raise _StopError

    stock: Any = KONTEXT.load_stock(Path(kontext.path), torch.float32)
    stock._encode_vae_image = keep
    with pytest.raises(_StopError):
        stock(image=image, prompt="p", height=64, width=64)
    (size,) = kontext.control_sizes(Size(64, 64), [Size(*image.size)]).vae
    latents = kontext.encode_image(encoders, image, size)
    del stock._encode_vae_image
    with torch.no_grad():
        expected = stock._encode_vae_image(seen[0], generator=None)
    assert torch.equal(latents, stock._pack_latents(expected, 1, *expected.shape[1:])[0])


def test_positions_are_those_of_the_stock_pipeline_and_exact() -> None:
    grids = [Grid(1, 4, 6), Grid(1, 300, 2)]
    found = FluxKontext("").image_ids(grids)
    stock = [FluxKontextPipeline._prepare_latent_image_ids(1, g.rows, g.columns, "cpu", torch.float32) for g in grids]
    stock[1][:, 0] = 1
    assert torch.equal(found, torch.cat(stock).long()) and found.dtype == torch.int64


@pytest.mark.parametrize("kind", [Flux, FluxKontext])
def test_shape_shift_and_guidance_of_the_stock_base_are_known_without_a_file(kind: Any) -> None:
    family = load_family(None, kind.stock_bases[0], synthetic=True)
    model = family.transformer_skeleton()
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (19, 38)
    assert round(model.num_parameters() / 1e9, 1) == 11.9
    assert (*family.token_widths(), family.pooled_width(), family.pixels_per_token()) == (64, 4096, 768, 16)
    for tokens in (256, 1000, 4096, 9000):
        mu = calculate_shift(tokens)
        assert resolution_shift(tokens, family.flow_shift()) == pytest.approx(float(torch.tensor(mu).exp()), rel=1e-6)
    guidance = family.embedded_guidance()
    assert guidance is not None
    assert (guidance.training, guidance.sampling) == (1.0, {Flux: 3.5, FluxKontext: 2.5}[kind])


def test_every_preset_names_layers_that_there_are() -> None:
    family = load_family(None, FluxKontext.stock_bases[0], synthetic=True)
    linear = [n for n, module in family.transformer_skeleton().named_modules() if isinstance(module, torch.nn.Linear)]
    reached = {}
    for preset in family.lora_presets:
        fresh = family.transformer_skeleton()
        table = add_lora(
            fresh, r=1, lora_alpha=1, lora_dropout=0, target_modules=[preset], untrained=(), seed=0,
            presets=family.lora_presets,
        )  # fmt: skip
        assert all(row.modules for row in table), preset
        reached[preset] = {name.partition(".lora_")[0] for name in trainable_parameters(fresh)}
    assert len(reached["attention"]) == 19 * 8 + 38 * 3
    assert reached["attention+mlp"] - reached["attention"] == {
        name for name in linear if "ff" in name or "proj_mlp" in name or ("single" in name and "proj_out" in name)
    }
    assert reached["all"] == set(linear)


def test_a_base_without_embedded_guidance_has_a_constant_shift_and_takes_a_negative_prompt() -> None:
    """As FLUX.1-schnell."""
    family = Flux("")
    configs = {"transformer/config.json": {}, "scheduler/scheduler_config.json": {"shift": 2.0}}
    family._config = configs.__getitem__  # type: ignore[assignment]
    assert family.embedded_guidance() is None
    assert [resolution_shift(tokens, family.flow_shift()) for tokens in (64, 9000)] == pytest.approx([2.0, 2.0])


def test_what_the_base_does_not_take_is_refused(kontext: FluxKontext) -> None:
    with pytest.raises(UserError, match=r"^data\.resize\.control\.text_area: FLUX\.1 Kontext shows its text encoder"):
        kontext.control_areas(4096, 4096)
    with pytest.raises(UserError, match=r"^data\.resize\.control\.area: FLUX\.1 takes no control images"):
        Flux("").control_areas(4096, None)


def test_no_prompt_of_the_stated_length_is_cut(kontext: FluxKontext, encoders: Any) -> None:
    """By T5; CLIP sees the beginning of longer ones. What is cut of others fits and is their beginning."""
    words = ["swap"] * kontext.max_prompt_tokens  # a token each
    exact, over = " ".join(words), " ".join([*words, "swap"])
    assert kontext.over_long([exact, over, "short"]) == {over: (len(words) + 1, exact)}
    unknown = "交 " * 600  # a token of the blank before it, and an unknown one
    tokens, beginning = kontext.over_long([unknown])[unknown]
    assert tokens == 1200 and unknown.startswith(beginning) and len(beginning) == 2 * 255 - 1
    one, other = (
        kontext.encode_prompt(encoders, controls=[], prompt=" ".join([*words[:-1], last]), sizes=ControlSizes())
        for last in ("swap", "red")
    )
    assert not torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)
