"""The verb `export`: what a run has trained, as files for diffusers, ComfyUI and LyCORIS.

Promise: result, base, format and place are checked before anything is written. Files are whole or absent, and nothing
that exists is overwritten. The merged weight of a layer is the one that layer and adapter together compute with, worked
out in float32 (float64 over a float64 base) and rounded once, to the base's precision; every other tensor keeps its
bits. ComfyUI applies a LoRA at the strength at which it was trained. Cost: the LoRA in memory; to merge, the base read
once and written once, with one tensor in memory. A killed export leaves a folder `.tmp-export-...`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel
from safetensors import safe_open
from torch import Tensor

from mixres import atomic
from mixres.config.load import load_run_config
from mixres.config.schema import LYCORIS
from mixres.console import log
from mixres.data.records import printable
from mixres.errors import UserError, WorkError
from mixres.inference.artifact import TRANSFORMER, RunResult, find_base, find_result, renamed
from mixres.inference.card import CARD, UNNAMED, Card, CardOptions, run_folder
from mixres.inference.options import options
from mixres.inference.push import push
from mixres.models.family import Family
from mixres.models.hub import pipeline_folder
from mixres.models.lora import add_lora, trainable_parameters
from mixres.models.lora_file import (
    FILE_NAME,
    MAGNITUDE,
    RECIPE_FILE,
    RECIPE_KEY,
    Adapters,
    LoraHeader,
    header_of,
    layer_tensors,
    lora_file,
    weight_change,
    with_recipe,
)
from mixres.models.registry import load_family
from mixres.models.tensor_files import CONFIG, INDEX, ModelFiles, read_model_files, write_tensors
from mixres.preprocessing.training_data import check_folder
from mixres.training.checkpoint import MANIFEST, Checkpoint, problem_of
from mixres.training.setup import recipe

_SUFFIX = ".safetensors"
_KEY = "RUN"
_UNQUANTISED = ("F64", "F32", "F16", "BF16")

_USE = {  # by format and whether it is merged
    ("diffusers", False): "pipeline.load_lora_weights({out!r})",
    ("diffusers", True): "load {out!r} by from_pretrained, as the pipeline's transformer",
    ("lycoris", False): "lycoris.create_lycoris_from_weights(1.0, {out!r}, transformer)",
    ("comfyui", False): "put it in ComfyUI/models/loras",
    ("comfyui", True): "put it in ComfyUI/models/diffusion_models",
}


@dataclass(frozen=True)
class Request:
    """All that `export` needs."""

    result: RunResult
    lora: bytes  # in diffusers' format; empty where all weights were trained
    model: ModelFiles | None  # what the LoRA is merged into; None: it alone is written
    format: str
    out: Path
    card: Card | None = None  # of the folder that is written in place of a file
    written: bool = False  # that folder is there already, and is uploaded as it is


class _Options(BaseModel):
    run: str
    format: Literal["diffusers", "comfyui", "lycoris"]
    out: Path
    merge: bool = False
    base: str | None = None


# What is asked for.


def make_request(**given: Any) -> Request:
    """The options of the command line by name.

    Raises:
        UserError: the first that is wrong.
    """
    if given.get("card"):
        return _card_request(given)
    if idle := sorted(CardOptions.model_fields.keys() - _Options.model_fields.keys() & given.keys()):
        raise UserError([f"--{name.replace('_', '-')}: is for --card: add that, or leave this out" for name in idle])
    asked = options(_Options, given, run=_KEY)
    result, lora = _find_source(Path(asked.run).expanduser())
    diffusers, merge = asked.format == "diffusers", asked.merge
    if result.lora:
        _check_format(result.lora, asked.format, merge=merge)
    if asked.base is not None and not (merge and result.lora):
        raise UserError("--base: has no effect where no LoRA is merged into it: leave it out")
    if result.lora and result.lora.use_dora and not diffusers and not merge:
        use = "add --merge" if result.family.comfyui_reads_layout else "write --format diffusers"
        raise UserError(f"--format: ComfyUI does not apply the DoRA {result.path} as it was trained: {use}")
    if not result.lora and (asked.format != "comfyui" or not merge):
        use = "copy it, or write --format comfyui --merge" if result.family.comfyui_reads_layout else "copy it"
        raise UserError(f"{_KEY}: {result.path} holds all weights, in diffusers' format already: {use}")
    if merge and not diffusers and not result.family.comfyui_reads_layout:
        fix = "leave it out" if result.lora else "load the folder in diffusers"
        raise UserError(f"--merge: ComfyUI does not load a whole {result.family.name} in diffusers' layout: {fix}")
    model = _find_model(result, asked.base) if merge else None
    out = asked.out.expanduser()
    needed = sum(tensor.nbytes for tensor in model.tensors.values()) if model else len(lora)
    _check_out(out, needed, suffix="" if diffusers and merge else _SUFFIX)
    return Request(result, lora, model, asked.format, out)


def _card_request(given: Mapping[str, Any]) -> Request:
    if idle := sorted({"format", "merge"} & given.keys()):
        fixed = "--card writes the LoRA for diffusers and for ComfyUI: leave it out"
        raise UserError([f"--{name}: has no effect, {fixed}" for name in idle])
    asked = options(CardOptions, given, run=_KEY)
    if asked.private and not asked.push:
        raise UserError("--private: is for --push ORG/NAME: add that, or leave this out")
    path, out = Path(asked.run).expanduser(), asked.out.expanduser()
    result, lora = _find_source(path)
    if not result.lora:
        raise UserError(f"{_KEY}: {result.path} holds all weights, and a card is written for a LoRA: upload it by hand")
    card = Card(asked, result, run_folder(path, result))
    lora = with_recipe(lora, card.recipe)
    own = [(out / FILE_NAME).read_bytes()] if (out / FILE_NAME).is_file() and (out / CARD).is_file() else []
    written = asked.push is not None and own == [lora]  # perhaps by the same command, and perhaps edited since
    if not written:
        _check_out(out, 2 * len(lora), suffix="")
    return Request(result, lora, None, "diffusers", out, card, written)


def _check_format(lora: LoraHeader, form: str, *, merge: bool) -> None:
    """That the format has a place for adapters of this kind."""
    if lora.adapter in LYCORIS and form == "diffusers" and not merge:
        what = f"--format: not all pipelines of diffusers load the {lora.adapter} {lora.path}"
        raise UserError(f"{what}: add --merge, or write --format lycoris")
    if form == "lycoris" and (merge or lora.adapter not in LYCORIS):
        what = "merged weights have" if merge else f"{lora.path} is a {lora.adapter}, which has"
        raise UserError(f"--format: {what} no format of LyCORIS: write diffusers or comfyui")


def _find_source(path: Path) -> tuple[RunResult, bytes]:
    """What was trained, and its LoRA file."""
    if not (path / MANIFEST).is_file():
        result = find_result(str(path), _KEY)
        return result, result.path.read_bytes() if result.lora else b""
    if problem := problem_of(path):
        raise UserError(f"{_KEY}: {path} is damaged ({problem}): name another checkpoint")
    config = load_run_config(path.resolve().parents[1])
    model = config.model
    if model.lora is None:
        raise UserError(f"{_KEY}: {path} is of a run that trains all weights: name its result")
    family = load_family(model.family, model.pretrained_model_name_or_path, revision=model.revision)
    checkpoint, skeleton = Checkpoint(path), family.transformer_skeleton()
    add_lora(
        skeleton,
        **(model.adapter_settings() | {"pretrained_weight": None}),
        untrained=family.untrained_modules(skeleton),
        seed=config.train.seed,
        presets=family.lora_presets,
    )
    weights = checkpoint.tensors("trainable")
    expected = {name: parameter.shape for name, parameter in trainable_parameters(skeleton).items()}
    if expected != {name: weight.shape for name, weight in weights.items()}:
        raise UserError(f"{_KEY}: {path} does not fit the config.yaml of its run: export the run's result")
    stated = recipe(config, family, checkpoint.step)
    return RunResult(path, header_of(skeleton, path, stated), stated), lora_file(weights, skeleton, stated)


def _find_model(result: RunResult, base: str | None) -> ModelFiles:
    """The transformer that is written: the trained one, or the base that fits the adapters."""
    if result.lora is None:
        return read_model_files(result.path, _KEY, _UNQUANTISED)
    family = find_base(result, base, "--base")
    with renamed("--base"):
        folder = pipeline_folder(family.path, (TRANSFORMER,), revision=family.revision) / TRANSFORMER
    model = read_model_files(folder, "--base", _UNQUANTISED)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}
    if any(shapes.get(f"{layer}.weight") != sides[::-1] for layer, sides in result.lora.layers.items()):
        raise UserError(f"--base: the weights in {folder} do not fit its {CONFIG}: download it again")
    return model


def _check_out(out: Path, needed: int, *, suffix: str) -> None:
    if (out.suffix == _SUFFIX) != (suffix == _SUFFIX):
        kind = f"a file whose name ends in {_SUFFIX}" if suffix else f"a folder, whose name does not end in {_SUFFIX}"
        raise UserError(f"--out: {printable(out)} should be {kind}: rename it")
    if os.path.lexists(out):
        raise UserError(f"--out: {printable(out)} exists and is not overwritten: choose another name, or remove it")
    check_folder(out.parent, key="--out")
    there = next(path for path in out.absolute().parents if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise UserError(f"--out: {printable(there)} has {free:,} bytes free and {needed:,} are needed: make room")


# What is written.


def export(request: Request) -> None:
    """Write what was asked for.

    Raises:
        WorkError: something has come to be in its place.
        OSError: the disk is full, or cannot be written. Nothing is left then.
    """
    result, model, out = request.result, request.model, request.out
    log(f"source    {result.path}, step {result.recipe.get('step')}")
    if request.card:
        _write_card(request, request.card)
        return
    adapters = layer_tensors(result.lora, request.lora) if result.lora else {}
    with placed(out) as partial:
        if model:
            _write_merged(partial, request, model, adapters)
        else:
            _write_lora(partial, request.format, request, result.recipe)
    log(f"result    {out}")
    log(f"use       {_USE[request.format, model is not None].format(out=str(out))}")
    rule, how = result.recipe.get("target_size"), result.family.comfyui_controls
    if request.format == "comfyui" and how and rule:
        limit = f"at most {rule['max_pixels']} pixels, sides multiples of {rule['multiple_of']}"
        log(f"          scale the image to edit as in training ({limit}; mixres sample logs the size)")
        log(f"          {how}; give the sampler an empty latent of that size")


def _write_card(request: Request, card: Card) -> None:
    out, asked = request.out, card.asked
    if request.written:
        log(f"card      {out} is there already with this LoRA: it is uploaded as it is")
    else:
        with placed(out) as partial:
            partial.mkdir()
            for form, name in card.names.items():
                _write_lora(partial / name, form, request, card.recipe)
            card.write(partial)
        log(f"result    {out}: look at {CARD} before you upload it")
        if card.base == UNNAMED:
            log("          the card names no base, for it was a folder: --base ORG/NAME names it")
    if asked.push:
        push(out, asked.push, private=asked.private)


def _write_lora(path: Path, form: str, request: Request, stated: Mapping[str, Any]) -> None:
    lora = request.result.lora
    if lora and form == "comfyui":
        tensors = comfyui_tensors(layer_tensors(lora, request.lora), lora.lora_alpha, request.result.family)
        write_tensors(path, tensors, tensors.__getitem__, _metadata(stated), shown=True)
    else:
        atomic.write_bytes(path, request.lora)


def _write_merged(partial: Path, request: Request, model: ModelFiles, adapters: Adapters) -> None:
    """The transformer with the adapters merged into it: as many files as it had, or one for ComfyUI."""
    result, alpha = request.result, request.result.lora.lora_alpha if request.result.lora else 0.0
    stated = {**result.recipe, "merged": True} if adapters else result.recipe
    file_of = {name: model.folder / file for file, part in model.files.items() for name in part}
    markers = result.family.comfyui_markers(model.config) if request.format == "comfyui" else {}

    def merged(name: str) -> Tensor:
        if name in markers:
            return markers[name]
        with safe_open(file_of[name], "pt") as file:
            weight: Tensor = file.get_tensor(name)
        adapter = adapters.get(name.removesuffix(".weight"))
        return merged_weight(weight, adapter, alpha=alpha).to(weight.dtype) if adapter else weight

    if request.format == "comfyui":
        write_tensors(partial, model.tensors | markers, merged, _metadata(stated), shown=True)
    else:
        partial.mkdir()
        for name, part in model.files.items():
            write_tensors(partial / name, part, merged, _metadata(stated), shown=True)
        for name in (CONFIG, INDEX):
            if (model.folder / name).is_file():
                atomic.write_bytes(partial / name, (model.folder / name).read_bytes())
        atomic.write_json(partial / RECIPE_FILE, stated)


def _metadata(stated: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", RECIPE_KEY: json.dumps(stated, sort_keys=True)}


def merged_weight(weight: Tensor, adapter: Mapping[str, Tensor], *, alpha: float) -> Tensor:
    """`(outputs, inputs)`: the layer's weight with the adapter in it, in float32 or better.

    Source: `weight_change`; for DoRA, Liu et al. 2024 (arXiv 2402.09353), equation 5, with the rows of diffusers'
    weights for the paper's columns: m (W + alpha/r B A) / |W + alpha/r B A|.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.to(wide) + weight_change({part: tensor.to(wide) for part, tensor in adapter.items()}, alpha)
    magnitude = adapter.get(MAGNITUDE)
    if magnitude is None:
        return exact
    lengths = torch.linalg.vector_norm(exact, dim=1)
    return exact.mul(magnitude.to(wide).div(lengths).unsqueeze(1))


def comfyui_tensors(adapters: Adapters, alpha: float, family: Family) -> dict[str, Tensor]:
    """The tensors of adapters (no DoRA) by the names that ComfyUI's loader looks for; diffusers reads a LoRA too.

    Without `.alpha` both take alpha / r for 1, and ComfyUI also where a LoKr has two whole factors. A layer that
    ComfyUI knows by another name is there under both names: each program leaves out what it does not know. Source
    (read, nothing copied): Comfy-Org/ComfyUI, comfy/lora.py at 17358c8f73b5 (`load_lora`), in comfy/weight_adapter
    lora.py at 6f98b150e065, lokr.py at 2bffe2f4ce57, and loha.py at 17adbb5cacc2 (comfyanonymous/ComfyUI).
    """
    number = torch.tensor(alpha, dtype=torch.float32)  # which all programs read
    tensors: dict[str, Tensor] = {}
    for layer, adapter in adapters.items():
        assert MAGNITUDE not in adapter, layer
        parts = dict(adapter)
        if "lora_B.weight" in parts and not family.comfyui_alpha:
            parts["lora_B.weight"] = parts["lora_B.weight"] * (alpha / len(parts["lora_A.weight"]))
        else:
            parts.setdefault("alpha", number)
        names = [f"{family.comfyui_prefix}.{layer}", *filter(None, [family.comfyui_names.get(layer)])]
        tensors |= {f"{name}.{part}": tensor for name in names for part, tensor in parts.items()}
    return tensors


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which gets the name `out` in the end.

    Raises:
        WorkError: something has come to be there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{atomic.TMP_PREFIX}export-", dir=out.parent) as folder:
        partial = Path(folder) / "out"
        yield partial
        if os.path.lexists(out):
            raise WorkError(f"{out} has come to be while this was written, and is left as it is: name another")
        partial.rename(out)
        atomic.sync_directory(out.parent)
