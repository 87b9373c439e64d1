"""Who goes with whom: the samples of every optimizer step, split over ranks and microbatches.

Promise: a pure function of (lengths, weights, seed, samples_per_step, caption_dropout, max_tokens, layout, world size).
Which samples make a step, and which of them train on the empty prompt, depends on lengths, seed, samples_per_step and
caption_dropout alone; each epoch holds every sample exactly once, its last step may be short. No microbatch is over
`max_tokens`, and every rank has the same number of them. Cost: 24 bytes a sample and one permutation an epoch; a step
is planned when it is asked for, in O(n log n) of its samples (`padded`: times the few numbers of microbatches tried).

Legend: a microbatch of the layout `padded` computes rows x (longest text + longest image) tokens, `packed` the sum.

The rule of the split: a step takes as long as its heaviest rank, which computes its microbatches' tokens and pays
`MICROBATCH_TOKENS` more for each. Between ranks a token of a long sample counts more, as attention grows with the
square of the length: see `work`. `packed` has no padding, so it takes as few microbatches as the budget and the ranks
allow. `padded` sorts by length and cuts the row into runs, as even as can be; of the numbers of runs it takes the one
with which the heaviest rank has the minimum to do, so it splits further where that saves more than a microbatch costs.
"""

import bisect
import functools
import heapq
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _quoted
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import xxhash

from mixres.errors import UserError

Layout = Literal["padded", "packed"]
N = TypeVar("N", int, np.ndarray)
LengthsOf = Sequence[tuple[int, ...]] | np.ndarray  # of samples; an array has `Lengths` as rows
_AT_ONCE = 2**16  # identities that are hashed
# What a forward and backward call costs beyond its tokens (launches, hooks, gathering shards), in tokens' worth. A tiny
# model on a CPU pays about 50, see docs/numerics.md; a device that waits for launches or weights pays more.
MICROBATCH_TOKENS = 256


# Tokens at which attention costs as much as the linear layers of a block: 4 x length x width and 24 x width^2 FLOPs a
# token. Of the width 3072 that Qwen-Image and FLUX.1 have; others are balanced a little less well.
ATTENTION_LENGTH = 6 * 3072


class Lengths(NamedTuple):
    """Tokens of one sample: its text, all its images, of those the target; its text where the caption is dropped."""

    text: int
    image: int
    target: int
    empty_text: int = 0

    @property
    def total(self) -> int:
        return self.text + self.image

    @property
    def most(self) -> int:
        """All tokens, with caption or without, whichever is longer."""
        return self.image + max(self.text, self.empty_text)

    def without_caption(self) -> "Lengths":
        """The same sample with the empty prompt."""
        return self._replace(text=self.empty_text)


class Microbatch(NamedTuple):
    """Samples that one forward call takes, and their loss weights; 0 marks a dummy, which is computed and left out."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    dropped: frozenset[int] = frozenset()  # those of `indices` that take the empty prompt in place of their caption


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step over all ranks. `samples` and `target_tokens` are the loss divisors of the whole step."""

    step: int  # from 0
    epoch: int
    indices: tuple[int, ...]  # in the order of the shuffle
    ranks: tuple[tuple[Microbatch, ...], ...]
    target_tokens: int
    dropped: frozenset[int] = frozenset()  # see `Microbatch`

    @property
    def samples(self) -> int:
        return len(self.indices)


def computed_tokens(lengths: Sequence[Lengths], layout: Layout) -> int:
    """Tokens that a microbatch of these samples computes in `layout`."""
    if layout == "packed":
        return sum(length.total for length in lengths)
    return len(lengths) * (max(length.text for length in lengths) + max(length.image for length in lengths))


def work(length: int) -> int:
    """What a row or packed sample of so many tokens computes, attention included, in tokens' worth of linear layers."""
    return length + length * length // ATTENTION_LENGTH


def computed_work(lengths: Sequence[Lengths], layout: Layout) -> int:
    """As `computed_tokens`, with attention."""
    if layout == "packed":
        return sum(work(length.total) for length in lengths)
    return len(lengths) * work(max(length.text for length in lengths) + max(length.image for length in lengths))


def caption_dropped(seed: int, step: int, index: int, probability: float) -> bool:
    """Whether sample `index` goes without its caption in optimizer step `step`: of these three alone, no state."""
    drawn = xxhash.xxh3_64_intdigest(b"caption" + struct.pack("<QQQ", seed, step, index))
    return drawn < probability * 2**64


def as_table(lengths: LengthsOf) -> np.ndarray:
    """(n, 4), columns as the fields of `Lengths`."""
    return np.asarray(lengths, dtype=np.int32).reshape(-1, len(Lengths._fields))


def over_budget(lengths: LengthsOf, names: Sequence[str], max_tokens: int) -> list[str]:
    """A message for each sample that does not fit a microbatch alone."""
    text, image, _, empty_text = as_table(lengths).T
    most = image + np.maximum(text, empty_text)  # as `Lengths.most`
    assert len(names) == len(most), (len(names), len(most))
    return [
        f"{names[i]}: {most[i]} tokens alone are over batch.max_tokens = {max_tokens}: raise it, or lower "
        "data.resize.target.max_pixels"
        for i in np.flatnonzero(most > max_tokens).tolist()
    ]


class Plan:
    """All steps of a run, by index: resuming after step k is asking for step k + 1.

    Raises:
        UserError: samples that are over `max_tokens` alone, each by name and length; or there are no samples.
    """

    def __init__(
        self,
        lengths: LengthsOf,
        *,
        names: Sequence[str],
        weights: Sequence[float] | np.ndarray | None = None,
        seed: int,
        samples_per_step: int,
        max_tokens: int,
        layout: Layout,
        world_size: int = 1,
        caption_dropout: float = 0.0,
    ) -> None:
        self.lengths = as_table(lengths)
        if not len(self.lengths):
            raise UserError("data.train: there is no usable sample; add some")
        assert not caption_dropout or self.lengths[:, 3].all(), "encoded without the empty prompt"
        if over := over_budget(self.lengths, names, max_tokens):
            raise UserError(over)
        self.weights = np.ones(len(lengths)) if weights is None else np.array(weights, dtype=np.float64)
        assert self.weights.shape == (len(lengths),) and (self.weights > 0).all(), "0 marks a dummy microbatch"
        self.seed, self.samples_per_step, self.max_tokens = seed, samples_per_step, max_tokens
        self.layout: Layout = layout
        self.world_size, self.caption_dropout = world_size, caption_dropout
        self.epoch_samples = len(self.lengths)
        self.steps_per_epoch = -(-self.epoch_samples // samples_per_step)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffled)

    def step(self, step: int) -> StepPlan:
        """The plan of optimizer step `step`, from 0 on."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.samples_per_step
        return self.planned(step, epoch, self._epoch_order(epoch)[first : first + self.samples_per_step])

    def planned(self, step: int, epoch: int, order: np.ndarray) -> StepPlan:
        """Step `step` with the samples `order`, split over microbatches and ranks."""
        indices = tuple(order.tolist())
        p = self.caption_dropout
        dropped = frozenset(i for i in indices if p and caption_dropped(self.seed, step, i, p))
        lengths = dict(zip(indices, map(Lengths._make, self.lengths[order].tolist()), strict=True))
        lengths |= {i: lengths[i].without_caption() for i in dropped}
        weights = dict(zip(indices, self.weights[order].tolist(), strict=True))
        split = _Split(lengths, weights, dropped, self.layout, self.max_tokens, self.world_size)
        return StepPlan(
            step=step,
            epoch=epoch,
            indices=indices,
            ranks=split.over_ranks(split.microbatches()),
            target_tokens=sum(length.target for length in lengths.values()),
            dropped=dropped,
        )

    def lengths_in(self, microbatch: Microbatch) -> list[Lengths]:
        """Lengths of the microbatch's samples as it trains them."""
        lengths = [Lengths._make(self.lengths[i].tolist()) for i in microbatch.indices]
        pairs = zip(microbatch.indices, lengths, strict=True)
        return [length.without_caption() if i in microbatch.dropped else length for i, length in pairs]

    def order_hash(self, identities: Sequence[str]) -> str:
        """Changes with the samples (by identity, in order), the seed and samples_per_step: with what a step holds."""
        assert len(identities) == len(self.lengths), (len(identities), len(self.lengths))
        digest = xxhash.xxh3_128(json.dumps([self.seed, self.samples_per_step]).encode())
        digest.update(self._epoch_order(0).astype("<i8").tobytes())  # numpy may draw another permutation one day
        for first in range(0, len(identities), _AT_ONCE):
            digest.update("".join(map(_quoted, identities[first : first + _AT_ONCE])).encode())
        return digest.hexdigest()

    def plan_hash(self, identities: Sequence[str]) -> str:
        """Changes with `order_hash`, weights, and all that decides the split: lengths, drops, layout, budget, ranks."""
        split = [self.order_hash(identities), self.layout, self.max_tokens, self.world_size, self.caption_dropout]
        digest = xxhash.xxh3_128(json.dumps(split).encode())
        digest.update(self.lengths.astype("<i4").tobytes())
        digest.update(self.weights.astype("<f8").tobytes())
        return digest.hexdigest()

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.epoch_samples)


@dataclass(frozen=True)
class _Split:
    """The samples of one step, to be split over microbatches and ranks."""

    lengths: Mapping[int, Lengths]  # by index, of what each trains on in this step
    weights: Mapping[int, float]
    dropped: frozenset[int]
    layout: Layout
    max_tokens: int
    world_size: int

    def microbatches(self) -> list[tuple[int, ...]]:
        """Microbatches within budget, their number a multiple of the ranks where there are samples enough."""
        by_length = sorted(self.lengths, key=lambda i: (self.lengths[i].image, self.lengths[i].text, i), reverse=True)
        if self.layout == "padded":
            return self._split_padded(by_length)
        count = -(-sum(self.lengths[i].total for i in by_length) // self.max_tokens)
        while True:
            count = self._rounded(count, len(by_length))
            for cost in (work, int) if self.world_size > 1 else (int,):  # by tokens alone they may fit where else not
                batches = self._split_packed(by_length, count, cost)
                if max(sum(self.lengths[i].total for i in batch) for batch in batches) <= self.max_tokens:
                    return batches
            count += 1 + count // 64  # in steps that grow, or a step of many large samples would be tried for ever

    def _rounded(self, count: int, samples: int) -> int:
        return min(-(-count // self.world_size) * self.world_size, samples)

    def _split_packed(self, by_length: Sequence[int], count: int, cost: Callable[[int], int]) -> list[tuple[int, ...]]:
        """Longest first, each to the microbatch of the least cost (Graham 1969: at most 4/3 of the best)."""
        batches: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, b) for b in range(count)]
        for i in sorted(by_length, key=lambda i: (-self.lengths[i].total, i)):
            load, b = heapq.heappop(heap)
            batches[b].append(i)
            heapq.heappush(heap, (load + cost(self.lengths[i].total), b))
        return [tuple(batch) for batch in batches]

    def _split_padded(self, by_length: Sequence[int]) -> list[tuple[int, ...]]:
        """Runs of neighbours in length, as many as give the heaviest rank the minimum: see the module's docstring."""
        row, samples = [self.lengths[i] for i in by_length], len(by_length)
        mean = sum(self._cost((i,)) for i in by_length) / self.world_size  # no rank can have less
        count = self._rounded(len(_filled(row, self.max_tokens, samples)), samples)
        best: list[tuple[int, ...]] = []
        minimum = math.inf
        while True:
            cuts = itertools.pairwise([*_even_cuts(row, self.max_tokens, count), samples])
            batches = [tuple(by_length[first:last]) for first, last in cuts]
            per_rank = -(-count // self.world_size)
            costs = [self._cost(batch) for batch in batches]
            work = max(sum(costs[b] for b in rank) for rank in self._balanced(costs)) + per_rank * MICROBATCH_TOKENS
            if work < minimum:
                best, minimum = batches, work
            more = per_rank + 1 + per_rank // 8  # in steps that grow: a large step stays O(n log n)
            if count == samples or mean + more * MICROBATCH_TOKENS >= minimum:
                return best
            count = self._rounded(more * self.world_size, samples)

    def _cost(self, batch: Sequence[int]) -> int:
        """In tokens' worth; on one rank there is nothing to balance, and tokens are what takes memory."""
        return (computed_work if self.world_size > 1 else computed_tokens)(
            [self.lengths[i] for i in batch], self.layout
        )

    def _balanced(self, costs: Sequence[int]) -> list[list[int]]:
        """Positions in `costs` by rank: heaviest first to the lightest rank that still has room for an equal count."""
        per_rank = -(-len(costs) // self.world_size)
        ranks: list[list[int]] = [[] for _ in range(self.world_size)]
        heap = [(0, r) for r in range(self.world_size)]
        for b in sorted(range(len(costs)), key=lambda b: (-costs[b], b)):
            load, r = heapq.heappop(heap)
            ranks[r].append(b)
            if len(ranks[r]) < per_rank:
                heapq.heappush(heap, (load + costs[b], r))
        return ranks

    def over_ranks(self, batches: list[tuple[int, ...]]) -> tuple[tuple[Microbatch, ...], ...]:
        """Balanced; dummy microbatches make the counts equal."""
        per_rank = -(-len(batches) // self.world_size)
        weights = [tuple(self.weights[i] for i in b) for b in batches]
        microbatches = [Microbatch(b, w, self.dropped.intersection(b)) for b, w in zip(batches, weights, strict=True)]
        shortest = min((i for batch in batches for i in batch), key=lambda i: (self.lengths[i].total, i))
        dummy = Microbatch((shortest,), (0.0,), self.dropped.intersection((shortest,)))
        microbatches += [dummy] * (per_rank * self.world_size - len(microbatches))
        ranks = self._balanced([self._cost(m.indices) for m in microbatches])
        return tuple(tuple(microbatches[b] for b in rank) for rank in ranks)


def _even_cuts(row: Sequence[Lengths], max_tokens: int, count: int) -> list[int]:
    """Where `count` runs begin, so that the largest costs as little as can be, within 1/32; bisection on a budget."""
    totals = [length.total for length in row]
    low, high = max(*totals, -(-sum(totals) // count)), max_tokens  # `high` holds `count` runs or fewer at any time
    while high - low > low // 32:
        middle = (low + high) // 2
        if len(_filled(row, middle, count)) <= count:
            high = middle
        else:
            low = middle + 1
    cuts = _filled(row, high, count)
    while len(cuts) < count:  # samples of equal lengths fill fewer: halve the longest run
        first, last = max(itertools.pairwise([*cuts, len(row)]), key=lambda run: run[1] - run[0])
        bisect.insort(cuts, (first + last) // 2)
    return cuts


def _filled(row: Sequence[Lengths], budget: int, maximum: int) -> list[int]:
    """Where runs begin that are filled up to `budget` one by one, longest image first; gives up beyond `maximum`."""
    cuts: list[int] = []
    rows = text = image = 0
    for position, length in enumerate(row):
        if length.text > text:
            text = length.text
        rows += 1
        if not cuts or rows * (text + image) > budget:
            cuts.append(position)
            if len(cuts) > maximum:
                return cuts
            rows, text, image = 1, length.text, length.image
    return cuts


MAX_LENGTHS = 4


class Rounding(NamedTuple):
    """What text and image lengths of a padded microbatch are rounded up to multiples of."""

    text: int = 1
    image: int = 1

    def table(self, of: LengthsOf) -> np.ndarray:
        """As `as_table`, as the plan is to count them; the target's stay, they are what the loss is over."""
        multiples = self.text, self.image, 1, self.text
        return np.stack([rounded(*pair) for pair in zip(as_table(of).T, multiples, strict=True)], axis=1)


def rounding_of(lengths: LengthsOf, maximum: int = MAX_LENGTHS) -> Rounding:
    """The smallest powers of two whose multiples are at most `maximum` text and `maximum` image lengths."""
    text, image, _, empty_text = (np.unique(column).tolist() for column in as_table(lengths).T)
    return Rounding(_multiple({*text} | {*empty_text} - {0}, maximum), _multiple(image, maximum))


def rounded(length: N, multiple: int) -> N:
    """The smallest multiple that is not below `length`."""
    return -(-length // multiple) * multiple


def _multiple(lengths: Iterable[int], maximum: int) -> int:
    multiple, found = 1, set(lengths)
    while len({rounded(length, multiple) for length in found}) > maximum:
        multiple *= 2
    return multiple
