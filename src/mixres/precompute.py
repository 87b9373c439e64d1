"""Data on disk -> encoded samples in the cache: scan everything, encode what is missing, let the encoders go.

Promise: all that is wrong with the data is told before anything is encoded; a second run encodes nothing; the
encoders are released before anything else is loaded. Cost: VAE and text encoder once per sample that is new.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from mixres import atomic
from mixres.caching import make_folder
from mixres.config import Config
from mixres.data.cache import Cache, CacheEntry
from mixres.data.dataset import ScannedRecord, scan
from mixres.data.plan import Lengths
from mixres.data.records import EditRecord, Fault
from mixres.encoding import encode_missing, entry_keys, image_limits, target_size_of
from mixres.errors import UserError
from mixres.geometry import Size
from mixres.models.families import family_module
from mixres.training.distributed import launched
from mixres.training.progress import say

BAD_ITEMS = "bad_items.jsonl"


@dataclass(frozen=True)
class Item:
    """A usable example: its files, the size it is trained at, and its entry in the cache."""

    record: EditRecord
    target_size: Size
    key: str
    entry: CacheEntry

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.entry.text_tokens, self.entry.image_tokens, self.entry.target_tokens)


@dataclass(frozen=True)
class Encoded:
    """What training reads: the cache, and the examples in it."""

    cache: Cache
    train: list[Item]
    held_out: list[Item]


def run_cache(config: Config) -> None:
    """The verb `cache`: fill it, say what was done. Several processes share the work.

    Raises:
        UserError: data, base or sizes are wrong; every fault there is. There is no room for the entries.
        WorkError: the disk is full, or a file has changed meanwhile.
    """
    rank, world_size, device = launched()
    encode_all(config, family_of(config), device=device, rank=rank, world_size=world_size)


def family_of(config: Config) -> ModuleType:
    """The module of the base's model family.

    Raises:
        UserError: the base cannot be found or is of no family that is known.
    """
    model = config.model
    return family_module(model.family, model.pretrained_model_name_or_path, revision=model.revision)


def encode_all(
    config: Config, family: ModuleType, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> Encoded:
    """Scan training and held-out data, and return when every example is in the cache; the ranks share the encoding.

    Raises:
        UserError, WorkError: as `run_cache`.
    """
    cache, train, held_out, keys = examples(config, family, speak=rank == 0)
    wanted = dict(zip(keys, [*train, *held_out], strict=True))
    if rank == 0:
        cache.sweep()
    missing = {key: item for key, item in wanted.items() if cache.lookup(key) is None}
    encoded = encode_missing(config, family, cache, missing, device, rank, world_size) if missing else 0
    if rank == 0:
        save_index(cache)
        others = f", {len(missing) - encoded} by other processes" if encoded < len(missing) else ""
        found = len(wanted) - len(missing)
        say(f"cache     {len(wanted)} entries in {cache.root}: {encoded} encoded, {found} found{others}")
    elif encoded:
        say(f"cache     rank {rank}: {encoded} encoded")
    items = [_item(config, record, key, cache) for key, record in zip(keys, [*train, *held_out], strict=True)]
    return Encoded(cache, items[: len(train)], items[len(train) :])


def examples(
    config: Config, family: ModuleType, *, speak: bool
) -> tuple[Cache, list[ScannedRecord], list[ScannedRecord], list[str]]:
    """The cache, the usable examples (training, held-out) and the keys of both, in this order.

    Raises:
        UserError: data, base or sizes are wrong, or there can be no cache where it should be.
    """
    root = Path(config.cache.cache_dir)
    make_folder(root)
    train, held_out = _scan_all(config, family, speak=speak)
    return Cache(root), train, held_out, entry_keys(config, family, [*train, *held_out])


def save_index(cache: Cache) -> None:
    """Save the index of lengths; where that cannot be done, say so and go on."""
    try:
        cache.save_index()
    except OSError as error:  # every entry is found without it
        say(f"cache     the index could not be written ({error.strerror}): the next start takes longer")


def _scan_all(config: Config, family: ModuleType, *, speak: bool) -> tuple[list[ScannedRecord], list[ScannedRecord]]:
    data = config.data
    base = {"path": config.model.pretrained_model_name_or_path, "revision": config.model.revision}
    token = family.pixels_per_token(base["path"], revision=base["revision"])
    if data.resize.target.multiple_of % token:
        raise UserError(
            f"data.resize.target.multiple_of: {data.resize.target.multiple_of} is not a multiple of {token}, the "
            "pixels of one token of this base"
        )
    limits = image_limits(config)
    found: list[list[ScannedRecord]] = []
    faults: list[Fault] = []
    for sources in (data.train, data.held_out or ()):
        records, wrong = scan(sources, limits=limits, empty_caption=data.empty_caption, min_side=token, progress=speak)
        usable, unfit = _fitting(family, records)
        found.append(usable)
        faults += wrong + unfit
    _settle(config, faults, speak)
    if speak:
        controls = sum(len(r.record.controls) for records in found for r in records)
        say(f"data      {len(found[0])} training and {len(found[1])} held-out examples with {controls} controls")
    return found[0], found[1]


def _fitting(family: ModuleType, records: Sequence[ScannedRecord]) -> tuple[list[ScannedRecord], list[Fault]]:
    usable, faults = [], []
    for scanned in records:
        reason = family.example_fault(controls=len(scanned.record.controls), prompt=scanned.record.prompt)
        if reason is None:
            usable.append(scanned)
        else:
            faults.append(Fault(scanned.record.name, reason))
    return usable, faults


def _settle(config: Config, faults: Sequence[Fault], speak: bool) -> None:
    """Stop for faults, all of them together, or list them in the run folder where the configuration says to go on."""
    if config.data.on_bad_item == "error" and any(not fault.skip for fault in faults):
        raise UserError([str(fault) for fault in faults])
    folder = Path(config.logging.output_dir)
    if not speak:
        return
    if not faults:
        (folder / BAD_ITEMS).unlink(missing_ok=True)  # an earlier run's
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replace(folder / BAD_ITEMS) as tmp, tmp.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps({'path': fault.path, 'reason': fault.reason})}\n" for fault in faults)
        say(f"data      {len(faults)} faults, listed in {folder / BAD_ITEMS}: their examples are left out")


def _item(config: Config, scanned: ScannedRecord, key: str, cache: Cache) -> Item:
    entry = cache.lookup(key)
    assert entry is not None, key
    return Item(scanned.record, target_size_of(config, scanned), key, entry)


def spread(items: Iterable[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly over their target areas, smallest first."""
    ordered = sorted(items, key=lambda item: (item.entry.target_tokens, item.record.name))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]
