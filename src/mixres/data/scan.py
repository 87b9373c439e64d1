"""Folders, manifests, data sets, tar and parquet files -> records, and the scan that decodes every image first.

Promise: all problems of all sources are found in one pass and returned together; what the scan returns has been decoded
in full, with its upright sizes and the digests of its bytes. Cost: the scan reads and decodes every file once, 5 ms
(JPEG) to 25 ms (PNG) a megapixel, on threads: Pillow releases the GIL while it decodes, two threads take 0.55 the time.
A later scan with the same memo looks at the state of each file and decodes those that have changed.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import xxhash

from mixres.console import counted
from mixres.data.folder import records_from_folder
from mixres.data.huggingface import is_saved_dataset, records_from_saved_dataset
from mixres.data.images import BadImageError, ImageFacts, Limits, inspect_image
from mixres.data.manifest import SUFFIXES, records_from_manifest
from mixres.data.objects import StoredObject, find_objects, is_url
from mixres.data.parquet import records_from_parquet
from mixres.data.records import EditRecord, EmptyCaption, Picture, Problem, printable
from mixres.data.scan_cache import ScanMemo
from mixres.data.tar_shards import records_from_shard
from mixres.errors import Problems, UserError, without_secrets
from mixres.geometry import Size

SHARDS = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
INDEX = "shard_index"  # beside the memo
T = TypeVar("T")
R = TypeVar("R")


class ScannedRecord(NamedTuple):
    """A record whose every image decodes."""

    record: EditRecord
    target_size: Size  # upright
    control_sizes: tuple[Size, ...]
    digests: tuple[str, ...]  # of the file bytes: target, each control, then the mask if there is one
    flattened: bool  # an image has transparency
    first_of_several: bool  # an image is the first of several frames or pages
    regularization: bool = False  # counts in the loss with a weight of its own


class Scan(NamedTuple):
    """What a scan has found."""

    records: list[ScannedRecord]
    problems: list[Problem]
    decoded: int  # files that were decoded,
    unchanged: int  # and those that an earlier scan had decoded
    unusable: int  # records


class _Job(NamedTuple):
    path: Picture
    is_mask: bool


def find_records(
    source: str,
    *,
    follow_symlinks: bool = False,
    empty_caption: EmptyCaption = "error",
    columns: Mapping[str, str] = {},
    index: Path | None = None,
    progress: bool = False,
) -> tuple[list[EditRecord], list[Problem]]:
    """All records of a folder (sorted by name) or of another source (in its order), and all problems.

    `columns`: names of columns by role. `index`: a folder that keeps where the members of tar files lie. `progress`: as
    `console.counted` shows it.

    Raises:
        UserError: `source` itself is no data source, or cannot be read.
        WorkError: a store cannot be reached.
    """
    if source.lower().endswith((*SHARDS, *COMPRESSED)) and not Path(source).is_dir():
        return _records_of_objects(source, columns=columns, empty_caption=empty_caption, index=index, progress=progress)
    path = Path(source)
    reason = "no such folder or manifest; correct the path"
    if is_url(source):
        raise UserError(f"{without_secrets(printable(source))}: a URL names .tar or .parquet files; name some")
    try:
        if path.is_dir() and is_saved_dataset(path):
            return records_from_saved_dataset(path, columns=columns, empty_caption=empty_caption)
        if path.is_dir():
            return records_from_folder(path, follow_symlinks=follow_symlinks, empty_caption=empty_caption)
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            return records_from_manifest(path, follow_symlinks=follow_symlinks, empty_caption=empty_caption)
        if path.exists():
            reason = "is neither a folder nor a .jsonl, .csv, .tar or .parquet file; name one"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}; make it readable"
    raise UserError(f"{printable(source)}: {reason}")


def is_there(source: str) -> bool:
    """Whether there may be data at `source`; stores are not asked."""
    return source.lower().endswith(SHARDS) or Path(source).exists()


def _records_of_objects(
    source: str, *, columns: Mapping[str, str], empty_caption: EmptyCaption, index: Path | None, progress: bool
) -> tuple[list[EditRecord], list[Problem]]:
    """Those of all shards that `source` names, several at a time."""

    def read(stored: StoredObject) -> tuple[list[EditRecord], list[Problem]]:
        if not stored.url.lower().endswith(".parquet"):
            return records_from_shard(stored, columns=columns, empty_caption=empty_caption, index=index)
        return records_from_parquet(stored, columns=columns, empty_caption=empty_caption)

    objects, wrong = find_objects(source), Problems()
    bar, remote = progress and len(objects) > 1, is_url(source)
    found = _in_threads(lambda stored: wrong.collect(read, stored), objects, "index", "shard", bar, remote=remote)
    parts = [part for part in found if part]
    wrong.raise_if_any()
    return [record for records, _ in parts for record in records], [x for _, problems in parts for x in problems]


def _in_threads(
    work: Callable[[T], R], items: Sequence[T], verb: str, unit: str, progress: bool, *, remote: bool
) -> Iterator[R]:
    """What `work` makes of the items, in their order, with progress; `remote`: they wait more than they compute."""
    pool = ThreadPoolExecutor(8 if remote else min(8, os.cpu_count() or 1))
    try:
        results = pool.map(work, items)  # all are queued now, whoever counts
        for _, result in zip(counted(items, verb, unit, enabled=progress), results, strict=True):
            yield result
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the files that are still queued


def scan(
    sources: Sequence[str],
    *,
    limits: Limits,
    key: str = "",
    empty_caption: EmptyCaption = "error",
    columns: Mapping[str, str] = {},
    min_side: int = 16,
    progress: bool = True,
    memo: Path | None = None,
) -> Scan:
    """All usable records of all sources in their order, and every problem.

    `key`: what named the sources, for messages. `columns`: names of columns by role. `min_side`: pixels along the
    shorter side that still make one token. `progress`: as `console.counted` shows it. `memo`: a file that keeps what
    the scan found for the next one.

    Raises:
        UserError: there are sources that are no data source; a message for each, and the problems of the others.
    """
    assert not isinstance(sources, str), "a sequence of sources"
    records: list[EditRecord] = []
    problems: list[Problem] = []
    messages: list[str] = []
    unusable = 0
    for source in sources:
        try:
            found = find_records(
                source,
                follow_symlinks=limits.follow_symlinks,
                empty_caption=empty_caption,
                columns=columns,
                index=memo.parent / INDEX if memo else None,
                progress=progress,
            )
        except UserError as error:
            messages += [f"{key}: {message}" if key else message for message in error.messages]
        else:
            records += found[0]
            problems += found[1]
            unusable += len({problem.example for problem in found[1]} - {None})
    jobs = dict.fromkeys(job for record in records for job in _jobs(record))
    facts, decoded = _inspect(list(jobs), limits, ScanMemo(memo), progress)
    scanned = []
    for record in records:
        if reasons := _record_problems(record, facts, min_side):
            problems += reasons
        else:
            scanned.append(_scanned(record, facts))
    if messages:
        raise UserError([*messages, *map(str, problems)])
    return Scan(scanned, problems, decoded, len(jobs) - decoded, unusable + len(records) - len(scanned))


def split_held_out(
    records: Iterable[ScannedRecord], fraction: float, seed: int
) -> tuple[list[ScannedRecord], list[ScannedRecord]]:
    """Training and held-out records; about `fraction` (0 to 1) of the target images are held out.

    Each target's bytes and the seed decide alone, so that no image is on both sides under two names or prompts, and
    none changes sides when others come or go.
    """
    parts: tuple[list[ScannedRecord], list[ScannedRecord]] = [], []
    for scanned in records:
        draw = xxhash.xxh3_64_intdigest(f"{seed} {scanned.digests[0]}".encode())
        parts[draw < fraction * 2**64].append(scanned)
    return parts


def never_trained(
    train: Sequence[ScannedRecord], held_out: Sequence[ScannedRecord]
) -> tuple[list[ScannedRecord], list[Problem]]:
    """Held-out records whose target is not trained on under any name, and the problems of the others."""
    trained = {scanned.digests[0]: scanned.record for scanned in train}
    kept, problems = [], []
    for scanned in held_out:
        twin = trained.get(scanned.digests[0])
        if twin is None:
            kept.append(scanned)
        else:
            reason = f"is held out and trained on, as {printable(twin.target)}; take one of the two out"
            problems.append(Problem(printable(scanned.record.target), reason, example=scanned.record.name))
    return kept, problems


def _jobs(record: EditRecord) -> list[_Job]:
    """Target, controls, then the mask if there is one."""
    jobs = [_Job(path, False) for path in (record.target, *record.controls)]
    return [*jobs, _Job(record.mask, True)] if record.mask else jobs


def _inspect(
    jobs: list[_Job], limits: Limits, memo: ScanMemo, progress: bool
) -> tuple[dict[_Job, ImageFacts | BadImageError], int]:
    """Facts or reason for each job, and how many were decoded."""
    decoded = 0

    def inspect(job: _Job) -> tuple[ImageFacts | BadImageError, bool]:
        if facts := memo.find(job.path, job.is_mask, limits):
            return facts, False
        try:
            status = job.path.stat()  # before the bytes are read: what is changed meanwhile is read again next time
            facts = inspect_image(job.path, limits, is_mask=job.is_mask)
            memo.add(job.path, job.is_mask, status, facts)
            return facts, True
        except OSError as error:
            return BadImageError(f"cannot be read: {error.strerror or error}; make it readable"), True
        except BadImageError as error:
            return BadImageError(str(error)), True  # the one raised holds frames, and they the bytes of the file

    found = {}
    remote = any(is_url(str(job.path)) for job in jobs)
    results = _in_threads(inspect, jobs, "scan", "file", progress, remote=remote)
    try:
        for job, (facts, is_new) in zip(jobs, results, strict=True):
            found[job] = facts
            decoded += is_new
    finally:  # also where a store went away: what was read of it need not be read again
        with contextlib.suppress(OSError):  # a full or read-only disk: the memo only saves time
            memo.save()
    return found, decoded


def _record_problems(record: EditRecord, found: dict[_Job, ImageFacts | BadImageError], min_side: int) -> list[Problem]:
    problems = []
    target = found[_Job(record.target, False)]
    for job in _jobs(record):
        facts, reason = found[job], None
        if isinstance(facts, BadImageError):
            reason = str(facts)
        elif min(facts.size) < min_side:
            reason = f"{facts.size} is too small: no side may be under {min_side} pixels; take it out"
        elif job.is_mask and isinstance(target, ImageFacts) and facts.size != target.size:
            reason = f"the mask is {facts.size} pixels, its target {target.size}; give it the target's size"
        if reason:
            owner = "" if job.path == record.target else f" (belongs to {record.name})"
            problems.append(Problem(printable(job.path), f"{reason}{owner}", example=record.name))
    return problems


def _scanned(record: EditRecord, found: dict[_Job, ImageFacts | BadImageError]) -> ScannedRecord:
    facts = [f for job in _jobs(record) if isinstance(f := found[job], ImageFacts)]
    return ScannedRecord(
        record=record,
        target_size=facts[0].size,
        control_sizes=tuple(f.size for f in facts[1 : 1 + len(record.controls)]),
        digests=tuple(f.digest for f in facts),
        flattened=any(f.flattened for f in facts),
        first_of_several=any(f.first_of_several for f in facts),
    )
