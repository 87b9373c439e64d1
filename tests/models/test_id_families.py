"""FLUX.1 and FLUX.2: planted problems of a batch are seen, and both exports of a LoRA are applied as trained."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttnProcessor
from safetensors.torch import load_file
from torch import Tensor

from mixres.batch import Sample
from mixres.data.collate import collate
from mixres.errors import UserError
from mixres.geometry import Grid, token_count
from mixres.inference import export
from mixres.models import position_ids
from mixres.models.id_family import IdFamily
from mixres.models.lora import add_lora, fill_adapters, trainable_parameters
from mixres.models.lora_file import lora_file
from support.family_cases import EVERY_CASE, FamilyCase

STOCK_PROCESSORS = {"flux_kontext": FluxAttnProcessor, "flux2_dev": Flux2ParallelSelfAttnProcessor}
SIGMAS = torch.tensor([0.9, 0.2, 0.5])
GRIDS = [(Grid(1, 4, 6), Grid(1, 5, 4)), (Grid(1, 6, 4),), (Grid(1, 3, 8), Grid(1, 4, 5))]


@pytest.fixture(scope="module", params=STOCK_PROCESSORS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def case(name: str) -> FamilyCase:
    return EVERY_CASE[name]


@pytest.fixture(scope="module")
def family(case: FamilyCase, base_of: Callable[[Any], Path]) -> Any:
    return case.at(base_of(case))


@pytest.fixture(scope="module")
def model(family: Any) -> Any:
    return family.load_transformer(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def samples(family: Any) -> list[Sample]:
    """With references of other sizes, and texts of other lengths."""
    draw, (channels, width) = torch.Generator().manual_seed(5), family.token_widths()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    pooled = family.pooled_width()
    return [
        Sample(str(n), randn(each[0].tokens, channels), tuple(randn(g.tokens, channels) for g in each[1:]),
               randn(9 + n, width), each, pooled_embeds=randn(pooled) if pooled else None)
        for n, each in enumerate(GRIDS)
    ]  # fmt: skip


def predicted(family: IdFamily, model: Any, layout: Any, chosen: list[Sample]) -> Tensor:
    numbers = [int(sample.name) for sample in chosen]
    batch = collate(chosen, indices=numbers, weights=[1.0] * len(chosen), layout=layout)
    return family.predict_velocity(model, batch, batch.latents, SIGMAS[numbers], 1 + 3 * SIGMAS[numbers])


@torch.no_grad()
def velocities(family: IdFamily, model: Any, layout: str, chosen: list[Sample]) -> list[Tensor]:
    found = predicted(family, model, layout, chosen)
    lengths = [token_count(sample.img_shapes) for sample in chosen]
    rows = found[:, 0].split(lengths) if layout == "packed" else found
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_measure_sees_planted_problems(
    name: str, family: Any, model: Any, samples: list[Sample], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [velocities(family, model, "padded", [sample])[0] for sample in samples]
    assert max(errors(velocities(family, model, layout, samples), alone)) < 1e-6
    first, own_ids = samples[0].img_shapes[0], type(family).image_ids

    def ids_of_sample_0(self: Any, grids: Any) -> Tensor:
        count = token_count(grids)
        return own_ids(self, [Grid(1, count, first.columns)])[:count]

    with monkeypatch.context() as planted:
        planted.setattr(type(family), "image_ids", ids_of_sample_0)
        assert min(errors(velocities(family, model, layout, samples), alone)[1:]) > 1e-3
    if family.pooled_width():
        pooled_of_sample_0 = [replace(sample, pooled_embeds=samples[0].pooled_embeds) for sample in samples]
        assert min(errors(velocities(family, model, layout, pooled_of_sample_0), alone)[1:]) > 1e-3
    if layout == "padded":
        with monkeypatch.context() as planted:
            planted.setattr(position_ids, "joint_mask", lambda *_: None)
            assert min(errors(velocities(family, model, layout, samples), alone)[:2]) > 1e-3  # the others are padded
    with monkeypatch.context() as planted:
        planted.setattr(model.single_transformer_blocks[-1].attn, "processor", STOCK_PROCESSORS[name]())
        with pytest.raises(ValueError, match="needs the whole patch"):
            velocities(family, model, layout, samples)


def test_the_linear_layers_of_the_blocks_and_nothing_else_are_quantised(family: Any, samples: list[Sample]) -> None:
    """FLUX.1's single-stream blocks and the transformer have a `proj_out` each. A batch is still its samples alone."""
    model = family.load_transformer(dtype=torch.float32, device="cpu", quantize="int8")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (type(module.weight) is torch.nn.Parameter) is ("transformer_blocks." not in name), name
    alone = [velocities(family, model, "padded", [sample])[0] for sample in samples]
    for layout in ("padded", "packed"):
        assert max(errors(velocities(family, model, layout, samples), alone)) < 1e-5


def test_the_measure_sees_padding_in_the_loss(family: Any, model: Any, samples: list[Sample]) -> None:
    weight = model.proj_out.weight.requires_grad_(True)

    def gradient(chosen: list[list[Sample]], *, padding: bool) -> Tensor:
        losses = []
        for batch in chosen:
            rows = predicted(family, model, "padded", batch)
            lengths = [rows.shape[1] if padding else sample.img_shapes[0].tokens for sample in batch]
            losses += [row[:length].square().mean() for row, length in zip(rows, lengths, strict=True)]
        return torch.autograd.grad(torch.stack(losses).sum(), weight)[0]

    alone = gradient([[sample] for sample in samples], padding=False)
    assert errors([gradient([samples], padding=False)], [alone])[0] < 1e-5
    assert errors([gradient([samples], padding=True)], [alone])[0] > 1e-2


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_every_export_is_applied_as_trained(
    case: FamilyCase, family: Any, model: Any, samples: list[Sample], use_dora: bool, tmp_path: Path
) -> None:
    """By diffusers, adapters and merged weights. ComfyUI reads the names of some; alpha is not r."""
    trained = family.load_transformer(dtype=torch.float32, device="cpu")
    kind = {"r": 2, "lora_alpha": 6, "lora_dropout": 0, "use_dora": use_dora, "presets": family.lora_presets}
    add_lora(trained, **kind, target_modules=["all"], untrained=(), seed=0)
    fill_adapters(trainable_parameters(trained), seed=0)
    recipe = {"format": 1, "family": family.name, "base": family.path, "control_area": 1024 * 1024}
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(lora_file(trainable_parameters(trained), trained, recipe))
    expected = velocities(family, trained, "packed", samples)
    assert min(errors(velocities(family, model, "packed", samples), expected)) > 1e-3

    def exported(form: str, *, merge: bool = False) -> Path:
        out = tmp_path / (form if merge and form == "diffusers" else f"{form} {merge}.safetensors")
        export.export(export.make_request(run=str(lora), format=form, out=str(out), merge=merge))
        return out

    merged = exported("diffusers", merge=True)
    whole = family.load_transformer(trained=merged, dtype=torch.float32, device="cpu")
    assert max(errors(velocities(family, whole, "packed", samples), expected)) < 1e-5
    if family.comfyui_reads_layout:
        single, weights = load_file(exported("comfyui", merge=True)), load_file(next(merged.glob("*.safetensors")))
        assert single.keys() == weights.keys() and all(torch.equal(single[name], weights[name]) for name in weights)
    else:
        with pytest.raises(UserError, match=r"^--merge: ComfyUI does not load a whole flux2 .*: leave it out$"):
            exported("comfyui", merge=True)
    for form in ("diffusers",) if use_dora else ("diffusers", "comfyui"):
        out = exported(form)
        stock: Any = case.load_stock(Path(family.path), torch.float32)
        stock.load_lora_weights(out)
        family.patch(stock.transformer)
        assert max(errors(velocities(family, stock.transformer, "packed", samples), expected)) < 2e-6, form
    if use_dora:
        fix = "add --merge" if family.comfyui_reads_layout else "write --format diffusers"
        with pytest.raises(UserError, match=rf"^--format: ComfyUI does not apply the DoRA .*: {fix}$"):
            exported("comfyui")
        return
    # Every layer under a name that ComfyUI looks up, with the same sum B A: it takes alpha / r for 1.
    stored, given = load_file(out), load_file(lora)
    assert not any(tensor.endswith(".alpha") for tensor in stored)
    for tensor in given:
        if layer := re.fullmatch(r"transformer\.(.*)\.lora_A\.weight", tensor):
            names = [f"transformer.{layer[1]}", *filter(None, [family.comfyui_names.get(layer[1])])]
            for known in names:
                down, up = (stored.pop(f"{known}.lora_{side}.weight") for side in "AB")
                torch.testing.assert_close(up @ down, 3 * given[tensor.replace("_A.", "_B.")] @ given[tensor])
    assert not stored
