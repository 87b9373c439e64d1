"""The verb `bench`: what the ways to batch the same samples cost, on the user's own model, data and machine.

Promise: all ways are timed in one process, interleaved step by step, on whole optimizer steps of the configuration's
own plan (`run_step`: noise, forward, backward, clip, update); a figure is the median over rounds, with its lowest and
highest. No weight changes: the learning rate is zero. Cost: about two minutes of rounds, but three rounds at least.

The ways: `one_by_one` accumulates gradients over single samples; `padded` and `packed` are split as planned within
`batch.max_tokens`; `padded_random` pads under the same budget, but fills its microbatches in shuffled order, unsorted.

Reading a row: `ratio` is time over one_by_one's; `padding` the share of computed tokens that is filler; `flops` what a
step computes, counted in the round that warms up; `mfu` what it needs (no padding, nothing computed twice) per second
over the device's dense bf16 peak; `peak_bytes` on CUDA all that is allocated, on a CPU how far the process grew.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from mixres import atomic
from mixres.batch import Sample
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.plan import Lengths
from mixres.geometry import token_count
from mixres.models.family import Family
from mixres.models.registry import load_family
from mixres.preprocessing.fill import encode_all, family_of
from mixres.verification.batching import BASELINE, Source, Work, collated, make_work, plan_in
from mixres.verification.flops import FlopCounter
from mixres.verification.setup import (
    Workbench,
    machine,
    one_process,
    peak_memory,
    precision_label,
    report_path,
    set_up,
    step_seconds,
    versions,
)
from mixres.verification.synthetic_samples import synthetic_samples

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, NVIDIA's data sheets (SXM)
_STEPS, _LEAST_ROUNDS, _MAX_ROUNDS, _BUDGET_S = 4, 3, 15, 120.0


@dataclass(frozen=True)
class Row:
    """One way to batch. Ratios are to `one_by_one`; tokens and FLOPs are of the timed steps, rates by the median."""

    name: str
    ratio: float
    low: float
    high: float
    tokens_per_s: float
    useful_tokens_per_s: float
    padding: float
    flops: float  # a step
    mfu: float | None  # None where the device's peak is not known
    peak_bytes: int | None  # None where the system does not tell
    microbatches: float  # a step
    seconds: float  # a step


def bench(config: Config, *, synthetic: bool = False) -> None:
    """Time, print a table and write `reports/bench.json`.

    Raises:
        UserError: configuration, base or data are wrong, or a sample is over `batch.max_tokens` alone.
    """
    accelerator = one_process(config, "bench")
    family, source = _source(config, accelerator.device, synthetic)
    work = make_work(config, source, _STEPS)
    setting = set_up(config, family, accelerator)
    name = config.model.pretrained_model_name_or_path
    weights = "random weights and samples, " if synthetic else ""
    log(f"model     {name}, {weights}{precision_label(config)} on {accelerator.device}")
    peaks, flops, seconds = _time(setting, work)
    peak_flops = _peak_flops(config, accelerator.device)
    rows = [_row(way, work, flops, seconds, peaks[way], peak_flops) for way in seconds]
    trainer = _trainer_step(setting, source, work)
    _report(config, rows, trainer, work, len(seconds[BASELINE]), synthetic, accelerator.device)


def _source(config: Config, device: torch.device, synthetic: bool) -> tuple[Family, Source]:
    """The family, and the training samples: from the cache, filled where they are missing, or made up."""
    model = config.model
    if synthetic:
        path = model.pretrained_model_name_or_path
        family = load_family(model.family, path, revision=model.revision, synthetic=True)
        return family, _synthetic_source(config, family)
    family = family_of(config)
    encoded = encode_all(config, family, device=device)
    items, names = encoded.train, [item.record.name for item in encoded.train]

    def read(index: int) -> Sample:
        return encoded.cache.read(items[index].key, name=names[index])

    return family, Source([item.lengths for item in items], names, read)


def _synthetic_source(config: Config, family: Family) -> Source:
    channels, text_width = family.token_widths()
    text_area = family.control_areas(**config.data.resize.control.model_dump()).get("text_area")
    samples = synthetic_samples(
        config,
        _STEPS * config.batch.samples_per_step,
        channels=channels,
        text_width=text_width,
        pixels_per_token=family.pixels_per_token(),
        controls=family.controls,
        text_area=text_area if isinstance(text_area, int) else None,
    )
    lengths = [
        Lengths(
            len(s.prompt_embeds),
            token_count(s.img_shapes),
            len(s.target_latents),
            0 if s.empty_embeds is None else len(s.empty_embeds),
        )
        for s in samples
    ]
    return Source(lengths, [s.name for s in samples], samples.__getitem__)


def _time(
    setting: Workbench, work: Work
) -> tuple[dict[str, int | None], dict[str, FlopCounter], dict[str, list[float]]]:
    """Of each way the peak memory of a step, the FLOPs of all steps, and their seconds in each round.

    FLOPs are counted in a round that warms up.
    """

    def seconds_of(name: str, k: int) -> float:
        step, batches = work.steps[k], work.batches[name][k]
        divisor = setting.objective.divisor(step.samples, step.target_tokens)
        return step_seconds(setting, batches, count=len(batches), step=step.step, divisor=divisor)

    names, steps = list(work.batches), range(len(work.steps))
    seconds_of(BASELINE, 0)  # the optimizer's state is made here
    device = setting.accelerator.device
    peaks = {name: peak_memory(device, partial(seconds_of, name, 0)) for name in names}
    start = time.perf_counter()
    flops = {name: FlopCounter() for name in names}
    for name in names:
        with flops[name]:
            for k in steps:
                seconds_of(name, k)
    round_s = time.perf_counter() - start
    rounds = max(_LEAST_ROUNDS, min(_MAX_ROUNDS, int(_BUDGET_S / round_s)))
    seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in names}
    for number in range(rounds):
        for k in steps:
            turn = (number + k) % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name][number] += seconds_of(name, k)
    return peaks, flops, seconds


def _row(
    name: str,
    work: Work,
    flops: dict[str, FlopCounter],
    seconds: dict[str, list[float]],
    peak_bytes: int | None,
    peak_flops: float | None,
) -> Row:
    batches = [batch for step in work.batches[name] for batch in step]
    steps, median = len(work.steps), statistics.median(seconds[name])
    ratios = [own / base for own, base in zip(seconds[name], seconds[BASELINE], strict=True)]
    tokens, useful = (sum(b.tokens_computed for b in batches), sum(b.tokens for b in batches))
    return Row(
        name=name,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        tokens_per_s=tokens / median,
        useful_tokens_per_s=useful / median,
        padding=1 - useful / tokens,
        flops=flops[name].computed / steps,
        mfu=None if peak_flops is None else flops[BASELINE].needed / median / peak_flops,
        peak_bytes=peak_bytes,
        microbatches=len(batches) / steps,
        seconds=median / steps,
    )


def _peak_flops(config: Config, device: torch.device) -> float | None:
    if device.type != "cuda" or (config.model.dtype != "bfloat16" and config.train.mixed_precision != "bf16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _trainer_step(setting: Workbench, source: Source, work: Work) -> dict[str, float]:
    """A step as training does it, which reads and collates its samples, over the same step on batches made before."""
    layout = setting.config.batch.layout
    plan, ratios = plan_in(setting.config, source, layout), []
    for planned in work.steps * _LEAST_ROUNDS:
        (microbatches,) = plan.step(planned.step).ranks
        timed = partial(
            step_seconds,
            setting,
            count=len(microbatches),
            step=planned.step,
            divisor=setting.objective.divisor(planned.samples, planned.target_tokens),
        )
        ready = timed(list(collated(source, microbatches, layout)))
        ratios.append(timed(collated(source, microbatches, layout)) / ready)
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _report(
    config: Config,
    rows: Sequence[Row],
    trainer: dict[str, float],
    work: Work,
    rounds: int,
    synthetic: bool,
    device: torch.device,
) -> None:
    found: dict[str, Any] = {
        "machine": machine(device),
        "versions": versions(),
        "model": config.model.pretrained_model_name_or_path,
        "synthetic": synthetic,
        "precision": precision_label(config),
        "samples_per_step": config.batch.samples_per_step,
        "max_tokens": config.batch.max_tokens,
        "layout": config.batch.layout,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "steps": len(work.steps),
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
        "trainer_step": trainer,
    }
    _say_table(rows)
    log(f"trainer   a {config.batch.layout} step that reads and collates its samples takes {trainer['ratio']:.3f} x "
        f"one on batches made before ({trainer['low']:.3f} to {trainer['high']:.3f})")  # fmt: skip
    path = report_path(config, "bench.json")
    atomic.write_json(path, found)
    log(f"report    {path}: {len(work.steps)} steps of {config.batch.samples_per_step} samples, {rounds} rounds")


def _say_table(rows: Sequence[Row]) -> None:
    log(f"{'':<14} {'time':>6} {'(low  high)':>13} {'s/step':>8} {'mb/step':>7} {'tokens/s':>9} {'useful/s':>9} "
        f"{'padding':>7} {'GFLOP/step':>11} {'MFU':>6} {'peak MB':>8}")  # fmt: skip
    for row in rows:
        mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        log(f"{row.name:<14} {row.ratio:>6.3f} ({row.low:.3f} {row.high:.3f}) {row.seconds:>8.3f} "
            f"{row.microbatches:>7.1f} {row.tokens_per_s:>9.0f} {row.useful_tokens_per_s:>9.0f} {row.padding:>7.1%} "
            f"{row.flops / 1e9:>11.1f} {mfu:>6} {peak:>8}")  # fmt: skip
