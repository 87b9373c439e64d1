"""The run folder: one writer at a time, a status that others can read, and an orderly end after a signal.

Promise: `run_status.json` records how a run ended even where a launcher hides its exit code; a second writer never
touches it. SIGTERM, SIGINT, SIGUSR1 and the death of the launcher ask for the same: finish the step, save, end.
Cost: one lock and a few small writes a run.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

from filelock import FileLock, Timeout

from mixres import atomic
from mixres.console import log
from mixres.errors import Stopped, UserError

STATUS, METRICS, LOCK = "run_status.json", "metrics.jsonl", ".lock"
_LOCK_WAIT_S = 40.0  # a launcher may return while its trainer is still saving
_SILENT_S = 1.0
_ONE_REQUEST_S = 0.2  # signals this near together are one: a launcher sends on what a process group has already got
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # what torchrun and accelerate launch set
_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1  # Linux, see prctl(2)
# Those that this system has: Windows has SIGINT and SIGTERM.
_DEATH, _CHILD = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGCHLD"))


class StopOnSignal:
    """Within it SIGTERM, SIGINT, SIGUSR1 and the death of the launcher raise `Stopped` with `reason`.

    A second SIGTERM or SIGINT ends the process at once.
    """

    def __init__(self, reason: str) -> None:
        self.stop_requested = False
        self._reason, self._stop_at_once, self._asked_at = reason, True, 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in filter(None, (signal.SIGTERM, signal.SIGINT, _DEATH)):
            self._handlers[number] = signal.signal(number, self._on_signal)
        if end_with_launcher() and _DEATH:
            self._handlers[_DEATH] = signal.SIG_IGN  # it may still come while the process is ending
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested:
            if number != _DEATH and time.monotonic() - self._asked_at > _ONE_REQUEST_S:
                os._exit(128 + number)  # the second one: at once, without touching a file
            return
        self.stop_requested, self._asked_at = True, time.monotonic()
        if self._stop_at_once:
            raise Stopped(self._reason)


class RunFolder(StopOnSignal):
    """Holds the lock on `folder` and keeps its `run_status.json`; only the process of rank 0 does either.

    Raises:
        UserError: another process writes there, and did not stop within `wait_s` seconds (40 by default).
    """

    def __init__(
        self, folder: Path, *, verb: str, max_train_steps: int, rank: int, wait_s: float = _LOCK_WAIT_S
    ) -> None:
        super().__init__("stopped by a signal before the first step: run the same command to resume")
        self.folder, self.is_main = folder, rank == 0
        self._wait_s = wait_s
        self._lock = FileLock(folder / LOCK)
        now = time.time()
        self._status: dict[str, Any] = {
            "state": "running",
            "exit_code": None,
            "reason": None,
            "verb": verb,
            "step": 0,
            "max_train_steps": max_train_steps,
            "done_before": None,  # the step that the last run in the folder ended with, until a step is trained
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now,
            "updated": now,
        }

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            if self.is_main:
                self._take_folder()
        except BaseException:
            self._let_go()
            raise
        return self

    def _take_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            before = self._read()
            self._status["done_before"] = before.get("step" if before.get("state") == "done" else "done_before")
            self._write()
        except Timeout:
            raise UserError(
                f"logging.output_dir: {self.folder} is in use by {self._holder()}: wait, or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"logging.output_dir: {self.folder} cannot be written: {error.strerror or error}; name another"
            ) from error

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=min(_SILENT_S, self._wait_s))
        except Timeout:
            log(f"waiting   up to {self._wait_s:.0f} s for {self._holder()}, which writes to {self.folder}")
            self._lock.acquire(timeout=self._wait_s)

    def _let_go(self) -> None:
        self._lock.release()
        super().__exit__(None, None, None)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        state, code = _ending(error)
        # Torch raises from a signal handler when a worker of its loader has died, wherever the process is just then.
        handler = signal.signal(_CHILD, signal.SIG_DFL) if _CHILD else None
        try:
            self.update(state=state, exit_code=code, reason=None if error is None else str(error) or repr(error))
        finally:
            if _CHILD:
                signal.signal(_CHILD, handler or signal.SIG_DFL)
        self._let_go()

    def update(self, **changes: Any) -> None:
        """Write the status with `changes`; where it cannot be written the run continues without."""
        self._status |= {**changes, "updated": time.time()}
        try:
            if self.is_main:
                self._write()
        except OSError as error:
            _log.warning("%s could not be written: %s", self.folder / STATUS, error.strerror or error)

    def _write(self) -> None:
        atomic.write_json(self.folder / STATUS, self._status)

    def was_done(self, step: int) -> bool:
        """Whether the last run that trained in the folder finished at `step` and wrote its result."""
        return bool(self._status["done_before"] == step)

    def stop_between_steps(self) -> None:
        """From here on a signal sets `stop_requested`; up to here it ends the run at once, as nothing can be saved."""
        self._stop_at_once = False
        self._status["done_before"] = None

    def _read(self) -> dict[str, Any]:
        try:
            status = json.loads((self.folder / STATUS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def _holder(self) -> str:
        status = self._read()
        return f"process {status['pid']} on {status['host']}" if {"pid", "host"} <= status.keys() else "another process"


def end_with_launcher() -> bool:
    """Whether a launcher started this process. One that is killed leaves its processes behind: they get SIGUSR1 then.

    It ends a process at once, unless an open `RunFolder` or `StopOnSignal` takes it. Call it early: a launcher
    that died before is not noticed. Where there is no prctl nothing is sent.
    """
    launched = any(name in os.environ for name in LAUNCHERS)
    if launched and _DEATH and hasattr(os, "fork"):  # where there is no fork, no handle stands for the process itself
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(_DEATH), 0, 0, 0)
    return launched


def _ending(error: BaseException | None) -> tuple[str, int]:
    if error is None:
        return "done", 0
    if isinstance(error, Stopped):
        return "preempted", Stopped.exit_code
    return ("refused", 2) if isinstance(error, UserError) else ("failed", 1)
