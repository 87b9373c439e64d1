"""Who goes with whom: the samples of every optimizer step, split over ranks and microbatches.

Promise: a pure function of (lengths, seed, samples_per_step, max_tokens, layout, world size). Which samples make a
step depends on the first three alone; each epoch holds every sample exactly once, its last step may be short. No
microbatch is over `max_tokens`, and every rank has the same number of them. Cost: 12 bytes a sample and one permutation
an epoch; a step is planned when it is asked for, in O(n log n) of its own samples.

Legend: a microbatch of the layout `padded` computes rows x (longest text + longest image) tokens, `packed` the sum.
"""

import functools
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from mixres.errors import UserError

Layout = Literal["padded", "packed"]


class Lengths(NamedTuple):
    """Tokens of one sample: its text, all its images, and of those the target."""

    text: int
    image: int
    target: int

    @property
    def total(self) -> int:
        return self.text + self.image


class Microbatch(NamedTuple):
    """Samples that one forward call takes. Weight 0 marks a filler: computed, and left out of the loss."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step over all ranks. `samples` and `target_tokens` are the loss divisors of the whole step."""

    step: int  # from 0
    epoch: int
    indices: tuple[int, ...]  # in the order of the shuffle
    ranks: tuple[tuple[Microbatch, ...], ...]
    target_tokens: int

    @property
    def samples(self) -> int:
        return len(self.indices)


def computed_tokens(lengths: Sequence[Lengths], layout: Layout) -> int:
    """Tokens that a microbatch of these samples computes in `layout`."""
    if layout == "packed":
        return sum(length.total for length in lengths)
    return len(lengths) * (max(length.text for length in lengths) + max(length.image for length in lengths))


class Plan:
    """All steps of a run, by index: going on after step k is asking for step k + 1.

    Raises:
        UserError: samples that are over `max_tokens` alone, each by name and length; or there are no samples.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        *,
        names: Sequence[str],
        seed: int,
        samples_per_step: int,
        max_tokens: int,
        layout: Layout,
        world_size: int = 1,
    ) -> None:
        if not lengths:
            raise UserError("data.train: there is no usable sample")
        over = [
            f"{name}: {length.total} tokens alone are over batch.max_tokens = {max_tokens}: raise it, or lower "
            "data.resize.target.max_pixels"
            for name, length in zip(names, lengths, strict=True)
            if length.total > max_tokens
        ]
        if over:
            raise UserError(over)
        self.lengths = np.array(lengths, dtype=np.int32)  # (n, 3), columns as the fields of `Lengths`
        self.seed, self.samples_per_step, self.max_tokens = seed, samples_per_step, max_tokens
        self.layout: Layout = layout
        self.world_size = world_size
        self.steps_per_epoch = -(-len(self.lengths) // samples_per_step)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffled)

    def step(self, step: int) -> StepPlan:
        """The plan of optimizer step `step`, from 0 on."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.samples_per_step
        order = self._epoch_order(epoch)[first : first + self.samples_per_step]
        indices = tuple(order.tolist())
        lengths = dict(zip(indices, map(Lengths._make, self.lengths[order].tolist()), strict=True))
        split = _Split(lengths, self.layout, self.max_tokens, self.world_size)
        return StepPlan(
            step=step,
            epoch=epoch,
            indices=indices,
            ranks=split.over_ranks(split.microbatches()),
            target_tokens=sum(length.target for length in lengths.values()),
        )

    def order_hash(self, identities: Sequence[str]) -> str:
        """Changes with the samples (by identity, in order), the seed and samples_per_step: with what a step holds."""
        assert len(identities) == len(self.lengths), (len(identities), len(self.lengths))
        digest = xxhash.xxh3_128(json.dumps([self.seed, self.samples_per_step]).encode())
        digest.update(self._epoch_order(0).astype("<i8").tobytes())  # numpy may draw another permutation one day
        for identity in identities:
            digest.update(json.dumps(identity).encode())
        return digest.hexdigest()

    def plan_hash(self, identities: Sequence[str]) -> str:
        """Changes with `order_hash` and with all that decides the split: lengths, layout, max_tokens, world size."""
        split = [self.order_hash(identities), self.layout, self.max_tokens, self.world_size]
        digest = xxhash.xxh3_128(json.dumps(split).encode())
        digest.update(self.lengths.astype("<i4").tobytes())
        return digest.hexdigest()

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.lengths))


@dataclass(frozen=True)
class _Split:
    """The samples of one step, to be split over microbatches and ranks."""

    lengths: Mapping[int, Lengths]  # by index
    layout: Layout
    max_tokens: int
    world_size: int

    def microbatches(self) -> list[tuple[int, ...]]:
        """Few microbatches within budget, their number a multiple of the ranks where there are samples enough."""
        by_length = sorted(self.lengths, key=lambda i: (self.lengths[i].image, self.lengths[i].text, i), reverse=True)
        if self.layout == "padded":
            count = len(self._fill(by_length, self.max_tokens))
            return self._split_padded(by_length, self._rounded(count, len(by_length)))
        count = -(-sum(self.lengths[i].total for i in by_length) // self.max_tokens)
        while True:
            count = self._rounded(count, len(by_length))
            batches = self._split_packed(by_length, count)
            if max(sum(self.lengths[i].total for i in batch) for batch in batches) <= self.max_tokens:
                return batches
            count += 1 + count // 64  # in steps that grow, or a step of many large samples would be tried for ever

    def _rounded(self, count: int, samples: int) -> int:
        return min(-(-count // self.world_size) * self.world_size, samples)

    def _split_packed(self, by_length: Sequence[int], count: int) -> list[tuple[int, ...]]:
        """Longest first, each to the microbatch with the fewest tokens (Graham 1969: at most 4/3 of the best)."""
        batches: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, b) for b in range(count)]
        for i in sorted(by_length, key=lambda i: (-self.lengths[i].total, i)):
            tokens, b = heapq.heappop(heap)
            batches[b].append(i)
            heapq.heappush(heap, (tokens + self.lengths[i].total, b))
        return [tuple(batch) for batch in batches]

    def _fill(self, by_length: Sequence[int], budget: int) -> list[tuple[int, ...]]:
        """Neighbours in length side by side, each microbatch filled up to `budget` before the next is begun."""
        batches: list[list[int]] = []
        text = image = 0
        for i in by_length:
            length = self.lengths[i]
            text, image = max(text, length.text), max(image, length.image)
            if not batches or (len(batches[-1]) + 1) * (text + image) > budget:
                batches.append([])
                text, image = length.text, length.image
            batches[-1].append(i)
        return [tuple(batch) for batch in batches]

    def _split_padded(self, by_length: Sequence[int], count: int) -> list[tuple[int, ...]]:
        """`count` runs of neighbours with the smallest largest cost, by bisection on the budget."""
        totals = [self.lengths[i].total for i in by_length]
        low = max(*totals, -(-sum(totals) // count))
        high = self.max_tokens  # holds `count` or fewer at any time
        while low < high:
            middle = (low + high) // 2
            if len(self._fill(by_length, middle)) <= count:
                high = middle
            else:
                low = middle + 1
        batches = self._fill(by_length, high)
        while len(batches) < count:  # samples of equal lengths fill fewer: halve the one with the most of them
            largest = max(range(len(batches)), key=lambda b: len(batches[b]))
            batch = batches.pop(largest)
            batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return batches

    def over_ranks(self, batches: list[tuple[int, ...]]) -> tuple[tuple[Microbatch, ...], ...]:
        """Heaviest first to the lightest rank that still has room; fillers make the counts equal."""
        per_rank = -(-len(batches) // self.world_size)
        microbatches = [Microbatch(batch, (1.0,) * len(batch)) for batch in batches]
        shortest = min((i for batch in batches for i in batch), key=lambda i: (self.lengths[i].total, i))
        filler = Microbatch((shortest,), (0.0,))
        microbatches += [filler] * (per_rank * self.world_size - len(microbatches))
        cost = {m: computed_tokens([self.lengths[i] for i in m.indices], self.layout) for m in microbatches}
        ranks: list[list[Microbatch]] = [[] for _ in range(self.world_size)]
        heap = [(0, r) for r in range(self.world_size)]
        for microbatch in sorted(microbatches, key=lambda m: (-cost[m], m)):
            load, r = heapq.heappop(heap)
            ranks[r].append(microbatch)
            if len(ranks[r]) < per_rank:
                heapq.heappush(heap, (load + cost[microbatch], r))
        return tuple(tuple(rank) for rank in ranks)
