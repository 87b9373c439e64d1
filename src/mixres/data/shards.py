"""Cache entries in shards: tar archives of about a gigabyte each, found by an index at their end.

Promise: a shard is whole or absent, and an entry in it has the bytes of its file: `tar -xf` makes the files of it. No
lock: a process writes shards of its own, whose names carry host and process. Cost: two fsyncs a shard. A process that
is killed loses its open shard: at most `size` bytes and an entry, encoded in `CLOSE_AFTER_S` seconds and an entry. A
read is one `pread` of one entry; at most `MAX_OPEN` shards are open at once.

File: members `ab/<key>.safetensors`, then `index.json`, the end of the archive, and 32 bytes: offset and length of the
index's text, its xxh3_64, `MAGIC`. The index holds by key the entry's offset in the shard and its row of the cache's
index. An empty file `<shard>.<key>.damaged` removes one entry.
"""

import contextlib
import errno
import json
import os
import re
import socket
import struct
import tarfile
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash

from mixres import atomic

FOLDER = "shards"
CLOSE_AFTER_S = 300.0  # an open shard is closed then, full or not: it bounds what a kill costs on a slow device
MAX_OPEN = 64
MAGIC = b"mixres-1"
_BLOCK = tarfile.BLOCKSIZE
_TRAILER = struct.Struct("<QQQ8s")
_SETTLED_S = 2.0  # a folder that changed less than this ago may change again under the same time
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFIT = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


class Place(NamedTuple):
    """Where an entry lies, and its row of the cache's index, which begins with its bytes."""

    shard: str
    offset: int
    row: list[Any]

    @property
    def size(self) -> int:
        return int(self.row[0])


def member_name(key: str) -> str:
    """The path of an entry in a shard, and of its file in the cache."""
    return f"{key[:2]}/{key}.safetensors"


class Shards:
    """The shards in `folder`; `size` closes one that this process writes, in bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.places: dict[str, Place] = {}
        self.counts: dict[str, int] = {}  # entries by shard, those that another shard holds too among them
        self.unreadable: set[str] = set()
        self._damaged: set[str] = set()
        self._listed: tuple[int, bool] | None = None  # the folder's time of change, and whether it was settled
        self._files: dict[str, BinaryIO] = {}  # the one used last is last
        self._open: _OpenShard | None = None
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        assert self._open is None, "its writer closes it first"
        return self.__dict__ | {"_files": {}}

    def find(self, key: str) -> Place | None:
        """Where the entry lies; one that is not known is looked for among shards that have come since."""
        if key not in self.places:
            self.refresh()
        return self.places.get(key)

    def refresh(self) -> None:
        """See what other processes added and removed since the last time. Cost: one `stat` where there is nothing."""
        try:
            changed = self.folder.stat().st_mtime_ns
            if self._listed == (changed, True):
                return
            names = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            changed, names = 0, []
        self._listed = changed, time.time() - changed / 1e9 > _SETTLED_S
        shards = {name for name in names if name.endswith(".tar")}
        damaged = {name for name in names if name.endswith(".damaged")}
        if damaged != self._damaged or not shards >= self.counts.keys() | self.unreadable:
            self.places, self.counts, self._damaged = {}, {}, damaged
            self.unreadable.clear()
            self.places |= self._open.places if self._open else {}
        shapes: dict[str, Any] = {}
        for name in sorted(shards - self.counts.keys() - self.unreadable):
            self._load(name, shapes)

    def read(self, key: str) -> bytes:
        """The entry's bytes, unchecked; fewer where the shard was cut short.

        Raises:
            FileNotFoundError: the shard has been removed since it was found.
        """
        place = self.places[key]
        if self._open and place.shard == self._open.path.name:
            return os.pread(self._open.file.fileno(), place.size, place.offset)
        file = self._files.pop(place.shard, None) or (self.folder / place.shard).open("rb", buffering=0)
        self._files[place.shard] = file
        if len(self._files) > MAX_OPEN:
            self._files.pop(next(iter(self._files))).close()
        return os.pread(file.fileno(), place.size, place.offset)

    def append(self, key: str, data: bytes, row: list[Any]) -> None:
        """Put an entry into the open shard, from which this process alone reads until it is closed.

        Raises:
            OSError: the disk is full or cannot be written; the shard was closed with what it held before.
        """
        if self._open is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.sync_directory(self.folder.parent)
            self._open = _OpenShard(self.folder)
        shard = self._open
        try:
            self.places[key] = shard.append(key, data, row)
        except OSError:
            with contextlib.suppress(OSError):  # the first refusal is the one to report
                self.close()
            raise
        if shard.end >= self.size or time.monotonic() - shard.begun > CLOSE_AFTER_S:
            self.close()

    def close(self) -> None:
        """Make the open shard one that every process sees. Where its index finds no room, its last entries give way.

        Raises:
            OSError: the disk is full or cannot be written; what was closed stays.
        """
        shard, self._open = self._open, None
        refused: OSError | None = None
        while shard and shard.places and (refused is None or refused.errno in _NO_ROOM):
            try:
                name = shard.close()
            except OSError as error:
                refused = error
                key, _ = shard.places.popitem()
                self.places.pop(key, None)
                continue
            self.counts[name] = len(shard.places)
            self.places |= {key: place._replace(shard=name) for key, place in shard.places.items()}
            shard = None
        if shard:
            self.places = {key: place for key, place in self.places.items() if place.shard != shard.path.name}
            shard.remove()
        if refused:
            raise refused

    @property
    def closed(self) -> bool:
        """Whether all that was appended is in shards that every process sees."""
        return self._open is None

    def drop(self, key: str) -> None:
        """Remove a damaged entry, for all processes.

        Raises:
            OSError: the folder cannot be written.
        """
        place = self.places.pop(key)
        if self._open and place.shard == self._open.path.name:
            del self._open.places[key]
        else:
            # The next look at the folder sees it, and where another shard holds the entry too.
            (self.folder / f"{place.shard.removesuffix('.tar')}.{key}.damaged").touch()

    def remove(self, name: str) -> None:
        """Delete a shard and what was noted of its entries; those of them that lie elsewhere too are found there.

        Raises:
            OSError: the folder cannot be written.
        """
        (self.folder / name).unlink(missing_ok=True)
        for marker in self.folder.glob(f"{name.removesuffix('.tar')}.*.damaged"):
            marker.unlink(missing_ok=True)
            self._damaged.discard(marker.name)
        self.counts.pop(name, None)
        self.unreadable.discard(name)

    def _load(self, name: str, shapes: dict[str, Any]) -> None:
        try:
            with (self.folder / name).open("rb") as file:
                rows = _read_index(file)
            removed = {marker.split(".")[-2] for marker in self._damaged if marker.startswith(name[:-3])}
            for key, (offset, row) in rows.items():
                if key not in removed:
                    row[3] = shapes.setdefault(str(row[3]), row[3])  # many entries have the same
                    self.places[key] = Place(name, offset, row)
            self.counts[name] = len(rows)
        except _UNFIT:
            self.unreadable.add(name)


class _OpenShard:
    """A shard under a temporary name, until it is closed."""

    def __init__(self, folder: Path) -> None:
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
        self.name = f"{host}-{os.getpid()}-{os.urandom(4).hex()}.tar"
        self.path = folder / f"{atomic.TMP_PREFIX}{self.name}"
        self.file = self.path.open("xb+", buffering=0)
        self.places: dict[str, Place] = {}
        self.end, self.begun = 0, time.monotonic()

    def append(self, key: str, data: bytes, row: list[Any]) -> Place:
        assert row[0] == len(data), row
        place = Place(self.path.name, self.end + _BLOCK, row)
        self._write(self.end, _member(member_name(key), data))
        self.places[key], self.end = place, place.offset + -(-len(data) // _BLOCK) * _BLOCK
        return place

    def close(self) -> str:
        """Write the index and give the shard its name, which is returned."""
        *_, last = self.places.values()
        self.end = last.offset + -(-last.size // _BLOCK) * _BLOCK
        rows = {key: place[1:] for key, place in self.places.items()}
        index = json.dumps({"format": 1, "entries": rows}, separators=(",", ":")).encode()
        trailer = _TRAILER.pack(self.end + _BLOCK, len(index), xxhash.xxh3_64_intdigest(index), MAGIC)
        self.file.truncate(self.end)  # what was begun behind the last entry makes room
        self._write(self.end, _member("index.json", index) + bytes(2 * _BLOCK) + trailer)
        os.fsync(self.file.fileno())
        self.path.replace(self.path.with_name(self.name))
        self.file.close()
        atomic.sync_directory(self.path.parent)
        return self.name

    def remove(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self.file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            error.filename = str(self.path.with_name(self.name))
            raise


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return b"".join((info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)))


def _read_index(file: BinaryIO) -> dict[str, Any]:
    """What the end of a shard states.

    Raises:
        OSError, ValueError, LookupError, TypeError: it is not one that was written.
    """
    file.seek(-_TRAILER.size, os.SEEK_END)
    offset, length, digest, magic = _TRAILER.unpack(file.read())
    if magic != MAGIC or offset + length > file.tell():
        raise ValueError("it has no index")
    file.seek(offset)
    text = file.read(length)
    if xxhash.xxh3_64_intdigest(text) != digest:
        raise ValueError("the checksum of its index is wrong")
    rows: dict[str, Any] = json.loads(text)["entries"]
    return rows
