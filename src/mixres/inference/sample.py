"""The verb `sample`: images from what a run has trained, through the stock pipeline of its base.

Promise: options, prompts, control images, the trained weights and their base are checked before any weight is read;
every bad line of a prompts file is reported at once. The images are those of a process without mixres, for the same
base, LoRA, controls, prompt and seed, over the base quantised as under the LoRA in training. Each PNG records its
settings. Cost: one decode of each control; the text encoder once a prompt with its controls, then released; then the
denoising loop once an image, twice with `compare` or guidance, four times with both. Embeddings wait in memory, 10 MB
a prompt for Qwen-Image-Edit.

Lines of a prompts file have the keys of a data manifest (`prompt`, `path_control`, `path_control_1`, ...), so that a
manifest of held-out data can be given as it is: its targets and masks are not opened. `seed` and `size` may be added.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator
from torch import Tensor

from mixres import __version__
from mixres.config.schema import SampleConfig
from mixres.console import counted, log
from mixres.data.images import WHITE, BadImageError, Limits, check_size, inspect_image, read_image
from mixres.data.manifest import BadRowError, control_keys, file_below, json_rows, key_problems
from mixres.data.records import check_caption, printable
from mixres.errors import Problems, UserError, WorkError
from mixres.geometry import Size, target_size
from mixres.inference.artifact import RunResult, find_base, find_quantization, find_result, renamed
from mixres.inference.options import options, validated
from mixres.models.family import ControlSizes, Family
from mixres.models.quantize import Method
from mixres.preprocessing.fill import release
from mixres.training.distributed import dist_env
from mixres.training.sample_sheets import Row, image_grid, save_png

NEGATIVE_PROMPT = " "  # the model cards' where guidance leads away from nothing in particular
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
    guidance: Annotated[float, Field(ge=1, le=100)] = 1.0
    negative_prompt: Annotated[str, AfterValidator(_checked_negative)] | None = None
    compare: bool = False
    base: str | None = None
    device: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    quantize: Literal["null", Method] | None = None


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
    quantize: Method | None  # of the base's weights


_Text = tuple[str, tuple[Path, ...], ControlSizes]  # a prompt, and the controls that the text encoder sees with it


# What is asked for.


def make_request(**given: Any) -> Request:
    """The options of the command line by name, as text or typed; None stands for one that is not given.

    Raises:
        UserError: the first option that is wrong, or every problem of the prompts and control images.
    """
    asked = options(Options, given)
    if (asked.prompt is None) == (asked.prompts is None):
        raise UserError("--prompt: give either --prompt TEXT or --prompts FILE")
    if asked.prompts and asked.image:
        raise UserError("--image: the lines of --prompts name their images: leave it out")
    if asked.negative_prompt is not None and asked.guidance == 1:
        raise UserError("--negative-prompt: has no effect without guidance: give --guidance above 1, or leave it out")
    if asked.restore_size and not (asked.image or asked.prompts):
        raise UserError("--restore-size: there is no image whose size could be restored: leave it out")
    device = _device(asked.device)
    result = find_result(asked.lora, "--lora")
    family = find_base(result, asked.base, "--base")
    quantize = find_quantization(result, asked.quantize, "--quantize", device)
    dtype = asked.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    negative = NEGATIVE_PROMPT if asked.negative_prompt is None else asked.negative_prompt
    problems = Problems()
    if asked.prompts:
        rows = _read_rows(asked.prompts.expanduser(), problems)
    else:
        images = tuple(Path(image).expanduser() for image in asked.image)
        rows = {"": _Row.model_validate({"prompt": asked.prompt, "path_control": images})}
    sizes = _control_sizes(rows, problems)
    problems.add(*_fit_problems(family, rows, asked))
    problems.raise_if_any()
    jobs = []
    for path, row in zip(_free_paths(asked.out.expanduser(), len(rows)), rows.values(), strict=True):
        controls = [sizes[control] for control in row.controls]
        size = row.size or asked.size or _default_size(family, result, controls)
        control_sizes = result.control_sizes(size, controls, row.align_control)
        jobs.append(
            ImageJob(
                path,
                row.prompt,
                negative if asked.guidance > 1 else None,
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
    return Request(asked, result, family, tuple(jobs), device, dtype, quantize)


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
    for path, at in {path: at or "--image" for at, row in rows.items() for path in row.controls}.items():
        try:
            sizes[path] = inspect_image(path, _LIMITS).size
        except BadImageError as error:
            problems.add(f"{at}: {printable(path)}: {error}")
    return sizes


def _fit_problems(family: Family, rows: Mapping[str, _Row], asked: Options) -> Iterator[str]:
    """What the base cannot take: the number of controls, a prompt, a size."""
    for at, row in rows.items():
        if problem := family.record_problem(controls=len(row.controls), prompt=""):
            yield f"{at or '--image'}: {problem}"
    prompts = [(at or "--prompt", row.prompt) for at, row in rows.items()]
    prompts += [("--negative-prompt", asked.negative_prompt)] if asked.negative_prompt else []
    long, most = family.over_long(prompt for _, prompt in prompts), family.max_prompt_tokens
    for at, prompt in prompts:
        if problem := family.record_problem(controls=family.controls[0], prompt=prompt):
            yield f"{at}: {problem}"
        if prompt in long:
            yield f"{at}: the prompt is {long[prompt][0]} tokens long, more than {most}: shorten it"
    token = family.pixels_per_token()
    for at, size in [("--size", asked.size), *((f"{at}: 'size'", row.size) for at, row in rows.items())]:
        if size and (size.width % token or size.height % token):
            near = target_size(size, max_pixels=_LIMITS.max_source_pixels, multiple_of=token)
            yield f"{at}: {size} has a side that is no multiple of {token}, the pixels of a token: write {near}"


def _free_paths(folder: Path, count: int) -> list[Path]:
    """`0001.png` and so on, after the numbers that are taken in the folder."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    last = max((int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))), default=0) + count
    digits = max(4, len(str(last)))
    return [folder / f"{number:0{digits}d}.png" for number in range(last - count + 1, last + 1)]


# What is made of it.


def sample(request: Request) -> None:
    """Make all images of `request`, and with `compare` the grids that show them side by side.

    Raises:
        UserError: the base's weights cannot be loaded, or the folder cannot be made.
        WorkError: a control has changed since the request, an image is there by now, or memory does not suffice.
    """
    folder = request.jobs[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: {printable(folder)} cannot be written: {error.strerror}; choose another") from error
    quantized = f", weights in {request.quantize}" if request.quantize else ""
    log(f"model     {request.family.path}, {request.dtype}{quantized} on {request.device}")
    log(f"weights   {printable(request.result.path)}")
    try:
        count = _make_images(request)
    except UserError as error:
        raise renamed(error, "--base") from error
    if request.options.compare:
        _write_grids(request)
    log(f"images    {count} in {printable(folder)}")


def _make_images(request: Request) -> int:
    """Make and save every image; how many there are."""
    digest = request.result.digest()
    embeds = _encode(request)
    release(request.device)
    passes = (False, True) if request.options.compare else (True,)
    jobs = [(trained, job) for trained in passes for job in request.jobs]
    pipelines, pipeline, current = _pipelines(request), None, None
    for trained, job in counted(jobs, "sample", "image", enabled=True):
        if trained is not current:
            pipeline = None  # it may have to go before there is room for the next
            pipeline, current = next(pipelines), trained
        path = job.path if trained else job.untrained_path
        log(f"image     {path.name}: {job.size}, {request.options.steps} steps")
        image = _make_image(request, pipeline, job, embeds)
        if job.restored_size:
            image = image.resize(job.restored_size, Image.Resampling.LANCZOS)
        settings = json.dumps(_settings(request, job, digest if trained else None), ensure_ascii=False)
        _save(image, path, mixres=settings)
    return len(jobs)


def _text(job: ImageJob, prompt: str) -> _Text:
    return prompt, job.controls, job.control_sizes


def _encode(request: Request) -> dict[_Text, Tensor]:
    """The embeddings `(T, D)` of each prompt with its controls, on the CPU; the text encoder is gone then."""
    prompts = [(job, prompt) for job in request.jobs for prompt in (job.prompt, job.negative) if prompt is not None]
    texts = dict.fromkeys(_text(*each) for each in prompts)
    encoders, embeds = request.family.load_encoders(dtype=getattr(torch, request.dtype), device=request.device), {}
    for text in counted(texts, "encode", "prompt", enabled=True):
        prompt, controls, sizes = text
        images = _read(request, controls)
        embeds[text] = request.family.encode_prompt(encoders, controls=images, prompt=prompt, sizes=sizes)
    return embeds


def _pipelines(request: Request) -> Iterator[Any]:
    """The stock pipeline of the base, if it is compared with, then that with the trained weights."""
    if request.result.lora:
        pipeline = _load(request, None)
        if request.options.compare:
            yield pipeline
        pipeline.load_lora_weights(request.result.path)
        yield pipeline
    else:
        if request.options.compare:
            yield _load(request, None)
            release(request.device)
        yield _load(request, request.result.path)


def _load(request: Request, trained: Path | None) -> Any:
    family, dtype, device = request.family, getattr(torch, request.dtype), request.device
    transformer = family.load_transformer(trained=trained, quantize=request.quantize, dtype=dtype, device=device)
    pipeline = family.load_sampling_pipeline(transformer=transformer, dtype=dtype, device=device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)  # an image may take minutes
    return pipeline


def _make_image(request: Request, pipeline: Any, job: ImageJob, embeds: Mapping[_Text, Tensor]) -> Image.Image:
    negative = None if job.negative is None else embeds[_text(job, job.negative)]
    try:
        return request.family.sample_image(
            pipeline,
            controls=_read(request, job.controls),
            prompt_embeds=embeds[_text(job, job.prompt)],
            size=job.size,
            sizes=job.control_sizes,
            steps=request.options.steps,
            seed=job.seed,
            negative_embeds=negative,
            guidance=request.options.guidance,
        )
    except torch.OutOfMemoryError as error:
        raise WorkError(f"{request.device} is out of memory at {job.size}: give a smaller --size") from error


def _read(request: Request, controls: Sequence[Path]) -> list[Image.Image]:
    limits = replace(_LIMITS, background=request.result.recipe.get("background", WHITE))
    try:
        return [read_image(path, limits) for path in controls]
    except BadImageError as error:
        raise WorkError(f"{error} (an image changed after the start: run the command again)") from error


def _settings(request: Request, job: ImageJob, digest: str | None) -> dict[str, Any]:
    """The metadata of the PNG; `digest` is that of the trained weights, None without them."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative,
        "guidance": request.options.guidance,
        "seed": job.seed,
        "steps": request.options.steps,
        "size": str(job.size),
        "restored_size": job.restored_size and str(job.restored_size),
        "images": [printable(path) for path in job.controls],
        **request.result.areas(job.size),
        "control_sizes": [str(size) for size in job.control_sizes.vae],
        "lora": None if digest is None else printable(request.result.path),
        "lora_xxh3": digest,
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
        rows = [_grid_row(request, job, columns) for job in jobs]
        headings = [f"image {number}" for number in range(1, columns + 1)]
        grid = image_grid((*headings, "without", "with"), rows)
        _save(grid, jobs[0].path.with_name(f"compare-{jobs[0].path.name}"), [row.caption for row in rows])


def _grid_row(request: Request, job: ImageJob, columns: int) -> Row:
    controls = _read(request, job.controls)
    empty = [None] * (columns - len(controls))
    made = []
    for path in (job.untrained_path, job.path):
        with Image.open(path) as image:
            made.append(image.convert("RGB"))
    return Row((*controls, *empty, *made), job.prompt, f"{job.path.name}, {job.size}, seed {job.seed}")
