"""Folders and manifests -> records, and the scan that decodes every picture once before anything is trained.

Promise: all faults of all sources are found in one pass and returned together; what the scan returns has been decoded
in full, with its upright sizes and the digests of its bytes. Cost: the scan reads and decodes every file once, 5 ms
(JPEG) to 25 ms (PNG) a megapixel, on threads: Pillow releases the GIL while it decodes, two threads take 0.55 the time.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mixres.data.folder import records_from_folder
from mixres.data.images import BadImageError, ImageFacts, Limits, inspect_image, inspect_mask
from mixres.data.manifest import records_from_manifest
from mixres.data.records import EditRecord, EmptyCaption, Fault, printable
from mixres.errors import UserError
from mixres.geometry import Size


class ScannedRecord(NamedTuple):
    """A record whose every picture decodes."""

    record: EditRecord
    target_size: Size  # upright
    control_sizes: tuple[Size, ...]
    digests: tuple[str, ...]  # of the file bytes: target, each control, then the mask if there is one
    flattened: bool  # a picture had transparency, which was laid on white


class _Job(NamedTuple):
    path: Path
    is_mask: bool


def find_records(
    source: str, *, follow_symlinks: bool = False, empty_caption: EmptyCaption = "error"
) -> tuple[list[EditRecord], list[Fault]]:
    """All examples of a data folder (sorted by name) or a `.jsonl` manifest (in its order), and all faults.

    Raises:
        UserError: `source` itself is no data source.
    """
    path = Path(source)
    if path.is_dir():
        return records_from_folder(path, follow_symlinks=follow_symlinks, empty_caption=empty_caption)
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return records_from_manifest(path, follow_symlinks=follow_symlinks, empty_caption=empty_caption)
    reason = "is neither a folder nor a .jsonl manifest" if path.exists() else "no such folder or manifest"
    raise UserError([f"{printable(source)}: {reason}"])


def scan(
    sources: Sequence[str],
    *,
    limits: Limits,
    empty_caption: EmptyCaption = "error",
    min_side: int = 16,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[list[ScannedRecord], list[Fault]]:
    """All usable examples of all sources in their order, and every fault.

    `min_side`: pixels along the shorter side that still make one token. `workers`: threads, by default one a core and
    at most 8. `progress`: a bar on stderr, only where that is a terminal.

    Raises:
        UserError: one message for each source that is no data source.
    """
    assert not isinstance(sources, str), "a sequence of sources"
    records, faults = _find_all(sources, limits.follow_symlinks, empty_caption)
    jobs = dict.fromkeys(job for record in records for job in _jobs(record))
    found = _inspect(list(jobs), limits, workers or min(8, os.cpu_count() or 1), progress)
    scanned = []
    for record in records:
        reasons = _record_faults(record, found, min_side)
        faults += reasons
        if not reasons:
            scanned.append(_scanned(record, found))
    return scanned, faults


def _find_all(
    sources: Sequence[str], follow_symlinks: bool, empty_caption: EmptyCaption
) -> tuple[list[EditRecord], list[Fault]]:
    records: list[EditRecord] = []
    faults: list[Fault] = []
    messages: list[str] = []
    for source in sources:
        try:
            some, wrong = find_records(source, follow_symlinks=follow_symlinks, empty_caption=empty_caption)
        except UserError as error:
            messages += error.messages
            continue
        records += some
        faults += wrong
    if messages:
        raise UserError(messages)
    return records, faults


def _jobs(record: EditRecord) -> list[_Job]:
    jobs = [_Job(path, False) for path in (record.target, *record.controls)]
    return [*jobs, _Job(record.mask, True)] if record.mask else jobs


def _inspect(jobs: list[_Job], limits: Limits, workers: int, progress: bool) -> dict[_Job, ImageFacts | BadImageError]:
    def inspect(job: _Job) -> ImageFacts | BadImageError:
        try:
            return inspect_mask(job.path, limits) if job.is_mask else inspect_image(job.path, limits)
        except BadImageError as error:
            return BadImageError(str(error))  # the one raised holds frames, and they the bytes of the file

    pool = ThreadPoolExecutor(workers)
    try:
        bar = tqdm(total=len(jobs), desc="scan", unit="file", disable=None if progress else True)
        with bar:
            found = {}
            for job, facts in zip(jobs, pool.map(inspect, jobs), strict=True):
                found[job] = facts
                bar.update()
            return found
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the files that are still queued


def _record_faults(record: EditRecord, found: dict[_Job, ImageFacts | BadImageError], min_side: int) -> list[Fault]:
    faults = []
    for job in _jobs(record):
        facts = found[job]
        of = "" if job.path == record.target else f" (belongs to {record.name})"
        if isinstance(facts, BadImageError):
            faults.append(Fault(printable(job.path), f"{facts}{of}"))
        elif min(facts.size) < min_side:
            reason = f"{facts.size} is too small: no side may be under {min_side} pixels{of}"
            faults.append(Fault(printable(job.path), reason))
        elif job.is_mask:
            target = found[_Job(record.target, False)]
            if isinstance(target, ImageFacts) and facts.size != target.size:
                reason = f"the mask is {facts.size} pixels, its target {target.size}: they must be the same{of}"
                faults.append(Fault(printable(job.path), reason))
    return faults


def _scanned(record: EditRecord, found: dict[_Job, ImageFacts | BadImageError]) -> ScannedRecord:
    facts = [f for job in _jobs(record) if isinstance(f := found[job], ImageFacts)]
    sizes = [f.size for f in facts]
    return ScannedRecord(
        record=record,
        target_size=sizes[0],
        control_sizes=tuple(sizes[1 : 1 + len(record.controls)]),
        digests=tuple(f.digest for f in facts),
        flattened=any(f.flattened for f in facts),
    )
