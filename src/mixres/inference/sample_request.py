"""What `mixres sample` is asked for: the pictures to be made, or all that is wrong with the request.

Promise: options, images, prompts, the trained weights and their base are checked together, before any weight is read;
pictures are numbered on behind those that are there. Cost: one full decode of each image, the header of the LoRA, a few
JSON files of the base.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mixres.config.schema import SampleConfig
from mixres.data.images import BadImageError, inspect_image
from mixres.data.records import BadCaptionError, check_caption, printable
from mixres.errors import UserError
from mixres.geometry import Size, target_size
from mixres.inference.artifact import Base, RunResult, find_base, find_quantization, find_result
from mixres.inference.sample_rows import LIMITS, MAX_SEED, Row, given_row, parsed_size, rows_of
from mixres.models.quantize import Method
from mixres.training.distributed import dist_env

NEGATIVE_PROMPT = " "  # what the model cards give where nothing is to be kept away
_DTYPES = ("bfloat16", "float32")
_OWN = re.compile(r"(?:compare-)?(\d{4,})(?:-without)?\.png")  # what `beside` and `_paths` call pictures
_STOCK_MULTIPLE = 32  # to which the stock pipelines round the sides of a picture whose size is not given
T = TypeVar("T")


class Text(NamedTuple):
    """A prompt beside the images that the text encoder sees with it, and their areas as the family takes them."""

    prompt: str
    images: tuple[Path, ...]
    areas: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Wanted:
    """One picture to be made."""

    path: Path  # of the PNG file
    text: Text
    negative: Text | None  # with guidance
    size: Size
    seed: int


@dataclass(frozen=True)
class Request:
    """All that `sample` needs."""

    result: RunResult
    base: Base
    wanted: tuple[Wanted, ...]
    steps: int
    guidance: float
    device: torch.device
    dtype: torch.dtype
    quantize: Method | None  # of the base's weights
    compare: bool  # each picture without the trained weights too


class _Problems(list[str]):
    def tried(self, make: Callable[..., T | None], *arguments: Any) -> T | None:
        """What `make` returns; None where it raises, and its problems are kept."""
        try:
            return make(*arguments)
        except UserError as error:
            self += error.messages
            return None


def make_request(
    *,
    lora: str | None = None,
    out: str | None = None,
    image: Sequence[str] | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
    base: str | None = None,
    size: str | None = None,
    negative_prompt: str | None = None,
    compare: bool = False,
    **settings: str | None,
) -> Request:
    """The options of the command line, as text; `settings` are those of `_settings`.

    Raises:
        UserError: one line for every problem of all of them.
    """
    problems = _Problems(_missing(lora, out, image, prompt, prompts))
    result = None if lora is None else problems.tried(find_result, lora, "--lora")
    how = _settings(problems, result, **settings)
    negative = problems.tried(_negative, negative_prompt, how["guidance"] != 1)
    fixed = problems.tried(_option_size, size)
    rows = _rows(problems, image or (), prompt, prompts)
    sizes = _image_sizes(problems, rows)
    found = problems.tried(find_base, result, base, "--base") if result else None
    if found:
        problems += _fit_problems(found, rows, negative, fixed)
        problems.tried(_check_lengths, found, rows, negative)
    folder = Path(out or ".").expanduser()
    problems += _out_problems(folder)
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    assert result and found
    seed = how.pop("seed")
    wanted = [
        _wanted(found, path, row, row.size or fixed or _stock_size(found, row, sizes), seed, negative)
        for path, row in zip(_paths(folder, len(rows)), rows, strict=True)
    ]
    return Request(result, found, tuple(wanted), compare=compare, **how)


def _settings(
    problems: _Problems,
    result: RunResult | None,
    *,
    steps: str | None = None,
    seed: str | None = None,
    guidance: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    place = problems.tried(_device, device)
    return {
        "steps": problems.tried(_number, "--steps", steps, SampleConfig().steps, int, 2, 1000),
        "seed": problems.tried(_number, "--seed", seed, 0, int, 0, MAX_SEED),
        "guidance": problems.tried(_number, "--guidance", guidance, 1.0, float, 1.0, 100.0),
        "device": place,
        "dtype": problems.tried(_dtype, dtype, place),
        "quantize": problems.tried(find_quantization, result, quantize, "--quantize", place)
        if result and place
        else None,
    }


def _wanted(base: Base, path: Path, row: Row, size: Size, seed: int, negative: str | None) -> Wanted:
    areas = tuple(base.areas(size).items())
    text = Text(row.prompt, row.images, areas)
    return Wanted(
        path=path,
        text=text,
        negative=None if negative is None else text._replace(prompt=negative),
        size=size,
        seed=seed if row.seed is None else row.seed,
    )


def _missing(
    lora: str | None, out: str | None, image: Sequence[str] | None, prompt: str | None, prompts: str | None
) -> Iterator[str]:
    if lora is None:
        yield "--lora: not given; write --lora RUN, a run folder, or a .safetensors file"
    if out is None:
        yield "--out: not given; write --out DIR, a folder for the pictures"
    if prompt is None and prompts is None:
        yield "--prompt: not given; write --prompt TEXT, or --prompts FILE"
    for name, value in (("--prompt", prompt), ("--image", image)):
        if prompts is not None and value is not None:
            yield f"{name}: given with --prompts, whose lines say it: leave one of the two out"


def _rows(problems: _Problems, image: Sequence[str], prompt: str | None, prompts: str | None) -> list[Row]:
    if prompts is not None:
        rows, wrong = problems.tried(rows_of, Path(prompts).expanduser()) or ([], [])
        problems += wrong
        return rows
    row = None if prompt is None else problems.tried(given_row, prompt, image)
    return [row] if row else []


def _number(option: str, text: str | None, default: T, kind: Callable[[str], T], least: Any, most: Any) -> T:
    try:
        value: Any = default if text is None else kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        what = "an integer" if kind is int else "a number"
        raise UserError(f"{option}: given {text}, allowed: {what} >= {least} and <= {most}")
    return value  # type: ignore[no-any-return]


def _negative(text: str | None, guided: bool) -> str | None:
    """The negative prompt, where there is guidance."""
    if text is not None and not guided:
        raise UserError("--negative-prompt: has no effect without guidance: give --guidance above 1, or leave it out")
    try:
        check_caption(text or "")
    except BadCaptionError as error:
        raise UserError(f"--negative-prompt: {error}; change it") from error
    return (NEGATIVE_PROMPT if text is None else text) if guided else None


def _option_size(text: str | None) -> Size | None:
    try:
        return None if text is None else parsed_size(text)
    except ValueError as error:
        raise UserError(f"--size: {error}; change it") from error


def _device(text: str | None) -> torch.device:
    try:
        device = dist_env().device if text is None else torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device: {text} cannot be used: {str(error).partition(chr(10))[0]}; choose another"
        ) from error
    return device


def _dtype(text: str | None, device: torch.device | None) -> torch.dtype:
    name = text or ("float32" if device is None or device.type == "cpu" else "bfloat16")
    if name not in _DTYPES:
        raise UserError(f"--dtype: given {text}, allowed: one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _image_sizes(problems: _Problems, rows: Sequence[Row]) -> dict[Path, Size]:
    """The upright size of every image that can be used; each is decoded once."""
    sizes = {}
    for path, where in {path: row.images_at for row in rows for path in row.images}.items():
        try:
            sizes[path] = inspect_image(path, LIMITS).size
        except BadImageError as error:
            problems.append(f"{where}: {printable(path)}: {error}")
    return sizes


def _fit_problems(base: Base, rows: Sequence[Row], negative: str | None, fixed: Size | None) -> Iterator[str]:
    """What of the rows this base cannot take."""
    family, token = base.family, base.pixels_per_token
    fewest = family.controls[0]
    for row in rows:
        if problem := family.record_problem(controls=len(row.images), prompt=""):
            yield f"{row.images_at}: {problem}"
    for where, prompt in [*((row.prompt_at, row.prompt) for row in rows), ("--negative-prompt", negative or "")]:
        if problem := family.record_problem(controls=fewest, prompt=prompt):
            yield f"{where}: {problem}"
    for where, size in [("--size", fixed), *((row.size_at, row.size) for row in rows)]:
        if size and (size.width % token or size.height % token):
            near = target_size(size, max_pixels=LIMITS.max_source_pixels, multiple_of=token)
            yield f"{where}: {size} has a side that is no multiple of {token}, the pixels of a token: write {near}"


def _check_lengths(base: Base, rows: Sequence[Row], negative: str | None) -> None:
    """Raises UserError with every prompt that is too long for the text encoder."""
    at = {row.prompt: row.prompt_at for row in rows} | ({negative: "--negative-prompt"} if negative else {})
    long, most = base.family.over_long(at), base.family.max_prompt_tokens
    if long:
        told = {at[text]: f"the prompt is {tokens} tokens long, more than {most}" for text, (tokens, _) in long.items()}
        raise UserError([f"{where}: {reason}: shorten it" for where, reason in told.items()])


def _stock_size(base: Base, row: Row, sizes: Mapping[Path, Size]) -> Size:
    """What the stock pipelines make where no size is given: their area, at the aspect of the last image, or square."""
    return base.family.default_size(sizes[row.images[-1]] if row.images else None)


def _paths(folder: Path, count: int) -> list[Path]:
    """`0001.png` and so on, behind what earlier calls have left in the folder."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    there = [int(match[1]) for name in names if (match := _OWN.fullmatch(name))]
    last = max(there, default=0) + count
    digits = max(4, len(str(last)))
    return [folder / f"{number:0{digits}d}.png" for number in range(last - count + 1, last + 1)]


def _out_problems(folder: Path) -> Iterator[str]:
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not there.is_dir():
        yield f"--out: {printable(there)} is no folder: choose another"
    elif not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        yield f"--out: {printable(there)} cannot be written: choose another folder"


def beside(path: Path) -> tuple[Path, Path]:
    """Where the picture without the trained weights goes, and the sheet whose first row it is."""
    return path.with_name(f"{path.stem}-without.png"), path.with_name(f"compare-{path.stem}.png")
