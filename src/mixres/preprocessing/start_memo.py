"""What a start found, kept for the next one: usable records, keys of their entries, and what a plan needs of these.

Promise: it is used only where all that it was made of is as it was: the tar and parquet files by size, times and inode
(objects by size and ETag), the sections data, cache and model of the configuration, the seed, the bytes of the base's
encoders, and the shards of the cache by name, index and noted damage. A start with it finds what one without it finds,
record by record. A memo that is damaged counts as none. Cost: about 370 bytes a record, on disk and in memory.

There is none where a source is a folder, a manifest or a data set, whose files have a state each, where an entry has a
file of its own, where an object has no usable record, or where an image was left out for want of memory. Then, and
after any change, a start looks at everything and keeps what it found.

File: a line with `_VERSION`, the xxh3_128 of what follows, sections: records as JSON, where each ends, keys, keys of
the noise, rows of `samples.ROW`; a JSON object with the bytes of each section, and its own length as 8 bytes.
"""

import contextlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mixres import __version__, atomic
from mixres.config.schema import Config
from mixres.data.cache import Cache
from mixres.data.objects import StoredObject, find_objects
from mixres.data.parquet import image_of
from mixres.data.records import Problem, is_settled
from mixres.data.scan import SHARDS, ScannedRecord
from mixres.data.scan_cache import VERSION as SCAN
from mixres.data.shard_index import record_of, row_of
from mixres.data.tar_shards import TarImage
from mixres.errors import UserError, WorkError
from mixres.geometry import Size
from mixres.models import hub
from mixres.models.family import Family
from mixres.preprocessing.cache_folder import cache_folder
from mixres.preprocessing.encode import ENCODING, FINGERPRINTS
from mixres.preprocessing.samples import ROW, CachedSample, Lazy, table_of
from mixres.preprocessing.training_data import SOURCES, Summary

FOLDER = "starts"  # beside the entries
MOST = 4  # configurations that are kept
# Raise it when the same data and configuration would give other records, problems, keys or lengths.
_VERSION = b"mixres start 1\n"
_BASE = ("model_index.json", "transformer/config.json")  # beside the encoders
_AT_ONCE = 2**14  # records that are written
_HASH = 16  # bytes of a key, and of a digest
_BEGIN = len(_VERSION) + _HASH


class Kept(NamedTuple):
    """What the start before has found."""

    summary: Summary
    train: Sequence[ScannedRecord]
    held_out: list[ScannedRecord]
    keys: list[str]  # of both
    noise_keys: list[str]  # of the held-out ones
    table: np.ndarray  # `table_of` the training samples
    entries: str  # of the cache, as they are logged


class StartMemo:
    """The memo of a configuration beside the entries of its cache.

    Raises:
        WorkError: a store cannot be reached.
    """

    def __init__(self, config: Config, family: Family, cache: Cache) -> None:
        self._config, self._family, self._cache, self._folder = config, family, cache, cache_folder(config) / FOLDER
        self._seen: tuple[int, int] | None = None  # the file that `load` found unfit
        try:
            named = (getattr(config.data, key) for key in SOURCES)
            sources = [source for own in named if isinstance(own, tuple) for source in own]
            self._objects = [*_objects(sources)] if all(map(_is_object, sources)) else []
            self._path = self._folder / f"{self._digest}.start" if self._objects else None
        except UserError:  # for the scan to report, beside everything else
            self._path = None
        self._fit = self._path is not None and all(is_settled(stored.status) for stored in self._objects)

    def load(self) -> Kept | None:
        """What is kept, where it is of the present state of everything."""
        if self._path is None:
            return None
        self._seen = self._written()
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            data = self._path.read_bytes()
            if data[:_BEGIN] != _VERSION + xxhash.xxh3_128_digest(memoryview(data)[_BEGIN:]):
                return None
            head = json.loads(data[-8 - int.from_bytes(data[-8:], "little") : -8])
            if head["state"] == self._state():
                with contextlib.suppress(OSError):  # it was used now
                    os.utime(self._path)
                return self._kept(data, head)
        return None

    def save(
        self,
        summary: Summary,
        records: Sequence[ScannedRecord],
        samples: Sequence[CachedSample],
        noise_keys: Sequence[str],
        entries: str,
    ) -> None:
        """Keep what this start found, training before held-out, unless another process has done so meanwhile.

        A full or read-only disk keeps nothing, nor does a start that left out an image which the next one may read.
        """
        if not self._fit or self._written() != self._seen or any(problem.passing for problem in summary.problems):
            return
        shards = self._cache.shards
        try:
            shards.refresh()
        except (UserError, WorkError):  # what this start needs is there
            return
        numbers = {stored: number for number, stored in enumerate(self._objects)}
        in_shards = all(key in shards.shard_of for sample in samples for key in (sample.key, *sample.entry.parts))
        # An object that the scan has not found may come back as it was.
        if not in_shards or {_object_of(scanned) for scanned in records} != numbers.keys():
            return
        rows = (_row(numbers[_object_of(scanned)], scanned) for scanned in records)
        known = summary._replace(decoded=0, unchanged=summary.decoded + summary.unchanged)
        head = {"state": self._state(), "summary": known, "entries": entries}
        keys = (bytes.fromhex("".join(keys)) for keys in ([sample.key for sample in samples], noise_keys))
        with contextlib.suppress(OSError):
            self._write(head, rows, *keys, table_of(samples).tobytes())

    def _written(self) -> tuple[int, int] | None:
        """What differs whenever the file is written anew."""
        assert self._path
        try:
            there = self._path.stat()
        except OSError:
            return None
        return there.st_ino, there.st_mtime_ns

    def _write(self, head: dict[str, Any], rows: Iterator[bytes], *parts: bytes) -> None:
        assert self._path
        self._folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep((self._folder,), 3600.0)
        digest, ends, end = xxhash.xxh3_128(), array("Q"), 0
        with atomic.replace(self._path) as tmp, tmp.open("wb") as file:

            def write(data: bytes) -> None:
                digest.update(data)
                file.write(data)

            file.write(bytes(_BEGIN))
            while some := list(islice(rows, _AT_ONCE)):
                for row in some:
                    end += len(row)
                    ends.append(end)
                write(b"".join(some))
            parts = np.asarray(ends, "<u8").tobytes(), *parts
            for part in parts:
                write(part)
            head["sections"] = [end, *map(len, parts)]
            stated = json.dumps(head).encode()
            write(stated + len(stated).to_bytes(8, "little"))
            file.seek(0)
            file.write(_VERSION + digest.digest())
        for old in sorted(self._folder.glob("*.start"), key=lambda path: path.stat().st_mtime_ns)[:-MOST]:
            old.unlink(missing_ok=True)

    def _state(self) -> list[Any]:
        return [[[stored.url, *stored.status] for stored in self._objects], self._cache.shards.state()]

    @cached_property
    def _digest(self) -> str:
        """Over all else that a start depends on.

        Raises:
            UserError: the base's files cannot be had.
        """
        model = self._config.model
        name, revision = model.pretrained_model_name_or_path, model.revision
        base = [hub.pipeline_json(name, file, revision=revision) for file in _BASE]
        encoders = self._family.encoder_fingerprint(cache_folder(self._config) / FINGERPRINTS)
        sections = self._config.model_dump(mode="json", include={"data", "cache", "model"})
        code = __version__, SCAN.decode(), ENCODING, self._family.name
        stated = [
            code,
            str(Path.cwd()),
            hub.commit(name, revision=revision),
            base,
            encoders,
            sections,
            self._config.train.seed,
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(stated, sort_keys=True).encode())

    def _kept(self, data: bytes, head: dict[str, Any]) -> Kept:
        *values, problems = head["summary"]
        summary = Summary._make([*values, [Problem(*problem) for problem in problems]])
        ends = [*accumulate(head["sections"], initial=_BEGIN)]
        _, last, keys, noise, table = (memoryview(data)[begin:end] for begin, end in pairwise(ends))
        samples = np.frombuffer(table, ROW)
        record = _Records(data, np.frombuffer(last, "<u8"), samples["regularization"], tuple(self._objects))
        held_out = [record(i) for i in range(summary.train, len(samples))]
        return Kept(
            summary,
            Lazy(summary.train, record),
            held_out,
            _hex(keys),
            _hex(noise),
            samples[: summary.train],
            head["entries"],
        )


@dataclass(frozen=True, eq=False)
class _Records:
    """Makes a record of its row."""

    data: bytes  # which can be handed to another process, other than a view of it
    ends: np.ndarray  # of each row
    regularization: np.ndarray
    objects: tuple[StoredObject, ...]

    def __call__(self, i: int) -> ScannedRecord:
        first, last = (int(self.ends[i - 1]) if i else 0), int(self.ends[i])
        row = self.data[_BEGIN + first : _BEGIN + last]
        number, record, target, controls, digests, flattened, several = json.loads(row)
        return ScannedRecord(
            record_of(_images_in(self.objects[number]), *record),
            Size(*target),
            tuple(Size(*size) for size in controls),
            tuple(digests),
            flattened,
            several,
            bool(self.regularization[i]),
        )


def _object_of(scanned: ScannedRecord) -> Any:
    """The file that all its images lie in."""
    picture: Any = scanned.record.target
    return picture[0]


def _row(number: int, scanned: ScannedRecord) -> bytes:
    record, *rest, _ = scanned
    return json.dumps([number, row_of(record), *rest]).encode()


def _images_in(stored: StoredObject) -> Callable[..., Any]:
    return partial(image_of if stored.url.lower().endswith(".parquet") else TarImage, stored)


def _is_object(source: str) -> bool:
    return source.lower().endswith(SHARDS) and not Path(source).is_dir()


def _objects(sources: Sequence[str]) -> Iterator[StoredObject]:
    for source in sources:
        yield from find_objects(source)


def _hex(data: memoryview) -> list[str]:
    text = data.hex()
    return [text[begin : begin + 2 * _HASH] for begin in range(0, len(text), 2 * _HASH)]
