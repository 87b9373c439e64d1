"""Data on disk -> encoded samples in the cache: scan everything, encode what is missing, let the encoders go.

Promise: all that is wrong with the data is told before anything is encoded; a second run encodes nothing; the
encoders are released before anything else is loaded. Cost: VAE and text encoder once per sample that is new, twice
where caption dropout needs its empty prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch

from mixres.config.config import Config
from mixres.console import log
from mixres.data.cache import Cache, CacheEntry
from mixres.data.plan import Lengths
from mixres.data.records import EditRecord
from mixres.data.scan import ScannedRecord
from mixres.errors import UserError
from mixres.geometry import Size, control_size, token_grid
from mixres.models.registry import family_module
from mixres.preprocessing.encode import encode_missing, entry_keys
from mixres.preprocessing.fill import make_folder
from mixres.preprocessing.training_data import SOURCES, control_areas, scan_of, target_size_of, usable_records
from mixres.training.distributed import dist_env

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


def run_cache(config: Config) -> None:
    """The verb `cache`: fill it, say what was done. Several processes share the work.

    Raises:
        UserError: data, base or sizes are wrong; every problem there is. There is no room for the entries.
        WorkError: the disk is full, or a file has changed meanwhile.
    """
    rank, world_size, device = dist_env()
    encode_all(config, family_of(config), device=device, rank=rank, world_size=world_size)


def family_of(config: Config) -> ModuleType:
    """The module of the base's model family.

    Raises:
        UserError: the base cannot be found or is of no known family; the problems of the data are reported too.
    """
    model = config.model
    try:
        return family_module(model.family, model.pretrained_model_name_or_path, revision=model.revision)
    except UserError as error:
        raise UserError([*error.messages, *_file_problems(config)]) from error


def _file_problems(config: Config) -> list[str]:
    """What keeps the data from being used, as far as the files tell it without the base."""
    is_main, stop = dist_env().rank == 0, config.data.on_bad_item == "error"
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
    config: Config, family: ModuleType, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> CachedData:
    """Scan training and held-out data, and return when every example is in the cache; the ranks share the encoding.

    Raises:
        UserError, WorkError: as `run_cache`.
    """
    found = keyed_records(config, family, is_main=rank == 0)
    return encode(config, family, found, device=device, rank=rank, world_size=world_size)


def encode(
    config: Config,
    family: ModuleType,
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


def keyed_records(config: Config, family: ModuleType, *, is_main: bool) -> KeyedRecords:
    """Scan training and held-out data; the usable examples and what their entries are called.

    Raises:
        UserError: data, base or sizes are wrong, or there can be no cache where it should be.
    """
    root = Path(config.cache.cache_dir)
    make_folder(root)
    train, held_out = usable_records(config, family, is_main=is_main)
    keys = entry_keys(config, family, train, empty_prompt=config.data.caption_dropout > 0)
    return KeyedRecords(Cache(root), train, held_out, keys + entry_keys(config, family, held_out))


def _check_budget(config: Config, family: ModuleType, train: Iterable[ScannedRecord]) -> None:
    """What the plan would refuse after hours of encoding; it knows the lengths of the texts too, and checks again."""
    token = family.pixels_per_token(config.model.pretrained_model_name_or_path, revision=config.model.revision)
    over = []
    for scanned in train:
        target = target_size_of(config, scanned)
        area = control_areas(config, family, target).get("control_area", 0)
        sizes = (target, *(control_size(size, area=area) for size in scanned.control_sizes))
        tokens = sum(token_grid(size, token).tokens for size in sizes)
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
