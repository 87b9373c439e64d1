"""A run as its folder has it, whatever state it is in.

Promise: what is damaged, half written or not there is left out, never an error; images and texts of links that lead
out of the folder are not shown.
Cost: one pass over `metrics.jsonl`, no torch; the trainer is not asked.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mixres.config.load import FROZEN
from mixres.errors import UserError
from mixres.training.run_folder import LOCK, METRICS, STATUS

Line = Mapping[str, Any]
PAGE = "report.html"
_SIGNS = (STATUS, METRICS, FROZEN, "reports")  # of a run folder, each where something was done in it
_LARGEST = 1e300  # beyond it a number is none
_NOT_LISTED = (PAGE, "samples", "checkpoints", "wandb")  # shown in another way, or another program's


@dataclass(frozen=True)
class Run:
    """What is in a run folder. `state` is that of the status file; some that are `running` there are `killed`.

    Of those on another machine nothing is known: they are `elsewhere`.
    """

    folder: Path
    state: str
    status: Line = field(default_factory=dict)
    steps: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    grids: list[tuple[int, Path]] = field(default_factory=list)
    checkpoints: list[tuple[str, int, float]] = field(default_factory=list)  # name, bytes, time

    @property
    def last(self) -> int:
        """The last step that was done."""
        return int(self.steps[-1]["step"]) if self.steps else int(number(self.status, "step") or 0)

    @property
    def happened(self) -> str:
        """What a reader has to know first, in one sentence."""
        resumes = "; the same command resumes" if self.checkpoints else ""
        where = f"process {self.status.get('pid')} on {self.status.get('host')}"
        reason = str(self.status.get("reason") or "no reason was written")
        wrote = f"the last file was written {moment(self.written)}"
        before = number(self.status, "done_before")
        kept = f", which had {before:,.0f} steps before" if before else ""
        return {
            "done": f"Done: {self.last:,} steps.",
            "failed": f"Failed after step {self.last:,}: {reason}",
            "refused": f"Refused, nothing was trained by this start{kept}: {reason}",
            "preempted": f"Stopped: {reason}",
            "running": f"Running as {where}; {wrote}.",
            "killed": f"Killed: {where} ended after step {self.last:,} without writing why; {wrote}{resumes}.",
            "elsewhere": f"Recorded as running: {where}, which cannot be asked from here; {wrote}.",
        }.get(self.state, "No run was started in this folder.")

    @property
    def written(self) -> float:
        """When anything was last written."""
        times = [number(self.status, "updated") or 0.0]
        with contextlib.suppress(OSError):
            times.append((self.folder / METRICS).stat().st_mtime)
        return max(times)

    def files(self) -> list[tuple[str, int, float]]:
        """Every other file with its bytes and time: those of a checkpoint or of another program are not among them."""
        found = []
        for path in inside(self.folder, "*", "reports/*", "ema/*", "transformer/*"):
            if path.name.startswith(".") or path.relative_to(self.folder).parts[0] in _NOT_LISTED:
                continue
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((path.relative_to(self.folder).as_posix(), status.st_size, status.st_mtime))
        return sorted(found)

    def text(self, name: str) -> str | None:
        """The text of a file in the folder."""
        try:
            return next(inside(self.folder, name)).read_text(encoding="utf-8", errors="replace")
        except (OSError, StopIteration):
            return None


def check_run(folder: Path) -> Path:
    """The folder itself. One with nothing in it is that of a run that has still to be started.

    Raises:
        UserError: it is none, or none of a run.
    """
    try:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: name logging.output_dir of a run that has been started")
        others = {path.name for path in folder.iterdir()} - {PAGE}
        if others and others.isdisjoint(_SIGNS):
            raise UserError(f"{folder}: no run folder, it has none of {', '.join(_SIGNS)}: name logging.output_dir")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; name a run folder") from error
    return folder


def read_run(folder: Path) -> Run:
    """What is in `folder` now."""
    status = read_status(folder)
    steps: dict[int, Line] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for line in _lines(folder / METRICS):
        if "loss" in line:
            steps[line["step"]] = line
        else:  # evaluation and drift of a step are lines of their own
            evaluations.setdefault(line["step"], {}).update(line)
    grids = [(int(path.stem[5:]), path) for path in inside(folder, "samples/step-*.png") if path.stem[5:].isdecimal()]
    return Run(
        folder,
        state_of(folder, status),
        status,
        [steps[step] for step in sorted(steps)],
        [evaluations[step] for step in sorted(evaluations)],
        sorted(grids),
        list(_checkpoints(folder)),
    )


def number(line: Line, key: str) -> float | None:
    """The finite number that `line` has at `key`."""
    value = line.get(key)
    valid = isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
    return value if valid else None


def column(lines: list[Line], key: str) -> np.ndarray:
    """The values of one key, NaN where a line has none."""
    return np.array([np.nan if (value := number(line, key)) is None else value for line in lines], dtype=float)


def moment(seconds: float) -> str:
    """A time as the clock on this machine's wall has it."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "never"
    except (OverflowError, OSError, ValueError):
        return "at no time"


def read_status(folder: Path) -> Line:
    """What the status file holds, nothing where there is none."""
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def state_of(folder: Path, status: Line) -> str:
    """The state in the status file, unless the process that wrote `running` is gone."""
    state = str(status.get("state", ""))
    if state != "running" or _is_locked(folder):
        return state
    return "killed" if status.get("host") == socket.gethostname() else "elsewhere"  # locks may end at a machine


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the lock. A trainer that starts at this very instant tries once more."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            return False
    except (Timeout, OSError):  # the latter where only others may write: it is as the status has it
        return True


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for row in text.splitlines():
        with contextlib.suppress(
            ValueError, RecursionError
        ):  # a row that is just being written, or that a kill cut short
            line = json.loads(row)
            if isinstance(line, dict) and type(step := line.get("step")) is int and 0 <= step < 2**53:
                yield line


def inside(folder: Path, *patterns: str) -> Iterator[Path]:
    """The files of the folder by their names; a link to a file outside is none."""
    root = folder.resolve()
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with contextlib.suppress(OSError):
            if path.is_file() and path.resolve().is_relative_to(root):
                yield path


def _checkpoints(folder: Path) -> Iterator[tuple[str, int, float]]:
    for path in sorted((folder / "checkpoints").glob("step-*")):
        with contextlib.suppress(OSError):  # just deleted
            yield path.name, sum(entry.stat().st_size for entry in os.scandir(path)), path.stat().st_mtime
