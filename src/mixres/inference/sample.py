"""The verb `sample`: images from what a run has trained, of any sizes in one batch.

Promise: options, prompts, control images, the trained weights and their base are checked before any weight is read;
every bad line of a prompts file is reported at once. The images are those of a process without mixres, for the same
base, LoRA, controls, prompt and seed, over the base quantised as under the LoRA in training. Each PNG records its
settings. What an interrupted command has made is kept: the same command makes the rest. Cost: one decode of each
control; the text encoder once a prompt with its controls and size, then released; then one forward call a step and
batch, twice the tokens with guidance, two passes with `compare`. Embeddings wait in memory, 10 MB a prompt for
Qwen-Image-Edit.

Lines of a prompts file have the keys of a data manifest (`prompt`, `path_control`, `path_control_1`, ...), so that a
manifest of held-out data can be given as it is: its targets and masks are not opened. `seed` and `size` may be added.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from mixres.console import counted, log, progress
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
from mixres.training.denoising import ImageInputs, image_inputs, make_images, microbatches
from mixres.training.distributed import dist_env
from mixres.training.sample_sheets import Row, image_grid, save_png

_LIMITS = Limits()
_GRID_ROWS = 12
_NUMBERED = re.compile(r"(?:compare-)?(\d{4,})(?:-without)?\.png")  # all that `sample` writes
_RECORD = "mixres"  # what the settings are called in a PNG file


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
    batch_tokens: Annotated[int, Field(ge=1)] = 32768
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

    def file(self, trained: bool) -> Path:
        """The image with or without the trained weights."""
        return self.path if trained else self.path.with_name(f"{self.path.stem}-without.png")


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
    digest: str | None  # of a LoRA file

    @property
    def passes(self) -> tuple[bool, ...]:
        """Without the trained weights and with them, or with them alone."""
        return (False, True) if self.options.compare else (True,)


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
    digest = hub.file_digest(result.path) if result.lora else None
    jobs = []
    for row in rows.values():
        controls = [sizes[control] for control in row.controls]
        size = row.size or asked.size or _default_size(family, result, controls)
        control_sizes = result.control_sizes(size, controls, row.align_control)
        jobs.append(
            ImageJob(
                out,
                row.prompt,
                negative,
                row.controls,
                control_sizes,
                size,
                controls[0] if asked.restore_size and controls else None,
                asked.seed if row.seed is None else row.seed,
            )
        )
    request = Request(asked, result, family, tuple(jobs), device, dtype, guidance, quantize, digest)

    request = replace(request, jobs=tuple(_numbered(request, out)))
    for job in request.jobs:
        first = sizes[job.controls[0]] if job.controls else None
        nearest = result.aligned_size(first, job.size) if first else None
        if nearest and job.control_sizes.vae[0] != job.size:
            what = f"has another aspect than its first image ({first}), so edits may be shifted or stretched"
            log(f"size      {job.path.name}: {job.size} {what}: the nearest size of that aspect is {nearest}")
    return request


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
    token = family.pixels_per_token()
    for at, size in [("--size", asked.size), *((f"{at}: 'size'", row.size) for at, row in rows.items())]:
        if size and (size.width % token or size.height % token):
            near = target_size(size, max_pixels=_LIMITS.max_source_pixels, multiple_of=token)
            yield f"{at}: {size} has a side that is no multiple of {token}, the pixels of a token: write {near}"


def _numbered(request: Request, folder: Path) -> Iterator[ImageJob]:
    """The jobs with their files, `0001.png` and so on: those that the same command made before, else new numbers."""
    recorded = _recorded(folder)
    last = max(recorded, default=0)
    for job in request.jobs:
        own = [json.loads(_settings(request, job, trained)) for trained in request.passes]
        number = next((number for number, made in recorded.items() if any(each in made for each in own)), None)
        if number is None:
            last = number = last + 1
        recorded.pop(number, None)
        yield replace(job, path=folder / f"{number:04d}.png")


def _recorded(folder: Path) -> dict[int, list[Any]]:
    """By their number, the settings of the images in the folder."""
    found: dict[int, list[Any]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _NUMBERED.fullmatch(path.name):
            settings = found.setdefault(int(match[1]), [])
            with suppress(OSError, ValueError), Image.open(path) as image:
                settings.append(json.loads(image.info[_RECORD]) if _RECORD in image.info else None)
    return found


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
    """Make and save every image that is not there yet."""
    result, wanted = request.result, [(job, trained) for trained in request.passes for job in request.jobs]
    missing = [(job, trained) for job, trained in wanted if not job.file(trained).exists()]
    if len(missing) < len(wanted):
        log(f"image     {len(wanted) - len(missing)} of {len(wanted)} are there already")
    if not missing:
        return
    embeds, pipeline = dict(zip(request.jobs, _encode(request), strict=True)), None
    with progress(len(missing), "sample", "image") as stepped:
        for trained in dict.fromkeys(trained for _, trained in missing):
            if pipeline is None or not result.lora:
                pipeline = None  # it may have to go before there is room for the next
                release(request.device)
                pipeline = _load(request, result.path if trained and not result.lora else None)
            if trained and result.lora:
                pipeline.remove_all_hooks()  # loading would put them back, for a device of its own choice
                pipeline.load_lora_weights(result.path)
            if request.options.offload:
                pipeline.enable_model_cpu_offload(device=request.device)
            jobs = [job for job, which in missing if which == trained]
            inputs = [_inputs(request, pipeline, job, embeds[job]) for job in jobs]
            for part in microbatches([each.tokens for each in inputs], request.options.batch_tokens):
                chosen, given = jobs[part.start : part.stop], inputs[part.start : part.stop]
                with _enough_memory(request, chosen):
                    images = make_images(request.family, pipeline, given, steps=request.options.steps, stepped=stepped)
                for job, image in zip(chosen, images, strict=True):
                    if job.restored_size:
                        image = image.resize(job.restored_size, Image.Resampling.LANCZOS)
                    _save(image, job.file(trained), **{_RECORD: _settings(request, job, trained)})
                    log(f"image     {job.file(trained).name}: {job.size}, {request.options.steps} steps")


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
    return family.load_sampling_pipeline(transformer=transformer, dtype=dtype, device=device)


def _inputs(request: Request, pipeline: Any, job: ImageJob, embeds: Embeds) -> ImageInputs:
    controls = _read(request, job.controls)
    with _enough_memory(request, [job]):
        return image_inputs(
            request.family,
            pipeline,
            controls=controls,
            text=embeds[0],
            negative=embeds[1],
            size=job.size,
            sizes=job.control_sizes,
            seed=job.seed,
            guidance=request.guidance,
        )


@contextmanager
def _enough_memory(request: Request, jobs: Sequence[ImageJob]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        sizes = ", ".join(dict.fromkeys(str(job.size) for job in jobs))
        smaller = "--batch-tokens" if len(jobs) > 1 else "--size"
        raise WorkError(f"{request.device} is out of memory at {sizes}: give a smaller {smaller}") from error


def _read(request: Request, controls: Sequence[Path]) -> list[Image.Image]:
    limits = replace(_LIMITS, background=request.result.recipe.get("background", WHITE))
    images = []
    for path in controls:
        try:
            images.append(read_image(path, limits))
        except BadImageError as error:
            again = "the image changed after the start: run the command again"
            raise WorkError(f"{printable(path)}: {error} ({again})") from error
    return images


def _settings(request: Request, job: ImageJob, trained: bool) -> str:
    """The metadata of the PNG, with or without the `trained` weights, as JSON."""
    settings = {
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
        "lora_xxh3": request.digest if trained else None,
        "base": request.family.path,
        "revision": request.family.revision,
        "dtype": request.dtype,
        "quantize": request.quantize,
        "mixres": __version__,
    }
    return json.dumps(settings, ensure_ascii=False)


def _save(image: Image.Image, path: Path, captions: Sequence[str] = (), **texts: str) -> None:
    if path.exists():
        raise WorkError(f"{path} is there by now and is not overwritten: choose another --out")
    save_png(image, path, captions, **texts)


def _write_grids(request: Request) -> None:
    """Controls, the image without the trained weights and the one with them; some rows a grid."""
    for first in range(0, len(request.jobs), _GRID_ROWS):
        jobs = request.jobs[first : first + _GRID_ROWS]
        path = jobs[0].path.with_name(f"compare-{jobs[0].path.name}")
        if path.exists():  # the same command made it of the same images
            continue
        columns = max(len(job.controls) for job in jobs)
        rows = []
        for job in jobs:
            controls = _read(request, job.controls)
            made = [Image.open(path).convert("RGB") for path in map(job.file, request.passes)]
            empty = [None] * (columns - len(job.controls))
            note = f"{job.path.name}, {job.size}, seed {job.seed}"
            rows.append(Row((*controls, *empty, *made), job.prompt, note))
        headings = [f"image {number}" for number in range(1, columns + 1)]
        grid = image_grid((*headings, "without", "with"), rows)
        _save(grid, path, [row.caption for row in rows])
