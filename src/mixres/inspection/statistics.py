"""The figures of `inspect`: sizes, tokens, the plan's sums and notices. No pixel and no weight is read.

Promise: every figure is a number or a text under a name of its own, ready for JSON. The sums are those that
`metrics.jsonl` will show, since they are of the very steps that the run asks the plan for.
Cost: a few passes over the records, and planning each step that is summed, some 0.1 ms a sample.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from mixres.config.schema import Config
from mixres.console import amount
from mixres.data.cache import CacheEntry
from mixres.data.plan import Lengths, Microbatch, Plan, computed_tokens
from mixres.data.scan import ScannedRecord
from mixres.geometry import Size
from mixres.preprocessing.samples import lengths_of
from mixres.preprocessing.training_data import ScannedData

_BINS = 12
_APART = 1.1  # aspects of control and target that differ by this factor are counted
_NEARLY = 1.05  # those that differ by less may be pairs that should have one grid
_RESIZED = 1.05  # an area that changes by less is only rounded
_CROOKED = 1.02  # a change of aspect by rounding that is worth a notice
_ENLARGED = 2.0  # so is a control that is enlarged by this factor along a side,
_IDLE = 0.2  # and this fraction of the ranks' time
Figures = dict[str, Any]


def summary(values: Sequence[int]) -> Figures:
    """Least, median, mean, most and sum; all are 0 where there is no value."""
    values = values or [0]
    return {
        "least": min(values),
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "most": max(values),
        "sum": sum(values),
    }


def histogram(values: Sequence[float]) -> list[Figures]:
    """Counts between round numbers, at most `_BINS` + 2 of them; each bin is without its upper end."""
    rough = (max(values) - min(values)) / _BINS or max(values) / _BINS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    numbers = np.floor(np.array(values) / step).astype(np.int64)
    first = int(numbers.min())
    return [
        {"from": round(number * step, 9), "to": round((number + 1) * step, 9), "count": count}
        for number, count in enumerate(np.bincount(numbers - first).tolist(), first)
    ]


def item_figures(found: ScannedData) -> Figures:
    """How many there are of each kind."""
    records = [scanned.record for scanned in (*found.train, *found.held_out)]
    return {
        "training_examples": len(found.train),
        "of_them_regularization": sum(scanned.regularization for scanned in found.train),
        "held_out_examples": len(found.held_out),
        "controls": sum(len(record.controls) for record in records),
        "masks": sum(record.mask is not None for record in records),
        "empty_captions": sum(not record.prompt for record in records),
        "cut_captions": found.cut,
        "with_transparency": sum(scanned.flattened for scanned in (*found.train, *found.held_out)),
        "with_several_frames": sum(scanned.first_of_several for scanned in (*found.train, *found.held_out)),
        "pictures": found.decoded + found.unchanged,
        "data_faults": len(found.problems),
    }


def size_figures(train: Sequence[ScannedRecord], entries: Sequence[CacheEntry], token: int) -> Figures:
    """Pixels and aspects of the training records, in files and as the VAE sees them.

    `entries` are those of the records, `token` is the side of a token in pixels.
    """
    seen = [[Size(grid.columns * token, grid.rows * token) for grid in entry.img_shapes] for entry in entries]
    files, trained = [scanned.target_size for scanned in train], [sizes[0] for sizes in seen]
    controls = [size for scanned in train for size in scanned.control_sizes]
    encoded = [size for sizes in seen for size in sizes[1:]]
    growth = [math.prod(size) / math.prod(file) for file, size in zip(files, trained, strict=True)]
    control_growth = [math.prod(size) / math.prod(file) for file, size in zip(controls, encoded, strict=True)]
    apart = [_apart(scanned.target_size, size) for scanned in train for size in scanned.control_sizes]
    changes = [_apart(file, size) for file, size in zip(files, trained, strict=True)]
    most = changes.index(max(changes))
    aspects = [size.width / size.height for size in files]
    pixels = {
        "target_files": files,
        "targets_as_trained": trained,
        "control_files": controls,
        "controls_as_encoded": encoded,
    }
    return {
        "pixels": {name: summary([math.prod(size) for size in sizes]) for name, sizes in pixels.items()},
        "different_target_sizes": len(set(trained)),
        "targets_scaled_down": sum(ratio < 1 / _RESIZED for ratio in growth),
        "targets_enlarged": sum(ratio > _RESIZED for ratio in growth),
        "most_change_of_aspect": changes[most] - 1,
        "most_changed_aspect": f"{train[most].record.name} ({files[most]} to {trained[most]})",
        "controls_enlarged": sum(ratio > _RESIZED for ratio in control_growth),
        "most_enlargement_of_a_control": math.sqrt(max(control_growth, default=0)),
        "controls_of_another_aspect": sum(ratio > _APART for ratio in apart),
        **_grid_figures(seen, apart),
        "least_aspect": min(aspects),
        "most_aspect": max(aspects),
        "aspects": histogram(aspects),
    }


def _grid_figures(seen: Sequence[Sequence[Size]], apart: Sequence[float]) -> Figures:
    """Controls whose token grid is not their target's. Grids lie centre on centre, so edges are half a side apart."""
    pairs = [(sizes[0], control) for sizes in seen for control in sizes[1:]]
    edges = [max(abs(a - b) for a, b in zip(*pair, strict=True)) / 2 for pair in pairs]
    near = [edge for edge, ratio in zip(edges, apart, strict=True) if edge and ratio < _NEARLY]
    return {
        "controls_of_another_grid": sum(map(bool, edges)),
        "of_them_nearly_of_the_targets_aspect": len(near),
        "most_pixels_apart_at_an_edge": max(near, default=0.0),
    }


def _apart(one: Size, other: Size) -> float:
    """By what factor the aspects differ, 1 or more."""
    ratio = one.width * other.height / (one.height * other.width)
    return max(ratio, 1 / ratio)


def token_figures(train: Sequence[ScannedRecord], entries: Sequence[CacheEntry]) -> Figures:
    """Tokens of the training samples: text, target, each control, all; and the samples at the ends."""
    kinds = {"text": [entry.text_tokens for entry in entries]}
    if any(entry.empty_tokens for entry in entries):
        kinds["text_without_caption"] = [entry.empty_tokens for entry in entries]
    images = zip_longest(*([grid.tokens for grid in entry.img_shapes] for entry in entries))
    for number, counts in enumerate(images):  # None where a sample has fewer controls
        kinds[f"control_{number}" if number else "target"] = [count for count in counts if count is not None]
    kinds["all"] = [lengths_of(entry).total for entry in entries]
    return {
        "per_example": {kind: summary(counts) for kind, counts in kinds.items()},
        "of_all": histogram(kinds["all"]),
        "extremes": _extremes(train, entries),
    }


def _extremes(train: Sequence[ScannedRecord], entries: Sequence[CacheEntry]) -> list[Figures]:
    samples = sorted(zip(train, entries, strict=True), key=lambda sample: sample[0].record.name)

    def tokens(sample: tuple[ScannedRecord, CacheEntry]) -> int:
        return lengths_of(sample[1]).total

    def aspect(sample: tuple[ScannedRecord, CacheEntry]) -> float:
        return sample[0].target_size.width / sample[0].target_size.height

    ends = {
        "fewest tokens": min(samples, key=tokens),
        "most tokens": max(samples, key=tokens),
        "longest text": max(samples, key=lambda sample: sample[1].text_tokens),
        "widest": max(samples, key=aspect),
        "tallest": min(samples, key=aspect),
    }
    return [
        {
            "what": what,
            "name": scanned.record.name,
            "target": str(scanned.target_size),
            "controls": ", ".join(map(str, scanned.control_sizes)) or "none",
            "text_tokens": entry.text_tokens,
            "target_tokens": entry.target_tokens,
            "control_tokens": entry.image_tokens - entry.target_tokens,
            "all_tokens": tokens((scanned, entry)),
        }
        for what, (scanned, entry) in ends.items()
    ]


class PlanSums(NamedTuple):
    """Sums over some steps and all ranks."""

    figures: Figures
    rank_tokens: list[int]  # computed by each rank
    largest: Microbatch  # the one with the most computed tokens


def plan_sums(plan: Plan, valid: Sequence[Lengths], steps: int) -> PlanSums:
    """Of the first `steps`, at least one; `valid` are lengths that are not rounded.

    `tokens` are valid ones, text and images; `fillers` are dummy microbatches, which only keep ranks in step. The idle
    fraction of the ranks' time is 1 - mean load / heaviest load, as if time were proportional to tokens.
    """

    def computed(microbatch: Microbatch) -> int:
        return computed_tokens(plan.lengths_in(microbatch), plan.layout)

    def tokens_of(microbatch: Microbatch) -> int:
        without = microbatch.dropped
        return sum((valid[i].without_caption() if i in without else valid[i]).total for i in microbatch.indices)

    planned = [plan.step(number) for number in range(steps)]
    microbatches = [m for step in planned for rank in step.ranks for m in rank]
    loads = np.array([[sum(map(computed, rank)) for rank in step.ranks] for step in planned])  # (steps, ranks)
    counts = [sum(map(len, step.ranks)) for step in planned]
    real = [m for m in microbatches if any(m.weights)]
    tokens, heaviest = sum(map(tokens_of, real)), int(loads.max(axis=1).sum())
    all_computed = int(loads.sum())
    figures = {
        "steps": steps,
        "samples": sum(step.samples for step in planned),
        "tokens": tokens,
        "tokens_computed": all_computed,
        "padding_share": 1 - tokens / all_computed,
        "microbatches": len(microbatches),
        "fillers": len(microbatches) - len(real),
        "heaviest_tokens": heaviest,
        "idle_share": 1 - all_computed / (plan.world_size * heaviest),
        "fewest_microbatches": min(counts),
        "most_microbatches": max(counts),
        "short_steps": sum(step.samples < plan.samples_per_step for step in planned),
    }
    return PlanSums(figures, loads.sum(axis=0).tolist(), max(microbatches, key=computed))


def notices(config: Config, found: ScannedData, sizes: Figures, epoch: Figures, ranks: int) -> list[str]:
    """What is allowed, but perhaps not intended."""
    train, wanted, steps = found.train, config.batch.samples_per_step, config.train.max_train_steps
    same = sum(len(set(s.digests[: 1 + len(s.control_sizes)])) <= len(s.control_sizes) for s in train)
    twins = len(train) - len({(scanned.digests, scanned.record.prompt) for scanned in train})
    enlarged, other, rest = sizes["targets_enlarged"], sizes["controls_of_another_aspect"], len(train) % wanted
    enlargement, change = sizes["most_enlargement_of_a_control"], sizes["most_change_of_aspect"]
    few, idle = found.summary.few(config), found.summary.idle(config)
    no_samples = config.sample.every and not found.held_out
    unaligned = "set data.resize.control.align=auto, which needs a new logging.output_dir"
    if config.data.resize.control.align == "auto":
        unaligned = (
            "scale the files of a pair alike, or set data.resize.control.align=always, or align_control of a record"
        )
    all_alone = epoch["microbatches"] == epoch["samples"] > epoch["steps"] * ranks
    fix = "raise batch.samples_per_step, or use fewer ranks"
    checks: list[tuple[object, str]] = [
        (found.cut, f"{amount(found.cut, 'caption')} cut (data.long_caption=truncate)"),
        (same, f"{amount(same, 'record')} with two images of the same bytes, such as a control that is its target"),
        (twins, f"{amount(twins, 'exact repetition')} of other records"),
        (other, f"{amount(other, 'control')} of another aspect than the target, by over 10 %: each keeps its own"),
        (
            near := sizes["of_them_nearly_of_the_targets_aspect"],
            f"{amount(near, 'control')} of nearly the target's aspect on another token grid, up to "
            f"{sizes['most_pixels_apart_at_an_edge']:g} pixels apart at an edge, so edits may be shifted: {unaligned}",
        ),
        (enlarged, f"{amount(enlarged, 'target')} enlarged: data.resize.target.upscale, or sides under multiple_of"),
        (
            change > _CROOKED - 1,
            f"the aspect of {sizes['most_changed_aspect']} changes by {change:.1%}: see data.resize.target.multiple_of",
        ),
        (enlargement > _ENLARGED, f"controls enlarged up to {enlargement:.1f} times a side (data.resize.control.area)"),
        (no_samples, "nothing is held out: there will be no samples while training (data.held_out)"),
        (few, str(few)),
        (idle, str(idle)),
        (steps < epoch["steps"], f"train.max_train_steps={steps} is less than an epoch of {epoch['steps']} steps"),
        (
            len(train) > wanted and rest,
            f"the last step of each epoch has {amount(rest, 'sample')} and moves the weights as far as one of {wanted}",
        ),
        (epoch["fillers"], f"{epoch['fillers']} dummy microbatches an epoch: {fix}"),
        (epoch["idle_share"] > _IDLE, f"ranks wait {epoch['idle_share']:.0%} of their time: {fix}"),
        (all_alone, "every microbatch is one sample: raise batch.max_tokens if memory allows"),
    ]
    return [text for holds, text in checks if holds]
