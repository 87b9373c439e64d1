"""The figures of `inspect`: sizes, tokens, the plan's sums and notices. No pixel and no weight is read.

Promise: every figure is a number or a text under a name of its own, ready for JSON. The sums are those that
`metrics.jsonl` will show, since they are of the very steps that the run asks the plan for.
Cost: a few passes over the records, and planning each step that is summed, some 0.1 ms a sample.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixres.config.schema import Config
from mixres.console import amount
from mixres.data.cache import CacheEntry
from mixres.data.plan import Lengths, Microbatch, Plan, computed_tokens
from mixres.data.scan import ScannedRecord
from mixres.geometry import Size
from mixres.preprocessing.training_data import ScannedData

_BINS = 12
_APART = 1.1  # aspects of control and target that differ by this factor are counted
_RESIZED = 1.05  # an area that changes by less is only rounded
_CROOKED = 1.02  # a change of aspect by rounding that is worth a notice
_ENLARGED = 2.0  # so is a control that is enlarged by this factor along a side,
_IDLE = 0.2  # and this share of the ranks' time
Figures = dict[str, Any]


def summary(values: Sequence[int]) -> Figures:
    """Least, median, mean, most and sum."""
    ordered = list(values)
    return {
        "least": min(ordered, default=0),
        "median": statistics.median(ordered or [0]),
        "mean": statistics.fmean(ordered or [0]),
        "most": max(ordered, default=0),
        "sum": sum(ordered),
    }


def histogram(values: Sequence[float]) -> list[Figures]:
    """Counts between round numbers, at most `_BINS` + 2 of them; each bin is without its upper end."""
    least, most = min(values), max(values)
    rough = (most - least) / _BINS or most / _BINS or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.floor(least / step)
    counts = [0] * (math.floor(most / step) - first + 1)
    for value in values:
        counts[math.floor(value / step) - first] += 1
    return [
        {"from": round((first + i) * step, 9), "to": round((first + i + 1) * step, 9), "count": count}
        for i, count in enumerate(counts)
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


def size_figures(train: Sequence[ScannedRecord], seen: Sequence[Sequence[Size]]) -> Figures:
    """Pixels and aspects of the training records; `seen` are the sizes that the VAE sees, target first."""
    files = [scanned.target_size for scanned in train]
    trained = [sizes[0] for sizes in seen]
    controls = [size for scanned in train for size in scanned.control_sizes]
    resized = [size for sizes in seen for size in sizes[1:]]
    pairs, aspects = list(zip(files, trained, strict=True)), [size.width / size.height for size in files]
    changes = [_apart(*pair) for pair in pairs]
    most = changes.index(max(changes))
    return {
        "pixels": {
            "target_files": summary([math.prod(size) for size in files]),
            "targets_as_trained": summary([math.prod(size) for size in trained]),
            "control_files": summary([math.prod(size) for size in controls]),
            "controls_as_encoded": summary([math.prod(size) for size in resized]),
        },
        "different_target_sizes": len(set(trained)),
        "targets_scaled_down": sum(_area_ratio(*pair) < 1 / _RESIZED for pair in pairs),
        "targets_enlarged": sum(_area_ratio(*pair) > _RESIZED for pair in pairs),
        "most_change_of_aspect": changes[most] - 1,
        "most_changed_aspect": f"{train[most].record.name} ({files[most]} to {trained[most]})",
        "controls_enlarged": sum(_area_ratio(*pair) > _RESIZED for pair in zip(controls, resized, strict=True)),
        "most_enlargement_of_a_control": max(
            (math.sqrt(_area_ratio(*pair)) for pair in zip(controls, resized, strict=True)), default=0.0
        ),
        "controls_of_another_aspect": sum(
            _apart(scanned.target_size, size) > _APART for scanned in train for size in scanned.control_sizes
        ),
        "least_aspect": min(aspects),
        "most_aspect": max(aspects),
        "aspects": histogram(aspects),
    }


def _area_ratio(source: Size, size: Size) -> float:
    return math.prod(size) / math.prod(source)


def _apart(one: Size, other: Size) -> float:
    """By what factor the aspects differ, 1 or more."""
    ratio = one.width * other.height / (one.height * other.width)
    return max(ratio, 1 / ratio)


def token_figures(train: Sequence[ScannedRecord], entries: Sequence[CacheEntry]) -> Figures:
    """Tokens of the training samples: text, target, each control, all; and the samples at the ends."""
    most_controls = max(len(entry.img_shapes) for entry in entries) - 1
    kinds = {"text": [entry.text_tokens for entry in entries]}
    if any(entry.empty_tokens for entry in entries):
        kinds["text_without_caption"] = [entry.empty_tokens for entry in entries]
    kinds["target"] = [entry.target_tokens for entry in entries]
    for number in range(1, most_controls + 1):
        some = [entry.img_shapes[number].tokens for entry in entries if len(entry.img_shapes) > number]
        kinds[f"control_{number}"] = some
    kinds["all"] = [_all_tokens(entry) for entry in entries]
    return {
        "per_example": {kind: summary(values) for kind, values in kinds.items()},
        "of_all": histogram(kinds["all"]),
        "extremes": _extremes(train, entries),
    }


def _all_tokens(entry: CacheEntry) -> int:
    return entry.text_tokens + entry.image_tokens


def _extremes(train: Sequence[ScannedRecord], entries: Sequence[CacheEntry]) -> list[Figures]:
    pairs = sorted(zip(train, entries, strict=True), key=lambda pair: pair[0].record.name)
    ways: dict[str, Callable[[tuple[ScannedRecord, CacheEntry]], float]] = {
        "fewest tokens": lambda pair: -_all_tokens(pair[1]),
        "most tokens": lambda pair: _all_tokens(pair[1]),
        "longest text": lambda pair: pair[1].text_tokens,
        "widest": lambda pair: pair[0].target_size.width / pair[0].target_size.height,
        "tallest": lambda pair: pair[0].target_size.height / pair[0].target_size.width,
    }
    return [{"what": what, **_example(*max(pairs, key=way))} for what, way in ways.items()]


def _example(scanned: ScannedRecord, entry: CacheEntry) -> Figures:
    return {
        "name": scanned.record.name,
        "target": str(scanned.target_size),
        "controls": ", ".join(map(str, scanned.control_sizes)) or "none",
        "text_tokens": entry.text_tokens,
        "target_tokens": entry.target_tokens,
        "control_tokens": entry.image_tokens - entry.target_tokens,
        "all_tokens": _all_tokens(entry),
    }


class PlanSums(NamedTuple):
    """Sums over some steps and all ranks."""

    figures: Figures
    rank_tokens: list[int]  # computed by each rank
    largest: Microbatch  # the one with the most computed tokens


def plan_sums(plan: Plan, valid: Sequence[Lengths], steps: int) -> PlanSums:
    """Of the first `steps`, at least one; `valid` are lengths that are not rounded.

    `tokens` are valid ones, text and images; `fillers` are microbatches that only keep ranks in step. The idle share of
    the ranks' time is 1 - mean load / heaviest load, as if time were proportional to tokens.
    """

    def computed(microbatch: Microbatch) -> int:
        return computed_tokens(plan.lengths_in(microbatch), plan.layout)

    planned = [plan.step(number) for number in range(steps)]
    microbatches = [m for step in planned for rank in step.ranks for m in rank]
    loads = [[sum(map(computed, rank)) for rank in step.ranks] for step in planned]
    rank_tokens, heaviest = [sum(rank) for rank in zip(*loads, strict=True)], sum(map(max, loads))
    counts = [sum(map(len, step.ranks)) for step in planned]
    real = [m for m in microbatches if any(m.weights)]
    tokens = sum(
        (valid[i].without_caption() if i in microbatch.dropped else valid[i]).total
        for microbatch in real
        for i in microbatch.indices
    )
    figures = {
        "steps": steps,
        "samples": sum(step.samples for step in planned),
        "tokens": tokens,
        "tokens_computed": sum(rank_tokens),
        "padding_share": 1 - tokens / sum(rank_tokens),
        "microbatches": len(microbatches),
        "fillers": len(microbatches) - len(real),
        "heaviest_tokens": heaviest,
        "idle_share": 1 - sum(rank_tokens) / (plan.world_size * heaviest),
        "fewest_microbatches": min(counts),
        "most_microbatches": max(counts),
        "short_steps": sum(step.samples < plan.samples_per_step for step in planned),
    }
    return PlanSums(figures, rank_tokens, max(microbatches, key=computed))


def notices(config: Config, found: ScannedData, sizes: Figures, epoch: Figures, ranks: int) -> list[str]:
    """What is allowed, but perhaps not intended."""
    said = [*_data_notices(config, found, sizes), *_plan_notices(config, found, epoch, ranks)]
    return [text for holds, text in said if holds]


def _data_notices(config: Config, found: ScannedData, sizes: Figures) -> list[tuple[object, str]]:
    train = found.train
    same = sum(len(set(s.digests[: 1 + len(s.control_sizes)])) <= len(s.control_sizes) for s in train)
    twins = len(train) - len({(scanned.digests, scanned.record.prompt) for scanned in train})
    enlarged, enlargement = sizes["targets_enlarged"], sizes["most_enlargement_of_a_control"]
    change, other = sizes["most_change_of_aspect"], sizes["controls_of_another_aspect"]
    return [
        (found.cut, f"{amount(found.cut, 'caption')} cut (data.long_caption=truncate)"),
        (same, f"{amount(same, 'record')} with two images of the same bytes, such as a control that is its target"),
        (twins, f"{amount(twins, 'exact repetition')} of other records"),
        (
            other,
            f"{amount(other, 'control')} of another aspect than the target, by over 10 %: allowed, each keeps its own",
        ),
        (enlarged, f"{amount(enlarged, 'target')} enlarged: data.resize.target.upscale, or sides under multiple_of"),
        (
            change > _CROOKED - 1,
            f"sides are rounded so coarsely that the aspect of {sizes['most_changed_aspect']} changes by {change:.1%}: "
            "small targets, or a large data.resize.target.multiple_of",
        ),
        (
            enlargement > _ENLARGED,
            f"controls are enlarged up to {enlargement:.1f} times along a side; data.resize.control.area=target gives "
            "each as many pixels as its target has",
        ),
        (
            config.sample.every and not found.held_out,
            "nothing is held out: there will be no samples while training (data.held_out)",
        ),
    ]


def _plan_notices(config: Config, found: ScannedData, epoch: Figures, ranks: int) -> list[tuple[object, str]]:
    wanted, steps, count = config.batch.samples_per_step, config.train.max_train_steps, len(found.train)
    rest, few = count % wanted, found.few(config)
    return [
        (few, str(few)),
        (
            steps < epoch["steps"],
            f"train.max_train_steps={steps} ends before the first epoch of {epoch['steps']} steps: some records never "
            "train",
        ),
        (
            count > wanted and rest,
            f"the last step of each epoch has {amount(rest, 'sample')} and moves the weights as far as one of {wanted}",
        ),
        (
            epoch["fillers"],
            f"{epoch['fillers']} dummy microbatches an epoch, for ranks without a sample of their own: {ranks} ranks, "
            f"batch.samples_per_step={wanted}",
        ),
        (
            epoch["idle_share"] > _IDLE,
            f"{epoch['idle_share']:.0%} of the ranks' time goes into waiting for the heaviest one: raise "
            "batch.samples_per_step, or take fewer ranks",
        ),
        (
            epoch["microbatches"] == epoch["samples"] and epoch["samples"] > epoch["steps"] * ranks,
            "every microbatch is one sample: raise batch.max_tokens if memory allows",
        ),
    ]


def seen_sizes(entries: Sequence[CacheEntry], token: int) -> list[list[Size]]:
    """The sizes at which the VAE sees each sample, target first; `token` is the side of a token in pixels."""
    return [[Size(grid.columns * token, grid.rows * token) for grid in entry.img_shapes] for entry in entries]
