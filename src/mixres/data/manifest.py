"""A manifest -> records: JSON lines or CSV with `path_target`, `path_control`, `path_control_1`, ..., `prompt`.

Promise: no row makes mixres open a file outside the manifest's folder, or anything that is not a file; every row is
a record or is named with every reason why not; records keep the order of the rows. Cost: one pass, one `stat` a path.

Paths are relative to the manifest. `path_mask` is optional, and so is `align_control` (true or false). Other keys are
left alone, except ones that look like a path. A CSV file is UTF-8 with commas, names its columns in the first line and
may quote as RFC 4180 does; an empty field is no value.
"""

import codecs
import contextlib
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from unicodedata import normalize

from mixres.data.records import EditRecord, EmptyCaption, Picture, Problem, has_surrogate, printable, prompt_of_row

SUFFIXES = (".jsonl", ".csv")
MAX_LINE_BYTES = 2**22
ALIGN = "align_control"
_CONTROL_KEY = re.compile(r"path_control_([1-9]\d{0,3})")
_DRIVE = re.compile("[A-Za-z]:/")
_IMAGE_KEY = re.compile(rf"path_target|path_control|path_mask|{_CONTROL_KEY.pattern}")


class BadRowError(Exception):
    """One reason why a row cannot be used."""


Row = Mapping[str, Any] | BadRowError
ImageOf = Callable[[str, str, Any], Picture]


def records_from_manifest(
    manifest: Path, *, follow_symlinks: bool, empty_caption: EmptyCaption
) -> tuple[list[EditRecord], list[Problem]]:
    """All records of `manifest` in the order of its rows, and all problems (`path` is `manifest:line`)."""
    root = manifest.parent
    allowed = None if follow_symlinks else root.resolve()
    rows = (_csv_rows if manifest.suffix.lower() == ".csv" else json_rows)(manifest)
    return records_from_rows(manifest, rows, lambda _, *named: file_below(root, allowed, *named), empty_caption)


def records_from_rows(
    source: Path | str, rows: Iterable[tuple[int | str, Row]], image: ImageOf, empty_caption: EmptyCaption
) -> tuple[list[EditRecord], list[Problem]]:
    """All records of numbered rows, and all problems; `image` makes one of `source:row`, a key and its value."""
    records: list[EditRecord] = []
    problems: list[Problem] = []
    for number, row in rows:
        found = _record(f"{printable(source)}:{number}", row, image, empty_caption)
        if isinstance(found, EditRecord):
            records.append(found)
        else:
            problems += found
    return records, problems


def _record(where: str, row: Row, image: ImageOf, empty_caption: EmptyCaption) -> EditRecord | list[Problem]:
    """The record in `row`, or every reason why there is none.

    Its name is the text of `path_target` where that is text, else `where`.
    """
    if isinstance(row, BadRowError):
        return [Problem(where, str(row), example=where)]
    reasons = list(key_problems(row))
    images = {}
    for key in ["path_target", *control_keys(row), *(["path_mask"] if row.get("path_mask") is not None else [])]:
        try:
            if row.get(key) is None:
                raise BadRowError(f"has no '{key}'; add it")
            images[key] = image(where, key, row[key])
        except BadRowError as error:
            reasons.append(str(error))
    align = None
    try:
        align = _align(row)
    except BadRowError as error:
        reasons.append(str(error))
    prompt, found = prompt_of_row(where, row.get("prompt"), empty_caption)
    if reasons or found:
        problems = [*(Problem(where, reason) for reason in reasons), *found]
        return [problem._replace(example=where) for problem in problems]
    target, mask = images.pop("path_target"), images.pop("path_mask", None)
    name = printable(os.path.normpath(row["path_target"])) if isinstance(row["path_target"], str) else where
    return EditRecord(name, target, tuple(images.values()), prompt, mask, align)


def _align(row: Mapping[str, Any]) -> bool | None:
    """The value of `align_control`, which CSV has as text.

    Raises:
        BadRowError: it is neither true nor false.
    """
    given = row.get(ALIGN)
    value = {"true": True, "false": False}.get(given.lower()) if isinstance(given, str) else given
    if not isinstance(value, bool) and given is not None:
        raise BadRowError(f"'{ALIGN}' is neither true nor false; write one of them")
    return value


def column_key(columns: Mapping[str, str], *names: str) -> str | None:
    """The key of a manifest for a column of one of these names, with or without `path_`; None where nothing knows it.

    `columns`: names of columns by role, such as `target`; a role that is named there has no other column.
    """
    for name in names:
        named = next((role for role, column in columns.items() if column == name), None)
        role = named or name.removeprefix("path_")
        if role in columns and not named:
            continue
        if role in ("prompt", ALIGN):
            return role
        if _IMAGE_KEY.fullmatch(f"path_{role}"):
            return f"path_{role}"
    return None


def key_problems(row: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the keys of a row: a path that nothing knows, a gap in the controls."""
    known = {"path_target", "path_control", "path_mask"}
    for key in row:
        if key.startswith("path") and key not in known and not _CONTROL_KEY.fullmatch(key):
            paths = "path_target, path_control, path_control_1, ..., path_mask"
            yield f"unknown key '{printable(key)}'; write one of: {paths}"
    for number, key in enumerate(control_keys(row)[1:], start=1):
        if key != f"path_control_{number}":
            yield f"its control images have a gap: '{key}' without 'path_control_{number}'; number them anew"
            return


def json_rows(manifest: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers, and the object on each line that is not blank or why there is none."""
    with manifest.open("rb") as file:
        for number, line in enumerate(iter(lambda: _read_line(file), b""), start=1):
            if line.strip():
                try:
                    yield number, _parse(line)
                except BadRowError as error:
                    yield number, error


def _read_line(file: BinaryIO) -> bytes:
    """The next line; of one that is over the limit only the first bytes are kept."""
    line = rest = file.readline(MAX_LINE_BYTES + 1)
    while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = file.readline(MAX_LINE_BYTES + 1)
    return line


def _check_line(line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise BadRowError(f"the line is over {MAX_LINE_BYTES} bytes long; shorten it")
    if line.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadRowError("the file starts with a byte order mark; save it as UTF-8 without one")


def _parse(line: bytes) -> dict[str, Any]:
    _check_line(line)
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise BadRowError(f"the line is not JSON: {error.msg} (character {error.pos + 1}); correct it") from error
    except (ValueError, RecursionError) as error:  # not UTF-8; thousands of digits; brackets inside brackets
        raise BadRowError(f"the line is not JSON: {error}; correct it") from error
    if not isinstance(row, dict):
        raise BadRowError("the line is not a JSON object; write one")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise BadRowError(f"the key '{printable(key)}' stands twice; take one out")
    return row


def _csv_rows(manifest: Path) -> Iterator[tuple[int, Row]]:
    """Numbered by their first line; where the first row is no list of known columns nothing else is read."""
    with manifest.open("rb") as file:
        rows = _csv_fields(file)
        _, columns = next(rows, (1, []))
        if isinstance(columns, BadRowError):
            yield 1, columns
            return
        reasons = [BadRowError(reason) for reason in _csv_problems(columns)]
        yield from ((1, reason) for reason in reasons)
        for number, fields in rows if not reasons else ():
            if isinstance(fields, BadRowError):
                yield number, fields
            elif len(fields) == len(columns):
                yield number, {key: value or None for key, value in zip(columns, fields, strict=True)}
            elif fields:
                counts = f"the row has {len(fields)} fields, the first line names {len(columns)}"
                yield number, BadRowError(f"{counts}; quote what holds commas")


def _csv_fields(file: BinaryIO) -> Iterator[tuple[int, list[str] | BadRowError]]:
    """Line numbers, and the fields of the row that begins there, none where it is blank."""
    lines = map(_csv_line, iter(lambda: _read_line(file), b""))  # unlike a generator it goes on behind an error
    reader, refused = csv.reader(lines, strict=True), 0
    while True:
        number = reader.line_num + refused + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, BadRowError(f"the row is not CSV: {error}; quote it as RFC 4180 says")
        except BadRowError as error:
            refused += 1
            yield number, error
        else:
            bad = any(map(has_surrogate, fields))
            yield number, BadRowError("the row is not UTF-8; save it as UTF-8") if bad else fields


def _csv_line(line: bytes) -> str:
    _check_line(line)
    return line.decode("utf-8", "surrogateescape")  # quotes may hide an end of line: `_csv_fields` finds bad bytes


def _csv_problems(columns: Sequence[str]) -> Iterator[str]:
    for key in sorted({key for key in columns if columns.count(key) > 1}):
        yield f"the column '{printable(key)}' stands twice; take one out"
    yield from column_problems(columns)


def absent_columns(names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """What is wrong with `data.columns` for a table with columns of these `names`."""
    wanted = [name for name in columns.values() if name not in names]
    return [f"has no column '{printable(name)}', which data.columns names; correct it" for name in wanted]


def column_problems(columns: Sequence[str]) -> Iterator[str]:
    """What is wrong with the columns of a whole table: one that every row needs is missing, or as `key_problems`."""
    for key in ("path_target", *control_keys(dict.fromkeys(columns, ""))):
        if key not in columns:
            yield f"has no column '{key}'; add it, or rename one of: {', '.join(map(printable, columns))}"
    yield from key_problems(dict.fromkeys(columns, ""))


def control_keys(row: Mapping[str, Any]) -> list[str]:
    """The keys of a row's controls, in order: none for text to image, else the first one always."""
    given = [key for key, value in row.items() if value is not None]
    numbers = sorted(int(match[1]) for key in given if (match := _CONTROL_KEY.fullmatch(key)))
    first = ["path_control"] if numbers or "path_control" in given else []
    return first + [f"path_control_{number}" for number in numbers]


def file_below(
    root: Path, allowed: Path | None, key: str, value: Any, *, fix: str = "set data.follow_symlinks=true"
) -> Path:
    """The file that `value` names, checked to lie below `root`.

    A link may not lead out of `allowed` (None: it may), `fix` says what then; the text of the path never leads out of
    `root`.

    Raises:
        BadRowError: it does not, or is no file that can be had.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"'{key}' is not a path; write one in quotes")
    shown = f"'{key}': {printable(value)}"
    if "\0" in value or has_surrogate(value):
        raise BadRowError(f"{shown} holds characters that no path has; correct it")
    value = _with_slashes(root, value)
    if Path(value).is_absolute() or _DRIVE.match(value) or Path(os.path.normpath(value)).parts[:1] == ("..",):
        raise BadRowError(f"{shown} is not below the manifest's folder; move it there")
    try:
        path = _existing(root, value)
        if allowed is not None and not path.resolve().is_relative_to(allowed):
            raise BadRowError(f"{shown} is a link out of the manifest's folder; {fix}")
        if not path.is_file():
            raise BadRowError(f"{shown} is not a local file; correct the path")
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, no permission
        reason = getattr(error, "strerror", None) or error
        raise BadRowError(f"{shown} cannot be opened: {reason}; make it readable, or correct the path") from error
    return path


def _with_slashes(root: Path, value: str) -> str:
    """A path as Windows writes it, readable on every system; other systems allow backslashes in names too."""
    with contextlib.suppress(OSError):  # a name too long: reported where the file is opened
        if "\\" in value and not _existing(root, value).exists():
            return value.replace("\\", "/")
    return value


def _existing(root: Path, value: str) -> Path:
    """The path as written, or in the Unicode form in which it exists (macOS writes NFD, most editors NFC)."""
    path = root / value
    if path.exists() or value.isascii():
        return path
    forms = (root / normalize(form, value) for form in ("NFC", "NFD"))
    return next((form for form in forms if form.exists()), path)
