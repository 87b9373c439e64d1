"""The two ways a run ends that are no bug: the user's input is wrong, or the work could not be done.

Promise: a message is always exactly one printable line, whatever file name or value stands in it. Cost: none.
"""

from collections.abc import Sequence


def one_line(text: str) -> str:
    """`text` with every unprintable character (line ends, escape codes, lone surrogates) written as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


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


class WorkError(Exception):
    """Failed at work: the input was right, the work could not be done. The command line prints one line and exits 1."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Stopped(Exception):  # noqa: N818 - no error: the run was asked to stop and has saved
    """A signal came and the run saved itself. The command line exits 75: the same command goes on."""

    exit_code = 75
