"""The verb `verify`: that a batch of different sizes trains as its samples alone, on the user's own model and data.

Promise: what is compared is what would be trained (base, adapters, cached samples, objective, device, precision). A
case that does not fit is told as such and never counts as passed. Writes under `reports/` only, and no weight is kept.
Cost: loading the model, then about six forward and backward passes over at most four samples.

Bars: in float32 the batch is within 1e-6 (outputs) and 1e-5 (gradients) of the samples alone, in float64 within 1e-12
and 1e-11. In lower precision, batch and alone are both measured against float32, and the batch's error may be 1.5
times that of the samples alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mixres import atomic
from mixres.batch import Sample
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.plan import computed_tokens
from mixres.errors import UserError, WorkError
from mixres.models.lora import fill_adapters
from mixres.models.qwen_multi_resolution_patch import PatchState, patch_state
from mixres.preprocessing.fill import CachedSample, encode_all, family_of
from mixres.training.sample_sheets import save_png
from mixres.verification.batch_diagram import token_layout
from mixres.verification.consistency import Outcome, Ride, batches_of, errors, in_dtype, run
from mixres.verification.setup import (
    Workbench,
    free_memory,
    one_process,
    precision_label,
    report_path,
    set_up,
    versions,
)

LAYOUTS: tuple[Ride, ...] = ("padded", "packed")
BARS = {"float32": (1e-6, 1e-5), "float64": (1e-12, 1e-11)}
ROUNDING_FACTOR = 1.5
MAX_SAMPLES = 4
_CPU_PARAMETERS = 2_000_000_000  # a larger model takes a CPU hours in float32


@dataclass(frozen=True)
class Bar:
    """The largest errors that pass."""

    forward: float
    gradient: float


@dataclass(frozen=True)
class Case:
    """One layout in one precision. `passed` is None where it could not be judged; `reason` says why."""

    layout: str
    dtype: str
    samples: int
    forward: float | None
    gradient: float | None
    bar: Bar | None
    passed: bool | None
    reason: str | None = None


def verify(config: Config) -> None:
    """Compare, and write `reports/verify.json` and `reports/verify.png`.

    Raises:
        UserError: configuration, base or data are wrong, or fewer than two samples fit one batch.
        WorkError: a case misses its bar, or a layout could not be judged in any precision; all is written by then.
    """
    accelerator = one_process(config, "verify")
    family = family_of(config)
    encoded = encode_all(config, family, device=accelerator.device)
    chosen = most_different(encoded.train, config.batch.max_tokens)
    bench = set_up(config, family, accelerator)
    fill_adapters(bench.trained.parameters, seed=config.train.seed)
    bench.trained.transformer.eval()  # no dropout: it would differ from call to call
    header = _header(bench)
    samples = [encoded.cache.read(item.key, name=item.record.name) for item in chosen]
    for sample in samples:
        target, *controls = (f"{grid.rows}x{grid.columns}" for grid in sample.img_shapes)
        log(f"sample    {sample.name}: target {target}, control {', '.join(controls) or 'none'}, "
            f"text {len(sample.prompt_embeds)} tokens")  # fmt: skip
    trial = _Trial(bench, samples)
    cases = trial.cases()
    passed = _passed(cases) and bool(header["whole"])
    _say_table(cases)
    _write(config, {"passed": passed, "cases": [asdict(case) for case in cases], **header}, trial)
    if not passed:
        raise WorkError(_verdict(cases, header, config))


def most_different(items: Sequence[CachedSample], max_tokens: int) -> list[CachedSample]:
    """The shortest, the longest, the widest or tallest and the longest text, as far as they fit one padded batch.

    Raises:
        UserError: no two samples do.
    """

    def aspect(item: CachedSample) -> float:
        _, rows, columns = item.entry.img_shapes[0]
        return max(rows / columns, columns / rows)

    rankings: tuple[Callable[[CachedSample], float], ...] = (
        lambda item: item.lengths.total,
        lambda item: -item.lengths.total,
        lambda item: -aspect(item),
        lambda item: -item.lengths.text,
    )
    chosen: list[CachedSample] = []
    for ranking in rankings[:MAX_SAMPLES]:
        for item in sorted(items, key=lambda item: (ranking(item), item.record.name)):
            batch = [*chosen, item]
            if item not in chosen and computed_tokens([i.lengths for i in batch], "padded") <= max_tokens:
                chosen = batch
                break
    if len(chosen) < 2:
        raise UserError(
            f"batch.max_tokens: no two of the {len(items)} training samples fit {max_tokens} tokens together, so there "
            "is no batch to verify: raise it, or add samples"
        )
    return chosen


class _Trial:
    """The chosen samples on one model, in every precision and layout that fits."""

    def __init__(self, bench: Workbench, samples: Sequence[Sample]) -> None:
        self.bench, self.samples = bench, samples
        self.mask: torch.Tensor | None = None
        self.parameters = list(bench.trained.transformer.parameters())

    def cases(self) -> list[Case]:
        """In float32 (or the base's float64) first; it is the reference of what rounds more."""
        model, train = self.bench.config.model, self.bench.config.train
        exact = "float64" if model.dtype == "float64" else "float32"
        reason = self._exact_problem() if model.dtype == "bfloat16" else None
        reference: Outcome | str = reason or ""
        found: list[Case] = []
        if reason is None:
            with in_dtype(self.parameters, getattr(torch, exact)):
                reference = self._run("alone", autocast=False)
                found = [self._exact_case(layout, exact, reference) for layout in LAYOUTS]
        else:
            found = [self._unjudged(layout, exact, reason) for layout in LAYOUTS]
        if model.dtype == "bfloat16" or train.mixed_precision == "bf16":
            label, autocast = precision_label(self.bench.config), train.mixed_precision == "bf16"
            alone = self._run("alone", autocast=autocast)
            found += [self._rounded_case(layout, label, autocast, alone, reference) for layout in LAYOUTS]
        return found

    def _exact_case(self, layout: Ride, dtype: str, alone: Outcome | str) -> Case:
        batch = self._run(layout, autocast=False)
        if isinstance(batch, str) or isinstance(alone, str):
            return self._unjudged(layout, dtype, batch if isinstance(batch, str) else str(alone))
        if layout == "padded":
            self.mask = batch.mask
        return self._judged(layout, dtype, batch, alone, Bar(*BARS[dtype]))

    def _rounded_case(
        self, layout: Ride, dtype: str, autocast: bool, alone: Outcome | str, reference: Outcome | str
    ) -> Case:
        batch = self._run(layout, autocast=autocast)
        if isinstance(batch, str) or isinstance(alone, str):
            return self._unjudged(layout, dtype, batch if isinstance(batch, str) else str(alone))
        if layout == "padded":
            self.mask = batch.mask
        if isinstance(reference, str):  # how far batch and alone are apart is told, but there is no bar for it
            apart = self._judged(layout, dtype, batch, alone, Bar(math.inf, math.inf))
            reason = f"no float32 reference ({reference}); the errors are against the samples alone"
            return apart if apart.reason else replace(apart, bar=None, passed=None, reason=reason)
        allowed = errors(alone, reference)
        bar = Bar(ROUNDING_FACTOR * allowed.forward, ROUNDING_FACTOR * allowed.gradient)
        return self._judged(layout, dtype, batch, reference, bar)

    def _judged(self, layout: Ride, dtype: str, batch: Outcome, reference: Outcome, bar: Bar) -> Case:
        found, reason = errors(batch, reference), None
        if not (math.isfinite(found.forward) and math.isfinite(found.gradient)):
            return Case(
                layout, dtype, len(self.samples), None, None, None, False, "outputs or gradients are not finite"
            )
        within = found.forward <= bar.forward and found.gradient <= bar.gradient
        if found.unequal:
            reason = f"{len(found.unequal)} tensors have a gradient in only one of the two, first {found.unequal[0]}"
        passed = within and not found.unequal
        return Case(layout, dtype, len(self.samples), found.forward, found.gradient, bar, passed, reason)

    def _unjudged(self, layout: Ride, dtype: str, reason: str) -> Case:
        return Case(layout, dtype, len(self.samples), None, None, None, None, reason)

    def _run(self, ride: Ride, *, autocast: bool) -> Outcome | str:
        """The outcome, or why it does not fit."""
        try:
            return run(self.bench, self.samples, ride, autocast=autocast)
        except torch.OutOfMemoryError:
            return f"does not fit: the device ran out of memory with the samples {ride}"

    def _exact_problem(self) -> str | None:
        """Why this model cannot be computed in float32 here."""
        device = self.bench.accelerator.device
        trained, count = self.bench.trained.counts
        needed = sum(p.numel() * (4 - p.itemsize) for p in self.parameters if p.itemsize < 4) + 4 * trained
        if device.type == "cpu" and count >= _CPU_PARAMETERS:
            return f"does not fit: {count:,} parameters are too many for float32 on a CPU"
        free = free_memory(device)
        if free is not None and needed > free:
            return f"does not fit: float32 needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
        return None


def _header(bench: Workbench) -> dict[str, Any]:
    """Versions, patch and adapters as they are, told and for the report; `whole` if they are what they should be."""
    trained, config = bench.trained, bench.config
    patch: PatchState = patch_state(trained.transformer)
    found = versions()
    log("versions  " + ", ".join(f"{name} {number}" for name, number in found.items()))
    log(
        f"patch     {patch.processors} of {patch.blocks} attention processors and the positions "
        f"{'are' if patch.positions else 'are NOT'} those of mixres"
    )
    whole, lora = patch.whole, None
    if config.model.lora:
        lora = _lora_state(bench)
        whole = whole and lora["as_configured"]
        log(f"lora      r {lora['r']}, lora_alpha {lora['lora_alpha']}: "
            f"{'as configured' if lora['as_configured'] else 'NOT as configured'}")  # fmt: skip
    for line in trained.lines():
        log(line)
    count, total = trained.counts
    share = {"trained_parameters": count, "parameters": total}
    return {"versions": found, "patch": patch._asdict(), "lora": lora, **share, "whole": whole}


def _lora_state(bench: Workbench) -> dict[str, Any]:
    """What the model carries, read from the model, against what the configuration asks for."""
    wanted = bench.config.model.lora
    assert wanted is not None
    transformer: Any = bench.trained.transformer
    carried = transformer.peft_config["default"]
    counted, _ = bench.trained.counts
    agrees = (carried.r, float(carried.lora_alpha)) == (wanted.r, wanted.lora_alpha)
    agrees = agrees and all(row.modules for row in bench.trained.table)
    agrees = agrees and counted == sum(row.parameters for row in bench.trained.table)
    targets = {row.pattern: row.modules for row in bench.trained.table}
    return {"r": carried.r, "lora_alpha": float(carried.lora_alpha), "targets": targets, "as_configured": agrees}


def _passed(cases: Sequence[Case]) -> bool:
    """No case failed, and each layout was judged at least once."""
    judged = {case.layout for case in cases if case.passed}
    return all(case.passed is not False for case in cases) and judged == set(LAYOUTS)


def _say_table(cases: Sequence[Case]) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    log(f"{'layout':<8} {'dtype':<24} {'samples':>7} {'forward':>9} {'bar':>9} {'gradient':>9} {'bar':>9}")
    for case in cases:
        bars = (case.bar.forward, case.bar.gradient) if case.bar else (None, None)
        word = {True: "passed", False: "FAILED", None: "not judged"}[case.passed]
        numbers = " ".join(f"{number(x):>9}" for x in (case.forward, bars[0], case.gradient, bars[1]))
        note = f": {case.reason}" if case.reason else ""
        log(f"{case.layout:<8} {case.dtype:<24} {case.samples:>7} {numbers}  {word}{note}")


def _write(config: Config, report: dict[str, Any], trial: _Trial) -> None:
    padded, packed = (batches_of(trial.samples, layout)[0] for layout in LAYOUTS)
    samples = [
        {"name": s.name, "img_shapes": [list(g) for g in s.img_shapes], "text_tokens": len(s.prompt_embeds)}
        for s in trial.samples
    ]
    path, picture = report_path(config, "verify.json"), report_path(config, "verify.png")
    atomic.write_json(path, {**report, "device": str(trial.bench.accelerator.device), "samples": samples})
    save_png(token_layout(padded, packed, trial.mask), picture, padded.names)
    log(f"report    {path}, {picture}")


def _verdict(cases: Sequence[Case], header: dict[str, Any], config: Config) -> str:
    failed = [f"{case.layout} in {case.dtype}" for case in cases if case.passed is False]
    if failed:
        text = f"a batch differs from its samples alone: {', '.join(failed)}"
    elif not header["whole"]:
        text = "patch or adapters are not what they should be"
    else:
        text = "no precision could be judged for every layout"
    return f"verify failed: {text}; see {report_path(config, 'verify.json')}"
