"""What one training example is on disk, and what is wrong with one. No pixel is read here.

Promise: every name a message shows is one printable line; a caption is valid UTF-8 or a reason is given.
Cost: one small read a caption.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from mixres.errors import one_line

EmptyCaption = Literal["error", "use_empty", "skip"]
MAX_CAPTION_BYTES = 2**20
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class Status(Protocol):
    """What of a file's state tells that its bytes are those of an earlier look; `os.stat_result` is one."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...
    @property
    def st_ino(self) -> int: ...


class Picture(Protocol):
    """An encoded picture: a `Path`, or one that lies in a larger file and is read like a path."""

    def stat(self) -> Status: ...
    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class EditRecord:
    """Pictures of one example. Paths are as found on disk, their Unicode form untouched."""

    name: str  # of the target, relative to its source; printable, for messages
    target: Picture
    controls: tuple[Picture, ...]
    prompt: str
    mask: Picture | None = None


class Problem(NamedTuple):
    """One thing that keeps an example, or a file that should belong to one, from being used."""

    path: str
    reason: str
    skip: bool = False  # the configuration already says to leave this example out: list it, do not stop for it
    example: str | None = None  # the name of the one that it keeps from being used; None for a file that has none

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadCaptionError(ValueError):
    """This caption cannot be used; the message is the reason."""


def printable(path: Picture | str) -> str:
    """`path` on one line: a newline, a control character or a byte that is not UTF-8 shows as its escape."""
    return one_line(str(path))


def read_caption(path: Path) -> str:
    """The caption in a file, without white space around it.

    Raises:
        BadCaptionError: not plain UTF-8 text, or longer than `MAX_CAPTION_BYTES`; or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise BadCaptionError(f"the caption cannot be read: {error.strerror}; make it readable") from error
    if len(data) > MAX_CAPTION_BYTES:
        raise BadCaptionError(f"the caption is over {MAX_CAPTION_BYTES} bytes long; shorten it")
    if data.startswith(BYTE_ORDER_MARKS):
        raise BadCaptionError("the caption starts with a byte order mark; save it as UTF-8 without one")
    try:
        return check_caption(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadCaptionError(f"the caption is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def check_caption(text: str) -> str:
    """`text` without white space around it.

    Raises:
        BadCaptionError: it holds a NUL, a byte order mark or half of a surrogate pair, or is longer than
            `MAX_CAPTION_BYTES`.
    """
    if "\0" in text:
        raise BadCaptionError("the caption holds a NUL character; take it out")
    if "\ufeff" in text:
        raise BadCaptionError(f"the caption holds a byte order mark (character {text.index(chr(0xFEFF))}); take it out")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadCaptionError(f"the caption is not valid Unicode (character {error.start}); write it anew") from error
    if size > MAX_CAPTION_BYTES:
        raise BadCaptionError(f"the caption is over {MAX_CAPTION_BYTES} bytes long; shorten it")
    return text.strip()


def empty_caption_problem(path: str, what: str, policy: EmptyCaption) -> Problem | None:
    """The problem of an example whose caption is `what` (empty, missing), None where `policy` uses the empty prompt."""
    if policy == "use_empty":
        return None
    fix = "write one, or set data.empty_caption to use_empty or skip"
    return Problem(path, f"{what}; {fix}", skip=True) if policy == "skip" else Problem(path, f"{what}; {fix}")
