"""Folders, manifests, data sets, tar and parquet files -> records, and the scan that decodes every image first.

Promise: all problems of all sources are found in one pass and returned together; what the scan returns has been decoded
in full, with its upright sizes and the digests of its bytes. Cost: the scan reads and decodes every file once, 5 ms
(JPEG) to 25 ms (PNG) a megapixel, on threads, of which two take 0.55 the time, and on all ranks: see `decode`.
A later scan with the same memo looks at the state of each file and decodes those that have changed.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mixres.console import counted
from mixres.data.decode import Facts, Share, facts_of, in_threads
from mixres.data.folder import records_from_folder
from mixres.data.huggingface import is_saved_dataset, records_from_saved_dataset
from mixres.data.images import BadImageError, ImageFacts, Limits, NoMemoryError
from mixres.data.manifest import SUFFIXES, records_from_manifest
from mixres.data.objects import StoredObject, find_objects, is_url
from mixres.data.parquet import records_from_parquet
from mixres.data.records import EditRecord, EmptyCaption, Problem, collector_paused, printable
from mixres.data.scan_cache import Job, ScanMemo
from mixres.data.tar_shards import records_from_shard
from mixres.errors import Problems, UserError, WorkError, without_secrets
from mixres.geometry import Size

SHARDS = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
INDEX = "shard_index"  # beside the memo
ALONE = Share()


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


def find_records(
    source: str,
    *,
    follow_symlinks: bool = False,
    empty_caption: EmptyCaption = "error",
    columns: Mapping[str, str] = {},
    index: Path | None = None,
    progress: bool = False,
    share: Share = ALONE,
) -> tuple[list[EditRecord], list[Problem]]:
    """All records of a folder (sorted by name) or of another source (in its order), and all problems.

    `columns`: names of columns by role. `index`: a folder that keeps what is in shards. `progress`: as
    `console.counted` shows it. `share`: of the shards that this process reads before those of others.

    Raises:
        UserError: `source` itself is no data source, or cannot be read.
        WorkError: a store cannot be reached.
    """
    if source.lower().endswith((*SHARDS, *COMPRESSED)) and not Path(source).is_dir():
        how: dict[str, Any] = {"columns": columns, "empty_caption": empty_caption}
        return _records_of_objects(source, **how, index=index, progress=progress, share=share)
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
    source: str,
    *,
    columns: Mapping[str, str],
    empty_caption: EmptyCaption,
    index: Path | None,
    progress: bool,
    share: Share,
) -> tuple[list[EditRecord], list[Problem]]:
    """Those of all shards that `source` names, several at a time: first this process's own, as others keep theirs."""

    def read(stored: StoredObject) -> tuple[list[EditRecord], list[Problem]]:
        records_of = records_from_parquet if stored.url.lower().endswith(".parquet") else records_from_shard
        try:
            return records_of(stored, columns=columns, empty_caption=empty_caption, index=index)
        except WorkError as error:
            if isinstance(error.__cause__, UserError):  # may be listed and not be read, which is for the user to change
                raise error.__cause__ from error
            raise

    objects, wrong = find_objects(source), Problems()
    bar, remote = progress and len(objects) > 1, is_url(source)
    own, others = share.split(objects)
    order = [*own, *share.helping(others)]
    with in_threads(remote=remote) as pool:
        found = pool.map(lambda stored: wrong.collect(read, stored), order)
        parts = dict(zip(counted(order, "index", "shard", enabled=bar), found, strict=True))
    wrong.raise_if_any()
    whole = [part for stored in objects if (part := parts[stored])]
    return [record for records, _ in whole for record in records], [x for _, problems in whole for x in problems]


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
    share: Share = ALONE,
) -> Scan:
    """All usable records of all sources in their order, and every problem.

    `key`: what named the sources, for messages. `columns`: names of columns by role. `min_side`: pixels along the
    shorter side that still make one token. `progress`: as `console.counted` shows it. `memo`: a folder that keeps what
    the scan found for the next one, and for the processes that share this one.

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
            with collector_paused():
                found = find_records(
                    source,
                    follow_symlinks=limits.follow_symlinks,
                    empty_caption=empty_caption,
                    columns=columns,
                    index=memo.parent / INDEX if memo else None,
                    progress=progress,
                    share=share,
                )
        except UserError as error:
            messages += [f"{key}: {message}" if key else message for message in error.messages]
        else:
            records += found[0]
            problems += found[1]
            unusable += len({problem.example for problem in found[1]} - {None})
    with collector_paused():
        jobs = [job for record in records for job in _jobs(record)]
    facts, decoded, unchanged = facts_of(jobs, limits, ScanMemo(memo if jobs else None), share, progress=progress)
    del jobs
    scanned, first = [], 0
    with collector_paused():
        for record in records:
            last = first + 1 + len(record.controls) + (record.mask is not None)
            own, first = facts[first:last], last
            if reasons := _record_problems(record, own, min_side):
                problems += reasons
            else:
                scanned.append(_scanned(record, own))
    if messages:
        raise UserError([*messages, *map(str, problems)])
    return Scan(scanned, problems, decoded, unchanged, unusable + len(records) - len(scanned))


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


def _jobs(record: EditRecord) -> list[Job]:
    """Target, controls, then the mask if there is one."""
    jobs = [Job(path, False) for path in (record.target, *record.controls)]
    return [*jobs, Job(record.mask, True)] if record.mask else jobs


def _record_problems(record: EditRecord, found: Sequence[Facts], min_side: int) -> list[Problem]:
    """`found`: facts or reasons of the images of the record, in the order of `_jobs`."""
    target, problems = found[0], []
    if not record.mask and not [1 for x in found if isinstance(x, BadImageError) or min(x.size) < min_side]:
        return []
    for job, facts in zip(_jobs(record), found, strict=True):
        reason = None
        if isinstance(facts, BadImageError):
            reason = str(facts)
        elif min(facts.size) < min_side:
            reason = f"{facts.size} is too small: no side may be under {min_side} pixels; take it out"
        elif job.is_mask and isinstance(target, ImageFacts) and facts.size != target.size:
            reason = f"the mask is {facts.size} pixels, its target {target.size}; give it the target's size"
        if reason:
            owner = "" if job.path == record.target else f" (belongs to {record.name})"
            passing = isinstance(facts, NoMemoryError)
            problems.append(Problem(printable(job.path), f"{reason}{owner}", example=record.name, passing=passing))
    return problems


def _scanned(record: EditRecord, found: Sequence[Any]) -> ScannedRecord:
    sizes, digests, flattened, several = zip(*found, strict=True)  # of `ImageFacts`
    own = sizes[1 : 1 + len(record.controls)]
    return ScannedRecord(record, sizes[0], own, digests, flattened=any(flattened), first_of_several=any(several))
