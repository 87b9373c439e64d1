"""`train.py` as it finds Windows: without what POSIX alone has, and with worker processes that start from nothing.

What is taken away is taken from mixres, whose code must not ask for it. Libraries have branches of their own for each
system; those for this one still run.
"""

import builtins
import errno
import functools
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

ABSENT = {
    "fcntl", "grp", "pty", "pwd", "resource", "termios", "tty",
    "os.fork", "os.killpg", "os.pread", "os.pwrite", "os.sched_getaffinity", "os.statvfs",
    "signal.SIGCHLD", "signal.SIGKILL", "signal.SIGUSR1", "signal.SIGUSR2",
}  # fmt: skip
MODULES = {"os": os, "signal": signal}


def of_mixres(depth: int) -> bool:
    return sys._getframe(depth + 1).f_globals.get("__name__", "").startswith("mixres")


def without_posix(own_import: Any) -> Any:
    @functools.wraps(own_import)
    def imported(name: str, *rest: Any, **words: Any) -> Any:
        if of_mixres(1) and name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        module = own_import(name, *rest, **words)
        if of_mixres(1) and name in MODULES:
            return Part(module)
        return module

    return imported


class Part:
    """A module of Python's own without the names that are absent."""

    def __init__(self, module: Any) -> None:
        self.__module = module

    def __getattr__(self, name: str) -> Any:
        if f"{self.__module.__name__}.{name}" in ABSENT:
            raise AttributeError(f"module {self.__module.__name__!r} has no attribute {name!r}")
        return "nt" if (self.__module, name) == (os, "name") else getattr(self.__module, name)


def no_link(self: Path, *_: Any, **__: Any) -> None:
    raise OSError(errno.EINVAL, "A required privilege is not held by the client", str(self))


own_open = os.open


def no_directory(path: Any, *rest: Any, **words: Any) -> int:
    if of_mixres(1) and os.path.isdir(path):  # noqa: PTH112 - as os.open takes it
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return own_open(path, *rest, **words)


builtins.__import__ = without_posix(builtins.__import__)
os.open = no_directory
Path.symlink_to = no_link  # type: ignore[method-assign]
if multiprocessing.get_start_method(allow_none=True) is None:
    multiprocessing.set_start_method("spawn")

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    from mixres.cli import main

    sys.exit(main())
