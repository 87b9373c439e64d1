"""Time and memory of a start over many cache entries: index, lookups, plan, first step, later steps.

    python scripts/million_entries.py [N]

The entries are in shards, written as mixres writes them but for the samples themselves: indexes and lengths are real,
the rest of each file is a hole. Scanning the data is not part of it. Needs some 150 MB of disk for a million.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
from mixres.data.cache import Cache  # noqa: E402
from mixres.data.plan import Plan  # noqa: E402
from mixres.data.shards import FOLDER, _OpenShard  # noqa: E402
from mixres.preprocessing.fill import _collector_paused, lengths_of  # noqa: E402

ENTRY_BYTES, IN_A_SHARD, SIZES = 11_000_000, 90, 40  # an edit of 1 MP, and 1 GB of them
T = TypeVar("T")


def write_indexes(root: Path, keys: list[str]) -> None:
    draw = np.random.default_rng(0)
    grids = ["1x{}x{}".format(*sides) for sides in draw.integers(32, 80, (SIZES, 2))]
    pairs, texts = draw.integers(0, SIZES, (len(keys), 2)), draw.integers(200, 1500, len(keys))
    folder = root / FOLDER
    folder.mkdir()
    for first in range(0, len(keys), IN_A_SHARD):
        shard, offset = _OpenShard(folder), 512
        for i in range(first, min(len(keys), first + IN_A_SHARD)):
            shard.rows[keys[i]] = f"{offset} {ENTRY_BYTES} {texts[i]} 0 0 {','.join(grids[j] for j in pairs[i])}"
            offset += 512 - (-ENTRY_BYTES // 512) * 512
        shard.finish()
        shard.path.rename(folder / shard.name)
        shard.file.close()


def timed(what: str, work: Callable[[], T]) -> T:
    began, busy = time.perf_counter(), time.process_time()
    made = work()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{what:<16} {seconds:8.3f} s, {busy:8.3f} s of processor time, {peak:5.2f} GB at the peak so far", flush=True
    )
    return made


def main(count: int) -> None:
    keys = [xxhash.xxh3_128_hexdigest(str(number).encode()) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder, _collector_paused():
        root = Path(folder)
        timed("written", lambda: write_indexes(root, keys))
        began = time.perf_counter()
        cache = timed("index", lambda: Cache(root))
        entries = timed("lookups", lambda: [cache.lookup(key) for key in keys])
        lengths = timed("lengths", lambda: [lengths_of(entry) for entry in entries if entry])
        assert len(lengths) == count
        how = {"samples_per_step": 8, "max_tokens": 40_000, "layout": "packed", "world_size": 4, "seed": 0}
        plan = timed("plan", lambda: Plan(lengths, names=keys, **how))  # type: ignore[arg-type]
        timed("first step", lambda: plan.step(0))
        print(f"{count} entries  {time.perf_counter() - began:8.3f} s")
        for step in (1000, count // 8 - 3):
            timed(f"step {step}", lambda step=step: plan.step(step))  # type: ignore[misc]


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1_000_000)
