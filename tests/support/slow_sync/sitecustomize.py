"""A slow disk, for processes that have this folder on PYTHONPATH: every fsync takes `SLOW_SYNC_S` seconds longer."""

import os
import time

_fsync, _seconds = os.fsync, float(os.environ.get("SLOW_SYNC_S", "0"))


def _slow(descriptor: int) -> None:
    time.sleep(_seconds)
    _fsync(descriptor)
    time.sleep(_seconds)


os.fsync = _slow
