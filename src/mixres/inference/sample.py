"""The verb `sample`: pictures from what a run has left, through the stock pipeline of its base.

Promise: what a process without mixres makes of the same base, LoRA, images, prompt and seed, over the base quantised as
under the LoRA in training; each PNG says how it was made. Cost: the text encoder once a prompt and its images, then
released; then the denoising loop once a picture, twice with `compare` or guidance, four times with both. Embeddings
wait in memory, 10 MB a prompt for Qwen-Image-Edit.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mixres import __version__
from mixres.console import counted, log
from mixres.data.images import BadImageError, read_image
from mixres.data.records import printable
from mixres.errors import UserError, WorkError
from mixres.inference.artifact import renamed
from mixres.inference.sample_request import Request, Text, Wanted, beside
from mixres.inference.sample_rows import LIMITS
from mixres.preprocessing.fill import release
from mixres.training.sample_sheets import Row, contact_sheet, save_png

_SHEET_ROWS = 12


def sample(request: Request) -> None:
    """Make all pictures of `request`, and with `compare` the sheets that show them side by side.

    Raises:
        UserError: the base's weights cannot be loaded, or the folder cannot be made.
        WorkError: an image has changed since the request, a picture is there by now, or memory does not suffice.
    """
    folder = request.wanted[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {printable(folder)} cannot be made: {error.strerror}; name another folder") from error
    dtype = str(request.dtype).removeprefix("torch.")
    rounded = f", weights in {request.quantize}" if request.quantize else ""
    log(f"model     {request.base.path}, {dtype}{rounded} on {request.device}")
    log(f"weights   {printable(request.result.path)}")
    try:
        made = _make(request)
    except UserError as error:
        raise renamed(error, "--base") from error
    if request.compare:
        _write_sheets(request)
    log(f"pictures  {made} in {printable(folder)}")


def _make(request: Request) -> int:
    """Make and save every picture; how many there are."""
    digest = request.result.digest()
    embeds = _encoded(request)
    release(request.device)
    jobs = [(trained, one) for trained in ((False, True) if request.compare else (True,)) for one in request.wanted]
    pipelines, pipeline, current = _pipelines(request), None, None
    for trained, one in counted(jobs, "sample", "picture", enabled=True):
        if trained is not current:
            pipeline = None  # it may have to go before there is room for the next
            pipeline, current = next(pipelines), trained
        path = one.path if trained else beside(one.path)[0]
        log(f"picture   {path.name}: {one.size}, {request.steps} steps")
        picture = _picture(request, pipeline, one, embeds)
        settings = json.dumps(_settings(request, one, digest if trained else None), ensure_ascii=False)
        _save(picture, path, mixres=settings)
    return len(jobs)


def _encoded(request: Request) -> dict[Text, Tensor]:
    """The embeddings `(T, D)` of each prompt beside its images, on the CPU; the text encoder is gone then."""
    family = request.base.family
    texts = dict.fromkeys(text for one in request.wanted for text in (one.text, one.negative) if text)
    encoders = family.load_encoders(dtype=request.dtype, device=request.device)
    return {
        text: family.encode_prompt(
            encoders, controls=_read(request, text.images), prompt=text.prompt, areas=dict(text.areas)
        )
        for text in counted(texts, "encode", "prompt", enabled=True)
    }


def _pipelines(request: Request) -> Iterator[Any]:
    """The stock pipeline as it is, where that is to be compared with, then with the trained weights."""
    if request.result.lora:
        pipeline = _load(request, None)
        if request.compare:
            yield pipeline
        pipeline.load_lora_weights(request.result.path)
        yield pipeline
    else:
        if request.compare:
            yield _load(request, None)
            release(request.device)
        yield _load(request, request.result.path)


def _load(request: Request, trained: Path | None) -> Any:
    family, dtype, device = request.base.family, request.dtype, request.device
    transformer = family.load_transformer(trained=trained, quantize=request.quantize, dtype=dtype, device=device)
    pipeline = family.load_sampling_pipeline(transformer=transformer, dtype=dtype, device=device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)  # a picture may take minutes
    return pipeline


def _picture(request: Request, pipeline: Any, one: Wanted, embeds: dict[Text, Tensor]) -> Image.Image:
    try:
        picture = request.base.family.sample_image(
            pipeline,
            controls=_read(request, one.text.images),
            prompt_embeds=embeds[one.text],
            size=one.size,
            steps=request.steps,
            seed=one.seed,
            negative_embeds=embeds[one.negative] if one.negative else None,
            guidance=request.guidance,
            areas=dict(one.text.areas),
        )
    except torch.OutOfMemoryError as error:
        raise WorkError(f"{request.device} is out of memory at {one.size}: give a smaller --size") from error
    return picture


def _read(request: Request, images: Sequence[Path]) -> list[Image.Image]:
    limits = replace(LIMITS, background=request.result.background)
    try:
        return [read_image(path, limits) for path in images]
    except BadImageError as error:
        raise WorkError(f"{error} (an image changed after the start: run the command again)") from error


def _settings(request: Request, one: Wanted, digest: str | None) -> dict[str, Any]:
    """What the PNG says of itself; `digest` is that of the trained weights, None without them."""
    base = request.base
    return {
        "prompt": one.text.prompt,
        "negative_prompt": one.negative.prompt if one.negative else None,
        "guidance": request.guidance,
        "seed": one.seed,
        "steps": request.steps,
        "size": str(one.size),
        "images": [printable(path) for path in one.text.images],
        **dict(one.text.areas),
        "lora": None if digest is None else printable(request.result.path),
        "lora_xxh3": digest,
        "base": base.path,
        "revision": base.revision,
        "dtype": str(request.dtype).removeprefix("torch."),
        "quantize": request.quantize,
        "mixres": __version__,
    }


def _save(picture: Image.Image, path: Path, **texts: str) -> None:
    if path.exists():
        raise WorkError(f"{path} is there by now and is not written over: choose another --out")
    save_png(picture, path, **texts)


def _write_sheets(request: Request) -> None:
    """Images, the picture without the trained weights and the one with them; some rows a sheet."""
    for first in range(0, len(request.wanted), _SHEET_ROWS):
        some = request.wanted[first : first + _SHEET_ROWS]
        columns = max(len(one.text.images) for one in some)
        rows = [_sheet_row(request, one, columns) for one in some]
        headings = [f"image {number}" for number in range(1, columns + 1)]
        sheet = contact_sheet((*headings, "without", "with"), rows)
        _save(sheet, beside(some[0].path)[1], **{f"caption-{n}": row.caption for n, row in enumerate(rows)})


def _sheet_row(request: Request, one: Wanted, columns: int) -> Row:
    images = _read(request, one.text.images)
    empty = [None] * (columns - len(images))
    made = []
    for path in (beside(one.path)[0], one.path):
        with Image.open(path) as picture:
            made.append(picture.convert("RGB"))
    return Row((*images, *empty, *made), one.text.prompt, f"{one.path.name}, {one.size}, seed {one.seed}")
