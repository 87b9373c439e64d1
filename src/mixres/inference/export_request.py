"""What `mixres export` is asked for, or all that is wrong with it.

Promise: what was trained, its base, the format and the place are checked together, before anything is written. Cost:
the LoRA, or the checkpoint that holds it, read once; to merge, the headers of the base.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mixres.config.load import load_config
from mixres.data.records import printable
from mixres.errors import UserError
from mixres.inference.artifact import RunResult, find_base, find_result
from mixres.inference.merge import Adapter, ModelFiles, adapters_of, read_model_files
from mixres.models.hub import pipeline_folder
from mixres.models.lora import add_lora, trainable_parameters
from mixres.models.lora_file import FILE_NAME, LoraHeader, lora_file
from mixres.models.registry import load_family
from mixres.training.checkpoint import MANIFEST, Checkpoint, problem_of
from mixres.training.setup import recipe

FORMATS = ("diffusers", "comfyui")
TRANSFORMER = "transformer"
_SUFFIX = ".safetensors"
_KEY = "RUN"
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"
_HEADROOM = 2**24  # bytes beside the tensors: headers, JSON
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """All that `export` needs."""

    source: Path
    recipe: Mapping[str, Any]
    format: str  # one of FORMATS
    out: Path
    lora: bytes | None  # in diffusers' format; None where all weights were trained
    adapters: Mapping[str, Adapter]
    model: ModelFiles | None  # what the adapters are folded into; None: they alone are written


def make_request(
    *,
    run: str | None = None,
    format: str | None = None,
    merge: bool = False,
    out: str | None = None,
    base: str | None = None,
) -> Request:
    """The arguments of the command line, as text.

    Raises:
        UserError: one line for every problem of all of them.
    """
    problems = list(_argument_problems(run, format, out))

    def tried(make: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return make(*arguments)
        except UserError as error:
            problems.extend(error.messages)
            return None

    found = tried(_source, run) if run else None
    result, lora = found or (None, None)
    model = None
    if result:
        problems += _format_problems(result, format, merge, base)
        model = tried(_model, result, base) if merge else None
    path = Path(out or ".").expanduser()
    if out and format in FORMATS:
        needed = model.nbytes if model else len(lora or b"")
        problems += _out_problems(path, needed, folder=format == "diffusers" and merge)
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    assert result and format
    adapters = adapters_of(result.lora, lora) if result.lora and lora else {}
    stated = {**result.recipe, "merged": True} if model and adapters else result.recipe
    return Request(result.path, stated, format, path, lora, adapters, model)


def _argument_problems(run: str | None, format: str | None, out: str | None) -> Iterator[str]:
    if run is None:
        yield f"{_KEY}: not given; write export RUN, a run folder, one of its checkpoints, or a .safetensors file"
    if format not in FORMATS:
        given = "not given; write" if format is None else f"given {format}, allowed:"
        yield f"--format: {given} one of {', '.join(FORMATS)}"
    if out is None:
        yield "--out: not given; write --out FILE, which ends in .safetensors (a folder for diffusers with --merge)"


def _format_problems(result: RunResult, format: str | None, merge: bool, base: str | None) -> Iterator[str]:
    """What cannot be made of this result."""
    if base is not None and not (merge and result.lora):
        yield "--base: has no effect where no LoRA is merged into it: leave it out"
    if result.lora and result.lora.use_dora and format == "comfyui" and not merge:
        yield f"--format: ComfyUI does not apply a DoRA as it was trained, and {result.path} is one: add --merge"
    if not result.lora and format == "diffusers":
        yield f"{_KEY}: {result.path} holds all weights in diffusers' format as it is: copy it"
    if not result.lora and format == "comfyui" and not merge:
        yield f"--merge: not given, and {result.path} holds all weights and no LoRA: add it"


def _source(run: str) -> tuple[RunResult, bytes | None]:
    """What was trained, and its LoRA file."""
    path = Path(run).expanduser()
    if (path / MANIFEST).is_file():
        return _of_checkpoint(path)
    try:
        result = find_result(run, _KEY)
    except UserError:
        checkpoints = sorted((path / "checkpoints").glob(f"step-*/{MANIFEST}"))
        if not checkpoints or any((path / name).exists() for name in (FILE_NAME, TRANSFORMER)):
            raise
        raise UserError(
            f"{_KEY}: {path} has no result yet: let its run end, or name its newest checkpoint {checkpoints[-1].parent}"
        ) from None
    return result, result.path.read_bytes() if result.lora else None


def _of_checkpoint(path: Path) -> tuple[RunResult, bytes]:
    """The LoRA as it was at a checkpoint: the file that the run would have ended with there."""
    if problem := problem_of(path):
        raise UserError(f"{_KEY}: {path} is damaged ({problem}): name another checkpoint")
    config = load_config(path.resolve().parents[1] / "config.yaml")
    lora, model = config.model.lora, config.model
    if lora is None:
        raise UserError(f"{_KEY}: {path} is of a run that trains all weights: name its result")
    family = load_family(model.family, model.pretrained_model_name_or_path, revision=model.revision)
    checkpoint = Checkpoint(path)
    skeleton = family.transformer_skeleton()
    settings = lora.model_dump(exclude={"pretrained_weight"})
    add_lora(
        skeleton,
        **settings,
        untrained=family.untrained_modules(skeleton),
        seed=config.train.seed,
        presets=family.lora_presets,
    )
    weights = checkpoint.tensors("trainable")
    expected = {name: tuple(parameter.shape) for name, parameter in trainable_parameters(skeleton).items()}
    if expected != checkpoint.shapes("trainable"):
        raise UserError(f"{_KEY}: {path} does not fit the config.yaml of its run: export the run's result")
    stated = recipe(config, family, checkpoint.step)
    names = [name.removesuffix(_DOWN) for name in weights if name.endswith(_DOWN)]
    layers = {name: (weights[name + _DOWN].shape[1], weights[name + _UP].shape[0]) for name in names}
    header = LoraHeader(path, lora.r, lora.lora_alpha, lora.use_dora, layers, stated)
    return RunResult(path, header, stated), lora_file(weights, skeleton, stated)


def _model(result: RunResult, base: str | None) -> ModelFiles:
    """The transformer that is written whole: the trained one, or the base that fits the adapters."""
    try:
        if result.lora is None:
            return read_model_files(result.path)
        found = find_base(result, base, "--base")
        folder = pipeline_folder(found.path, (TRANSFORMER,), revision=found.revision)
        model = read_model_files(folder / TRANSFORMER)
    except UserError as error:
        raise UserError([m if m.startswith("--") else f"--base: {m}; name another" for m in error.messages]) from error
    for layer, (inputs, outputs) in result.lora.layers.items():
        entry = model.entries.get(f"{layer}.weight")
        if entry is None or entry.shape != (outputs, inputs):
            raise UserError(f"--base: {model.folder} lacks {layer} of {outputs} x {inputs}: name the base")
    return model


def _out_problems(out: Path, needed: int, *, folder: bool) -> Iterator[str]:
    shown = printable(out)
    if folder and out.suffix == _SUFFIX:
        yield f"--out: {shown} is to be a folder, the merged transformer/ in diffusers' format: leave {_SUFFIX} out"
    if not folder and out.suffix != _SUFFIX:
        yield f"--out: {shown} is to be a file: let its name end in {_SUFFIX}"
    if out.exists() or out.is_symlink():
        yield f"--out: {shown} is there and would be written over: choose another name, or take it away"
    there = next((path for path in out.absolute().parents if path.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"--out: {printable(there)} cannot be written: choose another folder"
    elif (free := shutil.disk_usage(there).free) < needed + _HEADROOM:
        yield f"--out: {printable(there)} has {free:,} bytes free and {needed + _HEADROOM:,} are needed: make room"
