"""A Hugging Face data set saved on disk (`save_to_disk`) -> records; its pictures stay in its arrow files.

Promise: nothing outside the folder is opened, no script of a data set runs, no picture is decoded here; every row is a
record or is named with every reason why not. Cost: the import of `datasets` (an optional package), a look at each row.

Columns are those of a manifest: `path_target`, `path_control`, ... hold the pictures themselves, `prompt` is text.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mixres.data.manifest import BadRowError, control_keys, key_problems, record_from_row
from mixres.data.records import EditRecord, EmptyCaption, Problem, printable
from mixres.errors import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"


class EmbeddedStatus(NamedTuple):
    """The state of the arrow files around a picture, with the picture's own size."""

    st_mode: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_ino: int


@dataclass(frozen=True)
class EmbeddedPicture:
    """The bytes of one picture in a memory-mapped column."""

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


def records_from_saved_dataset(root: Path, *, empty_caption: EmptyCaption) -> tuple[list[EditRecord], list[Problem]]:
    """All examples of the data set at `root` in the order of its rows, and all problems (`path` is `folder:row`).

    Raises:
        UserError: it cannot be read, holds several splits, or `datasets` is not installed.
    """
    arrow_files = _arrow_files(root)
    columns = _columns(root)
    wanted = [key for key in columns if key.startswith("path_")]
    if reasons := list(key_problems(dict.fromkeys(wanted, ""))):
        raise UserError([f"{printable(root)}: {reason}" for reason in reasons])
    files = _status(arrow_files)
    prompts = columns.get("prompt")
    records: list[EditRecord] = []
    problems: list[Problem] = []
    for row in range(len(columns["path_target"])):
        where = f"{printable(root)}:{row}"

        def picture(key: str, value: Any, where: str = where) -> EmbeddedPicture:
            return _picture(f"{where}:{key}", key, value, files)

        values = {key: value for key in wanted if (value := columns[key][row]).is_valid}
        prompt = prompts[row].as_py() if prompts is not None else None
        record, found = record_from_row(
            values | {"prompt": prompt}, where, picture=picture, empty_caption=empty_caption
        )
        problems += found
        if record:
            records.append(record)
    return records, problems


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


def _columns(root: Path) -> dict[str, Any]:
    """Arrow columns by name, memory-mapped."""
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        fix = "pip install 'mixres[datasets]'"
        raise UserError(
            f"{printable(root)}: is a Hugging Face data set, and 'datasets' is not installed: {fix}"
        ) from None
    try:
        table = datasets.load_from_disk(str(root.resolve()), keep_in_memory=False).data
        columns = {str(name): table.column(name) for name in table.column_names}
    except Exception as error:  # whatever arrow says of bytes that are not its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{printable(root)}: the data set cannot be read: {reason}; save it again") from error
    missing = [key for key in ("path_target", *control_keys(dict.fromkeys(columns, ""))) if key not in columns]
    if missing:
        found = ", ".join(map(printable, columns))
        raise UserError([f"{printable(root)}: has no column '{key}'; rename one of: {found}" for key in missing])
    return columns


def _status(files: list[Path]) -> EmbeddedStatus:
    """Newest times and a mixed inode of all files: one that changes changes the state of every picture."""
    stats = [file.stat() for file in files]
    return EmbeddedStatus(
        st_mode=stats[0].st_mode,
        st_size=sum(stat.st_size for stat in stats),
        st_mtime_ns=max(stat.st_mtime_ns for stat in stats),
        st_ctime_ns=max(stat.st_ctime_ns for stat in stats),
        st_ino=hash(tuple((stat.st_ino, stat.st_size) for stat in stats)),
    )


def _picture(name: str, key: str, value: Any, files: EmbeddedStatus) -> EmbeddedPicture:
    try:
        data = value["bytes"].as_buffer()
    except (AttributeError, KeyError, TypeError):
        raise BadRowError(f"'{key}' is not a picture; cast the column to datasets.Image") from None
    if data is None:
        raise BadRowError(f"'{key}' does not hold the bytes of its picture; save the data set with its pictures in it")
    return EmbeddedPicture(name, files._replace(st_size=data.size), data)
