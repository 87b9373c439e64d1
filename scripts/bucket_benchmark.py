"""Mixed batches against buckets, one by one: docs/results/buckets.json, its plots, and the tables of docs/buckets.md.

    python scripts/bucket_benchmark.py            # train what the results lack, then write tables and plots
    python scripts/bucket_benchmark.py --page     # tables and plots alone, from docs/results/buckets.json
    python scripts/bucket_benchmark.py --readme   # print five rows for the README

Takes some 30 minutes of one core. Each run is written as it is done: the same command resumes. Two data sets are made
of the quickstart's photographs: its own, and `border`, few pairs of many sizes whose edit is at the border too. Delete
build/buckets and docs/results/buckets.json to train all of them anew.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
from mixres.geometry import Size  # noqa: E402
from mixres.quickstart import data  # noqa: E402

BUILD, RESULTS = REPOSITORY / "build" / "buckets", REPOSITORY / "docs" / "results" / "buckets.json"
PAGE, IMAGES = REPOSITORY / "docs" / "buckets.md", REPOSITORY / "docs" / "images"
SETS, STEPS, SEEDS = ("quickstart", "border"), 100, 3
FRAME, GREEN, YELLOW = 8, (30, 170, 40), (240, 220, 20)
SETTINGS = (
    "batch.samples_per_step=4",
    "data.resize.target.multiple_of=8",  # one token of the tiny base
    "sample.steps=8",
    "evaluate.sigmas=[0.3, 0.7]",
)


def framed(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image under a frame of one token's width."""
    made = Image.new("RGB", image.size, colour)
    made.paste(image.crop((FRAME, FRAME, image.width - FRAME, image.height - FRAME)), (FRAME, FRAME))
    return made


def write_border_pairs(folder: Path, photographs: Sequence[data.Photograph], count: int, seed: int) -> None:
    """Pairs of sizes of their own: a green frame becomes yellow, and red and blue are swapped within it."""
    rng, images = random.Random(seed), [photograph.read() for photograph in photographs]
    for name in ("training_images", "control_images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = images[index % len(images)]
        size = Size(0, 1)
        while max(size) > 2.5 * min(size) or size.width * size.height > 128**2:
            size = Size(rng.randint(64, 176), rng.randint(64, 176))
        zoom = rng.uniform(1, min(2.5, image.width / size.width, image.height / size.height))
        left, top = (rng.uniform(0, whole - zoom * part) for whole, part in zip(image.size, size, strict=True))
        box = (left, top, left + zoom * size.width, top + zoom * size.height)
        made = image.resize(size, Image.Resampling.LANCZOS, box=box)
        swapped = Image.fromarray(np.ascontiguousarray(np.asarray(made)[..., ::-1]))
        scale = rng.uniform(1.1, 1.8)
        control = framed(made, GREEN).resize([round(scale * side) for side in size], Image.Resampling.NEAREST)
        framed(swapped, YELLOW).save(folder / "training_images" / f"{index:03d}.png")
        control.save(folder / "control_images" / f"{index:03d}.png")
        caption = folder / "training_images" / f"{index:03d}.txt"
        caption.write_text("green frame to yellow, swap red and blue\n", encoding="utf-8")


def train_all() -> None:
    """Train what is missing; every run ends in docs/results/buckets.json."""
    from mixres.config.load import load_config
    from mixres.verification.against_buckets import against_buckets

    data.write_demo(BUILD / "quickstart")
    write_border_pairs(BUILD / "border" / "train", data.TRAIN_PHOTOGRAPHS, 24, 3)
    write_border_pairs(BUILD / "border" / "held_out", data.HELD_OUT_PHOTOGRAPHS, 12, 4)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for seeds in range(1, SEEDS + 1):
        for name in SETS:
            folder = BUILD / name
            report = folder / "run" / "reports" / "buckets.json"
            if name in found and not report.exists():
                report.parent.mkdir(parents=True)
                report.write_text(json.dumps(found[name]), encoding="utf-8")
            words = [f"data.{part}={folder / part}" for part in ("train", "held_out")]
            words += [f"cache.cache_dir={BUILD / 'cache'}", f"logging.output_dir={folder / 'run'}", *SETTINGS]
            against_buckets(load_config(REPOSITORY / "configs" / "quickstart.yaml", words), steps=STEPS, seeds=seeds)
            found[name] = json.loads(report.read_text(encoding="utf-8"))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    train_all()
