"""The verb `sample`: images from what a run has trained, through the stock pipeline of its base.

Promise: options, prompts, control images, the trained weights and their base are checked before any weight is read;
every bad line of a prompts file is reported at once. The images are those of a process without mixres, for the same
base, LoRA, controls, prompt and seed, over the base quantised as under the LoRA in training. Each PNG records its
settings. Cost: one decode of each control; the text encoder once a prompt with its controls and size, then released;
then the denoising loop once an image, twice with `compare` or guidance, four times with both. Embeddings wait in
memory, 10 MB a prompt for Qwen-Image-Edit.

Lines of a prompts file have the keys of a data manifest (`prompt`, `path_control`, `path_control_1`, ...), so that a
manifest of held-out data can be given as it is: its targets and masks are not opened. `seed` and `size` may be added.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from mixres import __version__
from mixres.batch import TextEmbeds
from mixres.config.schema import SampleConfig
from mixres.console import counted, log
from mixres.data.images import WHITE, BadImageError, Limits, check_size, inspect_image, read_image
from mixres.data.manifest import BadRowError, control_keys, file_below, json_rows, key_problems
from mixres.data.records import check_caption, printable
from mixres.errors import Problems, UserError, WorkError
from mixres.geometry import Size, target_size
from mixres.inference.artifact import RunResult, find_base, find_quantization, find_result, renamed
from mixres.inference.options import options, validated
from mixres.models import hub
from mixres.models.family import ControlSizes, Family
from mixres.models.quantize import Method
from mixres.preprocessing.fill import release
from mixres.preprocessing.training_data import check_folder
from mixres.training.distributed import dist_env
from mixres.training.sample_sheets import Row, image_grid, save_png

_LIMITS = Limits()
_GRID_ROWS = 12
_NUMBERED = re.compile(r"(?:compare-)?(\d{4,})(?:-without)?\.png")  # all that `sample` writes


def _checked_prompt(text: str) -> str:
    if not (prompt := check_caption(text)):
        raise ValueError("the prompt is empty; write one")
    return prompt


def _checked_negative(text: str) -> str:
    check_caption(text)
    return text  # with its white space: the default is a blank


def _parsed_size(text: Any) -> Size:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text) if isinstance(text, str) else None
    if not match:
        raise ValueError(f"given {text}, should be WIDTHxHEIGHT in pixels, such as 1024x768")
    size = Size(int(match[1]), int(match[2]))
    check_size(size, _LIMITS)
    return size


_Prompt = Annotated[str, AfterValidator(_checked_prompt)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Size = Annotated[Size, PlainValidator(_parsed_size)]


class Options(BaseModel):
    """Those of the command line, whose help explains them."""

    lora: str
    out: Path
    image: list[str] = []
    prompt: _Prompt | None = None
    prompts: Path | None = None
    size: _Size | None = None
    restore_size: bool = False
    steps: Annotated[int, Field(ge=2, le=1000)] = SampleConfig().steps
    seed: _Seed = 0
    guidance: Annotated[float, Field(ge=1, le=100)] | None = None
    negative_prompt: Annotated[str, AfterValidator(_checked_negative)] | None = None
    compare: bool = False
    base: str | None = None
    device: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    quantize: Literal["null", Method] | None = None
    offload: bool = False


class _Row(BaseModel):
    """One image that is asked for: a line of a prompts file, its paths replaced by the control images."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompt: _Prompt
    controls: Annotated[tuple[Path, ...], Field(alias="path_control")]
    seed: _Seed | None = None
    size: _Size | None = None
    align_control: bool | None = None


@dataclass(frozen=True)
class ImageJob:
    """One image to be made."""

    path: Path  # of the PNG file
    prompt: str
    negative: str | None  # with guidance
    controls: tuple[Path, ...]
    control_sizes: ControlSizes
    size: Size
    restored_size: Size | None  # to which the image is scaled at last
    seed: int

    @property
    def untrained_path(self) -> Path:
        """The image without the trained weights."""
        return self.path.with_name(f"{self.path.stem}-without.png")


@dataclass(frozen=True)
class Request:
    """All that `sample` needs."""

    options: Options
    result: RunResult
    family: Family
    jobs: tuple[ImageJob, ...]
    device: torch.device
    dtype: str
    guidance: float
    quantize: Method | None  # of the base's weights


Embeds = tuple[TextEmbeds, TextEmbeds | None]  # of a prompt and, with guidance, of the negative one


# What is asked for.


def make_request(**given: Any) -> Request:
    """The options of the command line by name, as text or typed.

    Raises:
        UserError: the first option that is wrong, or every problem of the prompts and control images.
    """
    asked = options(Options, given)
    if (asked.prompt is None) == (asked.prompts is None):
        raise UserError("--prompt: give either --prompt TEXT or --prompts FILE")
    if asked.prompts and asked.image:
        raise UserError("--image: the lines of --prompts name their images: leave it out")
    if asked.restore_size and not (asked.image or asked.prompts):
        raise UserError("--restore-size: there is no image whose size could be restored: leave it out")
    out = asked.out.expanduser()
    check_folder(out, key="--out")
    device = _device(asked.device)
    result = find_result(asked.lora, "--lora")
    family = find_base(result, asked.base, "--base")
    quantize = find_quantization(result, asked.quantize, "--quantize", device)
    dtype = asked.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    guidance, negative = _guidance(family, asked)
    problems = Problems()
    if asked.prompts:
        rows = _read_rows(asked.prompts.expanduser(), problems)
    else:
        images = tuple(Path(image).expanduser() for image in asked.image)
        rows = {"--image, --prompt": _Row.model_validate({"prompt": asked.prompt, "path_control": images})}
    sizes = _control_sizes(rows, problems)
    problems.add(*_fit_problems(family, rows, asked))
    problems.raise_if_any()
    jobs = []
    for path, row in zip(_free_paths(out, len(rows)), rows.values(), strict=True):
        controls = [sizes[control] for control in row.controls]
        size = row.size or asked.size or _default_size(family, result, controls)
        control_sizes = result.control_sizes(size, controls, row.align_control)
        jobs.append(
            ImageJob(
                path,
                row.prompt,
                negative,
                row.controls,
                control_sizes,
                size,
                controls[0] if asked.restore_size and controls else None,
                asked.seed if row.seed is None else row.seed,
            )
        )
        nearest = result.aligned_size(controls[0], size) if controls else None
        if nearest and control_sizes.vae[0] != size:
            what = f"has another aspect than its first image ({controls[0]}), so edits may be shifted or stretched"
            log(f"size      {path.name}: {size} {what}: the nearest size of that aspect is {nearest}")
    return Request(asked, result, family, tuple(jobs), device, dtype, guidance, quantize)


def _guidance(family: Family, asked: Options) -> tuple[float, str | None]:
    """The guidance, and the prompt that it leads away from where there is one.

    Raises:
        UserError: a negative prompt is given and has no effect.
    """
    embedded, given = family.embedded_guidance(), asked.negative_prompt
    guidance = asked.guidance or (embedded.sampling if embedded else 1.0)
    if embedded is None and guidance > 1:
        return guidance, family.negative_prompt if given is None else given
    if given is not None:
        why = "without guidance: give --guidance above 1, or" if embedded is None else "on a guidance that is embedded:"
        raise UserError(f"--negative-prompt: has no effect {why} leave it out")
    return guidance, None


def _default_size(family: Family, result: RunResult, controls: Sequence[Size]) -> Size:
    """As in training, so that image and first control have one grid; without controls as in the stock pipeline."""
    trained = result.trained_size(controls[0]) if controls else None
    return trained or family.default_size(controls[-1] if controls else None)


def _device(name: str | None) -> torch.device:
    try:
        device = dist_env().device if name is None else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device: {name} cannot be used: {reason}; choose another") from error
    return device


def _read_rows(file: Path, problems: Problems) -> dict[str, _Row]:
    """The good lines of `file` in their order, by their place; what is wrong with the others is noted."""
    try:
        lines, root = list(json_rows(file)), file.parent.resolve()
    except OSError as error:
        raise UserError(f"--prompts: {printable(file)} cannot be read: {error.strerror}; name another") from error
    if not lines:
        problems.add(f"--prompts: {printable(file)} has no lines: write one for each image")
    places = {f"{printable(file)}:{number}": line for number, line in lines}
    rows = {at: problems.collect(_read_row, line, file.parent, root, at) for at, line in places.items()}
    return {at: row for at, row in rows.items() if row}


def _read_row(line: Mapping[str, Any] | BadRowError, folder: Path, root: Path, at: str) -> _Row | None:
    if isinstance(line, BadRowError):
        raise UserError(f"{at}: {line}")
    problems, controls = Problems(f"{at}: {problem}" for problem in key_problems(line)), []
    for key in control_keys(line):
        try:
            controls.append(file_below(folder, root, key, line.get(key), fix="put the file itself there"))
        except BadRowError as error:
            problems.add(f"{at}: {error}")
    values = {key: value for key, value in line.items() if not key.startswith("path")}
    values["path_control"] = tuple(controls)
    row = problems.collect(validated, _Row, values, lambda key: f"{at}: '{printable(key)}'")
    problems.raise_if_any()
    return row


def _control_sizes(rows: Mapping[str, _Row], problems: Problems) -> dict[Path, Size]:
    """The upright size of every control that can be used; each is decoded once."""
    sizes = {}
    for path, at in {path: at for at, row in rows.items() for path in row.controls}.items():
        try:
            sizes[path] = inspect_image(path, _LIMITS).size
        except BadImageError as error:
            problems.add(f"{at}: {printable(path)}: {error}")
    return sizes


def _fit_problems(family: Family, rows: Mapping[str, _Row], asked: Options) -> Iterator[str]:
    """What the base cannot take: the number of controls, a prompt, a size."""
    texts = [(at, row.prompt, len(row.controls)) for at, row in rows.items()]
    if asked.negative_prompt:
        texts.append(("--negative-prompt", asked.negative_prompt, family.controls[0]))
    long = family.over_long(prompt for _, prompt, _ in texts)
    for at, prompt, controls in texts:
        if problem := family.record_problem(controls=controls, prompt=prompt):
            yield f"{at}: {problem}"
        if prompt in long:
            yield f"{at}: the prompt is {long[prompt][0]} tokens long, more than {family.max_prompt_tokens}: shorten it"
    multiple = family.size_multiple()
    what = ", the pixels of a token" if multiple == family.pixels_per_token() else ""
    for at, size in [("--size", asked.size), *((f"{at}: 'size'", row.size) for at, row in rows.items())]:
        if size and (size.width % multiple or size.height % multiple):
            near = target_size(size, max_pixels=_LIMITS.max_source_pixels, multiple_of=multiple)
            yield f"{at}: {size} has a side that is no multiple of {multiple}{what}: write {near}"


def _free_paths(folder: Path, count: int) -> list[Path]:
    """`0001.png` and so on, after the numbers that are taken in the folder."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    last = max((int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))), default=0)
    return [folder / f"{number:04d}.png" for number in range(last + 1, last + 1 + count)]


# What is made of it.


def sample(request: Request) -> None:
    """Make all images of `request`, and with `compare` the grids that show them side by side.

    Raises:
        UserError: the base's weights cannot be loaded.
        WorkError: an image is there by now, a control has changed since it was checked, or memory does not suffice.
    """
    folder = request.jobs[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    log(f"model     {request.family.path}, {request.quantize or request.dtype} on {request.device}")
    with renamed("--base"):
        _make_images(request)
    if request.options.compare:
        _write_grids(request)
    log(f"images    {printable(folder)}")


def _make_images(request: Request) -> None:
    """Make and save every image."""
    result, compare = request.result, request.options.compare
    digest = hub.file_digest(result.path) if result.lora else None
    embeds, pipeline = _encode(request), None
    for trained in (False, True) if compare else (True,):
        if pipeline is None or not result.lora:
            pipeline = None  # it may have to go before there is room for the next
            release(request.device)
            pipeline = _load(request, result.path if trained and not result.lora else None)
        if trained and result.lora:
            pipeline.remove_all_hooks()  # loading would put them back, for a device of its own choice
            pipeline.load_lora_weights(result.path)
        if request.options.offload:
            pipeline.enable_model_cpu_offload(device=request.device)
        jobs = list(zip(request.jobs, embeds, strict=True))
        for job, own in counted(jobs, "sample", "image", enabled=True):
            path = job.path if trained else job.untrained_path
            log(f"image     {path.name}: {job.size}, {request.options.steps} steps")
            image = _make_image(request, pipeline, job, own)
            if job.restored_size:
                image = image.resize(job.restored_size, Image.Resampling.LANCZOS)
            settings = json.dumps(_settings(request, job, trained, digest), ensure_ascii=False)
            _save(image, path, mixres=settings)


def _encode(request: Request) -> list[Embeds]:
    """The embeddings of each image; the text encoder is gone then."""
    family, device = request.family, request.device
    encoders = family.load_encoders(dtype=getattr(torch, request.dtype), device=device)

    @cache
    def embeds(prompt: str, controls: tuple[Path, ...], sizes: ControlSizes) -> TextEmbeds:
        return family.encode_prompt(encoders, controls=_read(request, controls), prompt=prompt, sizes=sizes)

    encoded: list[Embeds] = []
    for job in counted(request.jobs, "encode", "prompt", enabled=True):
        seen = ((), ControlSizes()) if family.prompts_alone else (job.controls, job.control_sizes)
        negative = None if job.negative is None else embeds(job.negative, *seen)
        encoded.append((embeds(job.prompt, *seen), negative))
    return encoded


def _load(request: Request, trained: Path | None) -> Any:
    family, dtype, device = request.family, getattr(torch, request.dtype), request.device
    if request.options.offload and not request.quantize:  # which is for the device to do
        device = torch.device("cpu")
    transformer = family.load_transformer(trained=trained, quantize=request.quantize, dtype=dtype, device=device)
    pipeline = family.load_sampling_pipeline(transformer=transformer, dtype=dtype, device=device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)  # an image may take minutes
    return pipeline


def _make_image(request: Request, pipeline: Any, job: ImageJob, embeds: Embeds) -> Image.Image:
    try:
        return request.family.sample_image(
            pipeline,
            controls=_read(request, job.controls),
            text=embeds[0],
            negative=embeds[1],
            size=job.size,
            sizes=job.control_sizes,
            steps=request.options.steps,
            seed=job.seed,
            guidance=request.guidance,
        )
    except torch.OutOfMemoryError as error:
        raise WorkError(f"{request.device} is out of memory at {job.size}: give a smaller --size") from error


def _read(request: Request, controls: Sequence[Path]) -> list[Image.Image]:
    limits = replace(_LIMITS, background=request.result.recipe.get("background", WHITE))
    images = []
    for path in controls:
        try:
            images.append(read_image(path, limits, keep_alpha=request.family.keeps_alpha))
        except BadImageError as error:
            again = "the image changed after the start: run the command again"
            raise WorkError(f"{printable(path)}: {error} ({again})") from error
    return images


def _settings(request: Request, job: ImageJob, trained: bool, digest: str | None) -> dict[str, Any]:
    """The metadata of the PNG, with or without the `trained` weights; `digest` is that of a LoRA file."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative,
        "guidance": request.guidance,
        "seed": job.seed,
        "steps": request.options.steps,
        "size": str(job.size),
        "restored_size": job.restored_size and str(job.restored_size),
        "images": [printable(path) for path in job.controls],
        **request.result.areas(job.size),
        "control_sizes": [str(size) for size in job.control_sizes.vae],
        "lora": printable(request.result.path) if trained else None,
        "lora_xxh3": digest if trained else None,
        "base": request.family.path,
        "revision": request.family.revision,
        "dtype": request.dtype,
        "quantize": request.quantize,
        "mixres": __version__,
    }


def _save(image: Image.Image, path: Path, captions: Sequence[str] = (), **texts: str) -> None:
    if path.exists():
        raise WorkError(f"{path} is there by now and is not overwritten: choose another --out")
    save_png(image, path, captions, **texts)


def _write_grids(request: Request) -> None:
    """Controls, the image without the trained weights and the one with them; some rows a grid."""
    for first in range(0, len(request.jobs), _GRID_ROWS):
        jobs = request.jobs[first : first + _GRID_ROWS]
        columns = max(len(job.controls) for job in jobs)
        rows = []
        for job in jobs:
            controls = _read(request, job.controls)
            made = [Image.open(path) for path in (job.untrained_path, job.path)]
            empty = [None] * (columns - len(job.controls))
            note = f"{job.path.name}, {job.size}, seed {job.seed}"
            rows.append(Row((*controls, *empty, *made), job.prompt, note))
        headings = [f"image {number}" for number in range(1, columns + 1)]
        grid = image_grid((*headings, "without", "with"), rows)
        _save(grid, jobs[0].path.with_name(f"compare-{jobs[0].path.name}"), [row.caption for row in rows])
