"""Where shards lie: in a folder, or as objects behind a URL with copies of what was read on the local disk.

Promise: `publish` makes a shard visible whole or not at all; what is read behind a URL are the bytes of the object that
was listed, or of a copy of them. Cost: in a folder one `pread` a read; behind a URL one request, or none where a copy
is there. A listing behind a URL is made at most so often that it takes `_LOOKS` of the time.

A shard is never changed and its name is never used again, so a copy of a range of it needs no version.
"""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from filelock import FileLock

from mixres import atomic
from mixres.data.objects import ASKED_AT_ONCE, asked, sizes_under
from mixres.errors import UserError, WorkError

T = TypeVar("T")
MAX_OPEN = 64
_SETTLED_S = 0.1  # a folder that changed less than this ago may change again under the same time: clocks have ticks
_LOOKS = 0.05  # of the time
_LEFT_FREE = 0.05  # of the disk: copies make room for checkpoints
_SCANS = 0.01  # of the bound of the copies: they are counted again after so many new bytes of this process


class ShardStore(Protocol):
    """What `Shards` needs of the place where shards lie."""

    scratch: Path  # the local folder in which a shard is written
    attempts: tuple[bool, ...]  # values of `fresh` to try until what was read is as it was written

    def where(self, name: str) -> str: ...

    def names(self, *, again: bool) -> set[str] | None:
        """What is there; None where that is as it was, or has just been looked at."""

    def size(self, name: str) -> int: ...

    def read(self, name: str, start: int, size: int, *, fresh: bool = False) -> bytes:
        """So many bytes; fewer where the shard was cut short. `fresh`: not from a copy.

        Raises:
            FileNotFoundError: the shard has been removed.
            OSError, WorkError: it cannot be read.
        """

    def each(self, work: Callable[[str], T], names: Sequence[str]) -> Iterator[T]: ...

    def publish(self, path: Path, name: str) -> None:
        """Make the finished file in `scratch` the shard `name`."""

    def mark(self, name: str) -> None:
        """Put an empty file there."""

    def remove(self, name: str) -> None: ...

    def finish(self) -> None:
        """Publish what an earlier process could not."""


def read_at(file: BinaryIO, size: int, offset: int) -> bytes:
    """At most `size` bytes of a file that is not buffered."""
    if hasattr(os, "pread"):  # one call, and threads may share the file
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


class FolderStore:
    """Shards that are files of a folder, of which at most `MAX_OPEN` are open."""

    attempts: tuple[bool, ...] = (False,)

    def __init__(self, folder: Path) -> None:
        self.folder = self.scratch = folder
        self._listed: tuple[int, bool] | None = None  # the folder's time of change, and whether it was settled
        self._files: dict[str, BinaryIO] = {}  # the one used last is last

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def names(self, *, again: bool) -> set[str] | None:
        """As the protocol has it; `again`: also where the folder's time is the same, which network file systems keep
        for a while.
        """
        try:
            changed = self.folder.stat().st_mtime_ns
            if self._listed == (changed, True) and not again:
                return None
            with os.scandir(self.folder) as found:
                names = {entry.name for entry in found}
        except FileNotFoundError:
            changed, names = 0, set()
        except OSError as error:
            fix = "change its permissions, or name another cache.cache_dir"
            raise UserError(f"{self.folder}: the cache cannot be listed ({error.strerror or error}): {fix}") from error
        self._listed = changed, time.time() - changed / 1e9 > _SETTLED_S
        for name in self._files.keys() - names:
            self._files.pop(name).close()  # an open file keeps its space on the disk
        return names

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int, size: int, *, fresh: bool = False) -> bytes:
        file = self._files.pop(name, None) or (self.folder / name).open("rb", buffering=0)
        self._files[name] = file
        if len(self._files) > MAX_OPEN:
            self._files.pop(next(iter(self._files))).close()
        try:
            return read_at(file, size, start)
        except OSError as error:
            self._files.pop(name).close()
            if error.errno == errno.ESTALE:  # how a network file system says that another machine has removed it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(name)) from error
            raise

    def each(self, work: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
        return map(work, names)

    def publish(self, path: Path, name: str) -> None:
        path.replace(self.folder / name)
        atomic.sync_directory(self.folder)

    def mark(self, name: str) -> None:
        (self.folder / name).touch()

    def remove(self, name: str) -> None:
        if file := self._files.pop(name, None):
            file.close()  # Windows deletes no open file
        (self.folder / name).unlink(missing_ok=True)

    def finish(self) -> None:
        """There is nothing: publishing is one rename."""


class UrlStore:
    """Shards that are objects whose names begin with `url`; `scratch` is a folder of this machine for this URL alone.

    A finished shard that cannot be uploaded waits in `scratch`, where `finish` finds it. No file and no connection is
    kept open, so a loader's processes may be forked or get a copy.
    """

    attempts: tuple[bool, ...] = (False, True)

    def __init__(self, url: str, scratch: Path, copies: "LocalCopies") -> None:
        self.url, self.scratch, self._copies = url.rstrip("/"), scratch, copies
        self._sizes: dict[str, int] = {}
        self._next_look = 0.0

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def names(self, *, again: bool) -> set[str] | None:
        began = time.monotonic()
        if began < self._next_look and not again:
            return None
        self._sizes = sizes_under(self.url)
        now = time.monotonic()
        self._next_look = now + (now - began) / _LOOKS
        return set(self._sizes)

    def size(self, name: str) -> int:
        return self._sizes[name]

    def read(self, name: str, start: int, size: int, *, fresh: bool = False) -> bytes:
        copy = f"{name.removesuffix('.tar')}/{start}-{size}"
        if fresh:
            self._copies.drop(copy)
        elif (kept := self._copies.get(copy)) is not None:
            return kept
        url = self.where(name)
        try:
            data: bytes = asked(url, lambda files: files.cat_file(url, start=start, end=start + size))
        except UserError as error:  # at work, not before it
            raise WorkError(str(error)) from error
        if not fresh:
            self._copies.keep(copy, data)
        return data

    def each(self, work: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
        with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(names) or 1)) as pool:
            yield from pool.map(work, names)

    def publish(self, path: Path, name: str) -> None:
        """As the protocol has it.

        Raises:
            UserError, WorkError: it cannot be uploaded; it waits for the next run.
        """
        path.replace(self.scratch / name)
        atomic.sync_directory(self.scratch)
        self._upload(self.scratch / name)

    def mark(self, name: str) -> None:
        url = self.where(name)
        asked(url, lambda files: files.pipe_file(url, b""), "written")
        self._next_look = 0.0

    def remove(self, name: str) -> None:
        url = self.where(name)
        with contextlib.suppress(FileNotFoundError):
            asked(url, lambda files: files.rm_file(url), "deleted")

    def finish(self) -> None:
        """Upload the shards that wait, those of other processes of this machine too: both write the same bytes.

        Raises:
            UserError, WorkError: one cannot be uploaded.
        """
        if list(self.scratch.glob("*.tar")):
            with FileLock(self.scratch / ".upload.lock"):
                for path in sorted(self.scratch.glob("*.tar")):
                    self._upload(path)
        self._next_look = 0.0  # another process may have uploaded them just now

    def _upload(self, path: Path) -> None:
        url = self.where(path.name)
        try:
            asked(url, lambda files: files.put_file(str(path), url), "written")
        except FileNotFoundError as error:
            if path.exists():  # else another process has uploaded it
                raise UserError(f"{url}: there is no such bucket: create it, or correct cache.cache_dir") from error
        except (UserError, WorkError) as error:
            raise type(error)(f"{error}; nothing is lost: {path} waits for it") from error
        path.unlink(missing_ok=True)


class LocalCopies:
    """Files in `folder` that stand for ranges of objects; those used longest ago are deleted above `limit` bytes.

    Any number of processes of a machine share the folder. Each counts all files again after a hundredth of `limit` of
    its own, so the folder may exceed the limit by that, times the number of processes. A copy that is damaged is for
    the caller to find, as everything in a shard has a checksum. With 0 nothing is kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._until_count = 0.0  # bytes

    def get(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError:  # absent, deleted meanwhile, or on a disk that is broken
            return None
        with contextlib.suppress(OSError):  # it was used now
            os.utime(path)
        return data

    def keep(self, name: str, data: bytes) -> None:
        """Keep a copy; where there is no room for it, all goes without."""
        if len(data) > self.limit:
            return
        path = self.folder / name
        tmp = path.with_name(f"{atomic.TMP_PREFIX}{os.getpid()}-{threading.get_ident()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp.write_bytes(data)
            tmp.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                tmp.unlink()
        self._until_count -= len(data)
        if self._until_count < 0:
            with contextlib.suppress(OSError):
                self._make_room()
            self._until_count = self.limit * _SCANS

    def drop(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _make_room(self) -> None:
        found = []
        for folder in self.folder.parent.glob("*/*"):  # of all URLs: they share the bound
            with contextlib.suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    with contextlib.suppress(OSError):
                        status = file.stat()
                        found.append((status.st_mtime_ns, status.st_size, file.path))
        held, disk = sum(size for _, size, _ in found), shutil.disk_usage(self.folder.parent)
        over = held - min(self.limit, held + disk.free - _LEFT_FREE * disk.total)
        for _, size, path in sorted(found):
            if over <= 0:
                break
            with contextlib.suppress(OSError):
                Path(path).unlink()
            over -= size
