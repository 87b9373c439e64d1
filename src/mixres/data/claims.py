"""Which process encodes which entry: locks on single bytes of one file, one byte for each key.

Promise: no two living processes hold the claim of one key, and a claim ends with its process, however that ends. Cost:
two system calls a claim. On a network file system its locks must be on, as the lock of the index needs them too.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLAIMS = ".claims.lock"  # stays empty: a lock may lie behind the end of a file


class Claims:
    """The claims on entries of the cache at `root`, which must exist. One object a process: closing a file drops all
    locks that the process has on it.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self._file = (root / CLAIMS).open("ab", buffering=0)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the entry `key` is this process's to encode until the block ends; False where another has it.

        Raises:
            OSError: the file system has no locks.
        """
        byte = int(key[:15], 16)  # 60 bits, a valid offset; two keys on one byte would only wait for each other
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # systems differ in how they say that it is taken
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte, os.SEEK_SET)

    def close(self) -> None:
        self._file.close()
