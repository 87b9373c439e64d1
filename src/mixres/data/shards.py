"""Cache entries in shards: tar archives of about a gigabyte each, found by an index at their end.

Promise: a shard is whole or absent, and an entry in it has the bytes of its file: `tar -xf` makes the files of it. No
lock: a process writes shards of its own, whose names carry host and process. Cost: two fsyncs a shard. A process that
is killed loses its open shard: at most `size` bytes and an entry, encoded in `CLOSE_AFTER_S` seconds and an entry. A
read is one call for one entry, as `shard_store` has it, which knows where shards lie.

File: members `ab/<key>.safetensors`, then `index.json`, the end of the archive, and 32 bytes: offset and length of the
index's text, its xxh3_64, `MAGIC`. The index holds by key one string: the entry's offset in the shard, its bytes, and
what the cache notes of it. An empty file `<shard>.<key>.damaged` removes one entry.

An entry is one string here, which is read when it is asked for. `scripts/million_entries.py` measures what they take.
"""

import contextlib
import errno
import json
import os
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import xxhash

from mixres import atomic
from mixres.data.shard_store import ShardStore, read_at
from mixres.errors import WorkError

FOLDER = "shards"
CLOSE_AFTER_S = 300.0  # an open shard is closed then, full or not: it bounds what a kill costs on a slow device
MAGIC = b"mixres-1"
_BLOCK = tarfile.BLOCKSIZE
_TRAILER = struct.Struct("<QQQ8s")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFIT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


def member_name(key: str) -> str:
    """The path of an entry in a shard, and of its file in the cache."""
    return f"{key[:2]}/{key}.safetensors"


class Shards:
    """The shards in `store`; `size` closes one that this process writes, in bytes."""

    def __init__(self, store: ShardStore, size: int) -> None:
        self.store, self.size = store, size
        self.shard_of: dict[str, str] = {}  # by key
        self._rows: dict[str, dict[str, str]] = {}  # by shard and key
        self._digests: dict[str, int] = {}  # of the index by shard
        self.counts: dict[str, int] = {}  # entries by shard, those that another shard holds too among them
        self.unreadable: set[str] = set()
        self._damaged: set[str] = set()
        self._open: _OpenShard | None = None
        self.refresh()

    def __del__(self) -> None:
        if self._open:
            self._open.file.close()

    def __getstate__(self) -> dict[str, Any]:
        assert self._open is None, "its writer closes it first"
        return self.__dict__

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

    def state(self) -> list[Any]:
        """Shards, digests of their indexes and noted damage, as they were last seen: what every lookup depends on."""
        return [[name, self._digests[name]] for name in sorted(self.counts)] + sorted(self._damaged | self.unreadable)

    def refresh(self, *, again: bool = False) -> None:
        """See what other processes added and removed since the last time. Cost: a `stat`, where there is nothing.

        `again`: also where the store has no reason to look.

        Raises:
            WorkError: a shard cannot be read, whatever is in it; or the store cannot be listed.
            UserError: the store may not be listed.
        """
        names = self.store.names(again=again)
        if names is None:
            return
        shards = {name for name in names if name.endswith(".tar")}
        damaged = {name for name in names if name.endswith(".damaged")}
        if damaged != self._damaged or not shards >= self.counts.keys() | self.unreadable:
            self.shard_of, self._rows, self.counts, self._damaged = {}, {}, {}, damaged
            self.unreadable.clear()
            if self._open:
                self._take(self._open.path.name, self._open.rows)
        new = sorted(shards - self.counts.keys() - self.unreadable)
        for name, rows in zip(new, self.store.each(self._index_of, new), strict=True):
            if not rows:
                self.unreadable |= {name} if rows is None else set()
                continue
            self.counts[name] = len(rows)
            for marker in self._damaged:
                if marker.startswith(name[: -len("tar")]):
                    rows.pop(marker.split(".")[-2], None)
            self._take(name, rows)

    def read(self, key: str, *, fresh: bool = False) -> bytes:
        """The entry's bytes, unchecked; fewer where the shard was cut short. `fresh`: not from a copy of it.

        Raises:
            FileNotFoundError: the shard has been removed since it was found.
        """
        shard = self.shard_of[key]
        offset, size = _place(self._rows[shard][key])
        if self._open and shard == self._open.path.name:
            return read_at(self._open.file, size, offset)
        return self.store.read(shard, offset, size, fresh=fresh)

    def where(self, key: str) -> str:
        """The entry's place, for a message."""
        return self.store.where(f"{self.shard_of[key]}/{key}.safetensors")

    def append(self, key: str, data: bytes, note: str) -> None:
        """Put an entry into the open shard, from which this process alone reads until it is closed.

        Raises:
            OSError: the disk is full or cannot be written; the shard was closed with what it held before.
        """
        if self._open is None:
            folder = self.store.scratch
            folder.mkdir(parents=True, exist_ok=True)
            atomic.sync_directory(folder.parent)
            self._open = _OpenShard(folder)
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
            UserError, WorkError: the store cannot be written; it has what to do in the message.
        """
        shard, self._open = self._open, None
        refused: OSError | None = None
        if shard:
            del self._rows[shard.path.name]
        try:
            while shard and shard.rows and (refused is None or refused.errno in NO_ROOM):
                try:
                    shard.finish()
                    if os.name == "nt":  # which renames no open file
                        shard.file.close()
                    self.store.publish(shard.path, shard.name)
                except OSError as error:
                    refused = error
                    key, _ = shard.rows.popitem()
                    self.shard_of.pop(key, None)
                    continue
                self.counts[shard.name], self._digests[shard.name] = len(shard.rows), shard.digest
                self._take(shard.name, shard.rows)
                shard.file.close()
                shard = None
        finally:
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
            self.store.mark(f"{shard.removesuffix('.tar')}.{key}.damaged")
        del self.shard_of[key], self._rows[shard][key]

    def remove(self, name: str) -> None:
        """Delete a shard and what was noted of its entries; those of them that lie elsewhere too are found there.

        Raises:
            OSError: the folder cannot be written.
        """
        self.refresh(again=True)  # its damage may have been noted since
        self.store.remove(name)
        for marker in [marker for marker in self._damaged if marker.startswith(name.removesuffix("tar"))]:
            self.store.remove(marker)
            self._damaged.discard(marker)
        self.counts.pop(name, None)
        self.unreadable.discard(name)

    def held_by(self, name: str) -> list[str]:
        """Keys of the entries of a shard, those that another shard holds too among them."""
        return list(self._rows.get(name, ()))

    def _take(self, name: str, rows: dict[str, str]) -> None:
        self._rows[name] = rows
        self.shard_of |= dict.fromkeys(rows, name)

    def _index_of(self, name: str) -> dict[str, str] | None:
        """By key the rows of a shard; none where another process has removed it, None where they cannot be read."""
        for fresh in self.store.attempts:
            try:
                rows, self._digests[name] = _read_index(self.store, name, fresh)
                return rows
            except FileNotFoundError:
                return {}
            except OSError as error:  # which says nothing of what is in it
                fix = "make it readable, and run the same command again"
                raise WorkError(
                    f"{self.store.where(name)}: cannot be read ({error.strerror or error}): {fix}"
                ) from error
            except _UNFIT:
                continue
        return None


class _OpenShard:
    """A shard under a temporary name, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.name = atomic.own_name(".tar")
        self.path = folder / f"{atomic.TMP_PREFIX}{self.name.removesuffix('.tar')}"
        self.file = self.path.open("xb+", buffering=0)
        self.rows: dict[str, str] = {}
        self.end, self.begun, self.digest = 0, time.monotonic(), 0

    def append(self, key: str, data: bytes, note: str) -> None:
        member = _member(member_name(key), data)
        self._write(self.end, member)
        self.rows.pop(key, None)  # the last row is that of the last member
        self.rows[key] = f"{self.end + _BLOCK} {len(data)} {note}"
        self.end += len(member)

    def finish(self) -> None:
        """Write the index, and put it all on the disk."""
        offset, size = _place(self.rows[next(reversed(self.rows))])
        self.end = offset + -(-size // _BLOCK) * _BLOCK
        index = json.dumps({"format": 1, "entries": self.rows}, separators=(",", ":")).encode()
        self.digest = xxhash.xxh3_64_intdigest(index)
        trailer = _TRAILER.pack(self.end + _BLOCK, len(index), self.digest, MAGIC)
        self.file.truncate(self.end)  # what was begun behind the last entry makes room
        self._write(self.end, _member("index.json", index) + bytes(2 * _BLOCK) + trailer)
        os.fsync(self.file.fileno())

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


def _place(row: str) -> tuple[int, int]:
    offset, size, _ = row.split(" ", 2)
    return int(offset), int(size)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return b"".join((info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)))


def _read_index(store: ShardStore, name: str, fresh: bool) -> tuple[dict[str, str], int]:
    """What the end of a shard states, and its digest.

    Raises:
        OSError, WorkError: it cannot be read.
        ValueError, LookupError, TypeError: it is not one that was written.
    """
    size = store.size(name)
    if size < _TRAILER.size:
        raise ValueError("it has no index")
    offset, length, digest, magic = _TRAILER.unpack(store.read(name, size - _TRAILER.size, _TRAILER.size, fresh=fresh))
    if magic != MAGIC or offset + length > size:
        raise ValueError("it has no index")
    text = store.read(name, offset, length, fresh=fresh)
    if xxhash.xxh3_64_intdigest(text) != digest:
        raise ValueError("the checksum of its index is wrong")
    return dict(json.loads(text)["entries"]), digest
