"""Records on disk -> encoded samples in the cache: scan everything, encode what is missing, release the encoders.

Promise: everything that is wrong with the data is reported before anything is encoded; a second run encodes nothing;
no process waits for another one, so a dead rank stops nobody; the encoders are released before anything else is
loaded. Cost: VAE and text encoder once per new sample, the text encoder twice where caption dropout needs its empty
prompt; see `fill` for what is encoded twice.
"""

import gc
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from mixres.batch import Sample, TextEmbeds
from mixres.config.schema import Config
from mixres.console import clock, counted, log
from mixres.data.cache import Cache, CacheEntry, DamagedEntry
from mixres.data.decode import Share
from mixres.data.plan import Lengths, over_budget
from mixres.data.records import EditRecord, collector_paused
from mixres.data.scan import ALONE, ScannedRecord
from mixres.errors import Problems, UserError, WorkError
from mixres.geometry import Size
from mixres.models.family import ControlSizes, Family
from mixres.models.registry import load_family
from mixres.preprocessing.encode import (
    encode_record,
    entry_bytes,
    entry_keys,
    foreseen_entries,
    foreseen_prompts,
    lone_prompts,
    prompt_keys,
    text_problems,
)
from mixres.preprocessing.training_data import SOURCES, RecordSizes, SizesOf, scan_of, usable_records

T = TypeVar("T")
Encode = Callable[[str], tuple[Sample | TextEmbeds, Sequence[str]]]  # the entry of a key, and keys of its prompts
Load = Callable[[], Encode]
_LOOKS = 0.05  # of the time
_MANY = 100_000  # records


class CachedSample(NamedTuple):
    """A usable record, the sizes it is trained at, and its entry in the cache."""

    record: EditRecord
    target_size: Size
    control_sizes: ControlSizes
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
    """The usable records of a run and the keys of their entries, before anything is encoded."""

    cache: Cache
    train: list[ScannedRecord]
    held_out: list[ScannedRecord]
    keys: list[str]  # of the entries of both, in this order
    prompts: Mapping[str, str]  # keys of the entries of prompts by prompt, where they have entries of their own
    with_empty: frozenset[str]  # keys of the entries with the empty prompt too, for caption dropout

    @property
    def by_key(self) -> dict[str, ScannedRecord]:
        """One record of each entry: equal ones share it."""
        return dict(zip(self.keys, [*self.train, *self.held_out], strict=True))

    def train_keys(self, *, regularization: bool) -> list[str]:
        """Those of the regularisation set, or of the samples beside it."""
        return [k for k, x in zip(self.keys, self.train, strict=False) if x.regularization == regularization]


@dataclass(frozen=True)
class CachedData:
    """What training reads: the cache, and the samples in it."""

    cache: Cache
    train: list[CachedSample]
    held_out: list[CachedSample]


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
    found = keyed_records(config, family, is_main=rank == 0, share=Share(rank, world_size))
    return encode(config, family, found, device=device, rank=rank, world_size=world_size)


def keyed_records(config: Config, family: Family, *, is_main: bool, share: Share = ALONE) -> KeyedRecords:
    """Scan training and held-out data, shared with other processes; the usable records and the keys of their entries.

    Raises:
        UserError: data, base or sizes are wrong, or the folder of the cache cannot be made.
    """
    root = Path(config.cache.cache_dir)
    make_folder(root)
    train, held_out = usable_records(config, family, is_main=is_main, share=share)
    if len(train) > _MANY:
        gc.freeze()  # else each full collection of the process would look at every record again
    dropout = config.data.caption_dropout > 0
    keys = entry_keys(config, family, train, empty_prompt=dropout)
    prompts = prompt_keys(config, family, lone_prompts(family, [*train, *held_out], empty_prompt=dropout))
    with_empty = frozenset(keys if dropout else ())
    cache = Cache(root, shard_size(config), float8_text=config.cache.text == "float8")
    held_out_keys = entry_keys(config, family, held_out)
    return KeyedRecords(cache, train, held_out, keys + held_out_keys, prompts, with_empty)


def shard_size(config: Config) -> int:
    """In bytes; 0 where each entry has a file."""
    return round(config.cache.shard_gb * 10**9)


def encode(
    config: Config, family: Family, found: KeyedRecords, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> CachedData:
    """Return when every sample is in the cache; the ranks share the encoding.

    Raises:
        UserError, WorkError: as `run_cache`.
    """
    _fill(config, family, found, device=device, rank=rank, world_size=world_size)
    cache, train, held_out, keys, *_ = found
    found_records = zip(keys, [*train, *held_out], strict=True)
    sizes = RecordSizes(config, family)
    with collector_paused():
        samples = [_cached(sizes.of(scanned), scanned, key, cache) for key, scanned in found_records]
    if len(samples) > _MANY:
        gc.freeze()
    return CachedData(cache, samples[: len(train)], samples[len(train) :])


def _fill(
    config: Config,
    family: Family,
    found: KeyedRecords,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    alone: bool = False,
) -> None:
    """`fill` with the entries of these records that are missing, checked before anything is encoded."""
    cache, prompts, with_empty, records = found.cache, found.prompts, found.with_empty, found.by_key
    is_main = alone or rank == 0
    if is_main:
        cache.sweep()
    wanted = [*prompts.values(), *records]  # prompts first: samples are encoded with what is stored of them
    with collector_paused():
        entries = {key: entry for key in wanted if (entry := cache.lookup(key))}
    missing = {key: scanned for key, scanned in records.items() if key not in entries}
    foreseen = foreseen_prompts(family, {text: key for text, key in prompts.items() if key not in entries})
    foreseen |= foreseen_entries(config, family, missing, with_empty) if missing else {}
    with collector_paused():
        _check_lengths(config, family, found, entries | foreseen)
    sizes = entry_bytes(config, family, foreseen)
    check_space(cache.root, sizes.values())

    load = partial(_Encoder, config, family, found, missing, device)
    encoded = fill(cache, sizes, load, rank=rank, world_size=world_size, alone=alone)
    if encoded:
        release(device)
    if is_main:
        save_index(cache)
    if alone:
        of_all = f"{len(entries)} of all {len(wanted)} entries had been there"
        log(f"cache     shard {rank + 1}/{world_size}: {encoded} encoded; {of_all}")
    elif rank == 0:
        others = f", {len(sizes) - encoded} by other processes" if encoded < len(sizes) else ""
        of_them = f", {len(prompts)} of them prompts," if prompts else ""
        log(
            f"cache     {len(wanted)} entries{of_them} in {cache.root}: {encoded} encoded, {len(entries)} found{others}"
        )
    elif encoded:
        log(f"cache     rank {rank}: {encoded} encoded")


class _Encoder:
    """Encodes entries by their keys: of prompts, and of the records that are `missing`. The encoders are loaded now."""

    def __init__(
        self,
        config: Config,
        family: Family,
        found: KeyedRecords,
        missing: Mapping[str, ScannedRecord],
        device: torch.device,
    ) -> None:
        self.config, self.family, self.found, self.missing = config, family, found, missing
        self.texts = {key: prompt for prompt, key in found.prompts.items()}
        self.encoders = family.load_encoders(dtype=getattr(torch, config.model.dtype), device=device)

    def __call__(self, key: str) -> tuple[Sample | TextEmbeds, Sequence[str]]:
        """What the entry is to hold, and the keys of its prompts where they have entries of their own."""
        if key in self.texts:
            return self._encode_prompt(self.texts[key]), ()
        found, scanned, with_empty = self.found, self.missing[key], key in self.found.with_empty
        known = self._known if self.texts else None
        sample = encode_record(self.config, self.family, self.encoders, scanned, with_empty=with_empty, known=known)
        texts = [scanned.record.prompt, *([""] if with_empty else [])] if self.texts else []
        return sample, [found.prompts[text] for text in texts]

    def _encode_prompt(self, prompt: str) -> TextEmbeds:
        return self.family.encode_prompt(self.encoders, prompt=prompt, controls=[], sizes=ControlSizes())

    def _known(self, prompt: str) -> TextEmbeds:
        """As it is stored, or as the rank that is encoding it will store it.

        Raises:
            WorkError: what is stored is damaged.
        """
        cache, key = self.found.cache, self.found.prompts[prompt]
        if cache.lookup(key) is None:
            return self._encode_prompt(prompt)
        try:
            return cache.read_prompt(key)
        except DamagedEntry as error:
            raise WorkError(f"{error}: run the same command again") from error


def _check_lengths(config: Config, family: Family, found: KeyedRecords, entries: Mapping[str, CacheEntry]) -> None:
    """What the plan or the first step would refuse after hours of encoding."""
    names = [scanned.record.name for scanned in found.train]
    lengths = [lengths_of(entries[key]) for key, _ in zip(found.keys, found.train, strict=False)]
    problems = Problems(over_budget(lengths, names, config.batch.max_tokens))
    problems.add(*text_problems(family, found.by_key, entries))
    problems.raise_if_any()


def fill(
    cache: Cache, sizes: Mapping[str, int], load: Load, *, rank: int = 0, world_size: int = 1, alone: bool = False
) -> int:
    """Return when every key of `sizes` is in the cache; how many entries this process encoded.

    Each of `world_size` ranks encodes its own share of the keys. Then it encodes what is still missing of the other
    shares, in an order of its own, so that nobody waits for a rank that is slow or dead. No collective operation is
    open meanwhile. Cost: at the end a rank may encode an entry that another one is encoding, at most the few that are
    in flight then, or in the open shards; two runs over one folder may encode every entry twice. Both write the same
    bytes, and the last rename wins. `alone`: only the own share.

    `sizes` holds the bytes that each entry will take. `load` is called before the first entry that is encoded here.

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
                if cache.lookup(key) is not None:
                    continue
                encode_entry = encode_entry or load()
                value, prompts = encode_entry(key)
                with _writing(cache, sizes):
                    if isinstance(previous, TextEmbeds) and isinstance(value, Sample):
                        cache.close()  # the other ranks read the prompts for samples of theirs
                    cache.write(key, value, prompts)
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
        raise WorkError(
            f"cache.cache_dir: {cache.root} cannot be written ({error.strerror or error}): make room, about "
            f"{readable_size(sum(left))} for the {len(left)} entries to come, and run the same command again; "
            "those that are there stay"
        ) from error


def _cached(sizes: SizesOf, scanned: ScannedRecord, key: str, cache: Cache) -> CachedSample:
    entry = cache.lookup(key)
    assert entry is not None, key
    return CachedSample(scanned.record, sizes.target, sizes.controls, key, entry, scanned.regularization)


def spread(samples: Iterable[CachedSample], count: int) -> list[CachedSample]:
    """At most `count` of the samples, evenly over their target areas, smallest first."""
    return evenly(sorted(samples, key=lambda sample: (sample.entry.target_tokens, sample.record.name)), count)


def evenly(ordered: Sequence[T], count: int) -> list[T]:
    """At most `count` (2 or more) of them, first and last among them, at equal distances."""
    if len(ordered) <= count:
        return list(ordered)
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


# Disk and memory


def make_folder(root: Path) -> None:
    """Make the folder of the cache.

    Raises:
        UserError: it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache.cache_dir: {root} cannot be made ({error.strerror}): name another folder") from error


def check_space(root: Path, sizes: Collection[int]) -> None:
    """Compare the bytes that entries will take with the free space on the disk of `root`.

    Raises:
        UserError: they do not fit.
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


def save_index(cache: Cache) -> None:
    """Save the index of lengths; where it cannot be written, only the next start takes longer."""
    try:
        cache.save_index()
    except OSError as error:  # every entry is found without it
        log(f"cache     the index could not be written ({error.strerror}): the next start takes longer")


def release(device: torch.device) -> None:
    """Free the memory of what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
