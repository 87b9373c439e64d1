"""Files that are whole or absent: write a temporary neighbour, fsync it, rename it over, fsync the directory.

Promise: after a kill or a power cut at any instant the path holds its old content or its new content, never a part of
either. Cost: two fsyncs a file. A killed writer may leave a temporary file; every one starts with `TMP_PREFIX`.
"""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TMP_PREFIX = ".tmp-"


@contextmanager
def replace(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`: the block writes it, leaving the block makes it `path`.

    The directory must exist. The temporary name has a fixed length, so a name of 255 bytes can be replaced too.

    Raises:
        OSError: the disk is full, or the directory cannot be written; it names `path` where the system names no file.
            The temporary file is removed first.
    """
    path = Path(path)
    digest = hashlib.blake2s(os.fsencode(path.name), digest_size=4).hexdigest()
    tmp = path.with_name(f"{TMP_PREFIX}{digest}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield tmp
        with tmp.open("rb+") as file:
            os.fsync(file.fileno())
        tmp.replace(path)
    except OSError as error:
        if error.errno and error.filename is None:  # a write knows its descriptor only
            error.filename = str(path)
        raise
    finally:
        tmp.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Make `data` the content of `path`."""
    with replace(path) as tmp:
        tmp.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Make `text`, as UTF-8 with its line ends untouched, the content of `path`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, obj: Any, *, indent: int | None = 2) -> None:
    """Make `obj` as JSON, readable in every script, the content of `path`.

    Raises:
        TypeError, ValueError: `obj` holds something that JSON has no form for, NaN and infinity included.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (a file name that is not UTF-8) becomes \udcXX, which is also how JSON spells it.
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


def sweep(folders: Iterable[Path], max_age: float) -> int:
    """Delete the temporary files that killed writers left there more than `max_age` seconds ago; returns how many."""
    removed = 0
    for path in (path for folder in folders for path in folder.glob(f"{TMP_PREFIX}*")):
        try:
            if time.time() - path.stat().st_mtime > max_age:
                path.unlink()
                removed += 1
        except OSError:  # another process swept it, or the disk is read-only
            continue
    return removed


def own_name(suffix: str) -> str:
    """A file name that no other process, on this machine or another, gives: no lock is needed to write it."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{os.urandom(4).hex()}{suffix}"


def sync_directory(path: Path | str) -> None:
    """Put the names in directory `path` on disk. Windows opens no directory, and writes names by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
