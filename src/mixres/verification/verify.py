"""The verb `verify`: a batch of different sizes trains as its samples alone, on the user's own model and data.

Promise: what is compared is what would be trained (base, adapters, cached samples, objective, device, precision). A
case that does not fit is reported and never counts as passed. It writes under `reports/` only and keeps no weight.
Cost: loading the model, then about six forward and backward passes over at most four samples.

Bars: in float32 the batch is within 1e-6 (outputs) and 1e-5 (gradients) of the samples alone, in float64 within 1e-12
and 1e-11. In lower precision, batch and alone are both measured against float32, and the batch's error may be 1.5
times that of the samples alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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
from mixres.preprocessing.fill import CachedSample, encode_all, family_of
from mixres.training.sample_sheets import save_png
from mixres.training.setup import TrainState
from mixres.verification.batch_diagram import token_layout
from mixres.verification.consistency import BatchMode, Outcome, batches_of, errors, in_dtype, run
from mixres.verification.setup import free_memory, one_process, precision_label, report_path, set_up, versions

LAYOUTS: tuple[BatchMode, ...] = ("padded", "packed")
BARS = {"float32": {"forward": 1e-6, "gradient": 1e-5}, "float64": {"forward": 1e-12, "gradient": 1e-11}}
ROUNDING_FACTOR = 1.5
Bar = dict[str, float]  # the largest errors that pass, by measure


@dataclass(frozen=True)
class Case:
    """One layout in one precision. `passed` is None where there was nothing to judge; `reason` says why."""

    layout: str
    dtype: str
    samples: int
    forward: float | None = None
    gradient: float | None = None
    bar: Bar | None = None
    passed: bool | None = None
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
    setup = set_up(config, family, accelerator)
    fill_adapters(setup.parameters, seed=config.train.seed)
    setup.transformer.eval()  # no dropout: it would differ from call to call
    model_report = _report_model(setup)
    samples = [encoded.cache.read(item.key, name=item.record.name) for item in chosen]
    cases = _Comparison(setup, samples).cases()
    _log_table(cases)
    problem = _problem(cases, patched_and_adapted=model_report["whole"])
    report = {
        "passed": problem is None,
        "cases": [asdict(case) for case in cases],
        **model_report,
        "device": str(accelerator.device),
        "samples": [
            {"name": s.name, "img_shapes": [list(grid) for grid in s.img_shapes], "text_tokens": len(s.prompt_embeds)}
            for s in samples
        ],
    }
    path, image = report_path(config, "verify.json"), report_path(config, "verify.png")
    atomic.write_json(path, report)
    padded, packed = (batches_of(samples, layout)[0] for layout in LAYOUTS)
    save_png(token_layout(padded, packed), image, padded.names)
    log(f"report    {path}, {image}")
    if problem:
        raise WorkError(f"verify failed: {problem}; see {path}")


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
    for ranking in rankings:
        for item in sorted(items, key=lambda item: (ranking(item), item.record.name)):
            batch = [*chosen, item]
            if item not in chosen and computed_tokens([i.lengths for i in batch], "padded") <= max_tokens:
                chosen = batch
                break
    if len(chosen) < 2:
        raise UserError(f"batch.max_tokens: no two of {len(items)} training samples fit {max_tokens} tokens: raise it")
    return chosen


class _Comparison:
    """The chosen samples on one model, in every precision and layout that fits."""

    def __init__(self, setup: TrainState, samples: Sequence[Sample]) -> None:
        self.setup, self.samples = setup, samples
        self.parameters = list(setup.transformer.parameters())

    def cases(self) -> list[Case]:
        """In float32 (or the base's float64) first; it is the reference of what rounds more."""
        config = self.setup.config
        bfloat16, autocast = config.model.dtype == "bfloat16", config.train.mixed_precision == "bf16"
        exact = "float64" if config.model.dtype == "float64" else "float32"
        problem = self._float32_problem() if bfloat16 else None
        with nullcontext() if problem else in_dtype(self.parameters, getattr(torch, exact)):
            reference = problem or self._run("alone", autocast=False)
            cases = [self._case(layout, exact, False, reference, BARS[exact]) for layout in LAYOUTS]
        if bfloat16 or autocast:
            label, alone = precision_label(config), self._run("alone", autocast=autocast)
            bar: Bar | str = ""
            if isinstance(reference, str):
                bar = f"no float32 reference ({reference}); the errors are against the samples alone"
                reference = alone
            elif isinstance(alone, str):
                reference = alone
            else:
                allowed = errors(alone, reference)
                bar = {"forward": ROUNDING_FACTOR * allowed.forward, "gradient": ROUNDING_FACTOR * allowed.gradient}
            cases += [self._case(layout, label, autocast, reference, bar) for layout in LAYOUTS]
        return cases

    def _case(self, layout: BatchMode, dtype: str, autocast: bool, reference: Outcome | str, bar: Bar | str) -> Case:
        """The batch in `layout` against `reference`; where `bar` is why there is none, it is measured, not judged."""
        count = len(self.samples)
        batch = reference if isinstance(reference, str) else self._run(layout, autocast=autocast)
        if isinstance(batch, str) or isinstance(reference, str):
            return Case(layout, dtype, count, reason=str(batch))
        found = errors(batch, reference)
        if not (math.isfinite(found.forward) and math.isfinite(found.gradient)):
            return Case(layout, dtype, count, passed=False, reason="outputs or gradients are not finite")
        case = Case(layout, dtype, count, found.forward, found.gradient)
        if isinstance(bar, str):
            case = replace(case, reason=bar)
        else:
            passed = found.forward <= bar["forward"] and found.gradient <= bar["gradient"]
            case = replace(case, bar=bar, passed=passed)
        if found.unequal:
            reason = f"{len(found.unequal)} tensors have a gradient in only one of the two, first {found.unequal[0]}"
            case = replace(case, passed=False, reason=reason)
        return case

    def _run(self, mode: BatchMode, *, autocast: bool) -> Outcome | str:
        """The outcome, or why it does not fit."""
        try:
            return run(self.setup, self.samples, mode, autocast=autocast)
        except torch.OutOfMemoryError:
            return f"does not fit: the device ran out of memory with the samples {mode}"

    def _float32_problem(self) -> str | None:
        """Why this model cannot be computed in float32 here."""
        device, (trained, _) = self.setup.accelerator.device.type, self.setup.counts
        needed = {device: 4 * trained}
        for p in self.parameters:  # some may wait in host memory
            needed[p.device.type] = needed.get(p.device.type, 0) + p.numel() * max(0, 4 - p.itemsize)
        for place, more in needed.items():
            free = free_memory(torch.device(place))
            if free is not None and more > free:
                return f"does not fit: float32 needs {more / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
        return None


def _report_model(setup: TrainState) -> dict[str, Any]:
    """Versions, patch and adapters as the model carries them; `whole` if they are as they should be."""
    found = versions()
    patch = setup.family.patch_state(setup.transformer)
    log(f"versions  {_listed(found)}")
    log(f"patch     {_listed(patch._asdict())}")
    whole, lora = patch.whole, None
    if setup.config.model.lora:
        lora = _adapters(setup)
        whole = whole and lora["as_configured"]
        log(f"lora      {_listed(lora)}")
    for line in setup.lines():
        log(line)
    counts = dict(zip(("trained_parameters", "parameters"), setup.counts, strict=True))
    return {"versions": found, "patch": patch._asdict(), "lora": lora, **counts, "whole": whole}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if not isinstance(value, dict))


def _adapters(setup: TrainState) -> dict[str, Any]:
    """What the model carries, read from the model, against the configuration."""
    wanted, table = setup.config.model.lora, setup.table
    assert wanted is not None
    transformer: Any = setup.transformer
    carried = transformer.peft_config["default"]
    rank, alpha, targets = carried.r, float(carried.lora_alpha), {row.pattern: row.modules for row in table}
    trained, _ = setup.counts
    agrees = (rank, alpha) == (wanted.r, wanted.lora_alpha) and all(targets.values())
    agrees = agrees and trained == sum(row.parameters for row in table)
    return {"r": rank, "lora_alpha": alpha, "targets": targets, "as_configured": agrees}


def _log_table(cases: Sequence[Case]) -> None:
    log(f"{'layout':<8} {'dtype':<24} {'samples':>7} {'forward':>9} {'bar':>9} {'gradient':>9} {'bar':>9}")
    for case in cases:
        bar = case.bar or {}
        numbers = (case.forward, bar.get("forward"), case.gradient, bar.get("gradient"))
        columns = " ".join("        -" if number is None else f"{number:>9.1e}" for number in numbers)
        verdict = {True: "passed", False: "FAILED", None: "not judged"}[case.passed]
        note = f": {case.reason}" if case.reason else ""
        log(f"{case.layout:<8} {case.dtype:<24} {case.samples:>7} {columns}  {verdict}{note}")


def _problem(cases: Sequence[Case], *, patched_and_adapted: bool) -> str | None:
    """Why the whole has not passed: no case may fail, and each layout must pass at least once."""
    failed = [f"{case.layout} in {case.dtype}" for case in cases if case.passed is False]
    if failed:
        return f"a batch differs from its samples alone: {', '.join(failed)}"
    if not patched_and_adapted:
        return "patch or adapters are not what they should be"
    if {case.layout for case in cases if case.passed} != set(LAYOUTS):
        return "no precision could be judged for every layout"
    return None
