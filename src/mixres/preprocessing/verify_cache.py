"""The verb `cache --verify`: read every entry of the configuration's data and report the damaged and missing ones.

Promise: nothing is encoded and no weight is loaded; what is damaged is named and removed, so that the next caching
pass makes it again. Cost: the scan, and one read of every entry.
"""

from mixres.config.schema import Config
from mixres.console import counted, log
from mixres.data.cache import DamagedEntry
from mixres.errors import UserError, WorkError
from mixres.preprocessing.cache_folder import readable_size, save_index
from mixres.preprocessing.fill import entries_there, family_of, keyed_records


def verify_cache(config: Config, *, world_size: int = 1) -> None:
    """Check size and checksums of every entry, under the keys of files, captions and configuration as they are now.

    Raises:
        UserError: as `run_cache`, or several processes were started.
        WorkError: an entry is damaged or missing; each has been named by then.
    """
    if world_size > 1:
        raise UserError(f"--verify: works on one process, {world_size} were started: python train.py cache --verify")
    family = family_of(config)
    found = keyed_records(config, family, is_main=True)
    found.cache.shards.store.finish()
    cache, names = found.cache, {key: scanned.record.name for key, scanned in found.by_key.items()}
    there, parts = entries_there(found)
    names |= {key: part.title(family) for key, part in parts.items()}
    damaged = missing = 0
    for key, name in counted(names.items(), "verify", "entry", enabled=True):
        try:
            cache.read_entry(key, fresh=True)
            if key in found.by_key and key not in there:
                missing += 1
                log(f"cache     {name}: missing, the entry names parts of other files or settings")
        except DamagedEntry as error:
            damaged += 1
            log(f"cache     {name}: damaged, {error.path}: {error.reason}; it has been removed")
        except FileNotFoundError:
            missing += 1
            log(f"cache     {name}: missing, there is no entry of its files, caption and configuration as they are")
    save_index(cache)
    counts = f"{len(names) - damaged - missing} valid, {damaged} damaged, {missing} missing"
    log(f"cache     {len(names)} entries in {cache}: {counts}")
    for path in cache.unreadable():
        log(f"cache     {path}: damaged, its index cannot be read; its entries are missing, --compact removes it")
    if others := [size for key, size in cache.held().items() if key not in names]:
        size = readable_size(sum(others))
        log(f"cache     {len(others)} more entries there ({size}) are of other data or configurations")
    if damaged or missing:
        raise WorkError(f"cache.cache_dir: {cache}: {counts}: run `cache` without --verify to encode them")
