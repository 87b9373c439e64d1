"""The verb `sample`: images from what a run has trained, of any sizes in one batch.

Promise: the images are those of a process without mixres, for the same base, LoRA, controls, prompt and seed, over the
base quantised as under the LoRA in training. Each PNG records its settings. What an interrupted command has made is
kept: the same command makes the rest. Cost: one decode of each control; the text encoder once a prompt with its
controls and size, of the images that are to be made, then released; then one forward call a step and batch, twice the
tokens with guidance, two passes with `compare`. Embeddings wait in memory, 10 MB a prompt for Qwen-Image-Edit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mixres import atomic
from mixres.batch import TextEmbeds
from mixres.console import counted, log, progress
from mixres.data.images import WHITE, BadImageError, read_image
from mixres.data.records import printable
from mixres.errors import WorkError
from mixres.geometry import token_count
from mixres.inference.artifact import renamed
from mixres.inference.compare import BASE, TARGET, Comparison, comparison_grid, comparison_page
from mixres.inference.sample_request import LIMITS, RECORD, ImageJob, Request, settings_of
from mixres.models.family import ControlSizes
from mixres.models.lora import attach
from mixres.preprocessing.fill import release
from mixres.training.denoising import ImageInputs, image_inputs, make_images, microbatches
from mixres.training.sample_sheets import save_png

_GRID_ROWS = 12
Embeds = tuple[TextEmbeds, TextEmbeds | None]  # of a prompt and, with guidance, of the negative one


def sample(request: Request) -> None:
    """Make all images of `request`, and with `compare` the grids and pages that show them side by side.

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
        _write_comparisons(request)
    log(f"images    {printable(folder)}")


def _make_images(request: Request) -> None:
    """Make and save every image that is not there yet."""
    result, every = request.result, [(job, trained) for trained in request.passes for job in request.jobs]
    missing = [(job, trained) for job, trained in every if not job.file(trained).exists()]
    if len(missing) < len(every):
        log(f"image     {len(every) - len(missing)} of {len(every)} are there already")
    if not missing:
        return
    # In the batches of an unbroken command: in others the numbers would round otherwise.
    batches = [request.jobs[part.start : part.stop] for part in _microbatches(request)]
    gone = {job for job, _ in missing}
    embeds, pipeline = _encode(request, [job for batch in batches if gone & set(batch) for job in batch]), None
    with progress(len(missing), "sample", "image") as stepped:
        for trained in dict.fromkeys(trained for _, trained in missing):
            if pipeline is None or not result.lora:
                pipeline = None  # it may have to go before there is room for the next
                release(request.device)
                pipeline = _load(request, result.path if trained and not result.lora else None)
            if trained and result.lora:
                pipeline.remove_all_hooks()  # loading would put them back, for a device of its own choice
                attach(pipeline, result.lora)
            if request.options.offload:
                pipeline.enable_model_cpu_offload(device=request.device)
            for jobs in batches:
                if wanted := [job for job in jobs if (job, trained) in missing]:
                    inputs = [_inputs(request, pipeline, job, embeds[job]) for job in jobs]
                    made = _make(request, pipeline, jobs, inputs, len(wanted), stepped)
                    for job in wanted:
                        _save_image(request, job, made[job], trained)


def _microbatches(request: Request) -> list[range]:
    """Which images are made together; before anything is encoded, so that what is there already needs no encoder."""
    family = request.family
    preprocessors, tokens = family.load_preprocessors(), []
    for job in request.jobs:
        image = token_count(family.grids(job.size, job.control_sizes))
        texts = [job.prompt] if job.negative is None else [job.prompt, job.negative]
        lengths = (family.text_tokens(preprocessors, prompt=text, sizes=job.control_sizes) for text in texts)
        tokens.append(sum(image + length for length in lengths))
    return list(microbatches(tokens, request.options.batch_tokens))


def _make(
    request: Request,
    pipeline: Any,
    jobs: Sequence[ImageJob],
    inputs: Sequence[ImageInputs],
    counted_as: int,
    stepped: Callable[[float], None],
) -> dict[ImageJob, Image.Image]:
    def images_done(part: float) -> None:
        stepped(part * counted_as)

    with _enough_memory(request, jobs):
        images = make_images(request.family, pipeline, inputs, steps=request.options.steps, stepped=images_done)
    return dict(zip(jobs, images, strict=True))


def _save_image(request: Request, job: ImageJob, image: Image.Image, trained: bool) -> None:
    if job.restored_size:
        image = image.resize(job.restored_size, Image.Resampling.LANCZOS)
    path = job.file(trained)
    if path.exists():
        raise WorkError(f"{path} is there by now and is not overwritten: choose another --out")
    save_png(image, path, **{RECORD: settings_of(request, job, trained)})
    log(f"image     {path.name}: {job.size}, {request.options.steps} steps")


def _encode(request: Request, jobs: Sequence[ImageJob]) -> dict[ImageJob, Embeds]:
    """The embeddings of these images; the text encoder is gone then."""
    family, device = request.family, request.device
    encoders = family.load_encoders(dtype=getattr(torch, request.dtype), device=device)

    @cache
    def embeds(prompt: str, controls: tuple[Path, ...], sizes: ControlSizes) -> TextEmbeds:
        return family.encode_prompt(encoders, controls=_read(request, controls), prompt=prompt, sizes=sizes)

    encoded: dict[ImageJob, Embeds] = {}
    for job in counted(jobs, "encode", "prompt", enabled=True):
        seen = ((), ControlSizes()) if family.prompts_alone else (job.controls, job.control_sizes)
        negative = None if job.negative is None else embeds(job.negative, *seen)
        encoded[job] = embeds(job.prompt, *seen), negative
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
    limits = replace(LIMITS, background=request.result.recipe.get("background", WHITE))
    images = []
    for path in controls:
        try:
            images.append(read_image(path, limits, keep_alpha=request.family.keeps_alpha))
        except BadImageError as error:
            again = "the image changed after the start: run the command again"
            raise WorkError(f"{printable(path)}: {error} ({again})") from error
    return images


def _write_comparisons(request: Request) -> None:
    """A grid and a page for some images each: their controls, both of them, and their targets."""
    for first in range(0, len(request.jobs), _GRID_ROWS):
        jobs = request.jobs[first : first + _GRID_ROWS]
        path = jobs[0].path.with_name(f"compare-{jobs[0].path.name}")
        columns = max(len(job.controls) for job in jobs)
        inputs = ["input"] if columns == 1 else [f"input {number}" for number in range(1, columns + 1)]
        rows = [_comparison(request, job, inputs) for job in jobs]
        # Always: the same command may have got more images since, or targets.
        save_png(comparison_grid(rows), path, [row.prompt for row in rows])
        atomic.write_text(path.with_suffix(".html"), comparison_page(rows, f"{rows[0].name} to {rows[-1].name}"))


def _comparison(request: Request, job: ImageJob, inputs: Sequence[str]) -> Comparison:
    trained = "LoRA" if request.result.lora else "trained"
    images = dict(zip(inputs, _read(request, job.controls), strict=False))
    images |= {name: Image.open(job.file(which)) for name, which in ((BASE, False), (trained, True))}
    if job.target:
        (images[TARGET],) = _read(request, [job.target])
    return Comparison(job.path.name, images, job.prompt, f"{job.size}, seed {job.seed}")
