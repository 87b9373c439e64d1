"""Draws the README's badges and its figure, four photographs of four sizes in one packed batch, and makes its tables.

Usage: `python scripts/first_screen.py`.

Promise: sizes and tokens come from the code that trains, every number of a table from a file of results, what a badge
states from pyproject.toml. The photographs are those of the quickstart, whose licences are listed there. It takes
seconds.
"""

import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from bucket_benchmark import NAMES, PSNR, spread
from page_numbers import stored, table
from PIL import Image, ImageDraw, ImageFont

from mixres.geometry import Size, target_size, token_grid
from mixres.quickstart.data import HELD_OUT_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
OUT, BADGES = DOCS / "images" / "four_sizes.png", DOCS / "images" / "badges.svg"
AREA, PIXELS_PER_TOKEN = 1024 * 1024, 16
# A photograph and the region of it that stands for a file of that size: left, top, width, height.
SHOWN = {
    "coffee": (0, 0, 600, 400),
    "astronaut": (64, 0, 320, 480),
    "chelsea": (0, 0, 451, 300),
    "china": (0, 80, 640, 240),
}
COLOURS = {"coffee": "#b5651d", "astronaut": "#2f6fb0", "chelsea": "#3f8f4f", "china": "#8a4fb0"}
PROMPT_TOKENS = {"coffee": 74, "astronaut": 95, "chelsea": 70, "china": 81}
WIDTH, MARGIN, GAP, SCALE, DRAWN = 1280, 24, 24, 0.58, 2  # DRAWN: pixels of the file for one of the figure
INK, MUTED = "#1f2328", "#57606a"
TEXT_ENCODER_PIXELS = 28 * 28  # of a control that one text token holds


def lengths(name: str) -> tuple[Size, int, int]:
    """The size at which the region is trained, and the tokens of its text and of each of its two images."""
    size = target_size(Size(*SHOWN[name][2:]), max_pixels=AREA, multiple_of=16)
    text = PROMPT_TOKENS[name] + size.width * size.height // TEXT_ENCODER_PIXELS
    return size, text, token_grid(size, PIXELS_PER_TOKEN).tokens


def figure() -> Image.Image:
    """Photographs at one scale, each above its part of the packed row."""
    photographs = {photo.name: photo for photo in (*TRAIN_PHOTOGRAPHS, *HELD_OUT_PHOTOGRAPHS)}
    tallest = round(max(region[3] for region in SHOWN.values()) * SCALE)
    floor, row, height = tallest + 84, tallest + 190, tallest + 274
    image = Image.new("RGB", (WIDTH * DRAWN, height * DRAWN), "white")
    draw = ImageDraw.Draw(image, "RGBA")

    def text(x: float, y: float, words: str, size: int = 15, colour: str = INK, anchor: str = "la") -> None:
        draw.text((x * DRAWN, y * DRAWN), words, colour, ImageFont.load_default(size * DRAWN), anchor=anchor)

    def shape(*points: tuple[float, float], fill: str) -> None:
        draw.polygon([(x * DRAWN, y * DRAWN) for x, y in points], fill=fill)

    def box(left: float, top: float, right: float, bottom: float, fill: str) -> None:
        draw.rectangle((left * DRAWN, top * DRAWN, right * DRAWN - 1, bottom * DRAWN - 1), fill=fill)

    parts = {name: lengths(name) for name in SHOWN}
    total = sum(words + 2 * tokens for _, words, tokens in parts.values())
    text(MARGIN, 18, "Four images of four sizes, one batch: nothing is cropped, nothing is padded", 22)
    used = sum(region[2] for region in SHOWN.values()) * SCALE
    space = (WIDTH - 2 * MARGIN - used) / (len(SHOWN) - 1)
    left, begin = float(MARGIN), float(MARGIN)
    for name, (x, y, width, tall) in SHOWN.items():
        shown = Size(round(width * SCALE), round(tall * SCALE))
        photo = photographs[name].read().convert("RGB").crop((x, y, x + width, y + tall))
        photo = photo.resize((shown.width * DRAWN, shown.height * DRAWN), Image.Resampling.LANCZOS)
        image.paste(photo, (round(left) * DRAWN, (floor - shown.height) * DRAWN))
        text(left, floor + 8, f"{width} x {tall}", 16)
        _, words, tokens = parts[name]
        part = (words + 2 * tokens) / total * (WIDTH - 2 * MARGIN)
        end = begin + part
        corners = ((left, floor + 34), (left + shown.width, floor + 34), (end, row), (begin, row))
        shape(*corners, fill=f"{COLOURS[name]}30")
        box(left, floor + 30, left + shown.width, floor + 34, COLOURS[name])
        edges = [begin, begin + part * words / (words + 2 * tokens)]
        edges += [edges[1] + (end - edges[1]) / 2, end]
        for number, shade in enumerate(("", "d0", "a0")):
            box(edges[number] + 1, row, edges[number + 1] - 1, row + 40, "white")
            box(edges[number] + 1, row, edges[number + 1] - 1, row + 40, COLOURS[name] + shade)
        for middle, count in ((edges[1] + edges[2], tokens), (edges[2] + edges[3], tokens)):
            text(middle / 2, row + 20, f"{count:,}", 14, "white", "mm")
        left, begin = left + shown.width + space, end
    label = "one packed row: text, target and control of each sample, in tokens; attention stays within a sample"
    text(MARGIN, row + 52, label, 15, MUTED)
    text(WIDTH - MARGIN, row + 52, f"{total:,} tokens", 15, MUTED, "ra")
    return image.quantize(255, dither=Image.Dither.NONE)


def badges() -> str:
    """Licence, versions and types as an SVG: a file of the repository, so a reader's browser asks no other server."""
    found = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    project = found["project"]
    versions = {"python": project["requires-python"]}
    for line in project["dependencies"]:
        name, *bounds = re.split(r"(?=[<>=])", line, maxsplit=1)
        versions[name] = "".join(bounds)
    stated = {"licence": project["license"]}
    stated |= {name: versions[name].replace(",", ", ") for name in ("python", "torch", "diffusers")}
    stated |= {"types": "mypy strict"} if found["tool"]["mypy"]["strict"] else {}
    font, parts, left = ImageFont.load_default(11), [], 0.0
    for label, value in stated.items():
        for words, colour in ((label, "#4a5057"), (value, "#1f6f43")):
            width = round(1.12 * font.getlength(words)) + 14  # the browser's font is wider than Pillow's
            parts.append(
                f'<rect x="{left:g}" width="{width}" height="20" fill="{colour}"/>'
                f'<text x="{left + 7:g}" y="14" textLength="{width - 14}">{escape(words)}</text>'
            )
            left += width
        left += 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left - 6:g}" height="20" role="img" fill="#fff" '
        'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def comparison_table(buckets: Mapping[str, Any], exact: Mapping[str, Any]) -> str:
    """Mixed batches against the bucket rules of three trainers, and what `mixres verify` measured."""
    from mixres.verification.against_buckets import over_seeds
    from mixres.verification.bucket_rules import RULES
    from mixres.verification.verify import ROUNDING_FACTOR

    own, steps = [buckets["megapixel"]["quickstart"][rule] for rule in RULES], buckets["quickstart"]
    size = steps["samples_per_step"]

    def again(row: Mapping[str, Any]) -> str:
        short = f", batches of {row['mean_batch']:.1f}" if row["mean_batch"] < size else ""
        return f"{row['repeated']}{short}"

    rows = [
        ["area cropped at a megapixel, mean", "0", *(f"{row['cropped_mean']:.1%}" for row in own)],
        [f"images repeated to fill batches of {size}, of {steps['samples']}", "0", *map(again, own)],
    ]
    sets = {"border": "pairs of many sizes, edited at the border too", "quickstart": "pairs"}
    for name, title in sets.items():
        spreads = [spread(over_seeds(buckets[name], arm, *PSNR), 1) for arm in ("mixed", *RULES)]
        rows.append([f"held-out PSNR in dB, {buckets[name]['samples']} {title}", *spreads])
    worst = {name: max(case[name] for case in exact["cases"]) for name in ("forward", "gradient")}
    alone = {name: max(case["bar"][name] for case in exact["cases"]) / ROUNDING_FACTOR for name in worst}
    errors, own_errors = (", ".join(f"{name} {of[name]:.1e}" for name in worst) for of in (worst, alone))
    rows.append(["error of a batch of several sizes", errors, *["no such batch"] * len(RULES)])
    seeds = len({run["seed"] for name in sets for run in buckets[name]["runs"]})
    note = (
        "Buckets by the rules of each trainer's source, trained by mixres. PSNR: the tiny base, "
        f"{steps['steps']} steps of {size} samples (of musubi-tuner's rule fewer), {seeds} seeds: mean (lowest to "
        f"highest) ([how it was measured, and where buckets are as good](docs/buckets.md)). Errors of float32 against "
        f"float64; those of the same samples alone: {own_errors} ([numerics](docs/numerics.md))."
    )
    heads = ("", "mixres", *(NAMES[rule] for rule in RULES))
    return f"{table(heads, rows)}\n\n{note}"


def quickstart_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Means over the held-out pairs, in dB."""
    columns = {"copy": "copied input", "base": "base alone", "lora": "base + LoRA", "ceiling": "the VAE's own"}
    means = {name: f"{fmean(row[name] for row in found):.1f}" for name in columns}
    means["lora"] = f"**{means['lora']}**"
    return table(list(columns.values()), [list(means.values())])


def hardware_table(found: Mapping[str, Any]) -> str:
    """Peaks in GB, by recipe and setting."""
    columns = {
        "as it is": ([], 1),
        "`model.quantize=int8`": (["model.quantize=int8"], 1),
        "and `train.offload.blocks=2`": (["model.quantize=int8", "train.offload.blocks=2"], 1),
        "8 GPUs, `train.parallel=fsdp2`": (["train.parallel=fsdp2"], 8),
    }
    lines = []
    for recipe in sorted({row["recipe"] for row in found["rows"]}):
        # The ladders of a recipe may begin with a smaller microbatch, which the first column has not.
        peaks = {
            (tuple(x for x in row["changes"] if not x.startswith("batch.")), row["ranks"]): row["peak_bytes"]
            for row in reversed(found["rows"])
            if row["recipe"] == recipe
        } | {((), 1): next(r["peak_bytes"] for r in found["rows"] if r["recipe"] == recipe and not r["changes"])}
        cells = [peaks.get((tuple(changes), ranks)) for changes, ranks in columns.values()]
        lines.append([f"`{recipe}`", *(f"{peak / 1e9:.1f}" if peak else "" for peak in cells)])
    return table(["recipe", *columns], lines)


def tables() -> dict[str, str]:
    """Those of the README by their names, from the results in the repository."""
    return {
        "comparison": comparison_table(stored("buckets"), stored("verify")),
        "quickstart": quickstart_table(stored("quickstart")),
        "hardware": hardware_table(stored("hardware")),
    }


def main() -> int:
    """Write both images."""
    figure().save(OUT, optimize=True)
    BADGES.write_text(badges(), encoding="utf-8", newline="\n")
    sys.stdout.write(f"{OUT}\n{BADGES}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
