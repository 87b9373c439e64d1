"""Cache entries in shards: tar archives of about a gigabyte each, found by an index at their end.

Promise: a shard is whole or absent, and an entry in it has the bytes of its file: `tar -xf` makes the files of it. No
lock: a process writes shards of its own, whose names carry host and process. Cost: two fsyncs a shard. A process that
is killed loses its open shard: at most `size` bytes and an entry, encoded in `CLOSE_AFTER_S` seconds and an entry. A
read is one `pread` of one entry; at most `MAX_OPEN` shards are open at once.

File: members `ab/<key>.safetensors`, then `index.json`, the end of the archive, and 32 bytes: offset and length of the
index's text, its xxh3_64, `MAGIC`. The index holds by key one string: the entry's offset in the shard, its bytes, and
what the cache notes of it. An empty file `<shard>.<key>.damaged` removes one entry.

A million entries are a million strings here, read when they are asked for: 0.4 GB.
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
from typing import Any, BinaryIO

import xxhash

from mixres import atomic
from mixres.errors import WorkError

FOLDER = "shards"
CLOSE_AFTER_S = 300.0  # an open shard is closed then, full or not: it bounds what a kill costs on a slow device
MAX_OPEN = 64
MAGIC = b"mixres-1"
_BLOCK = tarfile.BLOCKSIZE
_TRAILER = struct.Struct("<QQQ8s")
_SETTLED_S = 0.1  # a folder that changed less than this ago may change again under the same time: clocks have ticks
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFIT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


def member_name(key: str) -> str:
    """The path of an entry in a shard, and of its file in the cache."""
    return f"{key[:2]}/{key}.safetensors"


class Shards:
    """The shards in `folder`; `size` closes one that this process writes, in bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.shard_of: dict[str, str] = {}  # by key
        self._rows: dict[str, dict[str, str]] = {}  # by shard and key
        self.counts: dict[str, int] = {}  # entries by shard, those that another shard holds too among them
        self.unreadable: set[str] = set()
        self._damaged: set[str] = set()
        self._listed: tuple[int, bool] | None = None  # the folder's time of change, and whether it was settled
        self._files: dict[str, BinaryIO] = {}  # the one used last is last
        self._open: _OpenShard | None = None
        self.refresh()

    def __del__(self) -> None:
        for file in [*self._files.values(), *([self._open.file] if self._open else [])]:
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        assert self._open is None, "its writer closes it first"
        return self.__dict__ | {"_files": {}}

    def find(self, key: str) -> str | None:
        """The entry's row in the index; one that is not known is looked for among shards that have come since."""
        if key not in self.shard_of:
            self.refresh()
        return self.known(key)

    def known(self, key: str) -> str | None:
        """As `find`, without a look at the folder."""
        shard = self.shard_of.get(key)
        return self._rows[shard][key] if shard else None

    def sizes(self) -> dict[str, int]:
        """The bytes of all entries, by key."""
        return {key: _place(self._rows[shard][key])[1] for key, shard in self.shard_of.items()}

    def refresh(self, *, again: bool = False) -> None:
        """See what other processes added and removed since the last time. Cost: one `stat` where there is nothing.

        `again`: also where the folder's time is the same, which network file systems keep for a while.

        Raises:
            WorkError: a shard cannot be read, whatever is in it.
        """
        try:
            changed = self.folder.stat().st_mtime_ns
            if self._listed == (changed, True) and not again:
                return
            with os.scandir(self.folder) as found:
                names = [entry.name for entry in found]
        except FileNotFoundError:
            changed, names = 0, []
        self._listed = changed, time.time() - changed / 1e9 > _SETTLED_S
        shards = {name for name in names if name.endswith(".tar")}
        damaged = {name for name in names if name.endswith(".damaged")}
        if damaged != self._damaged or not shards >= self.counts.keys() | self.unreadable:
            self.shard_of, self._rows, self.counts, self._damaged = {}, {}, {}, damaged
            self.unreadable.clear()
            for name in self._files.keys() - shards:
                self._files.pop(name).close()  # an open file keeps its space on the disk
            if self._open:
                self._take(self._open.path.name, self._open.rows)
        for name in sorted(shards - self.counts.keys() - self.unreadable):
            self._load(name)

    def read(self, key: str) -> bytes:
        """The entry's bytes, unchecked; fewer where the shard was cut short.

        Raises:
            FileNotFoundError: the shard has been removed since it was found.
        """
        shard = self.shard_of[key]
        offset, size = _place(self._rows[shard][key])
        if self._open and shard == self._open.path.name:
            return _read_at(self._open.file, size, offset)
        file = self._files.pop(shard, None) or (self.folder / shard).open("rb", buffering=0)
        self._files[shard] = file
        if len(self._files) > MAX_OPEN:
            self._files.pop(next(iter(self._files))).close()
        try:
            return _read_at(file, size, offset)
        except OSError as error:
            self._files.pop(shard).close()
            if error.errno == errno.ESTALE:  # how a network file system says that another machine has removed it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder / shard)) from error
            raise

    def append(self, key: str, data: bytes, note: str) -> None:
        """Put an entry into the open shard, from which this process alone reads until it is closed.

        Raises:
            OSError: the disk is full or cannot be written; the shard was closed with what it held before.
        """
        if self._open is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.sync_directory(self.folder.parent)
            self._open = _OpenShard(self.folder)
            self._rows[self._open.path.name] = self._open.rows
        shard = self._open
        try:
            shard.append(key, data, note)
            self.shard_of[key] = shard.path.name
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
        if shard:
            del self._rows[shard.path.name]
        while shard and shard.rows and (refused is None or refused.errno in _NO_ROOM):
            try:
                name = shard.close()
            except OSError as error:
                refused = error
                key, _ = shard.rows.popitem()
                self.shard_of.pop(key, None)
                continue
            self.counts[name] = len(shard.rows)
            self._take(name, shard.rows)
            shard = None
        if shard:
            for key in shard.rows:
                self.shard_of.pop(key, None)
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
        shard = self.shard_of[key]
        if not (self._open and shard == self._open.path.name):
            # The next look at the folder sees it, and where another shard holds the entry too.
            (self.folder / f"{shard.removesuffix('.tar')}.{key}.damaged").touch()
        del self.shard_of[key], self._rows[shard][key]

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

    def held_by(self, name: str) -> list[str]:
        """Keys of the entries of a shard, those that another shard holds too among them."""
        return list(self._rows.get(name, ()))

    def _take(self, name: str, rows: dict[str, str]) -> None:
        self._rows[name] = rows
        self.shard_of |= dict.fromkeys(rows, name)

    def _load(self, name: str) -> None:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                rows = _read_index(file)
        except FileNotFoundError:  # another process has removed it since
            return
        except OSError as error:  # which says nothing of what is in it
            fix = "make it readable, and run the same command again"
            raise WorkError(f"{path}: cannot be read ({error.strerror or error}): {fix}") from error
        except _UNFIT:
            self.unreadable.add(name)
            return
        self.counts[name] = len(rows)
        for marker in self._damaged:
            if marker.startswith(name[: -len("tar")]):
                rows.pop(marker.split(".")[-2], None)
        self._take(name, rows)


class _OpenShard:
    """A shard under a temporary name, until it is closed."""

    def __init__(self, folder: Path) -> None:
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
        self.name = f"{host}-{os.getpid()}-{os.urandom(4).hex()}.tar"
        self.path = folder / f"{atomic.TMP_PREFIX}{self.name.removesuffix('.tar')}"
        self.file = self.path.open("xb+", buffering=0)
        self.rows: dict[str, str] = {}
        self.end, self.begun = 0, time.monotonic()

    def append(self, key: str, data: bytes, note: str) -> None:
        member = _member(member_name(key), data)
        self._write(self.end, member)
        self.rows.pop(key, None)  # the last row is that of the last member
        self.rows[key] = f"{self.end + _BLOCK} {len(data)} {note}"
        self.end += len(member)

    def close(self) -> str:
        """Write the index and give the shard its name, which is returned."""
        offset, size = _place(self.rows[next(reversed(self.rows))])
        self.end = offset + -(-size // _BLOCK) * _BLOCK
        index = json.dumps({"format": 1, "entries": self.rows}, separators=(",", ":")).encode()
        trailer = _TRAILER.pack(self.end + _BLOCK, len(index), xxhash.xxh3_64_intdigest(index), MAGIC)
        self.file.truncate(self.end)  # what was begun behind the last entry makes room
        self._write(self.end, _member("index.json", index) + bytes(2 * _BLOCK) + trailer)
        os.fsync(self.file.fileno())
        if os.name == "nt":  # which renames no open file
            self.file.close()
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
            self.file.seek(offset)
            while view:
                view = view[self.file.write(view) :]
        except OSError as error:
            error.filename = str(self.path.with_name(self.name))
            raise


def _read_at(file: BinaryIO, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):  # one call, and threads may share the file
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


def _place(row: str) -> tuple[int, int]:
    offset, size, _ = row.split(" ", 2)
    return int(offset), int(size)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return b"".join((info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)))


def _read_index(file: BinaryIO) -> dict[str, str]:
    """What the end of a shard states.

    Raises:
        OSError: it cannot be read.
        ValueError, LookupError, TypeError: it is not one that was written.
    """
    if file.seek(0, os.SEEK_END) < _TRAILER.size:
        raise ValueError("it has no index")
    file.seek(-_TRAILER.size, os.SEEK_END)
    offset, length, digest, magic = _TRAILER.unpack(file.read())
    if magic != MAGIC or offset + length > file.tell():
        raise ValueError("it has no index")
    file.seek(offset)
    text = file.read(length)
    if xxhash.xxh3_64_intdigest(text) != digest:
        raise ValueError("the checksum of its index is wrong")
    rows: dict[str, str] = json.loads(text)["entries"]
    return rows
