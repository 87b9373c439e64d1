"""The verb `verify`: a batch of different sizes trains as its samples alone, on the user's own model and data.

Promise: what is compared is what would be trained (base, adapters, cached samples, objective, device, precision). A
case that does not fit is reported and never counts as passed. It writes under `reports/` only and keeps no weight.
Cost: loading the model, then about ten forward and backward passes over at most four samples.

The bar is the model's own rounding. The samples alone are computed twice, the second time with their sums in another,
equally valid order (`reordered_sums`). Against a reference in float64 the batch's error may be 1.5 times the larger one
of these two. Where float64 does not fit, the reference is that of as many of the blocks as fit, and the whole model is
judged without one: the batch may be 1.5 times as far from the samples alone as these are from themselves reordered.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from mixres import atomic
from mixres.batch import Sample
from mixres.config.schema import LYCORIS, Config
from mixres.console import log
from mixres.data.plan import computed_tokens
from mixres.errors import UserError, WorkError
from mixres.models.blocks import fewer_blocks, repeated_blocks
from mixres.models.lora import fill_adapters
from mixres.training.sample_sheets import save_png
from mixres.training.setup import TrainState
from mixres.verification.batch_diagram import token_layout
from mixres.verification.consistency import BatchMode, Outcome, batches_of, errors, in_dtype, reordered_sums, run
from mixres.verification.setup import (
    Source,
    cached_source,
    free_memory,
    one_process,
    precision_label,
    report_path,
    set_up,
    synthetic_source,
    versions,
)

LAYOUTS: tuple[BatchMode, ...] = ("padded", "packed")
ROUNDING_FACTOR = 1.5
_SYNTHETIC = 16  # samples to choose from
Bar = dict[str, float]  # the largest errors that pass, by measure


@dataclass(frozen=True)
class Case:
    """One layout in one precision. `passed` is None where there was nothing to judge; `reason` says why.

    `reference` is what the errors are against, None: the samples alone. `blocks` of the model were computed.
    """

    layout: str
    dtype: str
    samples: int
    forward: float | None = None
    gradient: float | None = None
    bar: Bar | None = None
    passed: bool | None = None
    reason: str | None = None
    reference: str | None = None
    blocks: int | None = None


def verify(config: Config, *, synthetic: bool = False) -> None:
    """Compare, and write `reports/verify.json` and `reports/verify.png`.

    `synthetic`: with random weights and samples in the shapes of the base, which show what kernels and patch do.

    Raises:
        UserError: configuration, base or data are wrong, or fewer than two samples fit one batch.
        WorkError: a case misses its bar, or a layout could not be judged in any precision; all is written by then.
    """
    accelerator = one_process(config, "verify")
    family, source = synthetic_source(config, _SYNTHETIC) if synthetic else cached_source(config, accelerator.device)
    samples = [source.read(index) for index in most_different(source, config.batch.max_tokens)]
    setup = set_up(config, family, accelerator)
    fill_adapters(setup.parameters, seed=config.train.seed)
    setup.transformer.eval()  # no dropout: it would differ from call to call
    model_report = _report_model(setup)
    cases = _Comparison(setup, samples).cases()
    _log_table(cases)
    problem = _problem(cases, patched_and_adapted=model_report["whole"])
    report = {
        "passed": problem is None,
        "cases": [asdict(case) for case in cases],
        **model_report,
        "device": str(accelerator.device),
        "synthetic": synthetic,
        "samples": [
            {"name": s.name, "img_shapes": [list(grid) for grid in s.img_shapes], "text_tokens": len(s.prompt_embeds)}
            for s in samples
        ],
    }
    path, image = report_path(config, "verify.json"), report_path(config, "verify.png")
    atomic.write_json(path, report)
    padded, packed = (batches_of(samples, layout)[0] for layout in LAYOUTS)
    save_png(token_layout(padded, packed, causal=family.block_causal), image, padded.names)
    log(f"report    {path}, {image}")
    if problem:
        raise WorkError(f"verify failed: {problem}; see {path}")


def most_different(source: Source, max_tokens: int) -> list[int]:
    """The shortest, the longest, the widest or tallest and the longest text, as far as they fit one padded batch.

    Raises:
        UserError: no two samples do.
    """

    def aspect(index: int) -> float:
        _, rows, columns = source.img_shapes[index][0]
        return max(rows / columns, columns / rows)

    lengths = source.lengths
    rankings: tuple[Callable[[int], float], ...] = (
        lambda index: lengths[index].total,
        lambda index: -lengths[index].total,
        lambda index: -aspect(index),
        lambda index: -lengths[index].text,
    )
    chosen: list[int] = []
    for ranking in rankings:
        for index in sorted(range(len(lengths)), key=lambda index: (ranking(index), source.names[index])):
            batch = [*chosen, index]
            if index not in chosen and computed_tokens([lengths[i] for i in batch], "padded") <= max_tokens:
                chosen = batch
                break
    if len(chosen) < 2:
        raise UserError(
            f"batch.max_tokens: no two of {len(lengths)} training samples fit {max_tokens} tokens: raise it"
        )
    return chosen


class _Comparison:
    """The chosen samples on one model, in every precision and layout that fits."""

    def __init__(self, setup: TrainState, samples: Sequence[Sample]) -> None:
        self.setup, self.samples = setup, samples

    def cases(self) -> list[Case]:
        """Against float64, as far as that fits; where it does not fit whole, in the model's own precision too."""
        whole, fit = len(repeated_blocks(self.setup.transformer)), self._blocks_in_float64()
        cases: list[Case] = []
        if fit:
            with fewer_blocks(self.setup.transformer, fit):
                cases = self._against_float64(len(repeated_blocks(self.setup.transformer)))
        if not cases or fit < whole:
            label, autocast = precision_label(self.setup.config), self.setup.config.train.mixed_precision == "bf16"
            cases += self._judged(label, autocast=autocast, reference=None, blocks=whole)
        return cases

    def _against_float64(self, blocks: int) -> list[Case]:
        """In float32, the sharp test, and in the precision of training; none where the reference does not fit."""
        config, parameters = self.setup.config, list(self.setup.transformer.parameters())
        label, autocast = precision_label(config), config.train.mixed_precision == "bf16"
        with in_dtype(parameters, torch.float64):
            reference = self._run("alone", autocast=False)
        if isinstance(reference, str):
            return []
        with in_dtype(parameters, torch.float32):
            cases = self._judged("float32", autocast=False, reference=reference, blocks=blocks)
        if label != "float32":
            cases += self._judged(label, autocast=autocast, reference=reference, blocks=blocks)
        return cases

    def _judged(self, label: str, *, autocast: bool, reference: Outcome | None, blocks: int) -> list[Case]:
        """Both layouts in one precision; without a reference the errors are against the samples alone."""
        alone = self._run("alone", autocast=autocast)
        with reordered_sums():
            reordered = self._run("alone", autocast=autocast)
        case = Case("", label, len(self.samples), reference="float64" if reference else None, blocks=blocks)
        if isinstance(alone, str) or isinstance(reordered, str):
            return [replace(case, layout=layout, reason=str(alone)) for layout in LAYOUTS]
        against = reference or alone
        own = [errors(each, against) for each in (alone, reordered)]
        least = torch.finfo(torch.bfloat16 if autocast else getattr(torch, label)).eps / 2  # where both round alike
        bar = {
            "forward": ROUNDING_FACTOR * max(least, *(found.forward for found in own)),
            "gradient": ROUNDING_FACTOR * max(least, *(found.gradient for found in own)),
        }
        return [self._case(replace(case, layout=layout), layout, autocast, against, bar) for layout in LAYOUTS]

    def _case(self, case: Case, layout: BatchMode, autocast: bool, against: Outcome, bar: Bar) -> Case:
        batch = self._run(layout, autocast=autocast)
        if isinstance(batch, str):
            return replace(case, reason=batch)
        found = errors(batch, against)
        if not (math.isfinite(found.forward) and math.isfinite(found.gradient)):
            return replace(case, passed=False, reason="outputs or gradients are not finite")
        passed, reason = found.forward <= bar["forward"] and found.gradient <= bar["gradient"], None
        if found.unequal:
            reason = f"{len(found.unequal)} tensors have a gradient in only one of the two, first {found.unequal[0]}"
        passed = passed and not found.unequal
        return replace(case, forward=found.forward, gradient=found.gradient, bar=bar, passed=passed, reason=reason)

    def _run(self, mode: BatchMode, *, autocast: bool) -> Outcome | str:
        """The outcome, or why it does not fit."""
        try:
            return run(self.setup, self.samples, mode, autocast=autocast)
        except torch.OutOfMemoryError:
            return f"does not fit: the device ran out of memory with the samples {mode}"

    def _blocks_in_float64(self) -> int:
        """How many of the blocks fit the device in float64 beside what is there, in half of what is free; 0: too few.

        None of a quantised base, whose weights have no wider form, of weights that lie elsewhere, and of float64.
        """
        transformer = self.setup.transformer
        blocks = repeated_blocks(transformer)
        plain = all(type(p) is nn.Parameter and p.is_floating_point() and p.numel() for p in transformer.parameters())
        if not plain or self.setup.config.model.dtype == "float64":
            return 0
        free = {device: free_memory(device) for device in {p.device for p in transformer.parameters()}}
        for count in range(len(blocks), 1, -1):
            with fewer_blocks(transformer, count):
                parameters = list(transformer.parameters())
            needed = dict.fromkeys(free, 0)
            for p in parameters:
                needed[p.device] += p.numel() * (8 - p.itemsize + 8 * p.requires_grad)
            if all(room is None or needed[device] <= room / 2 for device, room in free.items()):
                return count
        return 0


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
    alpha = float(carried.alpha if setup.config.model.adapter in LYCORIS else carried.lora_alpha)
    rank, targets = carried.r, {row.pattern: row.modules for row in table}
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
        note = f" ({case.blocks} blocks)" + (f": {case.reason}" if case.reason else "")
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
