"""A record is the files of one training sample on disk. No pixel is read here.

Promise: every name a message shows is one printable line; a caption is valid UTF-8 or a reason is given.
Cost: one small read a caption.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from mixres.errors import one_line

EmptyCaption = Literal["error", "use_empty", "skip"]
MAX_CAPTION_BYTES = 2**20
SETTLED_NS = 2_000_000_000  # a file that was written to less than this ago may change again under the same time


class EmbeddedStatus(NamedTuple):
    """The state of an image that lies in larger files: its own size, and the times and inode of those files."""

    st_mode: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_ino: int


Status = os.stat_result | EmbeddedStatus  # a file of the same state as before has the same bytes


def is_settled(status: Status, now_ns: int | None = None) -> bool:
    """Whether a later write would have other times than these."""
    return max(status.st_mtime_ns, status.st_ctime_ns) + SETTLED_NS < (now_ns or time.time_ns())


@contextmanager
def collector_paused() -> Iterator[None]:
    """A million records are no garbage: while they are made, Python's collector would look at them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Picture(Protocol):
    """An encoded image: a `Path`, or one that lies in a larger file and is read like a path."""

    def stat(self) -> Status: ...
    def read_bytes(self) -> bytes: ...


class ReadOnce:
    """A picture whose bytes are read once and kept, to be hashed and decoded."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture

    def __str__(self) -> str:
        return str(self._picture)

    def stat(self) -> Status:
        return self._picture.stat()

    def read_bytes(self) -> bytes:
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        return self._picture.read_bytes()


class EditRecord(NamedTuple):
    """The images and the prompt of one sample. Paths are as found on disk, their Unicode form untouched."""

    name: str  # of the target, relative to its source; printable, for messages
    target: Picture
    controls: tuple[Picture, ...]
    prompt: str
    mask: Picture | None = None
    align_control: bool | None = None  # instead of `data.resize.control.align`, for all its controls


class Problem(NamedTuple):
    """One thing that keeps a record, or a file that should belong to one, from being used."""

    path: str
    reason: str
    skip: bool = False  # the configuration already says to leave this record out: list it, do not stop for it
    example: str | None = None  # name of the record that cannot be used; None for a file that belongs to none
    passing: bool = False  # the next scan may not find it

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadCaptionError(ValueError):
    """This caption cannot be used; the message is the reason."""


def printable(path: object) -> str:
    """`path` on one line: a newline, a control character or a byte that is not UTF-8 shows as its escape."""
    return one_line(str(path))


def has_surrogate(text: str) -> bool:
    """Whether `text` is no valid Unicode; Python stands a lone surrogate for each byte that is not UTF-8."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def read_caption(path: Path) -> str:
    """The caption in a file, without white space around it.

    Raises:
        BadCaptionError: as `check_caption`; or the file is over `MAX_CAPTION_BYTES` long, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise BadCaptionError(f"the caption cannot be read: {error.strerror}; make it readable") from error
    if len(data) > MAX_CAPTION_BYTES:
        raise BadCaptionError(f"the caption is over {MAX_CAPTION_BYTES} bytes long; shorten it")
    return check_caption(data.decode("utf-8", "surrogateescape"))


def check_caption(text: str) -> str:
    """`text` without white space around it.

    Raises:
        BadCaptionError: it holds a NUL, a byte order mark or what is no valid Unicode.
    """
    if has_surrogate(text):
        raise BadCaptionError("the caption is not UTF-8; save it as UTF-8")
    if "\0" in text:
        raise BadCaptionError("the caption holds a NUL character; take it out")
    if "\ufeff" in text:
        raise BadCaptionError(f"the caption holds a byte order mark (character {text.index(chr(0xFEFF))}); take it out")
    return text.strip()


def prompt_of_file(target: Path, caption: Path | None, policy: EmptyCaption) -> tuple[str, list[Problem]]:
    """The text of the caption file of `target`, or the problem of one that is bad, or empty against `policy`."""
    if caption is None:
        return _prompt(printable(target), str, policy, if_empty=f"has no caption file {printable(target.stem)}.txt")
    return _prompt(printable(caption), partial(read_caption, caption), policy, if_empty="the caption is empty")


def prompt_of_row(where: str, given: Any, policy: EmptyCaption) -> tuple[str, list[Problem]]:
    """The prompt that the row `where` gives, or its problem, as `prompt_of_file`."""
    if given is None or isinstance(given, str):
        if_empty = "has no prompt" if given is None else "the prompt is empty"
        return _prompt(where, partial(check_caption, given or ""), policy, if_empty=if_empty)
    return "", [Problem(where, "'prompt' is not a string; write it in quotes")]


def _prompt(where: str, read: Callable[[], str], policy: EmptyCaption, *, if_empty: str) -> tuple[str, list[Problem]]:
    try:
        prompt = read()
    except BadCaptionError as error:
        return "", [Problem(where, str(error))]
    if prompt or policy == "use_empty":
        return prompt, []
    fix = "write one, or set data.empty_caption to use_empty or skip"
    return "", [Problem(where, f"{if_empty}; {fix}", skip=policy == "skip")]
