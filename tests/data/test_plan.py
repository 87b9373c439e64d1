"""Invariants of the plan over random data sets and machines: who is in a step, how a step is split, what it costs."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from mixres.data.plan import (
    MAX_LENGTHS,
    Layout,
    Lengths,
    Microbatch,
    Plan,
    Rounding,
    StepPlan,
    caption_dropped,
    computed_tokens,
    computed_work,
    rounded,
    rounding_of,
    work,
)
from mixres.errors import UserError

LAYOUTS: tuple[Layout, ...] = ("padded", "packed")
derandomized = settings(derandomize=True, deadline=None, database=None, max_examples=60)


@st.composite
def lengths(draw: st.DrawFn) -> Lengths:
    target, text = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    return Lengths(text, target + draw(st.integers(0, 60)), target, empty_text=draw(st.integers(1, text)))


@st.composite
def plans(draw: st.DrawFn, max_samples: int = 40) -> dict[str, Any]:
    """Arguments of a `Plan`; budgets from the minimum that holds every sample to four times that."""
    drawn = draw(st.lists(lengths(), min_size=1, max_size=max_samples))
    longest = max(length.total for length in drawn)
    return {
        "lengths": drawn,
        "seed": draw(st.integers(0, 2**63 - 1)),
        "samples_per_step": draw(st.integers(1, 16)),
        "max_tokens": draw(st.integers(longest, 4 * longest)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "world_size": draw(st.integers(1, 6)),
        "caption_dropout": draw(st.sampled_from((0.0, 0.0, 0.4, 1.0))),
    }


def make_plan(arguments: dict[str, Any], **changed: Any) -> Plan:
    """By default one step of all samples."""
    arguments = {"seed": 0, "samples_per_step": len(arguments["lengths"])} | arguments | changed
    return Plan(**arguments, names=[f"{i}.png" for i in range(len(arguments["lengths"]))])


def epoch_of(plan: Plan, epoch: int = 0) -> list[StepPlan]:
    return [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]


def microbatches_of(step: StepPlan) -> list[Microbatch]:
    return [microbatch for rank in step.ranks for microbatch in rank]


def members_of(arguments: dict[str, Any], microbatch: Microbatch) -> list[Lengths]:
    """The lengths of its samples as they train: with the empty prompt where the caption is dropped."""
    made = [(i, arguments["lengths"][i]) for i in microbatch.indices]
    return [length.without_caption() if i in microbatch.dropped else length for i, length in made]


def trained_of(step: StepPlan) -> Counter[int]:
    """How often each sample counts in the loss of `step`."""
    pairs = [pair for m in microbatches_of(step) for pair in zip(m.indices, m.weights, strict=True)]
    assert {weight for _, weight in pairs} <= {0.0, 1.0}
    return Counter(index for index, weight in pairs if weight)


@derandomized
@given(plans(), st.integers(0, 2))
def test_every_sample_counts_once_an_epoch_and_no_microbatch_is_over_budget(
    arguments: dict[str, Any], epoch: int
) -> None:
    count, per_step, ranks = len(arguments["lengths"]), arguments["samples_per_step"], arguments["world_size"]
    steps = epoch_of(make_plan(arguments), epoch)
    assert sorted(i for step in steps for i in step.indices) == list(range(count))
    assert [step.samples for step in steps] == [min(per_step, count - i) for i in range(0, count, per_step)]
    for step in steps:
        assert step.epoch == epoch
        assert trained_of(step) == Counter(step.indices)
        assert step.target_tokens == sum(arguments["lengths"][i].target for i in step.indices)
        assert len(step.ranks) == ranks and len({len(rank) for rank in step.ranks}) == 1
        for microbatch in microbatches_of(step):
            assert computed_tokens(members_of(arguments, microbatch), arguments["layout"]) <= arguments["max_tokens"]
        dummies = [m for m in microbatches_of(step) if not any(m.weights)]
        assert all(len(m.indices) == 1 and m.indices[0] in step.indices for m in dummies)
        assert all(all(m.weights) for m in microbatches_of(step) if m not in dummies)
        shortest = min(length.total for length in members_of(arguments, Microbatch(step.indices, (), step.dropped)))
        assert all(members_of(arguments, dummy)[0].total == shortest for dummy in dummies)
        if dummies:  # every sample has a microbatch of its own already, and less than one round of ranks is filled up
            assert len(microbatches_of(step)) - len(dummies) == step.samples and len(dummies) < ranks


@derandomized
@given(plans(), st.randoms(use_true_random=False))
def test_weights_reach_the_loss_with_their_samples_and_change_nothing_else(
    arguments: dict[str, Any], random: random.Random
) -> None:
    weights = [random.choice((1.0, 0.25, 3.0)) for _ in arguments["lengths"]]
    plain, weighted = make_plan(arguments), make_plan(arguments, weights=weights)
    for one, other in zip(epoch_of(plain), epoch_of(weighted), strict=True):
        for bare, microbatch in zip(microbatches_of(one), microbatches_of(other), strict=True):
            own = tuple(weights[i] for i in microbatch.indices)
            assert microbatch.weights == (own if any(bare.weights) else (0.0,))
            assert bare._replace(weights=microbatch.weights) == microbatch
        assert (one.indices, one.samples, one.target_tokens) == (other.indices, other.samples, other.target_tokens)
    identities = [str(i) for i in range(len(weights))]
    assert plain.order_hash(identities) == weighted.order_hash(identities)
    assert (plain.plan_hash(identities) == weighted.plan_hash(identities)) == (set(weights) == {1.0})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("max_tokens", "members"), [(59, 1), (60, 2), (61, 2), (89, 2), (90, 3), (179, 3), (180, 6)])
def test_budgets_are_filled_to_the_last_token_and_not_beyond(layout: Layout, max_tokens: int, members: int) -> None:
    step = make_plan({"lengths": [Lengths(10, 20, 20)] * 6, "max_tokens": max_tokens, "layout": layout}).step(0)
    assert [len(m.indices) for m in step.ranks[0]] == [members] * (6 // members)


@derandomized
@given(plans(), plans())
def test_what_a_step_holds_does_not_depend_on_the_machine(arguments: dict[str, Any], other: dict[str, Any]) -> None:
    machine = {name: other[name] for name in ("layout", "world_size")}
    here, there = make_plan(arguments), make_plan(arguments, **machine, max_tokens=arguments["max_tokens"] * 3)
    for one, two in zip(epoch_of(here, 1), epoch_of(there, 1), strict=True):
        assert (one.indices, one.target_tokens, one.epoch) == (two.indices, two.target_tokens, two.epoch)
        assert one.dropped == two.dropped


@derandomized
@given(plans(), st.integers(0, 2))
def test_a_caption_is_dropped_by_seed_step_and_sample_alone(arguments: dict[str, Any], epoch: int) -> None:
    seed, p = arguments["seed"], arguments["caption_dropout"]
    for step in epoch_of(make_plan(arguments), epoch):
        assert step.dropped == {i for i in step.indices if caption_dropped(seed, step.step, i, p)}
        assert all(m.dropped == step.dropped.intersection(m.indices) for m in microbatches_of(step))
        if p in (0.0, 1.0):
            assert step.dropped == (set(step.indices) if p else set())


def test_captions_are_dropped_as_often_as_asked_and_independently() -> None:
    """Over seeds, steps and samples: within 4 standard deviations, also how often two fall together."""
    count, p = 4000, 0.3
    draws = [[(7, 3, i) for i in range(count)], [(7, i, 3) for i in range(count)], [(i, 7, 3) for i in range(count)]]
    runs = [[caption_dropped(*drawn, p) for drawn in run] for run in draws]
    both = [[a and b for a, b in zip(*pair, strict=True)] for pair in itertools.combinations(runs, 2)]
    for drawn, rate in [*((run, p) for run in runs), *((run, p * p) for run in both)]:
        assert abs(sum(drawn) - count * rate) < 4 * math.sqrt(count * rate * (1 - rate)) + 1


@derandomized
@given(plans(), st.randoms(use_true_random=False))
def test_a_step_is_a_pure_function_of_its_index(arguments: dict[str, Any], shuffle: random.Random) -> None:
    straight, resumed = make_plan(arguments), make_plan(arguments)
    steps = [straight.step(i) for i in range(3 * straight.steps_per_epoch)]
    asked = list(range(len(steps)))
    shuffle.shuffle(asked)
    assert all(resumed.step(i) == steps[i] for i in asked)


def test_each_epoch_and_each_seed_has_its_own_uniform_order() -> None:
    arguments = {"lengths": [Lengths(1, 1, 1)] * 3, "max_tokens": 6, "layout": "packed"}
    plan = make_plan(arguments, seed=0)
    seen = Counter(plan.step(epoch).indices for epoch in range(6000))
    assert len(seen) == 6  # all permutations, each 1000 times give or take 4 standard deviations
    assert all(abs(count - 1000) < 4 * math.sqrt(6000 * 5 / 36) for count in seen.values())
    assert [plan.step(e).indices for e in range(9)] != [make_plan(arguments, seed=1).step(e).indices for e in range(9)]


@pytest.mark.parametrize(
    ("made", "microbatches"),
    [
        ([Lengths(100, 4000, 1)] * 8, [8]),  # nothing is padded: one microbatch, whatever it costs
        ([Lengths(100, 4000, 1)] * 4 + [Lengths(100, 500, 1)] * 4, [4, 4]),
        ([Lengths(10, 64, 1)] * 4 + [Lengths(10, 32, 1)] * 4, [8]),  # 128 tokens of padding, half a microbatch's cost
        ([Lengths(10, 128, 1)] * 4 + [Lengths(10, 32, 1)] * 4, [4, 4]),  # 384
        ([Lengths(10, 100 + 12 * i, 1) for i in range(8)], [8]),  # 336, of which a second microbatch saves 192
    ],
)
def test_one_padded_microbatch_is_split_where_padding_costs_more(made: list[Lengths], microbatches: list[int]) -> None:
    (rank,) = make_plan({"lengths": made, "max_tokens": 10**6, "layout": "padded"}).step(0).ranks
    assert sorted(len(microbatch.indices) for microbatch in rank) == microbatches


@derandomized
@given(plans(max_samples=60))
def test_the_ranks_loads_differ_by_no_more_than_one_microbatch(arguments: dict[str, Any]) -> None:
    for step in epoch_of(make_plan(arguments, samples_per_step=60)):
        costs = [[computed_work(members_of(arguments, m), arguments["layout"]) for m in rank] for rank in step.ranks]
        loads = [sum(rank) for rank in costs]
        assert max(loads) - min(loads) <= max(itertools.chain(*costs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_sample_weighs_more_than_as_many_tokens_of_short_ones(layout: Layout) -> None:
    """Attention: a sample of 16,384 tokens computes what 22 of 1,365 (30,947 tokens' worth), not what 12 of them do."""
    made = [Lengths(341, 1024, 1024)] * 44 + [Lengths(4096, 12288, 12288)] * 2
    step = make_plan({"lengths": made, "max_tokens": 10**6, "layout": layout, "world_size": 4}).step(0)
    loads = [sum(computed_work([made[i] for i in m.indices], layout) for m in rank) for rank in step.ranks]
    assert work(16384) == 30947 and max(loads) < 1.05 * sum(loads) / 4
    (one,) = make_plan({"lengths": made, "max_tokens": 10**6, "layout": "packed", "world_size": 1}).step(0).ranks
    assert len(one) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_over_budget_are_refused_together_by_name_and_size(layout: Layout) -> None:
    made = [Lengths(10, 90, 50), Lengths(11, 90, 50), Lengths(1, 1, 1), Lengths(50, 200, 150)]
    names = ["fits.png", "one over.png", "small.png", "大.png"]
    with pytest.raises(UserError) as caught:
        Plan(made, names=names, seed=0, samples_per_step=2, max_tokens=100, layout=layout)
    assert len(caught.value.messages) == 2
    for message, name, size in zip(caught.value.messages, names[1::2], (101, 250), strict=True):
        assert message.startswith(f"{name}: {size} tokens")
        assert "batch.max_tokens = 100" in message
    with pytest.raises(UserError, match=r"data\.train"):
        Plan([], names=[], seed=0, samples_per_step=2, max_tokens=100, layout=layout)


BASE: dict[str, Any] = {
    "lengths": [Lengths(3, 5, 4, 1), Lengths(2, 7, 7, 1), Lengths(4, 4, 4, 1)],
    "seed": 7, "samples_per_step": 2, "max_tokens": 40, "layout": "packed", "world_size": 2,
}  # fmt: skip
IDENTITIES = ["a", "b", "c"]
CHANGES: dict[str, tuple[dict[str, Any], list[str], bool, bool]] = {  # is the order the same, is the plan?
    "nothing": ({}, IDENTITIES, True, True),
    "seed": ({"seed": 8}, IDENTITIES, False, False),
    "samples_per_step": ({"samples_per_step": 3}, IDENTITIES, False, False),
    "sample": ({}, ["a", "b", "d"], False, False),
    "order_of_samples": ({}, ["b", "a", "c"], False, False),
    "where_a_name_ends": ({}, ["a", "bc", ""], False, False),
    "any_name": ({}, ["a\n", "b", "\udc80"], False, False),
    "more": ({"lengths": [*BASE["lengths"], Lengths(1, 1, 1)]}, [*IDENTITIES, "d"], False, False),
    "layout": ({"layout": "padded"}, IDENTITIES, True, False),
    "max_tokens": ({"max_tokens": 41}, IDENTITIES, True, False),
    "world_size": ({"world_size": 3}, IDENTITIES, True, False),
    "caption_dropout": ({"caption_dropout": 0.1}, IDENTITIES, True, False),
    "lengths": ({"lengths": [*BASE["lengths"][:2], Lengths(4, 4, 3, 1)]}, IDENTITIES, True, False),
    "empty_text": ({"lengths": [*BASE["lengths"][:2], Lengths(4, 4, 4, 2)]}, IDENTITIES, True, False),
}


@pytest.mark.parametrize(("changed", "identities", "same_order", "same_plan"), CHANGES.values(), ids=CHANGES)
def test_hashes_change_with_what_they_must(
    changed: dict[str, Any], identities: Sequence[str], same_order: bool, same_plan: bool
) -> None:
    plan, other = make_plan(BASE), make_plan(BASE, **changed)
    assert (plan.order_hash(IDENTITIES) == other.order_hash(identities)) == same_order
    assert (plan.plan_hash(IDENTITIES) == other.plan_hash(identities)) == same_plan


@pytest.mark.timeout(30)  # minutes, where the number of microbatches is searched one by one
def test_a_large_step_of_samples_over_half_the_budget_is_planned_at_once() -> None:
    made = [Lengths(1, 59, 59)] * 10_000
    step = make_plan({"lengths": made, "max_tokens": 100, "layout": "packed"}).step(0)
    assert [len(m.indices) for m in step.ranks[0]] == [1] * len(made)


@given(st.lists(lengths(), min_size=1, max_size=40), st.sampled_from([1, 30, 400]))
def test_few_lengths_are_left_and_none_is_shortened(made: list[Lengths], scale: int) -> None:
    made = [Lengths(*(n * scale + n % 7 for n in length)) for length in made]
    rounding = rounding_of(made)
    after = [Lengths(*row) for row in rounding.table(made).tolist()]
    assert len({length.text for length in after} | {length.empty_text for length in after} - {0}) <= MAX_LENGTHS
    assert len({length.image for length in after}) <= MAX_LENGTHS
    for old, new in zip(made, after, strict=True):
        assert 0 <= new.text - old.text < rounding.text and 0 <= new.image - old.image < rounding.image
        assert new.empty_text >= old.empty_text and new.target == old.target


def test_lengths_that_are_few_stay() -> None:
    assert rounding_of([Lengths(5, 100, 50), Lengths(7, 133, 60)]) == Rounding(1, 1)
    assert rounding_of([Lengths(5, n, 1) for n in (100, 133, 150, 199, 260)]) == Rounding(1, 32)
    assert [rounded(n, 64) for n in (1, 64, 65)] == [64, 64, 128]
