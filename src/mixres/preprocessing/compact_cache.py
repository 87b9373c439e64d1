"""The verb `cache --compact`: single files and small shards of the cache become full shards, whatever data they are of.

Promise: no entry is lost or changed. Cost: one read and one write of what moves; no weight and no image is read.
"""

from mixres.config.schema import Config
from mixres.console import log
from mixres.data.compact import compact
from mixres.data.objects import is_url
from mixres.data.shards import NO_ROOM
from mixres.errors import UserError, WorkError
from mixres.preprocessing.cache_folder import (
    cache_folder,
    open_cache,
    readable_size,
    save_index,
    shard_size,
)


def compact_cache(config: Config, *, world_size: int = 1) -> None:
    """Compact the folder `cache.cache_dir`.

    Raises:
        UserError: `cache.shard_gb` is 0, several processes were started, or another one is compacting the folder.
        WorkError: the disk is full or cannot be written; nothing is lost.
    """
    if world_size > 1:
        raise UserError(f"--compact: works on one process, {world_size} were started: python train.py cache --compact")
    if not shard_size(config):
        raise UserError("cache.shard_gb: is 0, a file for each entry: set the size of shards, such as 1.0")
    if not is_url(config.cache.cache_dir) and not (root := cache_folder(config)).is_dir():
        raise UserError(f"cache.cache_dir: {root} is no folder: name that of a cache")
    cache = open_cache(config)
    cache.shards.store.finish()
    cache.sweep()
    try:
        done = compact(cache)
    except OSError as error:
        key, place = "cache.local_dir" if cache.remote else "cache.cache_dir", error.filename or cache.root
        fix = "make room" if error.errno in NO_ROOM else "make it writable, with room"
        raise WorkError(
            f"{key}: {place}: {error.strerror or error}: {fix} for a shard, "
            f"{readable_size(shard_size(config))}, and run the same command again; nothing is lost"
        ) from error
    for entry in done.damaged:
        log(f"cache     damaged, {entry.path}: {entry.reason}; it has been removed")
    save_index(cache)
    held = cache.held()
    size = readable_size(sum(held.values()))
    moved = f"{done.moved} moved, {done.sources} files and shards replaced, {len(done.damaged)} damaged"
    log(f"cache     {len(held)} entries ({size}) in {cache}: {moved}")
