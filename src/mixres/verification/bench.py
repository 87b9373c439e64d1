"""The verb `bench`: what the ways to batch the same samples cost, on the user's own model, data and machine.

Promise: all ways are timed in one process, interleaved step by step, on whole optimizer steps of the configuration's
own plan (`run_step`: noise, forward, backward, clip, update). A figure is the median over rounds, with its lowest and
highest. No weight changes: the learning rate is zero. Cost: two minutes of rounds unless others are given, but three
rounds at least; one copy of each sample a way, on the CPU.

The ways: `one_by_one` accumulates gradients over single samples; `padded` and `packed` are split as planned within
`batch.max_tokens`. With `train.compile` blocks and row lengths are those of training, and packed batches are left out.

Reading a row: `ratio` is time over that of the first way; `padding` the fraction of computed tokens that is padding;
`flops` what a step computes, counted in an uncompiled round before; `mfu` what it needs (no padding, nothing computed
twice) per second over the device's dense bf16 peak; `peak_bytes` on CUDA all that is allocated, on a CPU how far the
process grew. `sampling` is no way to train: sample grids of the same model, their images in batches and one by one.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from mixres import atomic
from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.collate import collate
from mixres.data.loader import samples_of
from mixres.data.plan import Layout, Microbatch, StepPlan
from mixres.errors import Problems, UserError
from mixres.preprocessing.fill import CachedData
from mixres.training.sample_sheets import HeldOutSampler
from mixres.training.setup import TrainState, make_plan, row_rounding
from mixres.verification.bucket_data import single_samples
from mixres.verification.flops import FlopCounter
from mixres.verification.setup import (
    Source,
    cached_source,
    machine,
    one_process,
    peak_memory,
    precision_label,
    report_path,
    set_up,
    step_seconds,
    synthetic_source,
    versions,
)

BASELINE = "one_by_one"
WAYS: dict[str, Layout] = {BASELINE: "padded", "padded": "padded", "packed": "packed"}
# Dense bf16 with sums in fp32, in TFLOP/s, from NVIDIA's data sheets and, of GeForce and RTX cards, the white papers of
# their architectures. The longest part of a device's name counts; SXM where only the form differs.
PEAK_TFLOPS = {
    "A100": 312, "A10": 125, "L4": 121, "L40": 181, "L40S": 362, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H200": 989, "H200 NVL": 835, "B200": 2250, "RTX 3090": 71, "RTX 4090": 165.2, "RTX 5090": 209.5,
    "RTX A6000": 154.8,
}  # fmt: skip
MIN_ROUNDS, MAX_ROUNDS, BUDGET_S = 3, 15, 120.0
MAX_STEPS = 4
SAMPLING_STEPS = 4


class Step(NamedTuple):
    """One optimizer step of the plan in one way to batch it."""

    plan: StepPlan
    batches: list[Batch]


Work = dict[str, list[Step]]  # by way


def bench(
    config: Config,
    *,
    synthetic: bool = False,
    way: Sequence[str] = tuple(WAYS),
    steps: int = MAX_STEPS,
    seconds: float | None = None,
    peak_tflops: float | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> None:
    """Time, print a table and write `reports/bench.json`.

    `way`: those to time. `seconds` of rounds, but one at least. `peak_tflops`: of the device, else by its name.

    Raises:
        UserError: configuration, base or data are wrong, or a sample is over `batch.max_tokens` alone.
    """
    problems = Problems(
        f"--{name}: given {value}, allowed: a number above 0"
        for name, value in (("steps", steps), ("seconds", seconds), ("peak-tflops", peak_tflops))
        if value is not None and not 0 < value < math.inf
    )
    problems.raise_if_any()
    accelerator = one_process(config, "bench")
    device, compiled = accelerator.device, config.train.compile
    family, source = (
        synthetic_source(config, steps * config.batch.samples_per_step) if synthetic else cached_source(config, device)
    )
    ways = [name for name in WAYS if name in way and not (compiled and name == "packed")]
    if not ways:
        raise UserError("--way: packed batches cannot be compiled: choose another, or set train.compile to false")
    every = make_work(config, source, steps)
    work = {name: every[name] for name in ways}
    setup = set_up(config, family, accelerator, compiled=True)
    log(f"model     {config.model.pretrained_model_name_or_path}, {precision_label(config)} on {device}")
    base = _counted(setup, every[BASELINE])  # the optimizer's state is made here
    flops = {name: base if name == BASELINE else _counted(setup, own) for name, own in work.items()}
    if compiled:
        _time_rounds(setup, work, 1)  # the first round compiles
    start = time.perf_counter()
    peaks = {name: peak_memory(device, partial(seconds_of, setup, own[0])) for name, own in work.items()}
    fit = int((seconds or BUDGET_S) / ((time.perf_counter() - start) * len(every[BASELINE])))
    rounds = min(max_rounds, max(1 if seconds else MIN_ROUNDS, fit))
    times = _time_rounds(setup, work, rounds)
    rows = [
        {
            "name": name,
            **_rates(own, times[name], times[ways[0]]),
            "flops": flops[name].computed / len(own),
            "mfu": _mfu(config, device, base.needed / statistics.median(times[name]), peak_tflops),
            "peak_bytes": peaks[name],  # None where the system has no figure
        }
        for name, own in work.items()
    ]
    _log_table(rows)
    layout = config.batch.layout
    trainer = _trainer_step(setup, source, work[layout] * min(MIN_ROUNDS, rounds)) if layout in work else None
    both = {BASELINE, "packed"} <= set(ways)  # sampling packs
    report = {
        "machine": machine(device),
        "versions": versions(),
        "synthetic": synthetic,
        **_settings(config),
        "compile": compiled,
        "steps": len(every[BASELINE]),
        "rounds": rounds,
        "rows": rows,
        "trainer_step": trainer,
        "sampling": None,
    }
    path = report_path(config, "bench.json")
    atomic.write_json(path, report)
    if source.encoded and both:  # last: where it fails, the report above stays
        report["sampling"] = _sampling(setup, source.encoded, min(MIN_ROUNDS, rounds))
        atomic.write_json(path, report)
    log(f"report    {path}: {report['steps']} steps of {config.batch.samples_per_step} samples, "
        f"{report['rounds']} rounds")  # fmt: skip


def _settings(config: Config) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "model": config.model.pretrained_model_name_or_path,
        "precision": precision_label(config),
        "samples_per_step": config.batch.samples_per_step,
        "max_tokens": config.batch.max_tokens,
        "layout": config.batch.layout,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "quantize": config.model.quantize,
        "offload_blocks": config.train.offload.blocks,
    }


def make_work(config: Config, source: Source, steps: int = MAX_STEPS) -> Work:
    """The first `steps` of the run on one process, of one epoch at most, in every way.

    Raises:
        UserError: a sample is over `batch.max_tokens` alone.
    """
    work: Work = {}
    for way, layout in WAYS.items():
        plan = make_plan(config, source.lengths, source.names, layout=layout, world_size=1)
        work[way] = []
        for step in map(plan.step, range(min(steps, plan.steps_per_epoch))):
            step = single_samples(step) if way == BASELINE else step
            work[way].append(Step(step, list(collated(config, source, step.ranks[0], layout))))
    return work


def collated(config: Config, source: Source, microbatches: Sequence[Microbatch], layout: Layout) -> Iterator[Batch]:
    """A batch for each microbatch; its samples are read when it is asked for."""
    rounding = row_rounding(config, source.lengths)
    for indices, weights, dropped in microbatches:
        samples = samples_of(Microbatch(indices, weights, dropped), source.read)
        yield collate(samples, indices=indices, weights=weights, layout=layout, rounding=rounding)


def _counted(setup: TrainState, steps: Sequence[Step]) -> FlopCounter:
    """The FLOPs of these steps, uncompiled: a compiled block is one operation."""
    counter = FlopCounter()
    with torch.compiler.set_stance("force_eager"), counter:
        for step in steps:
            seconds_of(setup, step)
    return counter


def seconds_of(setup: TrainState, step: Step, batches: Iterable[Batch] | None = None) -> float:
    """Seconds of an optimizer step, over `batches` in place of those made before."""
    divisor = setup.objective.divisor(step.plan.samples, step.plan.target_tokens)
    count = len(step.batches)
    return step_seconds(setup, batches or step.batches, count=count, step=step.plan.step, divisor=divisor)


def _time_rounds(setup: TrainState, work: Work, rounds: int) -> dict[str, list[float]]:
    """Of each way the seconds of all steps, round by round."""
    seconds = {way: [0.0] * rounds for way in work}
    for number in range(rounds):
        for steps in zip(*work.values(), strict=True):
            for way, step in zip(work, steps, strict=True):
                seconds[way][number] += seconds_of(setup, step)
    return seconds


def _rates(steps: Sequence[Step], seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Of one way to batch: ratios to the first way, rates over the median round, all else a step."""
    batches = [batch for step in steps for batch in step.batches]
    median = statistics.median(seconds)
    tokens, useful = sum(b.tokens_computed for b in batches), sum(b.tokens for b in batches)
    return {
        **_spread([own / base for own, base in zip(seconds, baseline, strict=True)]),
        "tokens_per_s": tokens / median,
        "useful_tokens_per_s": useful / median,
        "padding": 1 - useful / tokens,
        "microbatches": len(batches) / len(steps),
        "seconds": median / len(steps),
    }


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _mfu(config: Config, device: torch.device, flops_per_s: float, peak_tflops: float | None) -> float | None:
    """The fraction of the device's peak in bf16; None where that is not known."""
    if peak_tflops is None:
        if device.type != "cuda" or (config.model.dtype != "bfloat16" and config.train.mixed_precision != "bf16"):
            return None
        peak_tflops = known_peak(torch.cuda.get_device_name(device))
    return None if peak_tflops is None else flops_per_s / (peak_tflops * 1e12)


def known_peak(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name."""
    known = [part for part in PEAK_TFLOPS if part in device_name]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def _trainer_step(setup: TrainState, source: Source, steps: Sequence[Step]) -> dict[str, float]:
    """A step as training does it, which reads and collates its samples, over the same step on batches made before."""
    layout, ratios = setup.config.batch.layout, []
    for step in steps:
        ready = seconds_of(setup, step)
        ratios.append(seconds_of(setup, step, collated(setup.config, source, step.plan.ranks[0], layout)) / ready)
    found = _spread(ratios)
    log(f"trainer   a {layout} step that reads and collates its samples takes {found['ratio']:.3f} x "
        f"one on batches made before ({found['low']:.3f} to {found['high']:.3f})")  # fmt: skip
    return found


def _sampling(setup: TrainState, encoded: CachedData, rounds: int) -> dict[str, Any] | None:
    """The images of a sample grid, of training samples of several sizes: in batches, and one by one, in turn.

    `ratio` is time in batches over time one by one. None: the device has no memory for them beside the training.
    """
    sample = setup.config.sample.model_copy(update={"steps": SAMPLING_STEPS})
    config = setup.config.model_copy(update={"sample": sample})
    times: dict[str, list[float]] = {"batched": [], BASELINE: []}
    try:
        sampler = HeldOutSampler(
            config, setup.family, setup.transformer, replace(encoded, train=[], held_out=encoded.train)
        )
        images = range(len(sampler.items))
        sampler.predictions(images[:1])  # what is loaded and chosen once
        for _ in range(rounds):
            for way, parts in (("batched", [images]), (BASELINE, [[image] for image in images])):
                start = time.perf_counter()
                for part in parts:
                    sampler.predictions(part)
                times[way].append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        log("sampling  not measured: there is no memory left for it")
        return None
    ratios = _spread([batched / alone for batched, alone in zip(*times.values(), strict=True)])
    rates = {way: len(images) / statistics.median(seconds) for way, seconds in times.items()}
    log(f"sampling  {len(images)} images in batches take {ratios['ratio']:.3f} x their time one by one "
        f"({ratios['low']:.3f} to {ratios['high']:.3f}): {rates['batched']:.3g} and {rates[BASELINE]:.3g} images/s, "
        f"{SAMPLING_STEPS} steps")  # fmt: skip
    alone = {"images_per_s": rates["batched"], f"{BASELINE}_images_per_s": rates[BASELINE]}
    return {"images": len(images), "steps": SAMPLING_STEPS, **ratios, **alone}


def _log_table(rows: Sequence[dict[str, Any]]) -> None:
    log(f"{'':<14} {'time':>6} {'(low  high)':>13} {'s/step':>8} {'mb/step':>7} {'tokens/s':>9} {'useful/s':>9} "
        f"{'padding':>7} {'GFLOP/step':>11} {'MFU':>6} {'peak MB':>8}")  # fmt: skip
    for row in rows:
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        log(f"{row['name']:<14} {row['ratio']:>6.3f} ({row['low']:.3f} {row['high']:.3f}) {row['seconds']:>8.3f} "
            f"{row['microbatches']:>7.1f} {row['tokens_per_s']:>9.0f} {row['useful_tokens_per_s']:>9.0f} "
            f"{row['padding']:>7.1%} {row['flops'] / 1e9:>11.1f} {mfu:>6} {peak:>8}")  # fmt: skip
