"""Draws the figures on positions of docs/multi_resolution.md from the code that trains.

Usage: `python scripts/position_figures.py`. The errors are written to docs/results/positions.json too.

Promise: every number in a figure comes from `mixres.models.qwen.rope` or from a forward call of the tiny base; none
is written by hand. It takes about ten seconds.
"""

import argparse
import json
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixres.models.qwen.rope import MultiResolutionRope, Shape, image_positions, text_positions
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.tiny_pipeline import write_tiny_pipeline

IMAGES = Path(__file__).parents[1] / "docs" / "images"
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "positions.json"
AXES = ("frame", "row", "column")
AXES_DIM = (16, 56, 56)  # of Qwen-Image: 128 channels a head
THETA = 10_000
COLOURS = ("#b5493b", "#2f6f9f", "#4b8b3b", "#8a6fae")
INK, FAINT = "#222222", "#d9d9d9"

# One batch: target and control of each sample. Sample 0 has the most tokens, so that its table is long enough for all.
MIX: tuple[list[Shape], ...] = (
    [(1, 24, 24), (1, 16, 16)],
    [(1, 20, 28), (1, 14, 18)],
    [(1, 16, 32), (1, 12, 20)],
)
TEXT_TOKENS = (30, 12, 50)


@dataclass(frozen=True)
class Errors:
    """Relative error of each sample's target tokens in the batch, against the stock model on that sample alone."""

    text_of_sample_0: list[float]  # only the text positions are those of sample 0
    image_of_sample_0: list[float]  # only the image positions are those of sample 0
    stock: list[float]  # the stock forward: all positions of sample 0, and image padding attended to
    patched: list[float]


def qwen_rope() -> MultiResolutionRope:
    """The positions of Qwen-Image."""
    return MultiResolutionRope(QwenEmbedRope(theta=THETA, axes_dim=list(AXES_DIM), scale_rope=True))


@torch.no_grad()
def measure(base: Path) -> Errors:
    """The mixed batch `MIX` through the transformer of the pipeline `base`, in float32."""
    stock = QwenImageTransformer2DModel.from_pretrained(base, subfolder="transformer", use_safetensors=True).eval()
    draw = torch.Generator().manual_seed(0)
    images = [_normal(_tokens(shapes), stock.config.in_channels, draw) for shapes in MIX]
    texts = [_normal(count, stock.config.joint_attention_dim, draw) for count in TEXT_TOKENS]
    sigmas = torch.rand(len(MIX), generator=draw)
    alone = [
        stock(image[None], text[None], None, sigma[None], [shapes], return_dict=False)[0][0]
        for image, text, sigma, shapes in zip(images, texts, sigmas, MIX, strict=True)
    ]
    valid = pad_sequence([torch.ones(count, dtype=torch.bool) for count in TEXT_TOKENS], batch_first=True)
    call = {
        "hidden_states": pad_sequence(images, batch_first=True),
        "encoder_hidden_states": pad_sequence(texts, batch_first=True),
        "encoder_hidden_states_mask": valid,
        "timestep": sigmas,
        "img_shapes": [*MIX],
        "return_dict": False,
    }
    logger = logging.getLogger("diffusers.models.transformers.transformer_qwenimage")
    logger.disabled = True  # it warns of different sizes, which is what is measured
    stock_output = stock(**call)[0]
    logger.disabled = False
    patched = patch_qwen_model_for_multi_resolution(stock)
    own = patched.pos_embed.padded_frequencies(list(MIX), images[0].shape[0], max(TEXT_TOKENS), None)
    first = patched.pos_embed([MIX[0]], max_txt_seq_len=max(TEXT_TOKENS))

    def errors(output: Tensor) -> list[float]:
        return [_error(out, ref, shapes) for out, ref, shapes in zip(output, alone, MIX, strict=True)]

    return Errors(
        text_of_sample_0=errors(patched(**call, image_rotary_emb=(own[0], first[1]))[0]),
        image_of_sample_0=errors(patched(**call, image_rotary_emb=(first[0], own[1]))[0]),
        stock=errors(stock_output),
        patched=errors(patched(**call)[0]),
    )


def _normal(tokens: int, width: int, draw: torch.Generator) -> Tensor:
    return torch.randn(tokens, width, generator=draw)


def _tokens(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _error(output: Tensor, reference: Tensor, shapes: Sequence[Shape]) -> float:
    target = math.prod(shapes[0])
    return float((output[:target] - reference[:target]).norm() / reference[:target].norm())


class Sheet:
    """A white image with a font that lies inside Pillow."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.text((16, 10), title, size=17)

    def text(
        self, at: tuple[float, float], text: str, *, size: int = 14, colour: str = INK, anchor: str | None = None
    ) -> None:
        self.draw.text(at, text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)

    def line(self, *points: tuple[float, float], colour: str = INK, width: int = 1) -> None:
        self.draw.line(points, fill=colour, width=width)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.draw.rectangle((left, top, right, bottom), fill=colour)


def frequencies_figure() -> Image.Image:
    """Wavelength of every channel pair, read off the table: its phase one step along the pair's own axis."""
    sheet = Sheet(900, 430, "Wavelength of each channel pair of a head, in tokens along its axis")
    step = qwen_rope().frequencies(torch.ones(1, 3, dtype=torch.int64), None)[0].angle()
    left, top, bottom, scale = 90, 60, 350, 12.0
    decades = 5

    def height(wavelength: float) -> float:
        return bottom - (bottom - top) * math.log10(wavelength) / decades

    for decade in range(decades + 1):
        sheet.line((left, height(10**decade)), (left + scale * len(step), height(10**decade)), colour=FAINT)
        sheet.text((left - 10, height(10**decade)), f"{10**decade:,}", anchor="rm")
    starts = [0, AXES_DIM[0] // 2, (AXES_DIM[0] + AXES_DIM[1]) // 2]
    for pair, angle in enumerate(step.tolist()):
        axis = sum(pair >= start for start in starts[1:])
        x = left + scale * (pair + 0.5)
        sheet.box(x - 4, height(2 * math.pi / angle), x + 4, bottom, COLOURS[axis])
    for axis, (name, start) in enumerate(zip(AXES, starts, strict=True)):
        pairs = AXES_DIM[axis] // 2
        label = f"{name}: {pairs} pairs, {start} to {start + pairs - 1}"
        sheet.text((left + scale * (start if axis else 0), bottom + 10 + 22 * (axis == 0)), label, colour=COLOURS[axis])
    sheet.text((left, bottom + 56), f"theta = {THETA:,}; pair i of an axis of d channels turns by theta^(-2i/d) a step")
    return sheet.image


def grids_figure() -> Image.Image:
    """A target and two controls of one sample, each on its own frame, centred on the same zero."""
    shapes: list[Shape] = [(1, 8, 12), (1, 6, 6), (1, 5, 9)]
    positions = image_positions(shapes).split([_tokens([shape]) for shape in shapes])
    sheet = Sheet(900, 360, "Image positions of one sample: a target and two controls")
    cell, middle_y = 20, 190
    for index, (shape, grid) in enumerate(zip(shapes, positions, strict=True)):
        middle_x = 160 + 290 * index
        for _, row, column in grid.tolist():
            x, y = middle_x + cell * column, middle_y + cell * row
            sheet.box(x - 8, y - 8, x + 8, y + 8, COLOURS[index])
        sheet.line((middle_x - 135, middle_y), (middle_x + 135, middle_y))
        sheet.line((middle_x, middle_y - 110), (middle_x, middle_y + 100))
        rows, columns = (f"{int(grid[:, axis].min())} to {int(grid[:, axis].max())}" for axis in (1, 2))
        name = "target" if index == 0 else f"control {index}"
        heading = f"{name}, {shape[1]} rows x {shape[2]} columns"
        sheet.text((middle_x, 55), f"{heading}: frame {int(grid[0, 0])}", anchor="ma")
        sheet.text((middle_x, 305), f"rows {rows}, columns {columns}", anchor="ma", colour=COLOURS[index])
    return sheet.image


def text_figure() -> Image.Image:
    """Where the text of two samples begins: on the diagonal, just outside the largest half side of its own images."""
    samples: list[list[Shape]] = [[(1, 8, 12), (1, 6, 6)], [(1, 16, 6), (1, 8, 8)]]
    sheet = Sheet(900, 440, "Text positions of two samples of one batch (frame = row = column)")
    cell, middle_y = 13, 225
    for index, shapes in enumerate(samples):
        middle_x = 200 + 440 * index
        for image, (shape, colour) in enumerate(zip(shapes, COLOURS, strict=False)):
            _, rows, columns = shape
            grid = image_positions([shape]).tolist()
            top, left = middle_y + cell * grid[0][1], middle_x + cell * grid[0][2]
            bottom, right = top + cell * (rows - 1), left + cell * (columns - 1)
            sheet.draw.rectangle((left - 5, top - 5, right + 5, bottom + 5), outline=colour, width=2)
            label = f"{'target' if image == 0 else 'control 1'} {rows}x{columns}"
            y = top - 22 if image == 0 else bottom + 7
            sheet.text((left - 2, y), label, size=12, colour=colour)
        sheet.line((middle_x - 150, middle_y), (middle_x + 215, middle_y), colour=FAINT)
        sheet.line((middle_x, middle_y - 150), (middle_x, middle_y + 180), colour=FAINT)
        texts = text_positions(shapes, 5)
        for _, row, column in texts.tolist():
            x, y = middle_x + cell * column, middle_y + cell * row
            sheet.box(x - 5, y - 5, x + 5, y + 5, COLOURS[3])
        first = int(texts[0, 0])
        sheet.text(
            (middle_x + cell * first + 12, middle_y + cell * first - 14), f"text from {first} on", colour=COLOURS[3]
        )
        sheet.text((middle_x - 150, 50), f"sample {index}")
    return sheet.image


def error_figure(errors: Errors) -> Image.Image:
    """Relative error of each sample, four ways, on a logarithmic axis."""
    sheet = Sheet(900, 440, "Mixed batch against each sample alone: relative error of the target tokens (float32)")
    rows = (
        ("text positions of sample 0", errors.text_of_sample_0, COLOURS[3]),
        ("image positions of sample 0", errors.image_of_sample_0, COLOURS[1]),
        ("stock forward: both, and image padding attended to", errors.stock, COLOURS[0]),
        ("patched", errors.patched, COLOURS[2]),
    )
    left, top, bottom, low, high = 90, 150, 380, -8, 1

    def height(error: float) -> float:
        clipped = max(math.log10(error), low) if error > 0 else low
        return bottom - (bottom - top) * (clipped - low) / (high - low)

    for number, (label, _, colour) in enumerate(rows):
        sheet.box(left, 48 + 22 * number, left + 14, 60 + 22 * number, colour)
        sheet.text((left + 22, 46 + 22 * number), label)
    for power in range(low, high):
        sheet.line((left, height(10.0**power)), (870, height(10.0**power)), colour=FAINT)
        sheet.text((left - 10, height(10.0**power)), f"1e{power}", anchor="rm")
    for sample, shapes in enumerate(MIX):
        for number, (_, values, colour) in enumerate(rows):
            x = left + 20 + 260 * sample + 58 * number
            sheet.box(x, height(values[sample]), x + 40, bottom, colour)
            label = f"{values[sample]:.1e}" if values[sample] else "0"
            sheet.text((x + 20, height(values[sample]) - 3), label, size=11, anchor="mb")
        sizes = ", control ".join(f"{h}x{w}" for _, h, w in shapes)
        sheet.text((left + 20 + 260 * sample, bottom + 12), f"sample {sample}: {sizes}")
    return sheet.image


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the four figures, and the measured errors."""
    parser = argparse.ArgumentParser(description="Draw the figures on positions of docs/multi_resolution.md.")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_pipeline(Path(folder), ["swap red and blue"])
        errors = measure(Path(folder))
    figures = {
        "frequencies": frequencies_figure(),
        "image_grids": grids_figure(),
        "text_offset": text_figure(),
        "sample_0_positions": error_figure(errors),
    }
    for name, figure in figures.items():
        figure.save(out / f"{name}.png", optimize=True)
    RESULTS.write_text(json.dumps(vars(errors), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
