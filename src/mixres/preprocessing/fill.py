"""Encoding what the cache lacks, by one process or by several that know nothing of each other.

Promise: living processes never encode one entry at the same time, what a killed or failing one leaves is taken over by
the others, and no collective is open meanwhile; a full disk costs the entries in flight and nothing that was written.
Cost: two system calls an entry beyond encoding and writing it; the slowest process decides when all go on.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from mixres.batch import Sample
from mixres.console import counted, log
from mixres.data.cache import Cache
from mixres.data.claims import Claims
from mixres.errors import UserError, WorkError

_POLL_S = 0.5
T = TypeVar("T")


def make_folder(root: Path) -> None:
    """Raises:
    UserError: there can be no cache at `root`.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache.cache_dir: {root} cannot be made ({error.strerror}): name another folder") from error


def check_space(root: Path, sizes: Collection[int]) -> None:
    """`sizes`: bytes that each entry to come will take.

    Raises:
        UserError: the disk of `root` has less left.
    """
    needed, free = sum(sizes), shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"cache.cache_dir: {root} needs about {readable_size(needed)} for {len(sizes)} entries, "
            f"{readable_size(free)} are free: make room, or name a folder on a larger disk"
        )


def readable_size(count: int) -> str:
    """Bytes for a reader; small caches in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def fill(
    cache: Cache,
    missing: Mapping[str, T],
    sizes: Mapping[str, int],
    load: Callable[[], Callable[[T], Sample]],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Return when every key of `missing` is in the cache, whoever encoded it; how many this process did.

    Each of `world_size` processes begins with its own share of the keys and then helps with the others', so that
    nobody waits for one that has died. `load` is called before the first entry that is encoded here. `sizes` holds
    the estimated bytes of each entry.

    Raises:
        WorkError: the disk is full or not to be written; what was written stays.
    """
    shares: list[list[str]] = [[] for _ in range(world_size)]
    for key in missing:
        shares[int(key, 16) % world_size].append(key)
    own, *others = shares[rank:] + shares[:rank]
    with _Worker(cache, missing, sizes, load) as worker:
        left = [key for key in counted(own, "encode", "sample", enabled=rank == 0) if not worker.take(key)]
        left = worker.rest([*left, *(key for share in others for key in share)])
        if left and rank == 0:
            log(f"cache     waits for {len(left)} entries that other processes are encoding")
        while left:
            time.sleep(_POLL_S)
            left = worker.rest(left)
        return worker.encoded


class _Worker(Generic[T]):
    def __init__(
        self, cache: Cache, items: Mapping[str, T], sizes: Mapping[str, int], load: Callable[[], Callable[[T], Sample]]
    ) -> None:
        self.cache, self.items, self.sizes, self.load = cache, items, sizes, load
        self.encoded = 0

    def __enter__(self) -> "_Worker[T]":
        with self._writing():
            self._claims = Claims(self.cache.root)
        return self

    def __exit__(self, *_: object) -> None:
        self._claims.close()

    @cached_property
    def encode(self) -> Callable[[T], Sample]:
        return self.load()

    def take(self, key: str) -> bool:
        """Whether the entry is there now, found or encoded; False while another process encodes it."""
        with self._claims.claim(key) as mine:
            if mine and self.cache.lookup(key) is None:
                sample = self.encode(self.items[key])
                with self._writing():
                    self.cache.write(key, sample)
                self.encoded += 1
            return mine

    def rest(self, keys: list[str]) -> list[str]:
        """The keys that other processes are encoding, after this one has taken all others."""
        return [key for key in keys if not self.take(key)]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            left = [size for key, size in self.sizes.items() if self.cache.lookup(key) is None]
            raise WorkError(
                f"cache.cache_dir: {self.cache.root} cannot be written ({error.strerror or error}): make room, about "
                f"{readable_size(sum(left))} for the {len(left)} entries to come, and run the same command again; "
                "those that are there stay"
            ) from error
