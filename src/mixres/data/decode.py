"""Facts of every image of a scan: from the memo where it is unchanged, else decoded, by all ranks together.

Promise: the facts are those that one process would find. No rank waits for another: each decodes its own share and
writes what it found into the memo's folder, then takes what the others have written there and decodes what is still
missing, so a dead rank stops nobody, and ranks that share no folder decode everything each. Cost: on threads, as Pillow
releases the GIL while it decodes; what another rank has decoded in its last `SAVE_S` seconds may be decoded twice.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

from mixres.console import counted
from mixres.data.images import BadImageError, ImageFacts, Limits, inspect_image
from mixres.data.objects import is_url
from mixres.data.records import collector_paused
from mixres.data.scan_cache import Job, ScanMemo

SAVE_S = 10.0  # between writes of what was found, which take a tenth of the time at most
AT_ONCE = 4096  # jobs that are queued
_FIRST = 64  # jobs of the first part of a share; then the memo is looked at
T = TypeVar("T")
Facts = ImageFacts | BadImageError


class Share(NamedTuple):
    """Which of several processes this one is."""

    rank: int = 0
    of: int = 1

    def split(self, items: Sequence[T]) -> tuple[list[T], list[T]]:
        """This process's own items, which are neighbours, as images of one row group are read together; the others."""
        begin, end = (part * len(items) // self.of for part in (self.rank, self.rank + 1))
        return [*items[begin:end]], [*items[end:], *items[:begin]]

    def helping(self, items: Sequence[T]) -> list[T]:
        """The items of others from a place of this process's own, so that two that help do not take the same."""
        begin = (self.rank + 1) * len(items) // (self.of + 1)
        return [*items[begin:], *items[:begin]]


@contextlib.contextmanager
def in_threads(*, remote: bool) -> Iterator[ThreadPoolExecutor]:
    """Threads for images and shards; `remote`: they wait more than they compute."""
    pool = ThreadPoolExecutor(8 if remote else min(8, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the files that are still queued


def facts_of(
    jobs: Sequence[Job], limits: Limits, memo: ScanMemo, share: Share, *, progress: bool
) -> tuple[list[Facts], int, int]:
    """Facts or reason for each job; how many different ones were decoded, and how many were known.

    Raises:
        WorkError: a store cannot be reached; what was read until then is remembered.
    """
    with collector_paused():
        known, unchanged = memo.find(jobs, limits)
    missing = dict.fromkeys(job for job, facts in zip(jobs, known, strict=True) if facts is None)
    found: dict[Job, Facts] = {}
    try:
        results = _looked_at(list(missing), limits, memo, share)
        for _, (job, facts) in zip(counted(missing, "scan", "file", enabled=progress), results, strict=True):
            found[job] = facts
    finally:  # also where a store went away: what was read of it need not be read again
        _save(memo)
    if missing:
        return [facts or found[job] for job, facts in zip(jobs, known, strict=True)], len(missing), unchanged
    return [*filter(None, known)], 0, unchanged


def _looked_at(jobs: Sequence[Job], limits: Limits, memo: ScanMemo, share: Share) -> Iterator[tuple[Job, Facts]]:
    """Each job with its facts, as they come in."""
    size, saved, pause = AT_ONCE if share.of == 1 else _FIRST, time.monotonic(), SAVE_S
    own, others = share.split(jobs)
    next_look = 0.0
    with in_threads(remote=any(is_url(str(job.path)) for job in jobs)) as pool:
        while own or others:
            began = time.monotonic()
            part = (own or share.helping(others))[:size]
            yield from zip(part, pool.map(partial(_inspect, limits=limits, memo=memo), part), strict=True)
            own, others = _without(part, own), _without(part, others) if not own else others
            done = time.monotonic()
            if not own or done - saved > pause:
                _save(memo)
                saved = time.monotonic()
                pause = max(SAVE_S, 9 * (saved - done))
            if share.of > 1 and done >= next_look and memo.refresh():
                looked = time.monotonic()
                for todo in (own, others):
                    by_others, _ = memo.find(todo, limits)
                    here = [(job, facts) for job, facts in zip(todo, by_others, strict=True) if facts]
                    yield from here
                    todo[:] = _without([job for job, _ in here], todo)
                next_look = time.monotonic() + 9 * (time.monotonic() - looked)  # it looks at all that is left
            if time.monotonic() - done > (done - began) / 10:  # looking at the memo is to take little of the time
                size = min(2 * size, AT_ONCE)


def _without(done: Sequence[Job], jobs: list[Job]) -> list[Job]:
    if jobs[: len(done)] == done:
        return jobs[len(done) :]
    gone = set(done)
    return [job for job in jobs if job not in gone]


def _inspect(job: Job, *, limits: Limits, memo: ScanMemo) -> Facts:
    try:
        status = job.path.stat()  # before the bytes are read: what is changed meanwhile is read again next time
        facts = inspect_image(job.path, limits, is_mask=job.is_mask)
    except OSError as error:
        return BadImageError(f"cannot be read: {error.strerror or error}; make it readable")
    except BadImageError as error:
        return type(error)(str(error))  # the one raised holds frames, and they the bytes of the file
    memo.add(job, status, facts, limits)
    return facts


def _save(memo: ScanMemo) -> None:
    with contextlib.suppress(OSError):  # a full or read-only disk: the memo only saves time
        memo.save()
