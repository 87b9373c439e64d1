"""Held-out samples while training, in one grid of images.

Promise: the grid shows what the stock pipeline makes of the current weights, at the samples' own sizes, from the
latents and embeddings of the cache. The training is untouched: random generators of its own, no mode left behind.
Cost: `sample.steps` forward calls for as many rows as fit into `batch.max_tokens`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import nn

from mixres import atomic
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.images import read_image
from mixres.data.records import Picture
from mixres.models.family import Family
from mixres.preprocessing.fill import CachedData, spread
from mixres.preprocessing.samples import CachedSample
from mixres.preprocessing.training_data import image_limits
from mixres.training.denoising import ImageInputs, from_noise, make_images, microbatches
from mixres.training.distributed import device_of
from mixres.training.drift import NOT_INSTALLED, Drift, drift_line, is_installed, measure_drift
from mixres.training.ema import Ema
from mixres.training.run_folder import RunFolder
from mixres.training.setup import TrainState
from mixres.training.side_work import attempt, prepared

ROWS = 6
_CELL, _GAP, _HEAD, _CAPTION = 224, 12, 28, 44
_FONT_SIZE = 14
_CHECK, _CHECK_GREYS = 8, (204, 255)  # pixels of a side, and its two greys
# Fonts of Linux, macOS and Windows that hold Chinese; last, DejaVu, which most systems have and which does not.
_SYSTEM_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc", "DejaVuSans.ttf")


@dataclass(frozen=True)
class Row:
    """One row of a sample grid; None is an empty cell."""

    images: tuple[Image.Image | None, ...]
    caption: str
    note: str


class HeldOutSampler:
    """Predicts a few held-out samples of several sizes, always the same ones and from the same noise."""

    def __init__(
        self, config: Config, family: Family, transformer: nn.Module, encoded: CachedData, ema: Ema | None = None
    ) -> None:
        self.ema = ema if config.sample.use_ema else None
        self.config, self.family, self.encoded = config, family, encoded
        self.items = spread(encoded.held_out, ROWS)
        self.controls = max((len(item.record.controls) for item in self.items), default=0)
        parameter = next(transformer.parameters())
        device = device_of(parameter)
        self.pipeline = family.load_sampling_pipeline(transformer=None, dtype=parameter.dtype, device=device)
        self.pipeline.register_modules(transformer=transformer)  # loading would move what waits in host memory
        # Where all weights train they are float32; the file that is written, and what it will draw, are not.
        dtype = getattr(torch, config.model.dtype)
        self._autocast = partial(
            torch.autocast, device.type, dtype, enabled=parameter.dtype != dtype, cache_enabled=False
        )

    def predictions(
        self,
        positions: Sequence[int],
        stop_requested: Callable[[], bool] = lambda: False,
        *,
        lockstep: bool = False,
    ) -> dict[int, Image.Image] | None:
        """The images of the samples at these positions in `items`; None where the run is asked to stop before one.

        `lockstep`: all ranks make the same images together, as each of them holds a part of the weights.
        """
        chosen, made = [self.items[position] for position in positions], []
        tokens = [item.lengths.image + item.lengths.text for item in chosen]
        with self.ema.averaged() if self.ema else nullcontext():
            for part in microbatches(tokens, self.config.batch.max_tokens):
                read = partial(self._inputs, [chosen[position] for position in part])
                inputs = prepared(read, stop_requested=stop_requested(), lockstep=lockstep)
                if inputs is None:
                    return None
                made += self._make(inputs)
        return dict(zip(positions, made, strict=True))

    def write(self, path: Path, made: Mapping[int, Image.Image]) -> tuple[Image.Image, dict[str, float]]:
        """Save the grid of the images of all samples and return it and its mean drift.

        Where the file cannot be written, the reason is logged.
        """
        pairs = [(item, made[position]) for position, item in enumerate(self.items)]
        drifts = [self.drift(*each) for each in pairs]
        rows = [self._row(*each, drift) for each, drift in zip(pairs, drifts, strict=True)]
        controls = [f"control {number}" for number in range(1, self.controls + 1)] if self.controls > 1 else ["control"]
        headings = (*controls[: self.controls], "target", "prediction")
        grid = image_grid(headings, rows)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(grid, path, [row.caption for row in rows])
        except OSError as error:
            log(f"samples   {path} could not be written ({error.strerror or error}): the run continues without it")
        return grid, drift_line(drifts)

    def predict(self, item: CachedSample) -> Image.Image:
        """The image for one held-out sample, at the size of its target."""
        (image,) = self._make(self._inputs([item]))
        return image

    def _inputs(self, items: Sequence[CachedSample]) -> list[ImageInputs]:
        samples = map(self.encoded.read, items)
        noisy = (from_noise(self.family, self.pipeline, sample, seed=self.config.train.seed) for sample in samples)
        embedded = self.family.embedded_guidance()
        return [ImageInputs(sample, guidance=embedded and embedded.sampling) for sample in noisy]

    def _make(self, inputs: Sequence[ImageInputs]) -> list[Image.Image]:
        with self._autocast():
            return make_images(self.family, self.pipeline, inputs, steps=self.config.sample.steps)

    def drift(self, item: CachedSample, made: Image.Image) -> Drift | None:
        """That of a predicted image against its target; against its input where the target is too unlike it."""
        drift = measure_drift(made, self.read(item.record.target))
        if drift is None and item.control_sizes.vae[:1] == (item.target_size,):
            drift = measure_drift(made, self.read(item.record.controls[0]))
        return drift

    def read(self, path: Picture) -> Image.Image:
        """A held-out image as it is on disk, RGB."""
        return read_image(path, image_limits(self.config), keep_alpha=self.family.keeps_alpha)

    def _row(self, item: CachedSample, made: Image.Image, drift: Drift | None) -> Row:
        controls = [self.read(path) for path in item.record.controls]
        empty = [None] * (self.controls - len(controls))
        sizes = [f"control {control.width}x{control.height}" for control in controls]
        target = self.read(item.record.target)
        images = (*controls, *empty, target, made)
        own = f"target {target.width}x{target.height}"
        trained = f", trained and predicted at {item.target_size}" if target.size != item.target_size else ""
        found = f"; {drift}" if drift else ""
        return Row(images, item.record.prompt, ", ".join([*sizes, own]) + trained + found)


def grid_writer(
    trained: TrainState,
    encoded: CachedData,
    run: RunFolder,
    show: Callable[[str, Image.Image, int], None],
    sinks: Sequence[Callable[[Mapping[str, Any]], None]],
) -> Callable[[int], None] | None:
    """What writes the grid of a step into `samples/` of the run folder, on all ranks; None where there is none.

    The ranks divide the images, so that no rank works while all others wait; of split weights they make each image
    together. Where that fails there is no grid; the reason is logged. `show` gets each grid with its name and step,
    each of `sinks` the line of metrics with its drift.
    """
    config, accelerator = trained.config, trained.accelerator
    if not (config.sample.every and encoded.held_out):
        return None
    sampler = HeldOutSampler(config, trained.family, trained.transformer, encoded, trained.ema)
    if run.is_main and not is_installed():
        log(f"samples   {NOT_INSTALLED}")
    # Split weights are gathered block by block as they are used: then every rank has to take part.
    lockstep = config.train.parallel == "fsdp2"
    own = range(len(sampler.items))
    if not lockstep:
        own = own[accelerator.process_index :: accelerator.num_processes]

    def predict() -> dict[int, Image.Image] | None:
        made = sampler.predictions(own, lambda: run.stop_requested, lockstep=lockstep)
        return made if made is None or run.is_main or not lockstep else {}

    def save(step: int, parts: Sequence[dict[int, Image.Image] | None]) -> None:
        if not run.is_main or None in parts:  # a stop was requested
            return
        made = {position: image for part in parts if part for position, image in part.items()}
        grid, line = sampler.write(run.folder / "samples" / f"step-{step:08d}.png", made)
        show("samples", grid, step)
        for sink in sinks if line else ():
            sink({"step": step, **line})

    def write(step: int) -> None:
        parts = attempt(predict, lockstep=lockstep)
        saved = parts if isinstance(parts, str) else attempt(partial(save, step, parts))
        if isinstance(saved, str) and run.is_main:
            log(f"samples   step {step}: no grid ({saved}): the run continues without it")

    return write


def image_grid(headings: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """A grid of images: rows under column headings, each image scaled to fit its cell with its aspect kept."""
    fonts = _fonts()
    font = fonts[0]
    width = _GAP + len(headings) * (_CELL + _GAP)
    heights = [max(_fitted(image).height for image in row.images if image) + _CAPTION + 6 for row in rows]
    canvas = Image.new("RGB", (width, _HEAD + sum(heights) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        draw.text((_left(column), 6), heading, fill="black", font=font)
    top = _HEAD
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row.images):
            if image:
                canvas.paste(_fitted(image), (_left(column), top))
        base = top + height - _CAPTION
        caption, own = _drawable(row.caption, fonts)
        draw.text((_GAP, base), caption, fill="black", font=own)
        draw.text((_GAP, base + 17), row.note, fill="gray", font=font)
        top += height
    return canvas


def save_png(image: Image.Image, path: Path, captions: Sequence[str] = (), **texts: str) -> None:
    """Write `image` in one rename; captions and texts, in any script, go into its metadata too."""
    info = PngInfo()
    for name, text in {**{f"caption-{number}": caption for number, caption in enumerate(captions)}, **texts}.items():
        info.add_itxt(name, text)
    with atomic.replace(path) as tmp:
        image.save(tmp, format="PNG", pnginfo=info)


def _left(column: int) -> int:
    return _GAP + column * (_CELL + _GAP)


def _fitted(image: Image.Image) -> Image.Image:
    """At the size of a cell; what is transparent shows a checkerboard."""
    scale = min(_CELL / image.width, _CELL / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    if image.mode != "RGBA":
        return image
    columns, rows = (np.arange(side) // _CHECK for side in size)
    board = np.where((rows[:, None] + columns) % 2, *_CHECK_GREYS).astype(np.uint8)
    return Image.alpha_composite(Image.fromarray(board).convert("RGBA"), image).convert("RGB")


def _fonts() -> list[Any]:
    """The fonts that are found, Pillow's own last."""
    names, found = list(_SYSTEM_FONTS), []
    if find_spec("pylopdf_fonts_zh_cn"):  # Noto Sans SC, from the extra `demo`
        from pylopdf_fonts_zh_cn import sans_path

        names.insert(0, str(sans_path()))
    for name in names:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, _FONT_SIZE))
    return [*found, ImageFont.load_default(_FONT_SIZE)]


def _drawable(text: str, fonts: Sequence[Any]) -> tuple[str, Any]:
    """The text and the first font that has its script, or where to find it: boxes would show nothing."""
    for font in fonts:
        missing = font.getmask("\uffff").getbbox(), font.getmask("\U0010fffe").getbbox()
        if not any(ord(c) > 0x2FF and font.getmask(c).getbbox() in missing for c in text):
            return text, font
    return "(no font here draws this prompt: it stands in the file's metadata)", fonts[0]
