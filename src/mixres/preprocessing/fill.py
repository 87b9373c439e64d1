"""Records on disk -> encoded samples in the cache: scan everything, encode what is missing, release the encoders.

Promise: everything that is wrong with the data is reported before anything is encoded; a second run encodes nothing;
no process waits for another one, so a dead rank stops nobody; the encoders are released before anything else is
loaded. Cost: VAE and text encoder once per new sample, the text encoder twice where caption dropout needs its empty
prompt; see `fill` for what is encoded twice.
"""

import gc
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch

from mixres.batch import Sample, TextEmbeds
from mixres.config.schema import Config
from mixres.console import clock, counted, log
from mixres.data.cache import Cache, CacheEntry
from mixres.data.decode import Share
from mixres.data.loader import MicrobatchDataset
from mixres.data.plan import Layout, Rounding, over_budget
from mixres.data.records import collector_paused
from mixres.data.scan import ALONE, ScannedRecord
from mixres.data.shards import NO_ROOM
from mixres.errors import Problems, UserError, WorkError
from mixres.models.family import Family
from mixres.models.registry import load_family
from mixres.preprocessing.cache_folder import check_space, open_cache, place_of, readable_size, save_index
from mixres.preprocessing.encode import (
    entry_bytes,
    entry_keys,
    foreseen_entries,
    shared_parts,
    text_problems,
    with_text,
)
from mixres.preprocessing.encoder import Encode, Encoder
from mixres.preprocessing.live_texts import LiveTexts, TextsOf
from mixres.preprocessing.parts import Part, Parts
from mixres.preprocessing.samples import (
    CachedSample,
    Lazy,
    LazySamples,
    SampleMaker,
    keys_of,
    lengths_of,
    name_at,
    names_of,
)
from mixres.preprocessing.start_memo import Kept, StartMemo
from mixres.preprocessing.training_data import (
    SOURCES,
    RecordSizes,
    Summary,
    check_folder,
    report,
    scan_of,
    usable_records,
)

T = TypeVar("T")
Load = Callable[[], Encode]
_LOOKS = 0.05  # of the time
_MANY = 100_000  # records


@dataclass(frozen=True)
class KeyedRecords:
    """The usable records of a run and the keys of their entries, before anything is encoded."""

    config: Config
    family: Family
    cache: Cache
    summary: Summary
    train: Sequence[ScannedRecord]
    held_out: list[ScannedRecord]
    keys: list[str]  # of the entries of both, in this order
    with_empty: frozenset[str]  # keys of the entries with the empty prompt too, for caption dropout
    noise_keys: list[str]  # `CachedSample.noise_key` of the held-out ones
    memo: StartMemo | None = None  # that is to keep what is found
    kept: Kept | None = None  # where it was known before

    @cached_property
    def shared(self) -> Parts:
        """What of them has entries of its own."""
        return shared_parts(self.config, self.family, self.by_key, self.with_empty)

    @property
    def by_key(self) -> dict[str, ScannedRecord]:
        """One record of each entry: equal ones share it."""
        return dict(zip(self.keys, [*self.train, *self.held_out], strict=True))

    def train_keys(self, *, regularization: bool) -> list[str]:
        """Those of the regularisation set, or of the samples beside it."""
        own = len(self.train) - self.summary.regularization
        return self.keys[own : len(self.train)] if regularization else self.keys[:own]


@dataclass(frozen=True)
class CachedData:
    """What training reads: the cache, the samples in it, and the text encoder where it holds no embeddings."""

    cache: Cache
    train: Sequence[CachedSample]
    held_out: Sequence[CachedSample]
    texts: LiveTexts | None = None

    def read(self, item: CachedSample) -> Sample:
        """The sample, its prompt embedded. Raises as `Cache.read` and `LiveTexts.embed`."""
        sample = self.cache.read(item.key, name=item.record.name)
        if self.texts is None:
            return sample
        texts = self.texts
        sample = sample.embedded(texts.embed(texts.inputs(item, item.record.prompt)))
        if sample.empty_embeds is None:
            return sample
        empty = texts.embed(texts.inputs(item, ""))
        return replace(sample, empty_embeds=empty.tokens, empty_pooled_embeds=empty.pooled)

    def dataset(
        self, samples: Sequence[CachedSample], layout: Layout, rounding: Rounding | None = None
    ) -> MicrobatchDataset:
        """These samples by position, for microbatches of them."""
        keys, names = keys_of(samples), names_of(samples)
        texts = TextsOf(self.texts, samples) if self.texts else None
        return MicrobatchDataset(self.cache, keys, names, layout, rounding or Rounding(), texts)


def run_cache(
    config: Config,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    shard: tuple[int, int] | None = None,
) -> None:
    """The verb `cache`: fill the cache, report what was done. Several processes share the work.

    `shard`: encode the i-th of n parts of the entries and nothing of the others, which other commands do.

    Raises:
        UserError: data, base or sizes are wrong, every problem at once; or the disk has too little space.
        WorkError: the disk is full, or a file has changed since the scan.
    """
    if shard and world_size > 1:
        raise UserError(
            f"--shard: is for one process, {world_size} were started, which share all entries: leave it out"
        )
    family = family_of(config, is_main=rank == 0)
    if shard:
        number, count = shard
        found = keyed_records(config, family, is_main=True, share=Share(number - 1, count))
        _fill(config, family, found, device=torch.device(device), rank=number - 1, world_size=count, alone=True)
    else:
        encode_all(config, family, device=torch.device(device), rank=rank, world_size=world_size)


def family_of(config: Config, *, is_main: bool = True) -> Family:
    """The model family of the base, bound to it.

    Raises:
        UserError: the base cannot be found or is of no known family; problems of the data are reported with it.
    """
    model, problems = config.model, Problems()
    base = model.pretrained_model_name_or_path
    family = problems.collect(load_family, model.family, base, revision=model.revision)
    if family is not None:
        family.background = config.data.background
        if is_main and (notice := family.training_notice()):
            log(f"model     {notice}")
        return family
    if is_main:
        log(f"model     {base} cannot be used; the data are scanned all the same")
    for key in SOURCES:
        with problems.collecting():
            found = scan_of(config, key, is_main=is_main).problems
            if config.data.on_bad_item == "error":
                problems.add(*(str(problem) for problem in found if not problem.skip))
    raise UserError(problems.lines)


def encode_all(
    config: Config, family: Family, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> CachedData:
    """Scan training and held-out data, and return when every sample is in the cache; the ranks share the encoding.

    Raises:
        UserError, WorkError: as `run_cache`.
    """
    found = keyed_records(config, family, is_main=rank == 0, share=Share(rank, world_size), known=True)
    return encode(config, family, found, device=device, rank=rank, world_size=world_size)


def keyed_records(
    config: Config, family: Family, *, is_main: bool, share: Share = ALONE, known: bool = False
) -> KeyedRecords:
    """Scan training and held-out data, shared with other processes; the usable records and the keys of their entries.

    `known`: take what an earlier start has kept of all this, where nothing has changed since.

    Raises:
        UserError: data, base or sizes are wrong, or the folder of the cache cannot be made.
    """
    cache, dropout = open_cache(config), config.data.caption_dropout > 0
    check_folder(Path(config.logging.output_dir))
    memo = StartMemo(config, family, cache) if known else None
    if kept := memo.load() if memo else None:
        if is_main:
            report(config, family, kept.summary)
        summary, train, held_out, keys, noise_keys, *_ = kept
        with_empty = frozenset(keys[: len(train)] if dropout else ())
        return KeyedRecords(config, family, cache, summary, train, held_out, keys, with_empty, noise_keys, memo, kept)
    found = usable_records(config, family, is_main=is_main, share=share)
    train, held_out = found.train, found.held_out
    if len(train) > _MANY:
        gc.freeze()  # else each full collection of the process would look at every record again
    keys = entry_keys(config, family, train, empty_prompt=dropout)
    with_empty = frozenset(keys if dropout else ())
    held_out_keys = noise_keys = entry_keys(config, family, held_out)
    if config.cache.text:
        noise_keys = entry_keys(with_text(config, None), family, held_out)
    keys += held_out_keys
    return KeyedRecords(config, family, cache, found.summary, train, held_out, keys, with_empty, noise_keys, memo)


def entries_there(found: KeyedRecords) -> tuple[dict[str, CacheEntry], dict[str, Part]]:
    """The entries of the records that are in the cache, and by key all parts that these and those to come name.

    An entry keeps what it names, also where the records that had the same part are gone.
    """
    entries: dict[str, CacheEntry] = {}
    parts: dict[str, Part] = {}
    for key, scanned in found.by_key.items():
        entry, own = found.cache.lookup(key), found.shared.of(key, scanned)
        if entry and not {*entry.parts} <= {*own.values()}:
            own = found.shared.all_of(key, scanned)
        if entry and {*entry.parts} <= {*own.values()}:
            entries[key], own = entry, {name: part for name, part in own.items() if part in entry.parts}
        else:
            own = found.shared.of(key, scanned)
        parts |= {part: Part(scanned, name) for name, part in own.items() if part not in parts}
    return entries, parts


def encode(
    config: Config,
    family: Family,
    found: KeyedRecords,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    keep: bool | None = None,
) -> CachedData:
    """Return when every sample is in the cache; the ranks share the encoding.

    `keep`: keep what was found for the next start, as rank 0 does; machines may have folders of their own.

    Raises:
        UserError, WorkError: as `run_cache`.
    """
    cache, count, recompute = found.cache, len(found.train), config.cache.text == "recompute"
    make = SampleMaker(cache, RecordSizes(config, family), found.keys, found.train, recompute)
    if found.kept:
        names = Lazy(count, partial(name_at, found.train))  # other processes get it
        Problems(over_budget(found.kept.table["lengths"], names, config.batch.max_tokens)).raise_if_any()
        _prepare(cache, is_main=rank == 0)
        if rank == 0:
            wanted = found.kept.entries.partition(" ")[0]
            log(f"cache     {found.kept.entries} in {cache}: 0 encoded, {wanted} found")
        train: Sequence[CachedSample] = LazySamples(count, make, found.keys[:count], names, found.kept.table)
    else:
        entries = _fill(config, family, found, device=device, rank=rank, world_size=world_size)
        with collector_paused():
            train = [make(i) for i in range(count)]
    own = zip(found.keys[count:], found.held_out, found.noise_keys, strict=True)
    held_out = [make.of(key, scanned)._replace(noise_key=noise) for key, scanned, noise in own]
    if count > _MANY:
        gc.freeze()
    if found.memo and not found.kept and (rank == 0 if keep is None else keep):
        records = [*found.train, *found.held_out]
        found.memo.save(found.summary, records, [*train, *held_out], found.noise_keys, entries)
    texts = LiveTexts(config, family, device, ranks=world_size) if recompute else None
    return CachedData(cache, train, held_out, texts)


def _prepare(cache: Cache, *, is_main: bool) -> None:
    """Upload what waits; on the main process, delete what killed writers left."""
    cache.shards.store.finish()
    if is_main:
        cache.sweep()


def _fill(
    config: Config,
    family: Family,
    found: KeyedRecords,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    alone: bool = False,
) -> str:
    """`fill` with the entries of these records that are missing, checked before anything is encoded.

    Returns how many entries there are, for the log.
    """
    cache, records = found.cache, found.by_key
    is_main = alone or rank == 0
    _prepare(cache, is_main=is_main)
    with collector_paused():
        entries, parts = entries_there(found)
        wanted = len(parts) + len(records)
        missing = {key: scanned for key, scanned in records.items() if key not in entries}
        known = {key: entry for key in parts if (entry := cache.lookup(key))}
        # Prompts are the last parts: samples are encoded with what is stored of them.
        parts = {key: parts[key] for key in sorted(parts, key=lambda key: isinstance(parts[key].name, str))}
        to_come = {key: part for key, part in parts.items() if key not in known}
    foreseen = foreseen_entries(config, family, missing, found.with_empty, found.shared, to_come)
    with collector_paused():
        _check_lengths(config, family, found, entries | foreseen)
    sizes = entry_bytes(config, family, foreseen)
    check_space(cache, sizes.values())

    load = partial(Encoder, config, family, cache, foreseen, missing, to_come, device)
    encoded = fill(cache, sizes, load, foreseen, rank=rank, world_size=world_size, alone=alone)
    if encoded:
        release(device)
    if is_main:
        save_index(cache)
    if alone:
        of_all = f"{wanted - len(sizes)} of all {wanted} entries had been there"
        log(f"cache     shard {rank + 1}/{world_size}: {encoded} encoded; {of_all}")
    elif rank and encoded:
        log(f"cache     rank {rank}: {encoded} encoded")
    texts = sum(isinstance(part.name, str) for part in parts.values())
    counts = {"prompts": texts, "controls": len(parts) - texts}
    of_them = " and ".join(f"{count} of them {what}" for what, count in counts.items() if count)
    entries_of = f"{wanted} entries{of_them and f', {of_them},'}"
    if is_main and not alone:
        others = f", {len(sizes) - encoded} by other processes" if encoded < len(sizes) else ""
        log(f"cache     {entries_of} in {cache}: {encoded} encoded, {wanted - len(sizes)} found{others}")
    return entries_of


def _check_lengths(config: Config, family: Family, found: KeyedRecords, entries: Mapping[str, CacheEntry]) -> None:
    """What the plan or the first step would refuse after hours of encoding."""
    names = [scanned.record.name for scanned in found.train]
    lengths = [lengths_of(entries[key]) for key, _ in zip(found.keys, found.train, strict=False)]
    problems = Problems(over_budget(lengths, names, config.batch.max_tokens))
    problems.add(*text_problems(family, found.by_key, entries))
    problems.raise_if_any()


def fill(
    cache: Cache,
    sizes: Mapping[str, int],
    load: Load,
    foreseen: Mapping[str, CacheEntry] = {},
    *,
    rank: int = 0,
    world_size: int = 1,
    alone: bool = False,
) -> int:
    """Return when every key of `sizes` is in the cache; how many entries this process encoded.

    Each of `world_size` ranks encodes its own share of the keys. Then it encodes what is still missing of the other
    shares, in an order of its own, so that nobody waits for a rank that is slow or dead. No collective operation is
    open meanwhile. Cost: at the end a rank may encode an entry that another one is encoding, at most the few that are
    in flight then, or in the open shards; two runs over one folder may encode every entry twice. Both write the same
    bytes, and the last rename wins. `alone`: only the own share.

    `sizes` holds the bytes that each entry will take. `load` is called before the first entry that is encoded here. An
    entry that names other parts than the `foreseen` one counts as missing.

    Raises:
        WorkError: the disk is full or cannot be written; what was written stays.
    """
    own = [key for key in sizes if int(key, 16) % world_size == rank]
    others = [] if alone else [key for key in sizes if int(key, 16) % world_size != rank]
    of_all = _OfAll(cache, sizes) if others else str
    random.Random(rank).shuffle(others)  # ranks that help the same slow one should not take the same keys
    encode_entry, encoded, previous = None, 0, None
    for share in filter(None, (own, others)):
        try:
            for key in counted(share, "encode", "sample", enabled=alone or rank == 0, note=of_all):
                there = cache.lookup(key)
                if there and there.parts == foreseen.get(key, there).parts:
                    continue
                encode_entry = encode_entry or load()
                value, *places = encode_entry(key)
                with _writing(cache, sizes):
                    if isinstance(previous, TextEmbeds) and isinstance(value, Sample):
                        cache.close()  # the other ranks read the prompts for samples of theirs
                    cache.write(key, value, *places)
                previous, encoded = value, encoded + 1
        finally:  # also where a record is refused: what was encoded before it stays
            with _writing(cache, sizes):
                cache.close()
    return encoded


class _OfAll:
    """How many of the entries there are by now, whoever encoded them, and when all will be there.

    Looking for them takes at most `_LOOKS` of the time.
    """

    def __init__(self, cache: Cache, keys: Collection[str]) -> None:
        self._cache, self._missing, self._count = cache, list(keys), len(keys)
        self._started = time.perf_counter()
        self._next, self._note = self._started, ""

    def __call__(self) -> str:
        before = time.perf_counter()
        if before >= self._next:
            self._missing = [key for key in self._missing if self._cache.lookup(key) is None]
            now = time.perf_counter()
            self._next = now + (now - before) / _LOOKS
            done, rate = self._count - len(self._missing), (self._count - len(self._missing)) / (now - self._started)
            left = f", left {clock(len(self._missing) / rate)}" if rate else ""
            self._note = f"of all {done}/{self._count}, {rate:.2f} sample/s{left}"
        return self._note


@contextmanager
def _writing(cache: Cache, sizes: Mapping[str, int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        left = [size for key, size in sizes.items() if cache.lookup(key) is None]
        fix = "make room" if error.errno in NO_ROOM else "make it writable, with room"
        raise WorkError(
            f"{place_of(cache)} cannot be written ({error.strerror or error}): {fix}, about "
            f"{readable_size(sum(left))} for the {len(left)} entries to come, and run the same command again; "
            "those that are there stay"
        ) from error


def spread(samples: Iterable[CachedSample], count: int) -> list[CachedSample]:
    """At most `count` of the samples, evenly over their target areas, smallest first."""
    return evenly(sorted(samples, key=lambda sample: (sample.entry.target_tokens, sample.record.name)), count)


def evenly(ordered: Sequence[T], count: int) -> list[T]:
    """At most `count` (2 or more) of them, first and last among them, at equal distances."""
    if len(ordered) <= count:
        return list(ordered)
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def release(device: torch.device) -> None:
    """Free the memory of what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
