"""What a plan makes of a run: tokens, filler, microbatches and the load of the ranks, summed over its steps.

Promise: the sums are those that `metrics.jsonl` will show, since they are of the very steps that the run asks the plan
for. Cost: planning each step that is summed, some 0.1 ms a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mixres.data.plan import Lengths, Microbatch, Plan, computed_tokens


@dataclass(frozen=True)
class Totals:
    """Sums over some steps and all ranks; `tokens` are valid ones, text and images, without fillers."""

    steps: int
    samples: int
    tokens: int
    tokens_computed: int
    padding_share: float  # of the computed tokens
    microbatches: int
    fillers: int  # microbatches that only keep ranks in step
    rank_tokens: tuple[int, ...]  # computed by each rank
    heaviest_tokens: int  # sum over steps of what the heaviest rank computes
    idle_share: float  # of the ranks' time, if time goes by tokens: 1 - mean load / heaviest load
    fewest_microbatches: int  # of a step
    most_microbatches: int
    short_steps: int  # with fewer samples than samples_per_step


class Largest(NamedTuple):
    """The microbatch with the most computed tokens."""

    microbatch: Microbatch
    lengths: list[Lengths]
    tokens: int


def _valid_tokens(valid: Sequence[Lengths], microbatch: Microbatch) -> int:
    own = [(i in microbatch.dropped, valid[i]) for i in microbatch.indices]
    return sum((length.without_caption() if dropped else length).total for dropped, length in own)


def totals(plan: Plan, valid: Sequence[Lengths], steps: range) -> tuple[Totals, Largest]:
    """Sums over `steps`, at least one, and their largest microbatch; `valid`: lengths not rounded."""
    ranks, counts = [0] * plan.world_size, list[int]()
    samples = tokens = heaviest = fillers = short = 0
    largest: Largest | None = None
    for number in steps:
        step = plan.step(number)
        samples, short = samples + step.samples, short + (step.samples < plan.samples_per_step)
        counts.append(sum(len(rank) for rank in step.ranks))
        loads = [0] * plan.world_size
        for rank, microbatch in ((r, m) for r, ms in enumerate(step.ranks) for m in ms):
            lengths, real = plan.lengths_in(microbatch), any(microbatch.weights)
            computed = computed_tokens(lengths, plan.layout)
            loads[rank] += computed
            tokens += _valid_tokens(valid, microbatch) if real else 0
            fillers += not real
            if largest is None or computed > largest.tokens:
                largest = Largest(microbatch, lengths, computed)
        heaviest += max(loads)
        ranks = [total + load for total, load in zip(ranks, loads, strict=True)]
    assert largest is not None, "no step"
    computed = sum(ranks)
    found = Totals(
        steps=len(steps),
        samples=samples,
        tokens=tokens,
        tokens_computed=computed,
        padding_share=1 - tokens / computed,
        microbatches=sum(counts),
        fillers=fillers,
        rank_tokens=tuple(ranks),
        heaviest_tokens=heaviest,
        idle_share=1 - computed / (plan.world_size * heaviest),
        fewest_microbatches=min(counts),
        most_microbatches=max(counts),
        short_steps=short,
    )
    return found, largest
