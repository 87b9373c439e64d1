"""What a scan found out about each picture, kept for the next scan: unchanged files are not decoded again.

Promise: a row is used only for a file of the same path, size, times and inode, whose times were older than
`SETTLED_NS` when it was read (a later write in the same tick of the clock could not be told from it); a memo that is
damaged, or of another version of the reader, counts as none. Cost: one `stat` a picture, about 150 bytes a row.
"""

import json
import time
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from PIL import __version__ as pillow_version

from mixres import atomic
from mixres.data.images import BadImageError, ImageFacts, Limits, check_size
from mixres.data.records import Picture, Status
from mixres.geometry import Size

VERSION = f"2, Pillow {pillow_version}"  # another one may read a file differently: then every file is decoded anew
SETTLED_NS = 2_000_000_000


class ScanMemo:
    """Facts by picture; `path` None remembers nothing. Reading is thread-safe, `save` merges with other processes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows = _read(path) if path else {}
        self._new: dict[str, list[Any]] = {}
        self._started_ns = time.time_ns()

    def find(self, picture: Picture, is_mask: bool, limits: Limits) -> ImageFacts | None:
        """The facts of an unchanged picture that is still within `limits`."""
        row = self._rows.get(_key(picture, is_mask)) if self._rows else None
        if row is None:
            return None
        try:
            status = picture.stat()
            if row[:4] != _state(status) or status.st_size > limits.max_bytes:
                return None
            facts = ImageFacts(Size(int(row[4]), int(row[5])), str(row[6]), bool(row[7]), bool(row[8]))
            check_size(facts.size, limits)
            if facts.first_of_several and not limits.first_frame:
                return None
        except (BadImageError, OSError, TypeError, ValueError, LookupError):
            return None
        return facts

    def add(self, picture: Picture, is_mask: bool, status: Status, facts: ImageFacts) -> None:
        """Remember what a decode said; `status` was taken before the picture was read."""
        if max(status.st_mtime_ns, status.st_ctime_ns) + SETTLED_NS < self._started_ns:
            self._new[_key(picture, is_mask)] = [*_state(status), *facts.size, *facts[1:]]

    def save(self) -> None:
        """Put the new rows on disk, beside those that other processes have saved."""
        if self.path is None or not self._new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            rows = _read(self.path)
            if self._new.items() <= rows.items():  # another rank of the same run was first
                return
            text = json.dumps({"version": VERSION, "rows": dict(sorted((rows | self._new).items()))})
            atomic.write_text(self.path, f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}")


def _key(picture: Picture, is_mask: bool) -> str:
    return f"{'mask' if is_mask else 'picture'} {Path(str(picture)).absolute()}"


def _state(status: Status) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        digest, _, text = path.read_bytes().partition(b" ")
        if digest.decode() != xxhash.xxh3_64_hexdigest(text):
            return {}
        memo = json.loads(text)
        return dict(memo["rows"]) if memo["version"] == VERSION else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
