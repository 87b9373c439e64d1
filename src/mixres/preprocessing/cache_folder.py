"""The cache of a configuration: its folder or URL, what this machine keeps of one at a URL, and room on the disk."""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

import xxhash

from mixres.config.schema import Config
from mixres.console import log
from mixres.data.cache import Cache
from mixres.data.objects import is_url
from mixres.data.shard_store import LocalCopies, UrlStore
from mixres.data.shards import FOLDER
from mixres.errors import UserError

_WRITABLE = ("s3", "gs", "hf", "memory")
_DEFAULT_SHARD_GB = 1.0


def cache_folder(config: Config) -> Path:
    """The local folder of the cache: itself, or for one at a URL what this machine remembers of it."""
    named = config.cache.cache_dir
    if not is_url(named):
        return Path(named)
    rest = re.sub(r"[^A-Za-z0-9.-]+", "-", named.partition("://")[2].rstrip("/"))[:60]
    digest = xxhash.xxh3_64_hexdigest(named.rstrip("/").encode())[:8]
    return Path(config.cache.local_dir).expanduser() / "caches" / f"{rest}-{digest}"


def make_folder(root: Path, key: str = "cache.cache_dir") -> None:
    """Make the folder of the cache, which `key` names.

    Raises:
        UserError: it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {root} cannot be made ({error.strerror}): name another folder") from error


def open_cache(config: Config) -> Cache:
    """The cache, whose local folder is made.

    Raises:
        UserError: the folder cannot be made, or the URL cannot be written, or may not be listed.
        WorkError: the store cannot be reached.
    """
    named, folder = config.cache.cache_dir, cache_folder(config)
    remote = None
    if is_url(named):
        if (scheme := named.partition("://")[0]) not in _WRITABLE:
            raise UserError(
                f"cache.cache_dir: {scheme}:// cannot be written: name a folder, or use s3://, gs:// or hf://"
            )
        copies = LocalCopies(folder.parents[1] / "copies" / folder.name, round(config.cache.local_gb * 10**9))
        remote = UrlStore(f"{named.rstrip('/')}/{FOLDER}", folder / "waiting", copies)
    make_folder(folder, "cache.local_dir" if remote else "cache.cache_dir")
    return Cache(folder, shard_size(config), float8_text=config.cache.text == "float8", remote=remote)


def shard_size(config: Config) -> int:
    """In bytes; 0 where each entry has a file, which none has at a URL."""
    size = config.cache.shard_gb or (_DEFAULT_SHARD_GB if is_url(config.cache.cache_dir) else 0)
    return round(size * 10**9)


def place_of(cache: Cache) -> str:
    """The key and the local folder into which entries are written, for a message."""
    return f"cache.local_dir: {cache.root}" if cache.remote else f"cache.cache_dir: {cache}"


def check_space(cache: Cache, sizes: Collection[int]) -> None:
    """Compare the bytes that entries will take on the local disk with the free space there.

    Raises:
        UserError: they do not fit.
    """
    needed, free = sum(sizes), shutil.disk_usage(cache.root).free
    if cache.remote:  # they leave with their shard
        needed = min(needed, cache.shards.size)
    if needed > free:
        raise UserError(
            f"{place_of(cache)} needs about {readable_size(needed)} for {len(sizes)} entries, "
            f"{readable_size(free)} are free: make room, or name a folder on a larger disk"
        )


def readable_size(count: int) -> str:
    """Bytes for a reader; small caches in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def save_index(cache: Cache) -> None:
    """Save the index of lengths; where it cannot be written, only the next start takes longer."""
    try:
        cache.save_index()
    except OSError as error:  # every entry is found without it
        log(f"cache     the index could not be written ({error.strerror}): the next start takes longer")
