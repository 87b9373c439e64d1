"""Webdataset shards (`000017.target.jpg`, `000017.control.png`, `000017.txt` in a tar file) -> records.

Promise: nothing is unpacked; images are read where they lie, by offset and size. A link, or a name that leads out of
the archive, is refused; of a shard that ends too early nothing is used. Cost: one pass over the headers of its members,
64 KiB a range, and a kept index by which the next scan of an unchanged shard reads nothing of it.

Members belong together whose names agree up to the first dot behind the folder, wherever they lie in the shard. What
follows names the column: `target.jpg` is `target`, a bare image suffix is `target`, and `txt` is `prompt`. Members that
are neither an image nor of a known column are left alone.
"""

import io
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mixres.data.images import SUFFIXES
from mixres.data.manifest import ALIGN, BadRowError, Row, column_key, records_from_rows
from mixres.data.objects import StoredObject
from mixres.data.records import (
    MAX_CAPTION_BYTES,
    EditRecord,
    EmbeddedStatus,
    EmptyCaption,
    Problem,
    printable,
)
from mixres.data.shard_index import Found, kept_records
from mixres.errors import UserError

RANGE_BYTES = 2**16  # of one read of headers: small members come along
MAX_END_BYTES = 2**20  # of zeros behind the last member
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d"}


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    offset: int
    size: int
    text: str | None  # of a .txt, with surrogates for what is no UTF-8
    problem: str | None


class TarImage(NamedTuple):
    """The bytes of one image in a shard."""

    shard: StoredObject
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def stat(self) -> EmbeddedStatus:
        mode, _, *times = self.shard.status
        return EmbeddedStatus(mode, self.size, *times)

    def read_bytes(self) -> bytes:
        return self.shard.read(self.offset, self.offset + self.size)


class _DamagedError(Exception):
    """Why nothing of a shard can be used."""


def records_from_shard(
    shard: StoredObject, *, columns: Mapping[str, str], empty_caption: EmptyCaption, index: Path | None
) -> tuple[list[EditRecord], list[Problem]]:
    """All records of a shard in the order of their first members, and all problems (`path` is `shard:name`).

    `columns`: names of columns by role. `index`: a folder that keeps what was found for the next scan.

    Raises:
        UserError: the shard is compressed.
        WorkError: it cannot be read any more.
    """

    def read() -> Found:
        try:
            members = list(_read_headers(shard))
        except _DamagedError as error:
            return [], [Problem(printable(shard), str(error), example=printable(shard))]
        return records_from_rows(str(shard), _rows(shard, members, columns), partial(_image, shard), empty_caption)

    kept = partial(kept_records, columns=columns, empty_caption=empty_caption)
    records, problems = kept(shard, index, read, partial(TarImage, shard))
    if not (records or problems):  # such as a file of zeros, which is what an interrupted copy may leave
        problems = [
            Problem(printable(shard), "holds no record; copy it again, or take it out", example=printable(shard))
        ]
    return records, problems


def _image(shard: StoredObject, where: str, key: str, member: Any) -> TarImage:
    if not isinstance(member, Member):
        raise BadRowError(f"'{key}' is not an image; correct data.columns")
    return TarImage(shard, member.name, member.offset, member.size)


def _rows(shard: StoredObject, members: list[Member], columns: Mapping[str, str]) -> Iterator[tuple[str, Row]]:
    """What a manifest would say of each group of members, or why it says nothing."""
    groups: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        group = folder + slash + stem
        column, is_image = _column(extension)
        key = column_key(columns, extension, column)
        bare = "target" if is_image and not column else "prompt" if extension == "txt" else None
        if bare and not key and bare not in columns:
            key = column_key({}, bare)
        row = groups.setdefault(group, {}) if key or is_image or member.problem else {}
        if member.problem:
            reasons.setdefault(group, f"{printable(member.name)}: {member.problem}")
        elif key is None and is_image:
            fix = "name it in data.columns, or take it out"
            reasons.setdefault(group, f"{printable(member.name)}: '{printable(column)}' is no known column; {fix}")
        elif key in row:
            reasons.setdefault(group, f"has several members for '{key}': {printable(member.name)} too; keep one")
        elif key:
            row[key] = _text(shard, member) if key in ("prompt", ALIGN) else member
    for group, row in groups.items():
        yield printable(group), BadRowError(reasons[group]) if group in reasons else row


def _column(extension: str) -> tuple[str, bool]:
    """The extension without the suffix of an image or a text, and whether it is that of an image."""
    column, _, suffix = extension.rpartition(".")
    is_image = f".{suffix.lower()}" in SUFFIXES
    return (column if is_image or suffix == "txt" else extension), is_image


def _text(shard: StoredObject, member: Member) -> str:
    if member.text is not None:
        return member.text
    data = shard.read(member.offset, member.offset + min(member.size, MAX_CAPTION_BYTES))
    return data.decode("utf-8", "surrogateescape").strip()


def _read_headers(shard: StoredObject) -> Iterator[Member]:
    """All files of the shard.

    `tarfile` takes a header that it cannot read, and an end without its mark, for the end of the archive; what
    stands there decides.

    Raises:
        _DamagedError: with the reason.
        UserError: it is compressed.
    """
    with io.BufferedReader(shard.open(), RANGE_BYTES) as file:
        start = file.read(8)
        file.seek(0)
        for magic, command in _COMPRESSED.items():
            if start.startswith(magic):
                fix = f"images do not shrink, and its members cannot be reached: unpack it with {command}"
                raise UserError(f"{printable(shard)}: is compressed; {fix}")
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for entry in archive:
                    yield from _member(archive, entry)
                end = archive.offset
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise _DamagedError(f"is damaged, its headers do not read: {error}; copy it again") from error
        file.seek(end)
        rest = file.read(MAX_END_BYTES)
    if not rest:
        raise _DamagedError("is cut, it has no end mark; copy it again")
    if rest.strip(b"\0"):
        raise _DamagedError(f"is damaged at byte {end}: no header is there, and more follows; copy it again")


def _member(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> Iterator[Member]:
    parts, problem = entry.name.split("/"), None
    if entry.isdir() or parts[-1].startswith("."):  # hidden files: macOS adds some
        return
    if entry.name.startswith("/") or ".." in parts:
        problem = "leads out of the archive; rename it"
    elif not entry.isreg() or entry.issparse():
        problem = "is a link, or no regular file; put the file itself there"
    text = None
    if not problem and parts[-1].endswith(".txt") and entry.size <= MAX_CAPTION_BYTES:
        file = archive.extractfile(entry)
        assert file is not None
        text = file.read().decode("utf-8", "surrogateescape").strip()
    elif not problem and parts[-1].endswith(".txt"):
        problem = f"is over {MAX_CAPTION_BYTES} bytes long; shorten it"
    yield Member(entry.name, entry.offset_data, entry.size, text, problem)
