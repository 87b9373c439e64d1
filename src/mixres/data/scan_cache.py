"""What scans found out about each image, kept for later scans and for the other processes of this one.

Promise: a row is used only for a file of the same path, size, times and inode, whose times were older than
`SETTLED_NS` when it was read (a later write in the same tick of the clock could not be told from it); a part that is
damaged, or of another version of the reader, counts as none. No lock: a process writes a part of its own, whose name
carries host and process. Cost: one `stat` an image, and 41 bytes a row on disk and in memory.

File: a line with `VERSION`, the xxh3_64 of what follows as 8 bytes, and rows of `_ROW`. A row is found by a hash over
the path and the state of its file, so that a file that changes has another row.
"""

import contextlib
import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import __version__ as pillow_version

from mixres import atomic
from mixres.data.images import BadImageError, ImageFacts, Limits, check_size
from mixres.data.objects import state_text
from mixres.data.records import Picture, Status, is_settled
from mixres.data.tar_shards import TarImage
from mixres.geometry import Size

# Another one may read a file differently: then every file is decoded anew.
VERSION = f"mixres scan 5, Pillow {pillow_version}\n".encode()
MERGED_AFTER_S = 3600.0  # parts that nobody has written to for so long become part of the next one that is written
_SUFFIX = ".rows"
_ROW = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("width", "<u4"), ("height", "<u4"), ("digest", "V16"), ("flags", "u1")]
)
_VALUES = struct.Struct("<II16sB")  # of a row, behind its key
_FLATTENED, _SEVERAL = 1, 2
_Part = tuple[tuple[int, int], np.ndarray]  # state of the file, and its rows


class Job(NamedTuple):
    """An image to be looked at."""

    path: Picture
    is_mask: bool


class ScanMemo:
    """Facts by image, in the parts in `folder`; None remembers nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._name = atomic.own_name(_SUFFIX)
        self._parts: dict[str, _Part] = {}  # by name
        self._rows = np.empty(0, _ROW)  # of all parts, sorted
        self._new: list[bytes] = []
        self._merged: list[np.ndarray] = []  # older parts, which this process has taken into its own
        self._saved = 0  # of the new rows
        self._started_ns = time.time_ns()
        self.refresh()

    def refresh(self) -> bool:
        """See what other processes have written since the last time; whether there is anything new."""
        known = self._parts
        for _ in range(2):  # a part that is gone by now may be in one that has come
            with contextlib.suppress(OSError):
                self._parts = self._read(known)
                break
        if all(part is known.get(name) for name, part in self._parts.items()):
            return False
        rows = np.concatenate([rows for _, rows in self._parts.values()])
        self._rows = rows if len(self._parts) == 1 else rows[np.argsort(rows["high"], kind="stable")]
        return True

    def find(self, jobs: Sequence[Job], limits: Limits) -> tuple[list[ImageFacts | None], int]:
        """The facts of each unchanged image that is still within `limits`, and of how many different ones."""
        if not (jobs and len(self._rows)):
            return [None] * len(jobs), 0
        keys, nothing, kinds = bytearray(), bytes(16), ("image", "mask")
        for path, is_mask in jobs:
            try:
                text, size = _text(path, limits)
            except OSError:  # whoever reads it will see
                size = limits.max_bytes + 1
            keys += _key(kinds[is_mask], text) if size <= limits.max_bytes else nothing
        wanted = np.frombuffer(keys, "<u8").reshape(-1, 2)
        places = np.searchsorted(self._rows["high"], wanted[:, 0]).clip(max=len(self._rows) - 1)
        rows = self._rows[places]
        there = (rows["high"] == wanted[:, 0]) & (rows["low"] == wanted[:, 1])
        facts = _facts(rows, there, limits)
        return facts, len(np.unique(places[there]))

    def add(self, job: Job, status: Status, facts: ImageFacts, limits: Limits) -> None:
        """Remember what a decode within `limits` found; `status` was taken before the image was read."""
        if is_settled(status, self._started_ns):
            flags = _FLATTENED * facts.flattened + _SEVERAL * facts.first_of_several
            values = _VALUES.pack(*facts.size, bytes.fromhex(facts.digest), flags)
            text = _state_text(job.path, status, limits)
            self._new.append(_key("mask" if job.is_mask else "image", text) + values)

    def save(self) -> None:
        """Put the rows on disk, where there are new ones.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        new = list(self._new)
        if not self.folder or len(new) == self._saved:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep([self.folder], MERGED_AFTER_S)
        now, old = time.time(), []
        for path in map(self.folder.joinpath, self._parts):
            with contextlib.suppress(FileNotFoundError):
                old += [path] if now - path.stat().st_mtime > MERGED_AFTER_S else []
        self._merged += [self._parts[path.name][1] for path in old]
        rows = np.concatenate([*self._merged, np.frombuffer(b"".join(new), _ROW)])
        rows = rows[np.lexsort((rows["low"], rows["high"]))]
        other = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
        data = rows[np.append(True, other)].tobytes()  # ranks may have merged the same part
        digest = xxhash.xxh3_64_digest(data)
        atomic.write_bytes(self.folder / self._name, VERSION + digest + data)
        self._saved = len(new)
        for path in old:
            path.unlink(missing_ok=True)

    def _read(self, known: Mapping[str, _Part]) -> dict[str, _Part]:
        """The parts of other processes, those that are `known` and unchanged as they are.

        Raises:
            OSError: there is no such folder, or a part is gone.
        """
        found = {}
        for entry in os.scandir(self.folder) if self.folder and self.folder.is_dir() else ():
            if not entry.name.endswith(_SUFFIX) or entry.name.startswith(".") or entry.name == self._name:
                continue
            there = entry.stat()
            state = there.st_size, there.st_mtime_ns
            if entry.name in known and known[entry.name][0] == state:
                found[entry.name] = known[entry.name]
                continue
            with Path(entry.path).open("rb") as file:
                version, digest, data = file.read(len(VERSION)), file.read(8), file.read()
            if version == VERSION and xxhash.xxh3_64_digest(data) == digest:
                found[entry.name] = state, np.frombuffer(data, _ROW)
        return found


def _key(kind: str, text: str) -> bytes:
    return xxhash.xxh3_128_digest(f"{kind} {text}".encode(errors="surrogateescape"))


def _text(path: Picture, limits: Limits) -> tuple[str, int]:
    """An image and the state of its file, and its size, 0 where that is not known before it is read.

    Raises:
        OSError: there is no such file.
    """
    if isinstance(path, TarImage):  # of which there may be millions; as `state_text` has it
        return f"{path.size} {path.shard.state}:{path.name}", path.size
    status = path.stat()
    return _state_text(path, status, limits), status.st_size


def _state_text(path: Picture, status: Status, limits: Limits) -> str:
    text = state_text(path, status)
    return text if status.st_size else f"{text} <= {limits.max_bytes}"  # all that is known of its size


def _facts(rows: np.ndarray, there: np.ndarray, limits: Limits) -> list[ImageFacts | None]:
    """What rows hold, where one is there and within `limits`."""
    sides, which = np.unique(rows["width"].astype("u8") << 32 | rows["height"], return_inverse=True)
    sizes = [Size(pair >> 32, pair & 2**32 - 1) for pair in sides.tolist()]  # one object for all images of a size
    there &= np.array([_is_within(size, limits) for size in sizes])[which]
    if not limits.first_frame:
        there &= rows["flags"] & _SEVERAL == 0
    digests = rows["digest"].tobytes().hex()
    values = (
        [sizes[number] for number in which.tolist()],
        [digests[begin : begin + 32] for begin in range(0, len(digests), 32)],
        (rows["flags"] & _FLATTENED != 0).tolist(),
        (rows["flags"] & _SEVERAL != 0).tolist(),
    )
    facts: list[ImageFacts | None] = [*map(ImageFacts, *values)]
    return facts if there.all() else [x if has else None for x, has in zip(facts, there.tolist(), strict=True)]


def _is_within(size: Size, limits: Limits) -> bool:
    try:
        check_size(size, limits)
    except BadImageError:
        return False
    return True
