"""What a scan found out about each image, kept for the next scan: unchanged files are not decoded again.

Promise: a row is used only for a file of the same path, size, times and inode, whose times were older than
`SETTLED_NS` when it was read (a later write in the same tick of the clock could not be told from it); a memo that
cannot be read, or of another version of the reader, counts as none. Cost: one `stat` an image, about 150 bytes a row.
"""

import json
import time
from pathlib import Path
from typing import Any

from PIL import __version__ as pillow_version

from mixres import atomic
from mixres.data.images import BadImageError, ImageFacts, Limits, check_size
from mixres.data.objects import is_url
from mixres.data.records import Picture, Status
from mixres.geometry import Size

VERSION = f"3, Pillow {pillow_version}"  # another one may read a file differently: then every file is decoded anew
SETTLED_NS = 2_000_000_000


class ScanMemo:
    """Facts by image; `path` None remembers nothing. Of several processes that save, the last one's rows stay."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows = _read(path) if path else {}
        self._new: dict[str, list[Any]] = {}
        self._started_ns = time.time_ns()

    def find(self, image: Picture, is_mask: bool, limits: Limits) -> ImageFacts | None:
        """The facts of an unchanged image that is still within `limits`."""
        row = self._rows.get(_key(image, is_mask)) if self._rows else None
        if row is None:
            return None
        try:
            status = image.stat()
            if row[:4] != _state(status) or status.st_size > limits.max_bytes:
                return None
            facts = ImageFacts(Size(int(row[4]), int(row[5])), str(row[6]), bool(row[7]), bool(row[8]))
            check_size(facts.size, limits)
        except (BadImageError, OSError, TypeError, ValueError, LookupError):
            return None
        return None if facts.first_of_several and not limits.first_frame else facts

    def add(self, image: Picture, is_mask: bool, status: Status, facts: ImageFacts) -> None:
        """Remember what a decode said; `status` was taken before the image was read."""
        if is_settled(status, self._started_ns):
            self._new[_key(image, is_mask)] = [*_state(status), *facts.size, *facts[1:]]

    def save(self) -> None:
        """Put the rows on disk, where there are new ones."""
        if self.path and self._new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_json(self.path, {"version": VERSION, "rows": self._rows | self._new}, indent=None)


def is_settled(status: Status, now_ns: int | None = None) -> bool:
    """Whether a later write would have other times than these."""
    return max(status.st_mtime_ns, status.st_ctime_ns) + SETTLED_NS < (now_ns or time.time_ns())


def _key(image: Picture, is_mask: bool) -> str:
    return f"{'mask' if is_mask else 'image'} {image if is_url(str(image)) else Path(str(image)).absolute()}"


def _state(status: Status) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        memo = json.loads(path.read_bytes())
        return dict(memo["rows"]) if memo["version"] == VERSION else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
