"""The same optimizer steps, batched in every way that `bench` compares.

Promise: each way holds exactly the samples of the configuration's own plan, step by step. Cost: one copy of each
sample a way, on the CPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mixres.batch import Batch, Sample
from mixres.config.schema import Config
from mixres.data.collate import collate
from mixres.data.loader import samples_of
from mixres.data.plan import Layout, Lengths, Microbatch, Plan, StepPlan, computed_tokens
from mixres.training.setup import make_plan

BASELINE = "one_by_one"
LAYOUTS: tuple[Layout, ...] = ("padded", "packed")


@dataclass(frozen=True)
class Source:
    """Samples by index, however they are had."""

    lengths: Sequence[Lengths]
    names: Sequence[str]
    read: Callable[[int], Sample]


@dataclass(frozen=True)
class Work:
    """Optimizer steps, and their microbatches by way, then by step."""

    steps: list[StepPlan]
    batches: dict[str, list[list[Batch]]]


def plan_in(config: Config, source: Source, layout: Layout) -> Plan:
    """The plan of the configuration's run on one process, in `layout`.

    Raises:
        UserError: a sample is over `batch.max_tokens` alone.
    """
    return make_plan(config, source.lengths, source.names, layout=layout, world_size=1)


def make_work(config: Config, source: Source, most_steps: int) -> Work:
    """The run's first steps, at most `most_steps` of one epoch: one by one, padded, padded unsorted, packed.

    Raises:
        UserError: as `plan_in`.
    """
    plans = {layout: plan_in(config, source, layout) for layout in LAYOUTS}
    steps = [plans["padded"].step(k) for k in range(min(most_steps, plans["padded"].steps_per_epoch))]

    def planned(layout: Layout, step: StepPlan) -> list[Batch]:
        return list(collated(source, plans[layout].step(step.step).ranks[0], layout))

    def grouped(step: StepPlan, groups: Sequence[tuple[int, ...]]) -> list[Batch]:
        made = [Microbatch(group, (1.0,) * len(group), step.dropped.intersection(group)) for group in groups]
        return list(collated(source, made, "padded"))

    def random_groups(step: StepPlan) -> list[tuple[int, ...]]:
        lengths = {i: source.lengths[i] for i in step.indices}
        lengths |= {i: lengths[i].without_caption() for i in step.dropped}
        return unsorted(step.indices, lengths, config.batch.max_tokens)

    return Work(
        steps,
        {
            BASELINE: [grouped(step, [(i,) for i in step.indices]) for step in steps],
            "padded": [planned("padded", step) for step in steps],
            "padded_random": [grouped(step, random_groups(step)) for step in steps],
            "packed": [planned("packed", step) for step in steps],
        },
    )


def unsorted(indices: Sequence[int], lengths: Mapping[int, Lengths], max_tokens: int) -> list[tuple[int, ...]]:
    """Microbatches for `padded` filled in the order given, each as far as the budget goes."""
    groups: list[tuple[int, ...]] = [()]
    for i in indices:
        longer = (*groups[-1], i)
        if computed_tokens([lengths[j] for j in longer], "padded") <= max_tokens:
            groups[-1] = longer
        else:
            groups.append((i,))
    return groups


def collated(source: Source, microbatches: Sequence[Microbatch], layout: Layout) -> Iterator[Batch]:
    """A batch for each microbatch, its samples read when it is asked for."""
    for microbatch in microbatches:
        samples = samples_of(microbatch, source.read)
        yield collate(samples, indices=microbatch.indices, weights=microbatch.weights, layout=layout)
