"""`mixres quickstart --config FILE` shows what the quickstart's LoRA has learnt, on unseen photographs.

Promise: the stock pipeline reads the adapter from its file, so the images are what a user would get. Beside them are
the base's image for the prompt, the copied control, and the best that the VAE could show.
Cost: two samplings a held-out pair, some ten seconds.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mixres import atomic
from mixres.config.schema import Config
from mixres.errors import UserError
from mixres.models.lora import attach
from mixres.models.lora_file import read_header
from mixres.preprocessing.fill import encode_all, family_of
from mixres.preprocessing.samples import CachedSample
from mixres.training.sample_sheets import HeldOutSampler, Row, image_grid, save_png

_SMOOTHED = 25  # steps in the mean of the loss curve's thick line
_NEXT = (
    "next      your own pairs on this base:  mixres train --config quickstart data.train=my_pairs "
    "data.held_out=null train.max_train_steps=20 logging.output_dir=output/smoke_test "
    "cache.cache_dir=output/smoke_test_cache",
    "          proof that batching is exact: mixres verify --config quickstart",
)
_LORA = "pytorch_lora_weights.safetensors"


class Result(NamedTuple):
    """PSNR in dB of each column of the grid, and the drift of the LoRA's image; both against the target."""

    name: str
    size: str
    copy: float
    base: float
    lora: float
    ceiling: float
    drift_px: float | None = None  # None: it could not be measured
    scale_pct: float | None = None


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB images of one size; 99 for equal ones."""
    assert image.size == reference.size, (image.size, reference.size)
    error = np.square(np.asarray(image, float) - np.asarray(reference, float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def show_results(config: Config) -> list[str]:
    """Sample every held-out pair with and without the run's LoRA; write results.png, results.json and loss.png.

    Returns the table and the paths of the files, line by line.

    Raises:
        UserError: the run has no finished LoRA, or there are no held-out pairs.
    """
    run = Path(config.logging.output_dir)
    if not (run / _LORA).is_file():
        raise UserError(f"{run}: there is no {_LORA}: train first")
    family = family_of(config)
    encoded = encode_all(config, family, device=torch.device("cpu"))
    if not encoded.held_out:
        raise UserError("data.held_out: name the pairs to show")
    transformer = family.load_transformer(dtype=getattr(torch, config.model.dtype), device="cpu")
    sampler = HeldOutSampler(config, family, transformer, encoded)
    items = encoded.held_out
    before = [sampler.predict(item) for item in tqdm(items, desc="base", unit="image", disable=None)]
    attach(sampler.pipeline, read_header(str(run / _LORA)))
    after = [sampler.predict(item) for item in tqdm(items, desc="LoRA", unit="image", disable=None)]
    compared = [_compare(sampler, *each) for each in zip(items, before, after, strict=True)]
    results = [result for result, _ in compared]
    # One row a photograph, its largest pair: 008_chelsea in landscape, 011_coffee in portrait.
    by_area = sorted(compared[::4] + compared[3::4], key=lambda pair: math.prod(map(int, pair[0].size.split("x"))))
    shown = list({result.name.rpartition("_")[2]: row for result, row in by_area}.values())
    sheet = image_grid(("input", "target", "base", "base + LoRA"), shown)
    save_png(sheet, run / "results.png", [row.caption for row in shown])
    atomic.write_json(run / "results.json", [result._asdict() for result in results])
    _draw_loss(run / "metrics.jsonl", run / "loss.png")
    return [*_table(results), f"images    {run / 'results.png'}", f"loss      {run / 'loss.png'}", *_NEXT]


def _compare(sampler: HeldOutSampler, item: CachedSample, base: Image.Image, lora: Image.Image) -> tuple[Result, Row]:
    target, control = (
        sampler.pipeline.image_processor.resize(sampler.read(path), *reversed(item.target_size))
        for path in (item.record.target, item.record.controls[0])
    )
    sample = sampler.encoded.read(item)
    ceiling = sampler.family.decode_latents(sampler.pipeline, sample.target_latents, sample.img_shapes[0])
    scores = [round(psnr(image, target), 2) for image in (control, base, lora, ceiling)]
    name, drift = Path(item.record.name).stem, sampler.drift(item, lora)
    found = () if drift is None else (round(drift.shift_px, 3), round(drift.scale_pct, 3))
    note = "{}  copy {:.1f}, base {:.1f}, LoRA {:.1f}, at best {:.1f} dB".format(item.target_size, *scores)
    row = Row((control, target, base, lora), item.record.prompt, note)
    return Result(name, str(item.target_size), *scores, *found), row


def _table(results: Sequence[Result]) -> list[str]:
    lines = [f"{'held out':<14}{'size':>9}{'copy':>8}{'base':>8}{'LoRA':>8}{'VAE':>8}   PSNR in dB"]
    means = [sum(column) / len(results) for column in list(zip(*results, strict=True))[2:6]]
    for name, size, *scores in (*(result[:6] for result in results), ("mean", "", *means)):
        lines.append(f"{name:<14}{size:>9}" + "".join(f"{score:8.1f}" for score in scores))
    drifts = [(r.drift_px, abs(r.scale_pct)) for r in results if r.drift_px is not None and r.scale_pct is not None]
    if not drifts:
        return lines
    shift, scale = map(max, zip(*drifts, strict=True))
    return [*lines, f"drift         at most {shift:.2f} px and {scale:.2f} % in {len(drifts)} images of the LoRA"]


def _draw_loss(metrics: Path, path: Path) -> None:
    """The loss of every step and its running mean, on a logarithmic axis."""
    from matplotlib.figure import Figure  # half a second, needed here only

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    # A step that was skipped has no loss.
    steps, losses = zip(*((line["step"], line["loss"]) for line in lines if line.get("loss") is not None), strict=True)
    width = min(_SMOOTHED, len(losses))
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="each step")
    axes.plot(steps[width - 1 :], means, color="#08519c", linewidth=1.8, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic.replace(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120)
