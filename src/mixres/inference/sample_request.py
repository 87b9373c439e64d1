"""What the verb `sample` is asked for: options, prompts and control images, all checked before any weight is read.

Promise: every bad line of a prompts file is reported at once. The same command means the same files again: an image is
found by the settings that its PNG records.

Lines of a prompts file have the keys of a data manifest (`prompt`, `path_control`, `path_control_1`, ...), so that a
manifest of held-out data can be given: its masks are not opened, and its targets only to compare. `seed` and `size` may
be added. Other keys are refused, since a misspelt one would be ignored.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from mixres import __version__
from mixres.config.schema import SampleConfig
from mixres.console import log
from mixres.data.images import BadImageError, Limits, check_size, inspect_image
from mixres.data.manifest import BadRowError, control_keys, file_below, json_rows, key_problems
from mixres.data.records import check_caption, printable
from mixres.errors import Problems, UserError
from mixres.geometry import Size, target_size
from mixres.inference.artifact import RunResult, find_base, find_quantization, find_result
from mixres.inference.options import options, validated
from mixres.models import hub
from mixres.models.family import ControlSizes, Family
from mixres.models.quantize import Method
from mixres.preprocessing.training_data import check_folder
from mixres.training.distributed import device_named

LIMITS = Limits()

_NUMBERED = re.compile(r"(?:compare-)?(\d{4,})(?:-without)?\.(?:png|html)")  # all that `sample` writes
RECORD = "mixres"  # what the settings are called in a PNG file


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
    check_size(size, LIMITS)
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
    target: Annotated[Path | None, Field(alias="path_target")] = None  # to compare with
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
    target: Path | None  # to compare with
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
    device = device_named(asked.device)
    result = find_result(asked.lora, "--lora")
    family = find_base(result, asked.base, "--base")
    quantize = find_quantization(result, asked.quantize, "--quantize", device)
    dtype = asked.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    guidance, negative = _guidance(family, asked)
    problems = Problems()
    if asked.prompts:
        rows = _read_rows(asked.prompts.expanduser(), problems, targets=asked.compare)
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
                row.target,
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


def _read_rows(file: Path, problems: Problems, *, targets: bool) -> dict[str, _Row]:
    """The good lines of `file` in their order, by their place; what is wrong with the others is noted."""
    try:
        lines, root = list(json_rows(file)), file.parent.resolve()
    except OSError as error:
        raise UserError(f"--prompts: {printable(file)} cannot be read: {error.strerror}; name another") from error
    if not lines:
        problems.add(f"--prompts: {printable(file)} has no lines: write one for each image")
    places = {f"{printable(file)}:{number}": line for number, line in lines}
    rows = {at: problems.collect(_read_row, line, file.parent, root, at, targets) for at, line in places.items()}
    return {at: row for at, row in rows.items() if row}


def _read_row(line: Mapping[str, Any] | BadRowError, folder: Path, root: Path, at: str, targets: bool) -> _Row | None:
    if isinstance(line, BadRowError):
        raise UserError(f"{at}: {line}")
    problems, paths = Problems(f"{at}: {problem}" for problem in key_problems(line)), {}
    wanted = ["path_target"] if targets and line.get("path_target") is not None else []
    for key in (*control_keys(line), *wanted):
        try:
            paths[key] = file_below(folder, root, key, line.get(key), fix="put the file itself there")
        except BadRowError as error:
            problems.add(f"{at}: {error}")
    values = {key: value for key, value in line.items() if not key.startswith("path")}
    values["path_target"] = paths.pop("path_target", None)
    values["path_control"] = tuple(paths.values())
    row = problems.collect(validated, _Row, values, lambda key: f"{at}: '{printable(key)}'")
    problems.raise_if_any()
    return row


def _control_sizes(rows: Mapping[str, _Row], problems: Problems) -> dict[Path, Size]:
    """The upright size of every control and target that can be used; each is decoded once."""
    sizes = {}
    for path, at in {path: at for at, row in rows.items() for path in (*row.controls, row.target) if path}.items():
        try:
            sizes[path] = inspect_image(path, LIMITS).size
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
            near = target_size(size, max_pixels=LIMITS.max_source_pixels, multiple_of=multiple)
            yield f"{at}: {size} has a side that is no multiple of {multiple}{what}: write {near}"


def _numbered(request: Request, folder: Path) -> Iterator[ImageJob]:
    """The jobs with their files, `0001.png` and so on: those that the same command made before, else new numbers."""
    recorded = _recorded(folder)
    last = max(recorded, default=0)
    for job in request.jobs:
        own = [json.loads(settings_of(request, job, trained)) for trained in (False, True)]
        # All that is there: the image without the trained weights is that of other commands too.
        same = (number for number, made in recorded.items() if made and all(each in own for each in made))
        number = next(same, None)
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
            if path.name.startswith("compare-"):
                continue
            with suppress(OSError, ValueError), Image.open(path) as image:
                settings.append(json.loads(image.info[RECORD]) if RECORD in image.info else None)
    return found


def settings_of(request: Request, job: ImageJob, trained: bool) -> str:
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
