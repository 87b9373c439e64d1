"""A bucketing trainer's data for the trainer of mixres: copies of the images, and a plan of one bucket a step.

Promise: targets and controls are fitted alike. The rows of the manifest are the samples, in their order, as often as a
batch may repeat one, since noise is drawn for a row; equal rows share a cache entry.
"""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixres import atomic
from mixres.config.schema import Config
from mixres.data.images import read_image
from mixres.data.plan import Microbatch, Plan, StepPlan
from mixres.data.scan import ScannedRecord
from mixres.geometry import Size
from mixres.models.family import Family
from mixres.preprocessing.training_data import image_limits, target_size_of
from mixres.verification.bucket_rules import Fill, Fit, Rule, cover

TOY_SIDE = 256  # pixels


@dataclass(frozen=True)
class Bucketed:
    """What a rule makes of the training records."""

    rule: Rule
    fits: list[Fit]  # of each target
    samples_per_step: int

    @property
    def copies(self) -> int:
        """Rows a sample has in the manifest: a batch may hold one sample alone."""
        counts = Counter(fit.bucket for fit in self.fits).values()
        short = any(count % self.samples_per_step for count in counts)
        return self.samples_per_step if short and self.rule.fill != "none" else 1

    def figures(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """What buckets do to targets of these `sizes`, an epoch; fractions of 1."""
        counts = Counter(fit.bucket for fit in self.fits).values()
        batches = sum(-(-count // self.samples_per_step) for count in counts)
        cropped = [fit.cropped for fit in self.fits]
        slots = len(self.fits) if self.rule.fill == "none" else batches * self.samples_per_step
        pairs = zip(self.fits, sizes, strict=True)
        return {
            "buckets": len(counts),
            "short_buckets": sum(count < self.samples_per_step for count in counts),  # under one batch
            "cropped": sum(part > 0 for part in cropped),  # images
            "cropped_mean": sum(cropped) / len(cropped),
            "cropped_most": max(cropped),
            "enlarged": sum(fit.scaled.width > size.width or fit.scaled.height > size.height for fit, size in pairs),
            "dropped": 0,  # none of these rules leaves a sample out
            "repeated": slots - len(self.fits),
            "batches": batches,
            "mean_batch": slots / batches,
        }


def fit_records(config: Config, family: Family, rule: Rule, records: Sequence[ScannedRecord]) -> Bucketed:
    """The fits of all targets. The area of the buckets is the mean of what mixres trains, or its largest (`Rule`).

    Where that is under `TOY_SIDE` squared, steps of several tokens would cut away what no trainer cuts: one token then.
    """
    areas = [size.width * size.height for size in (target_size_of(config, scanned) for scanned in records)]
    side = int((max(areas) if rule.shrinks_only else sum(areas) / len(areas)) ** 0.5)
    sizes = [scanned.target_size for scanned in records]
    multiple = family.size_multiple()
    tokens = rule.step_tokens if side >= TOY_SIDE else 1
    fits = rule.fits(sizes, side, -(-tokens * family.pixels_per_token() // multiple) * multiple)
    return Bucketed(rule, fits, config.batch.samples_per_step)


def write_copies(
    config: Config, family: Family, bucketed: Bucketed, records: Sequence[ScannedRecord], folder: Path
) -> Path:
    """Write the images as the rule has them, and return their manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    limits, rule, rows = image_limits(config), bucketed.rule, []
    for number, (scanned, fit) in enumerate(zip(records, bucketed.fits, strict=True)):
        record, row = scanned.record, {"prompt": scanned.record.prompt}
        keys = ["path_target", "path_control", *(f"path_control_{n}" for n in range(1, len(record.controls)))]
        for key, picture in zip(keys, (record.target, *record.controls), strict=False):
            image = read_image(picture, limits, keep_alpha=family.keeps_alpha)
            own = cover(Size(*image.size), fit.bucket) if rule.own_control and key != "path_target" else fit
            row[key] = f"{number:06d}_{key.removeprefix('path_')}.png"
            own.apply(image, rule.filters).save(folder / row[key])
        rows.append(json.dumps(row) + "\n")
    atomic.write_text(folder / "manifest.jsonl", "".join(rows * bucketed.copies))
    return folder / "manifest.jsonl"


class BucketPlan(Plan):
    """Steps of one bucket each: the epoch's order is dealt into batches by bucket, which come in random order.

    Of as many rows as `Bucketed.copies` says; `buckets` are those of the samples.
    """

    def __init__(self, *given: Any, buckets: Sequence[Size], fill: Fill, fixed_batches: bool, **named: Any) -> None:
        self.buckets, self.fill, self.fixed_batches = list(buckets), fill, fixed_batches
        super().__init__(*given, **named)
        assert len(self.lengths) % len(buckets) == 0 and self.world_size == 1
        self.epoch_samples = len(buckets)
        self.batches = functools.lru_cache(maxsize=2)(self._batches)
        self.steps_per_epoch = len(self.batches(0))

    def step(self, step: int) -> StepPlan:
        """As in `Plan`, of one bucket."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.planned(step, epoch, np.array(self.batches(epoch)[within]))

    def _batches(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        dealt: dict[Size, list[int]] = {}
        for index in self._epoch_order(0 if self.fixed_batches else epoch).tolist():
            dealt.setdefault(self.buckets[index], []).append(index)
        found = [batch for bucket in dealt.values() for batch in self._filled(bucket, rng)]
        return [found[i] for i in rng.permutation(len(found))] if len(dealt) > 1 else found

    def _filled(self, bucket: list[int], rng: np.random.Generator) -> Iterator[list[int]]:
        size = self.samples_per_step
        for first in range(0, len(bucket), size):
            batch = bucket[first : first + size]
            if self.fill != "none" and len(batch) < size:
                others = rng.permutation(bucket).tolist() if self.fill == "bucket" else batch
                batch = (batch + others * size)[:size]
            seen: Counter[int] = Counter()
            for place, index in enumerate(batch):  # each time another row
                batch[place] = index + seen[index] * len(self.buckets)
                seen[index] += 1
            yield batch


class OneByOnePlan(Plan):
    """The steps of mixres, each sample in a microbatch of its own."""

    def step(self, step: int) -> StepPlan:
        """As in `Plan`, split into single samples."""
        return single_samples(super().step(step))


def single_samples(step: StepPlan) -> StepPlan:
    """The same step on one rank, one sample after the other."""
    microbatches = (
        Microbatch((index,), (weight,), microbatch.dropped & {index})
        for microbatch in step.ranks[0]
        for index, weight in zip(microbatch.indices, microbatch.weights, strict=True)
    )
    return replace(step, ranks=(tuple(microbatches),))
