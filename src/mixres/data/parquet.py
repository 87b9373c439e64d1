"""Parquet files with images as bytes -> records.

Promise: no image is read before it is asked for, none that is only named is opened. Cost: the footer and the columns of
text, of an unchanged file nothing. An image is read with its row group, of which the last `GROUPS` are kept in memory:
write files with row groups of at most some 100 MB.

Columns are `target`, `control`, `control_1`, ..., `mask`, `prompt` and `align_control`, or named by `data.columns`. An
image is binary, or a struct with its `bytes` as `datasets.Image` writes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from mixres.data.images import BadImageError
from mixres.data.manifest import ALIGN, Row, absent_columns, column_key, column_problems, records_from_rows
from mixres.data.objects import StoredObject
from mixres.data.records import EditRecord, EmbeddedStatus, EmptyCaption, Problem, printable
from mixres.data.shard_index import Found, kept_records
from mixres.errors import UserError, WorkError

GROUPS = 2
_PLAIN = ("prompt", ALIGN)
_ARROW = (ValueError, OSError, NotImplementedError, LookupError)  # arrow's own errors are among them
_lock = Lock()  # a row group is read once, however many threads ask for its images


class _Cell(NamedTuple):
    """A place in a file."""

    group: int
    row: int


class ParquetImage(NamedTuple):
    """The bytes of one image in a column."""

    table: StoredObject
    columns: tuple[str, ...]  # of images, which are read together
    name: str  # of the column
    group: int
    row: int  # in its group
    number: int  # in the file

    def __str__(self) -> str:
        return f"{self.table}:{self.number}:{self.name}"

    def stat(self) -> EmbeddedStatus:
        return self.table.status._replace(st_size=0)  # not known before it is read

    def read_bytes(self) -> bytes:
        """The bytes, as the file holds them.

        Raises:
            BadImageError: the row group is damaged, or holds the name of an image alone.
            WorkError: the file cannot be read any more.
        """
        with _lock:
            try:
                value = _row_group(self.table, self.group, self.columns).column(self.name)[self.row].as_py()
            except WorkError:
                raise
            except _ARROW as error:
                raise BadImageError(f"its row group does not read: {_line(error)}; {_fix(error)}") from error
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise BadImageError("the row does not hold the bytes of its image; write the file with its images in it")
        return bytes(data)


def image_of(table: StoredObject, columns: Sequence[str], *place: Any) -> ParquetImage:
    """The image of these fields."""
    return ParquetImage(table, tuple(columns), *place)


def records_from_parquet(
    table: StoredObject, *, columns: Mapping[str, str], empty_caption: EmptyCaption, index: Path | None = None
) -> tuple[list[EditRecord], list[Problem]]:
    """All records of a file in the order of its rows, and all problems (`path` is `file:row`).

    `columns`: names of columns by role. `index`: a folder that keeps what was found for the next scan.

    Raises:
        UserError: its columns do not fit, or `pyarrow` is not installed.
        WorkError: it cannot be read any more.
    """
    try:
        import pyarrow  # noqa: F401 - optional
    except ImportError:
        fix = "pip install 'mixres[parquet]'"
        raise UserError(f"{printable(table)}: is a parquet file, and 'pyarrow' is not installed: {fix}") from None
    read = partial(_read, table, columns=columns, empty_caption=empty_caption)
    kept = partial(kept_records, columns=columns, empty_caption=empty_caption)
    return kept(table, index, read, partial(image_of, table))


def _read(table: StoredObject, *, columns: Mapping[str, str], empty_caption: EmptyCaption) -> Found:
    try:
        with _lock:
            file = _opened(table)
            by_key = _columns(table, file.schema_arrow, columns)
            rows = list(_rows(file, by_key))
    except _ARROW as error:
        reason = f"does not read: {_line(error)}; {_fix(error)}"
        return [], [Problem(printable(table), reason, example=printable(table))]
    images = tuple(name for key, name in by_key.items() if key not in _PLAIN)

    def image(where: str, key: str, cell: Any) -> ParquetImage:
        return ParquetImage(table, images, by_key[key], cell.group, cell.row, int(where.rpartition(":")[2]))

    return records_from_rows(str(table), rows, image, empty_caption)


def _columns(table: StoredObject, schema: Any, columns: Mapping[str, str]) -> dict[str, str]:
    """Names of the columns by the keys of a manifest.

    Raises:
        UserError: one that every row needs is missing, or holds no bytes.
    """
    keyed = [(key, name) for name in schema.names if (key := column_key(columns, name))]
    by_key = dict(keyed)
    reasons = [*absent_columns(schema.names, columns), *column_problems(list(by_key))]
    reasons += [f"has two columns for '{key}', '{name}' is one" for key, name in keyed if by_key[key] != name]
    if reasons:
        hint = f" (columns: {', '.join(map(printable, schema.names))}; name them in data.columns)"
        raise UserError([f"{printable(table)}: {reason}{hint}" for reason in reasons])
    for name in (name for key, name in by_key.items() if key not in _PLAIN):
        kind = str(schema.field(name).type)
        if not (kind in ("binary", "large_binary") or (kind.startswith("struct<") and "bytes: " in kind)):
            raise UserError(
                f"{printable(table)}: the column '{printable(name)}' holds {kind}, not images; "
                "write their bytes, or name another one in data.columns"
            )
    return by_key


def _rows(file: Any, by_key: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    """What a manifest would say of each row, with a `_Cell` for an image."""
    number = 0
    plain = [name for key, name in by_key.items() if key in _PLAIN]
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        texts = file.read_row_group(group, columns=plain).to_pydict() if plain else {}
        there = {key: _there(file, group, name, count) for key, name in by_key.items() if key not in _PLAIN}
        for row in range(count):
            images = {key: _Cell(group, row) for key, has in there.items() if has[row]}
            yield number, images | {key: texts[by_key[key]][row] for key in _PLAIN if key in by_key}
            number += 1


def _there(file: Any, group: int, name: str, count: int) -> list[bool]:
    """In which rows a column has an image: by its statistics, where they suffice, else by reading it."""
    chunks = (file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema in (name, f"{name}.bytes"))
    found = chunk.statistics
    if found and found.has_null_count and found.null_count == 0:
        return [True] * count
    if found and found.has_null_count and found.null_count == count and chunk.path_in_schema == name:
        return [False] * count  # a struct without bytes may hold a path, which is no image but is meant as one
    return [value.is_valid for value in file.read_row_group(group, columns=[name]).column(name)]


@lru_cache(maxsize=64)
def _opened(table: StoredObject) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(table.open())


@lru_cache(maxsize=GROUPS)
def _row_group(table: StoredObject, group: int, columns: tuple[str, ...]) -> Any:
    return _opened(table).read_row_group(group, columns=list(columns))


def _fix(error: Exception) -> str:
    if isinstance(error, NotImplementedError):  # another compression, or images of a row group beyond 2 GB
        return "write it anew, with smaller row groups"
    return "copy the file again"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
