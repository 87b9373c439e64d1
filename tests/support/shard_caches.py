"""Caches of twelve little samples, in a folder or at a URL."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mixres.batch import Sample
from mixres.data.cache import Cache, entry_key
from mixres.data.shard_store import LocalCopies, UrlStore
from mixres.geometry import Grid
from support.samples import assert_same, make_sample

NUMBERS = {entry_key(i=i): i for i in range(12)}
SIZES = dict.fromkeys(NUMBERS, 10_000)
ONE_GB = 10**9
LITTLE = 3000  # bytes: two or three entries
Open = Callable[..., Cache]


def sample(number: int) -> Sample:
    return make_sample((Grid(1, 2 + number % 3, 3), Grid(1, 2, 2)), mask=number % 2 == 0, empty=2, seed=number)


def filled(cache: Cache, keys: Sequence[str] = tuple(NUMBERS)) -> Cache:
    for key in keys:
        cache.write(key, sample(NUMBERS[key]))
    cache.close()
    return cache


def assert_filled(cache: Cache, keys: Sequence[str] = tuple(NUMBERS)) -> None:
    for key in keys:
        assert cache.lookup(key) is not None
        assert_same(cache.read(key), sample(NUMBERS[key]))


def opener(url: str, root: Path) -> Open:
    """Caches at one URL; each `machine` has local folders of its own."""

    def opened(machine: str = "a", size: int = LITTLE, limit: int = ONE_GB) -> Cache:
        folder = root / machine
        store = UrlStore(f"{url}/shards", folder / "waiting", LocalCopies(folder / "copies/x", limit))
        return Cache(folder, size, remote=store)

    return opened
