"""The two ways a run ends that are no bug: the user's input is wrong, or the work could not be done.

Promise: a message is always exactly one printable line, whatever file name or value stands in it.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def one_line(text: str) -> str:
    """`text` with every unprintable character (line ends, escape codes, lone surrogates) written as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def without_secrets(text: str) -> str:
    """`text` whose URLs have lost user, password and query string, as signed ones hold keys there.

    A password may hold slashes, as those of AWS do.
    """
    user = r"(https?://)[^\s'\"]*@|(\w://)(?:[^\s/'\"]*|[^\s/'\"]*:[^\s'\"]*)@"
    text = re.sub(user, r"\1\2***@", text, flags=re.IGNORECASE)
    query = r"(https?://[^\s?'\"]*|\w://[^\s?'\"]*(?=\?[^\s'\")\]]*=))\?[^\s'\")\]]*"
    return re.sub(query, r"\1?***", text, flags=re.IGNORECASE)


def did_you_mean(word: str, known: Iterable[str], what: str = "") -> str:
    """The end of a message that names what is spelt nearly as `word`, with `what` it is; empty if none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {what}'{close[0]}'?" if close else ""


class UserError(Exception):
    """Wrong input: configuration, data or arguments. The command line prints each message and exits 2.

    Every message names the key, file or sample and what fixes it; all problems found together are raised together.
    """

    def __init__(self, messages: Sequence[str] | str) -> None:
        lines = [messages] if isinstance(messages, str) else messages
        assert lines, "an error without a message"
        self.messages: tuple[str, ...] = tuple(one_line(line) for line in lines)
        super().__init__(self.messages)

    def __str__(self) -> str:
        return "\n".join(self.messages)


class Problems:
    """Collects everything that is wrong with an input, so that one `UserError` names it all."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines = list(lines)

    def add(self, *lines: str) -> None:
        """Note messages; one that is already there is raised once."""
        self.lines += lines

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note the messages of a `UserError` that ends the block; what follows the block runs in any case."""
        try:
            yield
        except UserError as error:
            self.add(*error.messages)

    def collect(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `make` returns; None where it raises `UserError`, whose messages are noted."""
        try:
            return make(*args, **kwargs)
        except UserError as error:
            self.add(*error.messages)
            return None

    def raise_if_any(self) -> None:
        """Raise all that was noted, each message once, in the order of the calls.

        Raises:
            UserError: there is a problem.
        """
        if self.lines:
            raise UserError(list(dict.fromkeys(self.lines)))


class WorkError(Exception):
    """Failed at work: the input was right, the work could not be done. The command line prints one line and exits 1."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Stopped(BaseException):
    """A signal came and the run saved itself. The command line exits 75: the same command resumes.

    It is raised wherever the process is, as `KeyboardInterrupt`; nothing that handles errors takes it for one.
    """

    exit_code = 75
