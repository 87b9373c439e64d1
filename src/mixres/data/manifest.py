"""A JSONL manifest -> records: one object a line with `path_target`, `path_control`, `path_control_1`, ..., `prompt`.

Promise: no line makes mixres open a file outside the manifest's folder, or anything that is not a file; every line is
a record or is named with every reason why not; records keep the order of the lines. Cost: one pass, one `stat` a path.

Paths are relative to the manifest. `path_mask` is optional. Other keys are left alone, except ones that look like a
path.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unicodedata import normalize

from mixres.data.records import (
    BadCaptionError,
    EditRecord,
    EmptyCaption,
    Fault,
    check_caption,
    empty_caption_fault,
    printable,
)

MAX_LINE_BYTES = 2**22
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(data|file|http|https|ftp|s3|gs|hf):", re.IGNORECASE)
_CONTROL_KEY = re.compile(r"path_control_([1-9]\d{0,3})")


class _BadRowError(ValueError):
    """One reason why a line cannot be used."""


def records_from_manifest(
    manifest: Path, *, follow_symlinks: bool, empty_caption: EmptyCaption
) -> tuple[list[EditRecord], list[Fault]]:
    """All examples of `manifest` in the order of its lines, and all faults (`path` is `manifest:line`)."""
    records, faults = [], []
    allowed = None if follow_symlinks else manifest.parent.resolve()
    for number, line in _lines(manifest):
        where = f"{printable(manifest)}:{number}"
        try:
            row = _parse(line)
        except _BadRowError as error:
            faults.append(Fault(where, str(error)))
            continue
        record, found = _record(manifest.parent, allowed, row, where, empty_caption)
        faults += found
        if record:
            records.append(record)
    return records, faults


def _lines(manifest: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; of a line over the limit only its first bytes are kept."""
    with manifest.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            if line.strip():
                yield number, line


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _BadRowError(f"the line is over {MAX_LINE_BYTES} bytes long")
    if line.startswith(b"\xef\xbb\xbf"):
        raise _BadRowError("the file starts with a byte order mark; save it as UTF-8 without one")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _BadRowError(f"the line is not UTF-8 (byte {error.start})") from error
    except _BadRowError:
        raise
    except json.JSONDecodeError as error:
        raise _BadRowError(f"the line is not JSON: {error.msg} (character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise _BadRowError(f"the line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _BadRowError("the line is not a JSON object")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _BadRowError(f"the key '{printable(next(k for k in keys if keys.count(k) > 1))}' stands twice")
    return row


def _record(
    root: Path, allowed: Path | None, row: Mapping[str, Any], where: str, empty_caption: EmptyCaption
) -> tuple[EditRecord | None, list[Fault]]:
    reasons: list[str] = []

    def path_of(key: str) -> Path:
        try:
            return _resolve(root, allowed, key, row.get(key))
        except _BadRowError as error:
            reasons.append(str(error))
            return root

    reasons += _key_faults(row)
    target = path_of("path_target")
    numbered = _numbered_controls(row)
    has_controls = bool(numbered) or row.get("path_control") is not None  # text to image has none
    controls = tuple(path_of(key) for key in ["path_control", *numbered]) if has_controls else ()
    mask = path_of("path_mask") if row.get("path_mask") is not None else None
    faults = [Fault(where, reason) for reason in reasons]
    prompt, fault = _prompt(row.get("prompt"), where, empty_caption)
    faults += [fault] if fault else []
    if faults:
        return None, faults
    name = printable(os.path.relpath(target, root))
    return EditRecord(name=name, target=target, controls=controls, prompt=prompt, mask=mask), []


def _prompt(value: Any, where: str, empty_caption: EmptyCaption) -> tuple[str, Fault | None]:
    if value is None:
        return "", empty_caption_fault(where, "has no prompt", empty_caption)
    if not isinstance(value, str):
        return "", Fault(where, "'prompt' is not a string")
    try:
        prompt = check_caption(value)
    except BadCaptionError as error:
        return "", Fault(where, str(error))
    return prompt, None if prompt else empty_caption_fault(where, "the prompt is empty", empty_caption)


def _numbered_controls(row: Mapping[str, Any]) -> list[str]:
    numbers = [int(match[1]) for key in row if (match := _CONTROL_KEY.fullmatch(key)) and row[key] is not None]
    return [f"path_control_{number}" for number in sorted(numbers)]


def _key_faults(row: Mapping[str, Any]) -> Iterator[str]:
    known = {"path_target", "path_control", "path_mask"}
    for key in row:
        if key.startswith("path") and key not in known and not _CONTROL_KEY.fullmatch(key):
            yield f"unknown key '{printable(key)}'; paths are path_target, path_control, path_control_1, ..., path_mask"
    present = _numbered_controls(row)
    for number, key in enumerate(present, start=1):
        if key != f"path_control_{number}":
            yield f"its control images have a gap: '{key}' without 'path_control_{number}'"
            return


def _resolve(root: Path, allowed: Path | None, key: str, value: Any) -> Path:
    """The file that `value` names, checked to lie below `root`.

    A link may not lead out of `allowed` (None: it may); the text of the path never leads out of `root`.
    """
    if value is None:
        raise _BadRowError(f"has no '{key}'")
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f"'{key}' is not a path")
    shown = f"'{key}': {printable(value)}"
    if _URL.match(value):
        raise _BadRowError(f"{shown} is a URL; mixres reads local files only")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise _BadRowError(f"{shown} holds characters that no path has")
    if Path(value).is_absolute() or Path(os.path.normpath(value)).parts[:1] == ("..",):
        raise _BadRowError(f"{shown} is not below the manifest's folder")
    try:
        path = _existing(root, value)
        if allowed is not None and not path.resolve().is_relative_to(allowed):
            raise _BadRowError(f"{shown} is a link out of the manifest's folder; set data.follow_symlinks=true")
        if not path.exists():
            raise _BadRowError(f"{shown} does not exist")
        if not path.is_file():
            raise _BadRowError(f"{shown} is not a file")
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, no permission
        raise _BadRowError(f"{shown} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    return path


def _existing(root: Path, value: str) -> Path:
    """The path as written, or in the Unicode form in which it exists (macOS writes NFD, most editors NFC)."""
    path = root / value
    if path.exists() or value.isascii():
        return path
    forms = (root / normalize(form, value) for form in ("NFC", "NFD"))
    return next((form for form in forms if form.exists()), path)
