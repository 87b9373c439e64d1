"""Usable records with their entries in the cache, and what a plan needs of all of them, as one array.

Cost: 25 bytes a sample for the array. A sample of `LazySamples` is made when it is asked for, in some 15 us.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from mixres.data.cache import Cache, CacheEntry
from mixres.data.plan import Lengths
from mixres.data.records import EditRecord
from mixres.data.scan import ScannedRecord
from mixres.errors import WorkError
from mixres.geometry import Size
from mixres.models.family import ControlSizes
from mixres.preprocessing.training_data import RecordSizes

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


@dataclass(frozen=True)
class SampleMaker:
    """Makes training samples of their positions."""

    cache: Cache
    sizes: RecordSizes
    keys: Sequence[str]
    records: Sequence[ScannedRecord]
    with_digests: bool

    def __call__(self, index: int) -> CachedSample:
        return self.of(self.keys[index], self.records[index])

    def of(self, key: str, scanned: ScannedRecord) -> CachedSample:
        """The sample of a record whose entry is `key`.

        Raises:
            WorkError: another process has found the entry damaged.
        """
        entry, own = self.cache.lookup(key), self.sizes.of(scanned)
        if entry is None:
            gone = "its cache entry is not there any more: run the same command again"
            raise WorkError(f"{scanned.record.name}: {gone}")
        at, digests = (own.target, own.controls), scanned.digests if self.with_digests else ()
        return CachedSample(scanned.record, *at, key, entry, scanned.regularization, digests)


def name_at(records: Sequence[ScannedRecord], index: int) -> str:
    """The name of a record by its position."""
    return records[index].record.name


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
