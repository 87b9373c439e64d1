"""Small shards and single files -> full shards, each entry once; what is damaged or unreadable is left out.

Promise: an entry is checked and lies in a closed shard before what held it is deleted, so a kill at any instant loses
none; readers find it in its new place. Cost: one read and one write of what moves, a shard's room on the disk.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from mixres.console import counted
from mixres.data.cache import Cache, DamagedEntry
from mixres.errors import UserError


class Compacted(NamedTuple):
    """What one pass did."""

    moved: int  # entries
    sources: int  # files and shards that were deleted
    damaged: list[DamagedEntry]


def compact(cache: Cache) -> Compacted:
    """Move the entries of single files and of shards under half of the size into shards of that size.

    A shard with entries that are damaged, or that another shard holds too, is written anew without them.

    Raises:
        UserError: another process is compacting this cache.
        OSError: the disk is full or the folder cannot be written; every entry is where it was, or in its new place.
    """
    try:
        with FileLock(cache.root / ".compact.lock", timeout=0):
            return _compact(cache)
    except Timeout as error:
        raise UserError(f"cache.cache_dir: another process is compacting {cache}: wait for its end") from error


def _compact(cache: Cache) -> Compacted:
    shards, files = cache.shards, cache.files()
    shards.refresh(again=True)
    live = Counter(shards.shard_of.values())
    unfit = {name for name, count in shards.counts.items() if live[name] < count}
    small = {name for name in shards.counts if shards.store.size(name) < shards.size / 2}
    if files or len(small | unfit) > 1:  # one small shard alone is the last one
        unfit |= small
    by_shard = {name: shards.held_by(name) for name in sorted(unfit | shards.unreadable)}
    kept = {key for key, name in shards.shard_of.items() if name not in by_shard}
    work: list[tuple[Path | str, list[str]]] = [*by_shard.items(), *((path, [key]) for key, path in files.items())]
    sources: list[Path | str] = []  # what they hold is in the shard that is open, or in closed ones
    damaged: list[DamagedEntry] = []
    moved = deleted = 0
    with cache.writing():
        for source, keys in counted(work, "compact", "source", enabled=True):
            for key in keys:
                while True:  # a file or another shard may hold what this one has lost
                    try:
                        cache.read_entry(key, fresh=True) if key in kept else cache.copy(key)
                    except DamagedEntry as error:
                        damaged.append(error)
                        kept.discard(key)
                        continue
                    except FileNotFoundError:  # the last copy was damaged, or another process has found it so
                        break
                    moved += key not in kept
                    kept.add(key)
                    break
            sources.append(source)
            if shards.closed:
                deleted += cache.remove(sources)
                sources = []
    return Compacted(moved, deleted + cache.remove(sources), damaged)
