"""`bench --against buckets`: one training with mixed batches, with the buckets of three trainers, and one by one.

Promise: one trainer, base, optimizer and number of steps for all arms; held-out samples are computed at their own sizes
for all. The arms differ in what a step holds (`BucketPlan`, `OneByOnePlan`) and in the images' sizes and crops. Each
run is written as it is done, so the same command resumes. Another configuration or other data begin in a folder of
their own, and what was there is kept. Cost, logged before it is spent: bucketed copies of the images and their cache
entries for each rule, and a training run of `steps` an arm and seed with its held-out images.

Times: of an epoch's steps in the order of the tokens that they compute, `timed_steps` at even distances, or all where
there are no more. So small and large buckets, and full and short batches, are there as often as in the epoch. Tokens
are counted over the whole epoch.

`mixed` and `one_by_one` train the same samples in the same steps, so they differ by rounding and in time alone. The
steps of `musubi_tuner` hold fewer samples where a bucket fills no batch.
"""

import importlib.util
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from PIL import Image

from mixres import atomic
from mixres.config.schema import Config
from mixres.console import amount, log
from mixres.data.plan import Plan, StepPlan, computed_tokens
from mixres.errors import Problems
from mixres.geometry import Size
from mixres.models.family import Family
from mixres.models.lora import attach
from mixres.models.lora_file import FILE_NAME, read_header
from mixres.preprocessing.cache_folder import readable_size
from mixres.preprocessing.encode import entry_bytes
from mixres.preprocessing.fill import CachedData, KeyedRecords, encode, encode_all, family_of, keyed_records
from mixres.preprocessing.live_texts import text_device
from mixres.training.sample_sheets import HeldOutSampler
from mixres.training.setup import build_plan, make_plan
from mixres.training.trainer import train
from mixres.training.validation import resolution_band
from mixres.verification.bench import Step, collated, seconds_of
from mixres.verification.bucket_data import Bucketed, BucketPlan, OneByOnePlan, fit_records, write_copies
from mixres.verification.bucket_rules import RULES
from mixres.verification.setup import (
    cached_source,
    machine,
    one_process,
    precision_label,
    report_path,
    set_up,
    versions,
)

ARMS = ("mixed", *RULES, "one_by_one")
STEPS = 40
TIMED_STEPS, TIMED_ROUNDS = 12, 3  # and a round that warms up
_LEFT_BYTES = 16  # of a run, for each weight that it trains: the result, and a checkpoint with two moments, in float32


class Arm(NamedTuple):
    """One way to feed the trainer."""

    config: Config
    plan_type: Callable[..., Plan]


def against_buckets(
    config: Config,
    *,
    steps: int = STEPS,
    seeds: int = 1,
    trained: Sequence[str] = ARMS,
    timed_steps: int = TIMED_STEPS,
) -> None:
    """Train `steps` steps with every arm and seed; print a table, write `reports/buckets.json` and `buckets.png`.

    All arms are timed, on `timed_steps` steps each; of those the ones named in `trained` are trained.

    Raises:
        UserError: configuration, base or data are wrong.
        Stopped: a signal came; the same command resumes.
    """
    problems = Problems(f"--{name}: given {value}, allowed: 1 and more"
                        for name, value in (("steps", steps), ("seeds", seeds)) if value < 1)  # fmt: skip
    if isinstance(config.data.held_out, float):
        problems.add("data.held_out: --against buckets trains on other files: name a folder or manifest, or null")
    if importlib.util.find_spec("matplotlib") is None:
        problems.add("--against: its plot needs 'matplotlib', which is not installed: pip install 'mixres[demo]'")
    problems.raise_if_any()
    accelerator = one_process(config, "bench")
    text_device(config, accelerator.device, ranks=1)
    config, family = _same_for_all(config, steps), family_of(config)
    records = keyed_records(config, family, is_main=True)
    encoded = encode(config, family, records, device=accelerator.device)
    path = report_path(config, "buckets.json")
    report = _begun(path, _report(config, encoded, accelerator, steps))
    folder = path.with_suffix("") / report["identity"]
    bucketed = {name: fit_records(config, family, rule, records.train) for name, rule in RULES.items()}
    sizes = [scanned.target_size for scanned in records.train]
    report["buckets"] = {name: own.figures(sizes) for name, own in bucketed.items()}
    known = {(run["arm"], run["seed"]) for run in report["runs"]}
    wanted = [(name, seed) for seed in range(config.train.seed, config.train.seed + seeds) for name in trained]
    missing = [run for run in wanted if run not in known]
    timed = "trained_weights" in report  # reports of earlier versions timed six steps
    if missing or not timed:
        _log_cost(config, family, encoded, bucketed, folder, runs=len(missing), timed=0 if timed else timed_steps)
        arms = _arms(config, family, records, bucketed, folder)
    if not timed:
        report |= _times(arms, family, accelerator, timed_steps)
        atomic.write_json(path, report)
    if missing:
        size = readable_size(_LEFT_BYTES * report["trained_weights"])
        log(f"cost      {amount(len(missing), 'run')} of {amount(steps, 'step')}; each leaves about {size} in {folder}")
    for name, seed in missing:
        log(f"arm       {name}, seed {seed}")
        run = _run(arms[name], family, seed, folder / f"{name}-{seed}", accelerator.device)
        report["runs"].append({"arm": name, "seed": seed, **run})
        atomic.write_json(path, report)
    for line in table(report):
        log(line)
    plot([("", report)], path.with_suffix(".png"))
    log(f"report    {path}, {path.with_suffix('.png')}")


def _same_for_all(config: Config, steps: int) -> Config:
    """Without what buckets have no rule for, evaluated at both ends alone, with a warm-up that `steps` have room for.

    A warm-up of more than half of them gets the part of the run that it has of the configuration's, at most half.
    """
    weights = config.data.mask_weight.model_copy(update={"foreground": 1.0, "background": 1.0})
    data = config.data.model_copy(update={"regularization": None, "mask_weight": weights})
    whole, warmup = config.train.max_train_steps, config.lr_scheduler.warmup_steps
    if 2 * warmup > steps:
        own = min(warmup * steps // whole, steps // 2)
        log(f"warm-up   {amount(steps, 'step')} are too few for lr_scheduler.warmup_steps = {warmup} of "
            f"train.max_train_steps = {whole}: {own} here, the same part or half")  # fmt: skip
        warmup = own
    return config.model_copy(
        update={
            "data": data,
            "loss": config.loss.model_copy(update={"prior_loss_weight": 1.0}),
            "lr_scheduler": config.lr_scheduler.model_copy(update={"warmup_steps": warmup}),
            "train": config.train.model_copy(update={"max_train_steps": steps}),
            "checkpoint": config.checkpoint.model_copy(update={"every": steps}),
            "sample": config.sample.model_copy(update={"every": 0}),
            "evaluate": config.evaluate.model_copy(update={"every": steps}),
        }
    )


def _begun(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report of earlier calls with these settings and data, or this new one. One of others is moved to its runs."""
    files = [path, path.with_suffix(".png")]
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["identity"] == report["identity"]:
            return dict(before)
        aside = path.with_suffix("") / before["identity"]
        aside.mkdir(parents=True, exist_ok=True)
        for file in (file for file in reversed(files) if file.exists()):
            file.replace(aside / file.name)
        log(f"kept      {amount(len(before['runs']), 'run')} with other settings or data: {aside}")
    if (own := path.with_suffix("") / report["identity"] / path.name).exists():
        own.replace(path)
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return report


def _log_cost(
    config: Config,
    family: Family,
    encoded: CachedData,
    bucketed: Mapping[str, Bucketed],
    folder: Path,
    *,
    runs: int,
    timed: int,
) -> None:
    """What is about to be written and computed, at most. Copies are PNG: no larger than their pixels, or hardly."""
    images = [len(sample.entry.img_shapes) for sample in encoded.train]
    pixels = sum(
        count * fit.bucket.width * fit.bucket.height
        for own in bucketed.values()
        for count, fit in zip(images, own.fits, strict=True)
    )
    entries = {sample.key: sample.entry for sample in encoded.train}
    cached = len(bucketed) * sum(entry_bytes(config, family, entries).values())
    steps = min(timed, len(images)) * (1 + TIMED_ROUNDS) * len(ARMS)
    images_size = readable_size((4 if family.keeps_alpha else 3) * pixels)
    log(f"cost      up to {images_size} of images in {folder}, and {len(bucketed) * len(entries)} cache entries of "
        f"about {readable_size(cached)}; {runs * config.train.max_train_steps} steps of training in "
        f"{amount(runs, 'run')}, up to {steps} of timing")  # fmt: skip


def _arms(
    config: Config, family: Family, records: KeyedRecords, bucketed: Mapping[str, Bucketed], folder: Path
) -> dict[str, Arm]:
    """All of `ARMS`, the copies of those with buckets written."""
    arms = {"mixed": Arm(config, Plan), "one_by_one": Arm(config, OneByOnePlan)}
    for name, own in bucketed.items():
        manifest = write_copies(config, family, own, records.train, folder / name)
        buckets = [fit.bucket for fit in own.fits]
        plan_type = partial(BucketPlan, buckets=buckets, fill=own.rule.fill, fixed_batches=own.rule.fixed_batches)
        arms[name] = Arm(_with_copies(config, family, manifest, buckets), plan_type)
    return {name: arms[name] for name in ARMS}


def _with_copies(config: Config, family: Family, manifest: Path, buckets: Sequence[Size]) -> Config:
    """Trained on bucketed copies at the sizes that they have."""
    most = max(bucket.width * bucket.height for bucket in buckets)
    size = {"max_pixels": most, "multiple_of": family.size_multiple(), "upscale": False}
    target = config.data.resize.target.model_copy(update=size)
    resize = config.data.resize.model_copy(update={"target": target})
    return config.model_copy(
        update={"data": config.data.model_copy(update={"train": (str(manifest),), "resize": resize})}
    )


def _report(config: Config, encoded: CachedData, accelerator: Accelerator, steps: int) -> dict[str, Any]:
    keys = [sample.key for sample in (*encoded.train, *encoded.held_out)]  # of the content of data and encoders
    places = {
        "data": {"train", "held_out"},
        "cache": {"cache_dir", "shard_gb", "local_dir", "local_gb", "text_device"},
        "logging": True,
        "resume": True,
    }
    settings = config.model_dump_json(exclude=places, exclude_defaults=True)  # type: ignore[arg-type] # pydantic takes both kinds
    return {
        "identity": xxhash.xxh3_64_hexdigest(" ".join([settings, *keys]).encode()),
        "machine": machine(accelerator.device),
        "versions": versions(),
        "model": config.model.pretrained_model_name_or_path,
        "precision": precision_label(config),
        "samples_per_step": config.batch.samples_per_step,
        "layout": config.batch.layout,
        "steps": steps,
        "samples": len(encoded.train),
        "held_out": len(encoded.held_out),
        "clock": "time" if accelerator.device.type == "cuda" else "processor time",
        "buckets": {},
        "times": {},
        "runs": [],
    }


def _times(arms: Mapping[str, Arm], family: Family, accelerator: Accelerator, timed_steps: int) -> dict[str, Any]:
    """Seconds and tokens a sample, the arms in turn; no weight changes. The keys are those of the report.

    `ratio` is time over that of `mixed` in the same round, with its lowest and highest.
    """
    clock = time.perf_counter if accelerator.device.type == "cuda" else time.process_time
    setup = set_up(arms["mixed"].config, family, accelerator)
    work, found = {}, {}
    for name, arm in arms.items():
        work[name], found[name] = _chosen_steps(arm, accelerator.device, timed_steps)
    samples = {name: sum(step.plan.samples for step in steps) for name, steps in work.items()}
    rounds: list[dict[str, float]] = []
    for _ in range(1 + TIMED_ROUNDS):  # the first one warms up
        rounds.append(dict.fromkeys(arms, 0.0))
        for turn in itertools.zip_longest(*work.values()):
            for name, step in zip(work, turn, strict=True):
                if step:
                    start = clock()
                    seconds_of(setup, step)
                    rounds[-1][name] += (clock() - start) / samples[name]
    for name, own in found.items():
        ratios = [taken[name] / taken["mixed"] for taken in rounds[1:]]
        own |= {
            "seconds": statistics.median(taken[name] for taken in rounds[1:]),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    weights = sum(parameter.numel() for parameter in setup.parameters.values())
    return {"times": found, "timed_rounds": TIMED_ROUNDS, "trained_weights": weights}


def _chosen_steps(arm: Arm, device: torch.device, most: int) -> tuple[list[Step], dict[str, float]]:
    """Steps of the first epoch to time, by the tokens that they compute, and the figures of all steps of the epoch."""
    config, plan_type = arm
    _, source = cached_source(config, device)
    layout = config.batch.layout
    plan = make_plan(config, source.lengths, source.names, layout=layout, world_size=1, plan_type=plan_type)

    def tokens(step: StepPlan) -> int:
        return sum(computed_tokens(plan.lengths_in(microbatch), layout) for microbatch in step.ranks[0])

    steps = sorted(map(plan.step, range(plan.steps_per_epoch)), key=tokens)
    figures = {"tokens": sum(map(tokens, steps)) / sum(step.samples for step in steps), "epoch_steps": len(steps)}
    chosen = [steps[place] for place in spread_places(len(steps), most)]
    figures["steps"] = len(chosen)
    return [Step(step, list(collated(config, source, step.ranks[0], layout))) for step in chosen], figures


def spread_places(count: int, most: int) -> list[int]:
    """The middles of `most` equal parts of `count` places, or all of them."""
    most = min(count, most)
    return [(2 * part + 1) * count // (2 * most) for part in range(most)]


def _run(arm: Arm, family: Family, seed: int, folder: Path, device: torch.device) -> dict[str, Any]:
    """One training run, and what it has learnt."""
    logging = arm.config.logging.model_copy(update={"output_dir": str(folder), "report_to": "none"})
    own = arm.config.train.model_copy(update={"seed": seed})
    config = arm.config.model_copy(update={"train": own, "logging": logging, "resume": "auto"})
    train(config, plan_type=arm.plan_type)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if "loss" in line]
    evaluated: dict[str, float] = next((line for line in reversed(lines) if "eval/loss" in line), {})
    encoded = encode_all(config, family, device=device)
    plan = build_plan(config, encoded, world_size=1, plan_type=arm.plan_type)
    rows = [encoded.train[i].key for step in range(len(trained)) for i in plan.step(step).indices]
    losses = [line["loss"] for line in trained if line["loss"] is not None]
    return {
        "samples": sum(line["samples"] for line in trained),
        "different": len(set(rows)),
        "tokens": sum(line["tokens_computed"] for line in trained),
        "train_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "eval": {name.removeprefix("eval/"): value for name, value in evaluated.items() if name.startswith("eval/")},
        "images": _held_out_images(config, family, encoded, folder / FILE_NAME, device),
    }


def _held_out_images(
    config: Config, family: Family, encoded: CachedData, lora: Path, device: torch.device
) -> dict[str, float | None]:
    """Means over the held-out samples at their own sizes; nothing where there are none, or all weights trained."""
    if not (encoded.held_out and lora.is_file()):
        return {}
    transformer = family.load_transformer(
        dtype=getattr(torch, config.model.dtype), device=device, quantize=config.model.quantize
    )
    sampler = HeldOutSampler(config, family, transformer, encoded)
    attach(sampler.pipeline, read_header(str(lora)))
    border, groups, drifts = family.pixels_per_token(), dict[str, list[float]](), []
    for item in encoded.held_out:
        made = sampler.predict(item)
        target = sampler.read(item.record.target).resize(item.target_size, Image.Resampling.LANCZOS)
        errors = np.square(np.asarray(made, float) - np.asarray(target, float)).mean(-1)
        inner = errors[border:-border, border:-border]
        band = f"psnr_{resolution_band(made.width * made.height)}"
        rim = (errors.sum() - inner.sum()) / max(1, errors.size - inner.size)
        for name, error in (("psnr", errors.mean()), (band, errors.mean()), ("psnr_border", rim)):
            groups.setdefault(name, []).append(psnr_of(float(error)))
        drifts.append(sampler.drift(item, made))
    found = [drift for drift in drifts if drift]
    return {
        **{name: statistics.fmean(values) for name, values in sorted(groups.items())},
        "drift_px": statistics.fmean(drift.shift_px for drift in found) if found else None,
        "scale_pct": statistics.fmean(abs(drift.scale_pct) for drift in found) if found else None,
        "drift_images": float(len(found)),
    }


def psnr_of(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error; 99 for none."""
    return 10 * math.log10(255**2 / error) if error else 99.0


def over_seeds(report: Mapping[str, Any], arm: str, *path: str) -> tuple[float, float, float] | None:
    """Mean, lowest and highest of one figure over an arm's runs; None where a run lacks it."""
    values = []
    for run in report["runs"]:
        if run["arm"] == arm:
            value: Any = run
            for name in path:
                value = (value or {}).get(name)
            values.append(value)
    if not values or None in values:
        return None
    return statistics.fmean(values), min(values), max(values)


def table(report: Mapping[str, Any]) -> list[str]:
    """A row an arm; means over seeds, with lowest and highest of the PSNR."""
    lines = [f"{'':<14}{'cropped':>9}{'repeated':>9}{'tokens':>8}{'ms/sample':>10}{'loss':>8}{'held out':>9}{'PSNR':>7}"
             f" {'(low  high)':>12}"]  # fmt: skip
    for arm in ARMS:
        own, times = report["buckets"].get(arm, {}), report["times"][arm]
        loss, held_out = over_seeds(report, arm, "train_loss"), over_seeds(report, arm, "eval", "loss")
        psnr = over_seeds(report, arm, "images", "psnr")
        image = "-" if psnr is None else f"{psnr[0]:>7.2f} ({psnr[1]:.2f} {psnr[2]:.2f})"
        cells = (f"{own.get('cropped_mean', 0):>9.1%}", f"{own.get('repeated', 0):>9}", f"{times['tokens']:>8.0f}",
                 f"{1000 * times['seconds']:>10.1f}", f"{loss[0] if loss else math.nan:>8.4f}",
                 "-".rjust(9) if held_out is None else f"{held_out[0]:>9.4f}", image)  # fmt: skip
        lines.append(f"{arm:<14}" + "".join(cells))
    return lines


def plot(reports: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """For each report the held-out PSNR (or loss) of each seed and its mean, and the time a sample."""
    from matplotlib.figure import Figure  # half a second, needed here only

    figure = Figure(figsize=(9, 3.2 * len(reports)), layout="constrained")
    rows = figure.subfigures(len(reports), squeeze=False)[:, 0]
    for (name, report), row in zip(reports, rows, strict=True):
        row.suptitle(name)
        left, right = row.subplots(1, 2)
        images = any(run["images"] for run in report["runs"])
        which = ("images", "psnr") if images else ("eval", "loss") if report["held_out"] else ("train_loss",)
        own = "held-out loss" if report["held_out"] else "training loss (other samples each)"
        unit = "held-out PSNR, dB" if images else own
        for place, arm in enumerate(ARMS):
            found = over_seeds(report, arm, *which)
            if found:
                mean, low, high = found
                left.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="#08519c", capsize=4)
            right.barh(place, 1000 * report["times"][arm]["seconds"], color="#9ecae1")
        for axes, label in ((left, f"{unit}: mean, lowest and highest"), (right, f"{report['clock']}, ms a sample")):
            axes.set(xlabel=label, yticks=range(len(ARMS)))
            axes.set_yticklabels([arm.replace("_", " ") for arm in ARMS])
            axes.invert_yaxis()
            axes.grid(alpha=0.3, axis="x")
    with atomic.replace(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120, metadata={"Software": None})
