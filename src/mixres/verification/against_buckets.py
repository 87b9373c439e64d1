"""`bench --against buckets`: one training with mixed batches, with the buckets of three trainers, and one by one.

Promise: one trainer, base, optimizer and number of steps for all arms; held-out samples are computed at their own sizes
for all. The arms differ in what a step holds (`BucketPlan`, `OneByOnePlan`) and in the images' sizes and crops. Each
run is written as it is done, so the same command resumes; another configuration or data begins anew.
Cost: a training run of `steps` an arm and seed, and their held-out images.

`mixed` and `one_by_one` train the same samples in the same steps, so they differ by rounding and in time alone. The
steps of `musubi_tuner` hold fewer samples where a bucket fills no batch.
"""

import itertools
import json
import math
import shutil
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
from mixres.console import log
from mixres.data.plan import Plan
from mixres.errors import Problems
from mixres.geometry import Size
from mixres.models.family import Family
from mixres.models.lora import attach
from mixres.models.lora_file import FILE_NAME, read_header
from mixres.preprocessing.fill import CachedData, encode, encode_all, family_of, keyed_records
from mixres.preprocessing.live_texts import text_device
from mixres.training.sample_sheets import HeldOutSampler
from mixres.training.setup import build_plan, make_plan
from mixres.training.trainer import train
from mixres.training.validation import resolution_band
from mixres.verification.bench import Step, collated, seconds_of
from mixres.verification.bucket_data import BucketPlan, OneByOnePlan, fit_records, write_copies
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
TIMED_STEPS, TIMED_ROUNDS = 6, 7


class Arm(NamedTuple):
    """One way to feed the trainer."""

    config: Config
    plan_type: Callable[..., Plan]


def against_buckets(config: Config, *, steps: int = STEPS, seeds: int = 1, trained: Sequence[str] = ARMS) -> None:
    """Train `steps` steps with every arm and seed; print a table, write `reports/buckets.json` and `buckets.png`.

    All arms are timed; of those the ones named in `trained` are trained.

    Raises:
        UserError: configuration, base or data are wrong.
        Stopped: a signal came; the same command resumes.
    """
    problems = Problems(f"--{name}: given {value}, allowed: 1 and more"
                        for name, value in (("steps", steps), ("seeds", seeds)) if value < 1)  # fmt: skip
    if isinstance(config.data.held_out, float):
        problems.add("data.held_out: --against buckets trains on other files: name a folder or manifest, or null")
    problems.raise_if_any()
    accelerator = one_process(config, "bench")
    text_device(config, accelerator.device, ranks=1)
    config, family = _same_for_all(config, steps), family_of(config)
    records = keyed_records(config, family, is_main=True)
    encoded = encode(config, family, records, device=accelerator.device)
    path = report_path(config, "buckets.json")
    report = _report(config, encoded, accelerator, steps)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before.get("identity") == report["identity"]:
        report = before
    else:
        shutil.rmtree(path.parent / "buckets", ignore_errors=True)
    arms = {"mixed": Arm(config, Plan), "one_by_one": Arm(config, OneByOnePlan)}
    for name, rule in RULES.items():
        bucketed = fit_records(config, family, rule, records.train)
        report["buckets"][name] = bucketed.figures([scanned.target_size for scanned in records.train])
        manifest = write_copies(config, family, bucketed, records.train, path.parent / "buckets" / name)
        buckets = [fit.bucket for fit in bucketed.fits]
        plan_type = partial(BucketPlan, buckets=buckets, fill=rule.fill, fixed_batches=rule.fixed_batches)
        arms[name] = Arm(_with_copies(config, family, manifest, buckets), plan_type)
    arms = {name: arms[name] for name in ARMS}
    if not report["times"]:
        report["times"] = _times(arms, family, accelerator)
        atomic.write_json(path, report)
    for seed in range(config.train.seed, config.train.seed + seeds):
        for name, arm in ((name, arms[name]) for name in trained):
            if any((run["arm"], run["seed"]) == (name, seed) for run in report["runs"]):
                continue
            log(f"arm       {name}, seed {seed}")
            folder = path.parent / "buckets" / f"{name}-{seed}"
            report["runs"].append({"arm": name, "seed": seed, **_run(arm, family, seed, folder, accelerator.device)})
            atomic.write_json(path, report)
    for line in table(report):
        log(line)
    plot([("", report)], path.with_suffix(".png"))
    log(f"report    {path}, {path.with_suffix('.png')}")


def _same_for_all(config: Config, steps: int) -> Config:
    """Without what buckets have no rule for, and evaluated at both ends alone."""
    weights = config.data.mask_weight.model_copy(update={"foreground": 1.0, "background": 1.0})
    data = config.data.model_copy(update={"regularization": None, "mask_weight": weights})
    return config.model_copy(
        update={
            "data": data,
            "train": config.train.model_copy(update={"max_train_steps": steps}),
            "checkpoint": config.checkpoint.model_copy(update={"every": steps}),
            "sample": config.sample.model_copy(update={"every": 0}),
            "evaluate": config.evaluate.model_copy(update={"every": steps}),
        }
    )


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


def _times(arms: Mapping[str, Arm], family: Family, accelerator: Accelerator) -> dict[str, dict[str, float]]:
    """Seconds and tokens a sample of steps all over the first epoch, the arms in turn; no weight changes.

    `ratio` is time over that of `mixed` in the same round, with its lowest and highest.
    """
    clock = time.perf_counter if accelerator.device.type == "cuda" else time.process_time
    setup = set_up(arms["mixed"].config, family, accelerator)
    work = {name: _some_steps(arm, accelerator.device) for name, arm in arms.items()}
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
    found = {}
    for name, steps in work.items():
        ratios = [taken[name] / taken["mixed"] for taken in rounds[1:]]
        tokens = sum(batch.tokens_computed for step in steps for batch in step.batches)
        found[name] = {
            "seconds": statistics.median(taken[name] for taken in rounds[1:]),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "tokens": tokens / samples[name],
        }
    return found


def _some_steps(arm: Arm, device: torch.device) -> list[Step]:
    """Steps of the first epoch, from its beginning to its end."""
    config, plan_type = arm
    _, source = cached_source(config, device)
    layout = config.batch.layout
    plan = make_plan(config, source.lengths, source.names, layout=layout, world_size=1, plan_type=plan_type)
    steps = map(plan.step, sorted({k * plan.steps_per_epoch // TIMED_STEPS for k in range(TIMED_STEPS)}))
    return [Step(step, list(collated(config, source, step.ranks[0], layout))) for step in steps]


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

    figure = Figure(figsize=(9, 3 * len(reports)), layout="constrained")
    rows = figure.subplots(len(reports), 2, squeeze=False)
    for (name, report), (left, right) in zip(reports, rows, strict=True):
        images = any(run["images"] for run in report["runs"])
        which = ("images", "psnr") if images else ("eval", "loss") if report["held_out"] else ("train_loss",)
        unit = "held-out PSNR, dB" if images else "held-out loss" if report["held_out"] else "training loss"
        for place, arm in enumerate(ARMS):
            found = over_seeds(report, arm, *which)
            if found:
                mean, low, high = found
                left.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="#08519c", capsize=4)
            right.barh(place, 1000 * report["times"][arm]["seconds"], color="#9ecae1")
        for axes, label in ((left, f"{unit}: mean, lowest and highest"), (right, f"{report['clock']}, ms a sample")):
            axes.set(xlabel=label, yticks=range(len(ARMS)), title=name)
            axes.set_yticklabels([arm.replace("_", " ") for arm in ARMS])
            axes.invert_yaxis()
            axes.grid(alpha=0.3, axis="x")
    with atomic.replace(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120, metadata={"Software": None})
