"""The records of a tar or parquet file, kept for the next scan, which then reads nothing of an unchanged file.

Promise: what is kept is used only for a file of the same path, size, times and inode (of an object: size and ETag), and
for the same `data.columns` and `data.empty_caption`. Cost: one JSON file a shard, about 200 bytes a record.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from mixres import atomic
from mixres.data.objects import StoredObject
from mixres.data.records import EditRecord, EmptyCaption, Picture, Problem, is_settled

_VERSION = 3
_DIGEST = 16  # characters before the JSON: its xxh3_64
Found = tuple[list[EditRecord], list[Problem]]


def kept_records(
    stored: StoredObject,
    folder: Path | None,
    read: Callable[[], Found],
    image: Callable[..., Picture],
    *,
    columns: Mapping[str, str],
    empty_caption: EmptyCaption,
) -> Found:
    """What `read` finds in a file, or what it found in its present state before, kept in `folder`.

    `image` makes a picture of this file from what a picture, which is a tuple, holds beside the file.
    """
    if folder is None:
        return read()
    file, state = index_of(stored, folder, columns=columns, empty_caption=empty_caption)
    with suppress(OSError, ValueError, LookupError, TypeError):
        data = file.read_bytes()
        whole = data[:_DIGEST] == xxhash.xxh3_64_hexdigest(data[_DIGEST:]).encode()
        if whole and (kept := json.loads(data[_DIGEST:]))["state"] == state:
            return [record_of(image, *row) for row in kept["records"]], [Problem(*row) for row in kept["problems"]]
    records, problems = read()
    if records and is_settled(stored.status):
        with suppress(OSError, ValueError):  # a full or read-only disk: the index only saves time
            write_index(file, state, map(row_of, records), problems)
    return records, problems


def index_of(
    stored: StoredObject, folder: Path, *, columns: Mapping[str, str], empty_caption: EmptyCaption
) -> tuple[Path, list[Any]]:
    """The file in `folder` that keeps the records of a shard, and all that they depend on."""
    state = [_VERSION, str(stored), *stored.status, sorted(map(list, columns.items())), empty_caption]
    return folder / f"{xxhash.xxh3_64_hexdigest(str(stored).encode())}.json", state


def write_index(file: Path, state: list[Any], rows: Iterable[list[Any]], problems: Sequence[Problem]) -> None:
    """Keep what `row_of` gives of each record.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"state": state, "records": list(rows), "problems": problems}).encode()
    atomic.write_bytes(file, xxhash.xxh3_64_hexdigest(data).encode() + data)


def row_of(record: EditRecord) -> list[Any]:
    """Name, prompt, alignment, images without their file, and whether the last is a mask."""
    images: list[Any] = [record.target, *record.controls, *([record.mask] if record.mask else [])]
    places = [image[1:] for image in images]
    return [record.name, record.prompt, record.align_control, places, record.mask is not None]


def record_of(
    image: Callable[..., Picture], name: str, prompt: str, align: bool | None, places: list[list[Any]], has_mask: bool
) -> EditRecord:
    """Inverse of `row_of`, as `kept_records` takes `image`."""
    target, *others = [image(*place) for place in places]
    mask = others.pop() if has_mask else None
    return EditRecord(name, target, tuple(others), prompt, mask, align)
