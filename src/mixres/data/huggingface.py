"""A Hugging Face data set saved on disk (`save_to_disk`) -> records; its images stay in its arrow files.

Promise: nothing outside the folder is opened, no script of a data set runs, no image is decoded here; every row is a
record or is named with every reason why not. Cost: the import of `datasets` (an optional package), a look at each row.

Columns are those of a manifest: `path_target`, `path_control`, ... hold the images themselves, `prompt` is text,
`align_control` is a truth value.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mixres.data.manifest import ALIGN, BadRowError, absent_columns, column_key, column_problems, records_from_rows
from mixres.data.records import EditRecord, EmbeddedStatus, EmptyCaption, Problem, printable
from mixres.errors import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"
_PLAIN = ("prompt", ALIGN)  # columns that hold no images


@dataclass(frozen=True)
class EmbeddedImage:
    """The bytes of one image in a memory-mapped column."""

    name: str  # folder:row:column
    status: EmbeddedStatus
    _bytes: Any = field(repr=False, compare=False)  # an arrow buffer

    def __str__(self) -> str:
        return self.name

    def stat(self) -> EmbeddedStatus:
        return self.status

    def read_bytes(self) -> bytes:
        return bytes(self._bytes)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` has written `folder`."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def records_from_saved_dataset(
    root: Path, *, columns: Mapping[str, str] = {}, empty_caption: EmptyCaption
) -> tuple[list[EditRecord], list[Problem]]:
    """All records of the data set at `root` in the order of its rows, and all problems (`path` is `folder:row`).

    `columns`: names of columns by role.

    Raises:
        UserError: it cannot be read, holds several splits, or `datasets` is not installed.
    """
    arrow_files = _arrow_files(root)
    found, names = _columns(root, columns)
    status = _status(arrow_files)
    plain = {name: found.pop(name) for name in _PLAIN if name in found}

    def values(row: int) -> dict[str, Any]:
        images = {key: value for key, column in found.items() if (value := column[row]).is_valid}
        return images | {name: column[row].as_py() for name, column in plain.items()}

    rows = ((row, values(row)) for row in range(len(found["path_target"])))
    return records_from_rows(root, rows, partial(_image, status, names), empty_caption)


def _arrow_files(root: Path) -> list[Path]:
    """The files that the data set says it has, checked to lie in its folder."""
    if not (root / STATE).is_file():
        splits = ", ".join(sorted(printable(path.parent) for path in root.glob(f"*/{STATE}")))
        raise UserError(f"{printable(root)}: holds several data sets; name one or a list of them: {splits}")
    try:
        names = [str(entry["filename"]) for entry in json.loads((root / STATE).read_bytes())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{printable(root / STATE)}: cannot be read; save the data set again") from error
    for name in names:
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{printable(root / STATE)}: names a file outside its folder: {printable(name)}; save it again"
            )
    return [root / name for name in names]


def _columns(root: Path, named: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The prompts and the columns of images by the keys of a manifest, memory-mapped; and the names of the columns."""
    shown = printable(root)
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        fix = "pip install 'mixres[datasets]'"
        raise UserError(f"{shown}: is a Hugging Face data set, and 'datasets' is not installed: {fix}") from None
    try:
        table = datasets.load_from_disk(str(root.resolve()), keep_in_memory=False).data
        columns = {str(name): table.column(name) for name in table.column_names}
    except Exception as error:  # whatever arrow says of bytes that are not its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{shown}: the data set cannot be read: {reason}; save it again") from error
    absent = absent_columns(list(columns), named)
    keys = {name: column_key(named, name) or name for name in named.values() if name in columns}
    others = {name: column for name, column in columns.items() if name not in {*keys, *keys.values()}}
    columns = others | {key: columns[name] for name, key in keys.items()}
    wanted = {name: column for name, column in columns.items() if name.startswith("path_") or name in _PLAIN}
    checked = [name for name in columns if name in wanted or not name.startswith("path")]
    if reasons := [*absent, *column_problems(checked)]:
        raise UserError([f"{shown}: {reason}" for reason in reasons])
    return wanted, {key: key for key in wanted} | {key: name for name, key in keys.items()}


def _status(files: list[Path]) -> EmbeddedStatus:
    """Newest times and a mixed inode of all files: one that changes, comes or goes changes the state of every image."""
    stats = [file.stat() for file in files]
    return EmbeddedStatus(
        st_mode=stats[0].st_mode,
        st_size=sum(stat.st_size for stat in stats),
        st_mtime_ns=max(stat.st_mtime_ns for stat in stats),
        st_ctime_ns=max(stat.st_ctime_ns for stat in stats),
        st_ino=hash(tuple((stat.st_ino, stat.st_size) for stat in stats)),
    )


def _image(status: EmbeddedStatus, names: Mapping[str, str], where: str, key: str, value: Any) -> EmbeddedImage:
    try:
        data = value["bytes"].as_buffer()
    except (AttributeError, KeyError, TypeError):
        raise BadRowError(f"'{key}' is not an image; cast the column to datasets.Image") from None
    if data is None:
        raise BadRowError(f"'{key}' does not hold the bytes of its image; save the data set with its images in it")
    # A scan finds by this name what it remembers: with the key, another column in the same role would be taken for it.
    return EmbeddedImage(f"{where}:{names[key]}", status._replace(st_size=data.size), data)
