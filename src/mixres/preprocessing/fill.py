"""Data on disk -> encoded samples in the cache: scan everything, encode what is missing, let the encoders go.

Promise: all that is wrong with the data is told before anything is encoded; a second run encodes nothing; the
encoders are released before anything else is loaded. Cost: VAE and text encoder once per sample that is new, twice
where caption dropout needs its empty prompt.
"""

import gc
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from mixres.batch import Sample
from mixres.config.schema import Config
from mixres.console import counted, log
from mixres.data.cache import Cache, CacheEntry
from mixres.data.claims import Claims
from mixres.data.plan import Lengths
from mixres.data.records import EditRecord
from mixres.data.scan import ScannedRecord
from mixres.errors import UserError, WorkError
from mixres.geometry import Size, token_count
from mixres.models.family import Family
from mixres.models.registry import load_family
from mixres.preprocessing.encode import encode_inputs, entry_keys, entry_sizes
from mixres.preprocessing.training_data import SOURCES, control_areas, scan_of, target_size_of, usable_records

_POLL_S = 0.5
T = TypeVar("T")


@dataclass(frozen=True)
class CachedSample:
    """A usable example: its files, the size it is trained at, and its entry in the cache."""

    record: EditRecord
    target_size: Size
    key: str
    entry: CacheEntry
    regularization: bool = False  # counts in the loss with `loss.prior_loss_weight`

    @property
    def lengths(self) -> Lengths:
        return lengths_of(self.entry)


def lengths_of(entry: CacheEntry) -> Lengths:
    """What the plan needs to know of an entry."""
    return Lengths(entry.text_tokens, entry.image_tokens, entry.target_tokens, entry.empty_tokens)


class KeyedRecords(NamedTuple):
    """What a run is of, before anything is encoded."""

    cache: Cache
    train: list[ScannedRecord]
    held_out: list[ScannedRecord]
    keys: list[str]  # of the entries of both, in this order

    def train_keys(self, *, regularization: bool) -> list[str]:
        """Those of the regularisation set, or of the samples beside it."""
        return [k for k, x in zip(self.keys, self.train, strict=False) if x.regularization == regularization]


@dataclass(frozen=True)
class CachedData:
    """What training reads: the cache, and the examples in it."""

    cache: Cache
    train: list[CachedSample]
    held_out: list[CachedSample]


def run_cache(config: Config, *, device: torch.device | str = "cpu", rank: int = 0, world_size: int = 1) -> None:
    """The verb `cache`: fill it, say what was done. Several processes share the work.

    Raises:
        UserError: data, base or sizes are wrong; every problem there is. There is no room for the entries.
        WorkError: the disk is full, or a file has changed meanwhile.
    """
    family = family_of(config, is_main=rank == 0)
    encode_all(config, family, device=torch.device(device), rank=rank, world_size=world_size)


def family_of(config: Config, *, is_main: bool = True) -> Family:
    """The model family of the base, bound to it.

    Raises:
        UserError: the base cannot be found or is of no known family; the problems of the data are reported too.
    """
    model = config.model
    try:
        return load_family(model.family, model.pretrained_model_name_or_path, revision=model.revision)
    except UserError as error:
        raise UserError([*error.messages, *_file_problems(config, is_main)]) from error


def _file_problems(config: Config, is_main: bool) -> list[str]:
    """What keeps the data from being used, as far as the files tell it without the base."""
    stop = config.data.on_bad_item == "error"
    if is_main:
        base = config.model.pretrained_model_name_or_path
        log(f"model     {base} cannot be used; the data are looked at all the same")
    problems: list[str] = []
    for key in SOURCES:
        try:
            found = scan_of(config, key, is_main=is_main).problems
            problems += [str(problem) for problem in found if stop and not problem.skip]
        except UserError as error:
            problems += error.messages
    return problems


def encode_all(
    config: Config, family: Family, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> CachedData:
    """Scan training and held-out data, and return when every example is in the cache; the ranks share the encoding.

    Raises:
        UserError, WorkError: as `run_cache`.
    """
    found = keyed_records(config, family, is_main=rank == 0)
    return encode(config, family, found, device=device, rank=rank, world_size=world_size)


def encode(
    config: Config,
    family: Family,
    scanned: KeyedRecords,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> CachedData:
    """Return when every example is in the cache; the ranks share the encoding.

    Raises:
        UserError, WorkError: as `run_cache`.
    """
    cache, train, held_out, keys = scanned
    _check_budget(config, family, train)
    wanted = dict(zip(keys, [*train, *held_out], strict=True))
    if rank == 0:
        cache.sweep()
    missing = {key: item for key, item in wanted.items() if cache.lookup(key) is None}
    with_empty = set(keys[: len(train)]) if config.data.caption_dropout > 0 else set[str]()
    encoded = encode_missing(config, family, cache, missing, with_empty, device, rank, world_size) if missing else 0
    if rank == 0:
        save_index(cache)
        others = f", {len(missing) - encoded} by other processes" if encoded < len(missing) else ""
        found = len(wanted) - len(missing)
        log(f"cache     {len(wanted)} entries in {cache.root}: {encoded} encoded, {found} found{others}")
    elif encoded:
        log(f"cache     rank {rank}: {encoded} encoded")
    items = [_item(config, record, key, cache) for key, record in zip(keys, [*train, *held_out], strict=True)]
    return CachedData(cache, items[: len(train)], items[len(train) :])


def keyed_records(config: Config, family: Family, *, is_main: bool) -> KeyedRecords:
    """Scan training and held-out data; the usable examples and what their entries are called.

    Raises:
        UserError: data, base or sizes are wrong, or there can be no cache where it should be.
    """
    root = Path(config.cache.cache_dir)
    make_folder(root)
    train, held_out = usable_records(config, family, is_main=is_main)
    keys = entry_keys(config, family, train, empty_prompt=config.data.caption_dropout > 0)
    return KeyedRecords(Cache(root), train, held_out, keys + entry_keys(config, family, held_out))


def _check_budget(config: Config, family: Family, train: Iterable[ScannedRecord]) -> None:
    """What the plan would refuse after hours of encoding; it knows the lengths of the texts too, and checks again."""
    over = []
    for scanned in train:
        target = target_size_of(config, scanned)
        grids = family.grids(target, scanned.control_sizes, control_areas(config, family, target))
        tokens = token_count(grids)
        if tokens > config.batch.max_tokens:
            over.append(
                f"{scanned.record.name}: its pictures alone are {tokens} tokens, over batch.max_tokens = "
                f"{config.batch.max_tokens}: raise it, or lower data.resize.target.max_pixels"
            )
    if over:
        raise UserError(over)


def save_index(cache: Cache) -> None:
    """Save the index of lengths; where that cannot be done, say so and go on."""
    try:
        cache.save_index()
    except OSError as error:  # every entry is found without it
        log(f"cache     the index could not be written ({error.strerror}): the next start takes longer")


def _item(config: Config, scanned: ScannedRecord, key: str, cache: Cache) -> CachedSample:
    entry = cache.lookup(key)
    assert entry is not None, key
    return CachedSample(scanned.record, target_size_of(config, scanned), key, entry, scanned.regularization)


def spread(items: Iterable[CachedSample], count: int) -> list[CachedSample]:
    """At most `count` of the items, evenly over their target areas, smallest first."""
    return evenly(sorted(items, key=lambda item: (item.entry.target_tokens, item.record.name)), count)


def evenly(ordered: Sequence[T], count: int) -> list[T]:
    """At most `count` (2 or more) of them, first and last among them, at equal distances."""
    if len(ordered) <= count:
        return list(ordered)
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def encode_missing(
    config: Config,
    family: Family,
    cache: Cache,
    missing: Mapping[str, ScannedRecord],
    with_empty: Collection[str],
    device: torch.device,
    rank: int,
    world_size: int,
) -> int:
    """Fill the cache together with the other ranks; how many entries this process encoded. Its encoders are gone then.

    The keys `with_empty` get the embeddings of the empty prompt too. They see the example's own control image, so they
    are others for each example.

    Raises:
        UserError: the encoders cannot be loaded, or the disk has no room for all entries.
        WorkError: the disk is full, or a file has changed since the scan.
    """
    sizes = entry_sizes(config, family, missing, with_empty)
    check_space(cache.root, sizes.values())
    wanted = {key: (scanned, key in with_empty) for key, scanned in missing.items()}
    load = partial(_load, config, family, device)
    encoded = fill(cache, wanted, sizes, load, rank=rank, world_size=world_size)
    release(device)
    return encoded


def release(device: torch.device) -> None:
    """Give back the memory of what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _load(config: Config, family: Family, device: torch.device) -> Callable[[tuple[ScannedRecord, bool]], Sample]:
    """Loads the encoders; the function encodes an example, with its empty prompt where that is wanted."""
    encoders = family.load_encoders(dtype=getattr(torch, config.model.dtype), device=device)

    def encode(wanted: tuple[ScannedRecord, bool]) -> Sample:
        scanned, empty = wanted
        inputs = encode_inputs(config, family, scanned)
        sample = family.encode(encoders, **inputs)
        if not empty:
            return sample
        return replace(sample, empty_embeds=family.encode(encoders, **inputs | {"prompt": ""}).prompt_embeds)

    return encode


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
