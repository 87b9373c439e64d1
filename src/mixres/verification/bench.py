"""The verb `bench`: what the ways to batch the same samples cost, on the user's own model, data and machine.

Promise: all ways are timed in one process, interleaved step by step, on whole optimizer steps of the configuration's
own plan (`run_step`: noise, forward, backward, clip, update). A figure is the median over rounds, with its lowest and
highest. No weight changes: the learning rate is zero. Cost: about two minutes of rounds, but three rounds at least;
one copy of each sample a way, on the CPU.

The ways: `one_by_one` accumulates gradients over single samples; `padded` and `packed` are split as planned within
`batch.max_tokens`.

Reading a row: `ratio` is time over one_by_one's; `padding` the fraction of computed tokens that is padding; `flops`
what a step computes, counted in the round that warms up; `mfu` what it needs (no padding, nothing computed twice) per
second over the device's dense bf16 peak; `peak_bytes` on CUDA all that is allocated, on a CPU how far the process grew.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from mixres import atomic
from mixres.batch import Batch, Sample
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.collate import collate
from mixres.data.loader import samples_of
from mixres.data.plan import Layout, Lengths, Microbatch, StepPlan
from mixres.geometry import token_count
from mixres.models.family import Family
from mixres.models.registry import load_family
from mixres.preprocessing.fill import encode_all, family_of
from mixres.training.setup import TrainState, make_plan
from mixres.verification.flops import FlopCounter
from mixres.verification.setup import (
    machine,
    one_process,
    peak_memory,
    precision_label,
    report_path,
    set_up,
    step_seconds,
    versions,
)
from mixres.verification.synthetic import synthetic_samples

BASELINE = "one_by_one"
WAYS: dict[str, Layout] = {BASELINE: "padded", "padded": "padded", "packed": "packed"}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, NVIDIA's data sheets (SXM)
MIN_ROUNDS, MAX_ROUNDS, BUDGET_S = 3, 15, 120.0
MAX_STEPS = 4


class Source(NamedTuple):
    """Samples by index: those of the cache, or synthetic ones."""

    lengths: Sequence[Lengths]
    names: Sequence[str]
    read: Callable[[int], Sample]


class Step(NamedTuple):
    """One optimizer step of the plan in one way to batch it."""

    plan: StepPlan
    batches: list[Batch]


Work = dict[str, list[Step]]  # by way


def bench(config: Config, *, synthetic: bool = False, max_rounds: int = MAX_ROUNDS) -> None:
    """Time, print a table and write `reports/bench.json`.

    Raises:
        UserError: configuration, base or data are wrong, or a sample is over `batch.max_tokens` alone.
    """
    accelerator = one_process(config, "bench")
    device = accelerator.device
    family, source = _synthetic_source(config) if synthetic else _cached_source(config, device)
    work = make_work(config, source)
    setup = set_up(config, family, accelerator)
    log(f"model     {config.model.pretrained_model_name_or_path}, {precision_label(config)} on {device}")
    first = {way: steps[0] for way, steps in work.items()}
    _seconds(setup, first[BASELINE])  # the optimizer's state is made here
    peaks = {way: peak_memory(device, partial(_seconds, setup, step)) for way, step in first.items()}
    start, flops = time.perf_counter(), {way: FlopCounter() for way in work}
    for way, steps in work.items():
        with flops[way]:
            for step in steps:
                _seconds(setup, step)
    fit = int(BUDGET_S / (time.perf_counter() - start))
    seconds = _time_rounds(setup, work, min(max_rounds, max(MIN_ROUNDS, fit)))
    rows = [
        {
            "name": way,
            **_rates(steps, seconds[way], seconds[BASELINE]),
            "flops": flops[way].computed / len(steps),
            "mfu": _mfu(config, device, flops[BASELINE].needed / statistics.median(seconds[way])),
            "peak_bytes": peaks[way],  # None where the system has no figure
        }
        for way, steps in work.items()
    ]
    trainer = _trainer_step(setup, source, work[config.batch.layout] * min(MIN_ROUNDS, max_rounds))
    _log_table(rows)
    log(f"trainer   a {config.batch.layout} step that reads and collates its samples takes {trainer['ratio']:.3f} x "
        f"one on batches made before ({trainer['low']:.3f} to {trainer['high']:.3f})")  # fmt: skip
    report = {
        "machine": machine(device),
        "versions": versions(),
        "model": config.model.pretrained_model_name_or_path,
        "synthetic": synthetic,
        "precision": precision_label(config),
        "samples_per_step": config.batch.samples_per_step,
        "max_tokens": config.batch.max_tokens,
        "layout": config.batch.layout,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "steps": len(work[BASELINE]),
        "rounds": len(seconds[BASELINE]),
        "rows": rows,
        "trainer_step": trainer,
    }
    path = report_path(config, "bench.json")
    atomic.write_json(path, report)
    log(f"report    {path}: {report['steps']} steps of {config.batch.samples_per_step} samples, "
        f"{report['rounds']} rounds")  # fmt: skip


def _cached_source(config: Config, device: torch.device) -> tuple[Family, Source]:
    """The training samples from the cache, which is filled where they are missing."""
    family = family_of(config)
    encoded = encode_all(config, family, device=device)
    samples, names = encoded.train, [sample.record.name for sample in encoded.train]

    def read(index: int) -> Sample:
        return encoded.cache.read(samples[index].key, name=names[index])

    return family, Source([sample.lengths for sample in samples], names, read)


def _synthetic_source(config: Config) -> tuple[Family, Source]:
    """Random weights and samples in the shapes of the base: no weight, image or cache is read."""
    model = config.model
    family = load_family(model.family, model.pretrained_model_name_or_path, revision=model.revision, synthetic=True)
    return family, source_of(synthetic_samples(config, family, MAX_STEPS * config.batch.samples_per_step))


def source_of(samples: Sequence[Sample]) -> Source:
    """These samples, held in memory."""
    empty = [0 if sample.empty_embeds is None else len(sample.empty_embeds) for sample in samples]
    lengths = [
        Lengths(len(sample.prompt_embeds), token_count(sample.img_shapes), len(sample.target_latents), own)
        for sample, own in zip(samples, empty, strict=True)
    ]
    return Source(lengths, [sample.name for sample in samples], samples.__getitem__)


def make_work(config: Config, source: Source) -> Work:
    """The first steps of the run on one process, at most `MAX_STEPS` of one epoch, in every way.

    Raises:
        UserError: a sample is over `batch.max_tokens` alone.
    """
    work: Work = {}
    for way, layout in WAYS.items():
        plan = make_plan(config, source.lengths, source.names, layout=layout, world_size=1)
        work[way] = []
        for step in map(plan.step, range(min(MAX_STEPS, plan.steps_per_epoch))):
            microbatches = _single_samples(step) if way == BASELINE else step.ranks[0]
            work[way].append(Step(step, list(_collated(source, microbatches, layout))))
    return work


def _single_samples(step: StepPlan) -> list[Microbatch]:
    return [
        Microbatch((index,), (weight,), microbatch.dropped & {index})
        for microbatch in step.ranks[0]
        for index, weight in zip(microbatch.indices, microbatch.weights, strict=True)
    ]


def _collated(source: Source, microbatches: Sequence[Microbatch], layout: Layout) -> Iterator[Batch]:
    """A batch for each microbatch; its samples are read when it is asked for."""
    for microbatch in microbatches:
        samples = samples_of(microbatch, source.read)
        yield collate(samples, indices=microbatch.indices, weights=microbatch.weights, layout=layout)


def _seconds(setup: TrainState, step: Step, batches: Iterable[Batch] | None = None) -> float:
    """Seconds of an optimizer step, over `batches` in place of those made before."""
    divisor = setup.objective.divisor(step.plan.samples, step.plan.target_tokens)
    count = len(step.batches)
    return step_seconds(setup, batches or step.batches, count=count, step=step.plan.step, divisor=divisor)


def _time_rounds(setup: TrainState, work: Work, rounds: int) -> dict[str, list[float]]:
    """Of each way the seconds of all steps, round by round."""
    seconds = {way: [0.0] * rounds for way in work}
    for number in range(rounds):
        for k in range(len(work[BASELINE])):
            for way, steps in work.items():
                seconds[way][number] += _seconds(setup, steps[k])
    return seconds


def _rates(steps: Sequence[Step], seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Of one way to batch: ratios to `one_by_one`, rates over the median round, all else a step."""
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


def _mfu(config: Config, device: torch.device, flops_per_s: float) -> float | None:
    """The fraction of the device's peak in bf16; None where that is not known."""
    if device.type != "cuda" or (config.model.dtype != "bfloat16" and config.train.mixed_precision != "bf16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops_per_s / peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _trainer_step(setup: TrainState, source: Source, steps: Sequence[Step]) -> dict[str, float]:
    """A step as training does it, which reads and collates its samples, over the same step on batches made before."""
    layout, ratios = setup.config.batch.layout, []
    for step in steps:
        ready = _seconds(setup, step)
        ratios.append(_seconds(setup, step, _collated(source, step.plan.ranks[0], layout)) / ready)
    return _spread(ratios)


def _log_table(rows: Sequence[dict[str, Any]]) -> None:
    log(f"{'':<14} {'time':>6} {'(low  high)':>13} {'s/step':>8} {'mb/step':>7} {'tokens/s':>9} {'useful/s':>9} "
        f"{'padding':>7} {'GFLOP/step':>11} {'MFU':>6} {'peak MB':>8}")  # fmt: skip
    for row in rows:
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        log(f"{row['name']:<14} {row['ratio']:>6.3f} ({row['low']:.3f} {row['high']:.3f}) {row['seconds']:>8.3f} "
            f"{row['microbatches']:>7.1f} {row['tokens_per_s']:>9.0f} {row['useful_tokens_per_s']:>9.0f} "
            f"{row['padding']:>7.1%} {row['flops'] / 1e9:>11.1f} {mfu:>6} {peak:>8}")  # fmt: skip
