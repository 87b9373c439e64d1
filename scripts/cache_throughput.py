"""Random access to many tiny cache entries: files against shards, local and through a local S3 server.

    python scripts/cache_throughput.py [N]    # measure, 100,000 by default
    python scripts/page_numbers.py            # the pages, from the results

Each round reads other entries in each way, one after the other, in one process and thread; files and shards are in the
memory of the system by then. The S3 server is moto's, in Python, so its own times say nothing of a real store; what
counts is what copies on the local disk save. Needs 1 GB of disk for 100,000 entries.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "tests")]

RESULTS = REPOSITORY / "docs/results/cache_throughput.json"
SHARD_BYTES, ROUNDS, READS, REQUESTS = 16 * 10**6, 11, 2000, 200


def measure(count: int) -> dict[str, Any]:
    import torch

    from mixres.data.cache import Cache, entry_key
    from mixres.data.shard_store import LocalCopies, UrlStore
    from mixres.geometry import Grid
    from mixres.verification.setup import versions
    from support.object_stores import ACCESS, s3_server
    from support.samples import make_sample

    torch.set_num_threads(1)
    keys = [entry_key(number=number) for number in range(count)]
    values = [make_sample((Grid(1, 4, 4), Grid(1, 4, 4)), text=8, seed=seed) for seed in range(50)]
    with tempfile.TemporaryDirectory() as folder, s3_server() as url:
        os.environ |= {**ACCESS, "AWS_ENDPOINT_URL": url}
        root = Path(folder)

        def remote(machine: str, limit: int) -> Cache:
            copies = LocalCopies(root / machine / "copies/s3", limit)
            store = UrlStore("s3://pairs/cache/shards", root / machine / "waiting", copies)
            return Cache(root / machine, SHARD_BYTES, remote=store)

        shards = Cache(root / "shards", SHARD_BYTES)
        for number, key in enumerate(keys):
            shards.write(key, values[number % len(values)])
        shards.close()
        files, uploaded = Cache(root / "files"), remote("a", 0)
        for path in sorted((root / "shards/shards").glob("*.tar")):
            with tarfile.open(path) as archive:
                archive.extractall(files.root, filter="data")
            copy = uploaded.shards.store.scratch / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
            uploaded.shards.store.finish()
        for key in keys:
            files.lookup(key)
        files.save_index()
        kept = remote("b", 10**10)
        starts: dict[str, Callable[[], Cache]] = {
            "files": lambda: Cache(files.root),
            "shards": lambda: Cache(shards.root),
            "S3, request by request": lambda: remote("c", 0),
            "S3, from local copies": lambda: remote("b", 10**10),
        }
        order = random.Random(0).sample(keys, count)
        rows = []
        caches = {}
        for way, opened in starts.items():
            began = time.perf_counter()
            caches[way] = opened()
            assert all(map(caches[way].lookup, keys))
            rows.append({"way": way, "start_s": time.perf_counter() - began, "rates": []})
        for number in range(ROUNDS):
            part = [order[(number * READS + i) % count] for i in range(READS)]
            for key in part[:REQUESTS]:
                kept.read(key)
            for row in rows:
                own = part[:REQUESTS] if row["way"].startswith("S3") else part
                row["rates"].append(rate(caches[row["way"]], own))
            sys.stderr.write(f"round {number + 1}: {[round(row['rates'][-1]) for row in rows]} entries/s\n")
        size = sum(shards.held().values()) / count
    base = rows[0]["rates"]
    for row in rows:
        ratios = [own / of_files for own, of_files in zip(row["rates"], base, strict=True)]
        row |= {"rate": statistics.median(row.pop("rates")), "ratio": statistics.median(ratios)}
        row |= {"low": min(ratios), "high": max(ratios)}
    stated = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "cores": os.cpu_count(), "versions": versions()}
    return {"entries": count, "entry_bytes": round(size), "rounds": ROUNDS, **stated, "rows": rows}


def rate(cache: Any, keys: Sequence[str]) -> float:
    """Entries read a second."""
    began = time.perf_counter()
    for key in keys:
        cache.read(key)
    return len(keys) / (time.perf_counter() - began)


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| entries read at random from | of the rate from files (range) | entries/s | a start finds all in |"]
    lines.append("|---" * 4 + "|")
    for row in found["rows"]:
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        lines.append(f"| {row['way']} | {ratio} | {row['rate']:.0f} | {row['start_s']:.1f} s |")
    note = f"{found['entries']:,} entries of {found['entry_bytes'] / 1000:.1f} kB, {found['rounds']} rounds in turn, "
    return "\n".join(lines) + f"\n\n{note}{found['cores']} cores that other work shared, {found['date']}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="?", type=int, default=100_000)
    given = parser.parse_args()
    RESULTS.write_text(json.dumps(measure(given.entries), indent=1) + "\n")


if __name__ == "__main__":
    main()
