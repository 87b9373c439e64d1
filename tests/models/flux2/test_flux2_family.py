"""What FLUX.2 has of its own: sizes of references, positions, the shift of training."""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from mixres.config.load import load_config
from mixres.diffusion.flow_matching import resolution_shift
from mixres.errors import UserError
from mixres.geometry import Size
from mixres.models.family import ControlSizes
from mixres.models.flux2.dev import Flux2Dev
from mixres.models.flux2.family import Flux2Klein
from mixres.models.registry import load_family
from mixres.preprocessing.fill import family_of
from support.family_cases import EVERY_CASE, PROMPTS, FamilyCase

FAMILY = Flux2Klein("")


@pytest.mark.parametrize(
    ("source", "area", "expected"),
    [
        (Size(100, 130), 1024 * 1024, Size(96, 128)),  # the stock pipeline would crop it to that
        (Size(1024, 1024), 1024 * 1024, Size(1024, 1024)),
        (Size(2048, 1000), 1024 * 1024, Size(1456, 704)),
        (Size(2048, 1000), 512 * 512, Size(720, 352)),
        (Size(20, 300), 1024 * 1024, Size(64, 288)),  # sides under 64 are refused there
    ],
)
def test_references_have_the_size_to_which_the_stock_pipeline_crops_them(
    source: Size, area: int, expected: Size
) -> None:
    assert FAMILY.control_sizes(Size(512, 512), [source], {"control_area": area}).vae == (expected,)
    assert FAMILY.control_sizes(Size(512, 256), [source], {"control_area": area}, [True]).vae == (Size(512, 256),)


def test_positions_are_those_of_the_stock_pipeline() -> None:
    grids = [(1, 4, 6), (1, 3, 3), (1, 5, 2)]
    target, *references = (torch.zeros(1, 1, rows, columns) for _, rows, columns in grids)
    stock = [Flux2KleinPipeline._prepare_latent_ids(target)[0], Flux2KleinPipeline._prepare_image_ids(references)[0]]
    assert torch.equal(FAMILY.image_ids(grids), torch.cat(stock)) and FAMILY.image_ids(grids).dtype == torch.int64
    assert torch.equal(FAMILY.text_ids(7), Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 7, 1))[0])


@pytest.mark.parametrize("steps", [None, 4, 28])
@pytest.mark.parametrize("tokens", [1, 256, 1024, 4096, 4300, 4301, 6000, 16384])
def test_the_shift_is_that_of_the_stock_pipeline(tokens: int, steps: int | None) -> None:
    stock = inspect.signature(Flux2KleinPipeline.__call__).parameters["num_inference_steps"].default
    expected = math.exp(compute_empirical_mu(tokens, steps or stock))
    assert resolution_shift(tokens, FAMILY.flow_shift(steps)) == pytest.approx(expected, rel=1e-12)


def test_an_area_for_the_text_encoder_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.resize\.control\.text_area: FLUX\.2 shows its text encoder no images"):
        FAMILY.control_areas(4096, 4096)


SHAPES = {Flux2Klein: (5, 20, 3.9, 7680), Flux2Dev: (8, 48, 32.2, 15360)}
BOTH = pytest.mark.parametrize("kind", SHAPES)


@BOTH
def test_the_shape_of_the_stock_base_is_known_without_a_file(kind: type[Flux2Klein]) -> None:
    family = load_family("flux2", kind.stock_bases[0], synthetic=True)
    double, single, billions, text_width = SHAPES[kind]
    model = family.transformer_skeleton()
    assert type(family) is kind
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (double, single)
    assert round(model.num_parameters() / 1e9, 1) == billions
    assert family.token_widths() == (128, text_width) and family.pixels_per_token() == 16


@BOTH
def test_every_preset_names_layers_that_there_are(kind: type[Flux2Klein]) -> None:
    model = load_family(None, kind.stock_bases[0], synthetic=True).transformer_skeleton()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]

    def covered(patterns: tuple[str, ...]) -> list[str]:
        return [name for name in linear if any(name == p or name.endswith(f".{p}") for p in patterns)]

    assert all(covered((pattern,)) for patterns in kind.lora_presets.values() for pattern in patterns)
    assert covered(kind.lora_presets["all"]) == linear


def test_a_distilled_klein_is_named(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for distilled in (True, False):
        index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
        (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        family_of(load_config(small_run, [f"model.pretrained_model_name_or_path={tmp_path}"]))
        line = f"model     {tmp_path} is distilled: train on its -base; the LoRA works on this one too"
        assert capsys.readouterr().out.splitlines() == ([line] if distilled else [])


def test_devs_encoder_fingerprint_holds_how_its_text_encoder_attends(
    base_of: Callable[[FamilyCase], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of padding change with it, and those of words do not."""
    family = Flux2Dev(str(base_of(EVERY_CASE["flux2_dev"])))
    encoders = family.load_encoders(dtype=torch.float32, device="cpu")
    assert family.encoding_environment() == encoders.text_encoder.config._attn_implementation
    own = family.encode_prompt(encoders, controls=[], prompt=PROMPTS[0], sizes=ControlSizes()).tokens
    encoders.text_encoder.set_attn_implementation("eager")
    other = family.encode_prompt(encoders, controls=[], prompt=PROMPTS[0], sizes=ControlSizes()).tokens
    difference = (other - own).abs().amax(1)
    assert difference[0] > 0.1 and difference[-1] < 1e-6
    before = family.encoder_fingerprint()
    monkeypatch.setattr(Flux2Dev, "encoding_environment", lambda _: "eager")
    assert family.encoder_fingerprint() != before


def test_no_prompt_of_the_stated_length_is_cut(base_of: Callable[[FamilyCase], Path]) -> None:
    for name in ("flux2_klein", "flux2_dev"):
        family = EVERY_CASE[name].at(base_of(EVERY_CASE[name]))
        prompt = "q" * family.max_prompt_tokens  # a token each
        assert family.over_long([prompt]) == {} and len(family.over_long([f"{prompt}q"])[f"{prompt}q"][1]) == len(
            prompt
        )
        encoders, sizes = family.load_encoders(dtype=torch.float32, device="cpu"), ControlSizes()
        ends = [
            family.encode_prompt(encoders, controls=[], prompt=f"{prompt[1:]}{c}", sizes=sizes).tokens for c in "qz"
        ]
        assert not torch.equal(*ends), name
