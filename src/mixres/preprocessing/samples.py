"""Usable records with their entries in the cache, and what a plan needs of all of them, as one array.

Cost: 25 bytes a sample for the array. A sample of `LazySamples` is made when it is asked for, in some 15 us.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from mixres.data.cache import CacheEntry
from mixres.data.plan import Lengths
from mixres.data.records import EditRecord
from mixres.geometry import Size
from mixres.models.family import ControlSizes

ROW = np.dtype([("lengths", "<i4", len(Lengths._fields)), ("target", "<i4", 2), ("regularization", "?")])
T = TypeVar("T")


class CachedSample(NamedTuple):
    """A usable record, the sizes it is trained at, and its entry in the cache."""

    record: EditRecord
    target_size: Size
    control_sizes: ControlSizes
    key: str
    entry: CacheEntry
    regularization: bool = False  # counts in the loss with `loss.prior_loss_weight`
    digests: tuple[str, ...] = ()  # of its files, where its controls are read again
    noise_key: str = ""  # of a held-out sample: its key where embeddings are stored as they are

    @property
    def lengths(self) -> Lengths:
        return lengths_of(self.entry)


def lengths_of(entry: CacheEntry) -> Lengths:
    """What the plan needs to know of an entry."""
    return Lengths(entry.text_tokens, entry.image_tokens, entry.target_tokens, entry.empty_tokens)


@dataclass(frozen=True, eq=False)
class Lazy(Sequence[T], Generic[T]):
    """`size` items, each made by `make` of its position whenever it is asked for."""

    size: int
    make: Callable[[int], T]

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        found = range(self.size)[index]
        return self.make(found) if isinstance(found, int) else [self.make(i) for i in found]


@dataclass(frozen=True, eq=False)
class LazySamples(Lazy[CachedSample]):
    """Samples whose `keys`, `names` and rows of `table_of` are there without them."""

    keys: Sequence[str]
    names: Sequence[str]
    table: np.ndarray


def table_of(samples: Sequence[CachedSample]) -> np.ndarray:
    """(n,) of `ROW`: lengths, width and height of the target, and whether the sample is of the regularisation set."""
    if isinstance(samples, LazySamples):
        return samples.table
    rows: Iterator[Any] = ((sample.lengths, sample.target_size, sample.regularization) for sample in samples)
    return np.fromiter(rows, ROW, len(samples))


def keys_of(samples: Sequence[CachedSample]) -> Sequence[str]:
    """Keys of their entries."""
    return samples.keys if isinstance(samples, LazySamples) else [sample.key for sample in samples]


def names_of(samples: Sequence[CachedSample]) -> Sequence[str]:
    """Names of their records."""
    return samples.names if isinstance(samples, LazySamples) else [sample.record.name for sample in samples]
