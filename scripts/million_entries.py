"""Time and memory of starts over many records: docs/results/million.json, and its table in docs/cache.md.

    python scripts/million_entries.py                   # measure what the results lack
    python scripts/million_entries.py --folder DIR 2000 # these counts alone, in DIR, printed and not kept
    python scripts/page_numbers.py                      # the pages, from the results

Records are edits in tar shards. The shards are holes; what scans of them keep, the memo and the index of the cache are
written as mixres writes them. Entries of the cache are real where the timed steps read them, else holes with a real
index. Needs 1.5 GB of disk for a million.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
from mixres.batch import Sample  # noqa: E402
from mixres.config.load import load_config  # noqa: E402
from mixres.config.schema import Config  # noqa: E402
from mixres.data.cache import Cache  # noqa: E402
from mixres.data.images import ImageFacts, Limits  # noqa: E402
from mixres.data.objects import find_objects  # noqa: E402
from mixres.data.plan import Lengths, Plan  # noqa: E402
from mixres.data.records import SETTLED_NS, collector_paused  # noqa: E402
from mixres.data.scan import INDEX, find_records, scan  # noqa: E402
from mixres.data.scan_cache import Job, ScanMemo  # noqa: E402
from mixres.data.shard_index import index_of, write_index  # noqa: E402
from mixres.data.shards import FOLDER, _OpenShard  # noqa: E402
from mixres.geometry import Size  # noqa: E402
from mixres.models.family import Family  # noqa: E402
from mixres.models.registry import load_family  # noqa: E402
from mixres.preprocessing.fill import KeyedRecords, encode, keyed_records  # noqa: E402
from mixres.preprocessing.samples import lengths_of  # noqa: E402
from mixres.preprocessing.training_data import RecordSizes  # noqa: E402
from mixres.training.setup import build_plan  # noqa: E402

RESULTS = REPOSITORY / "docs" / "results" / "million.json"
COUNTS, FILES = (1_000_000, 100_000, 1_000), (100_000, 50_000, 25_000)
IMAGE_BYTES, ENTRY_BYTES, IN_A_SHARD, SIZES = 900_000, 11_000_000, 90, 4000  # edits of 1 MP, 1 GB a shard
STEPS = 2  # of the first run, and of the resumed one
T = TypeVar("T")


def configuration(root: Path, count: int) -> Config:
    file = root / "run.yaml"
    file.write_text(f"""
model: {{pretrained_model_name_or_path: {REPOSITORY}/src/mixres/assets/tiny_base, dtype: float32,
         lora: {{r: 4, lora_alpha: 4}}}}
data: {{train: "{root}/data/*.tar", num_workers: 0,
        resize: {{target: {{max_pixels: 16384, multiple_of: 8}}, control: {{area: 4096}}}}}}
cache: {{cache_dir: {root}/cache, shard_gb: 1.0}}
batch: {{samples_per_step: 8, max_tokens: 4096}}
train: {{max_train_steps: {STEPS}, gradient_checkpointing: false, mixed_precision: "no"}}
checkpoint: {{every: {STEPS}}}
sample: {{every: 0}}
logging: {{output_dir: {root}/run, report_to: none}}
""")
    return load_config(file, [])


def write_data(root: Path, count: int) -> None:
    """Shards of 1000 records, what a scan keeps of their headers, and the memo of their images."""
    data, index = root / "data", root / "cache" / INDEX
    data.mkdir()
    index.mkdir(parents=True)
    shards = [data / f"pairs-{number:05d}.tar" for number in range(-(-count // 1000))]
    for shard in shards:
        with shard.open("wb") as file:
            file.truncate(2000 * (IMAGE_BYTES + 512))
    source = str(data / "*.tar")
    for number, stored in enumerate(find_objects(source)):
        records = []
        for record in range(1000 * number, min(1000 * (number + 1), count)):
            offset = 2 * (record % 1000) * (IMAGE_BYTES + 512)
            names = f"{record:07d}.target.jpg", f"{record:07d}.control.jpg"
            places = [(name, offset + i * (IMAGE_BYTES + 512), IMAGE_BYTES) for i, name in enumerate(names)]
            prompt = f"make picture {record} blue, with a rainy sky"
            records.append([f"{stored}:{record:07d}", prompt, None, places, False])
        file, state = index_of(stored, index, columns={}, empty_caption="error")
        write_index(file, state, records, [])
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    draw = np.random.default_rng(0)
    sizes = [Size(*sides) for sides in draw.integers(512, 1600, (SIZES, 2)).tolist()]
    memo = ScanMemo(root / "cache" / "scan")
    found, problems = find_records(source, index=index)
    assert (len(found), problems) == (count, [])
    for number, (record, size) in enumerate(zip(found, draw.integers(0, SIZES, count).tolist(), strict=True)):
        for slot, image in enumerate((record.target, *record.controls)):
            digest = xxhash.xxh3_128_hexdigest(f"{number} {slot}".encode())
            memo.add(Job(image, is_mask=False), image.stat(), ImageFacts(sizes[size], digest, False, False), Limits())
    memo.save()


def write_entries(root: Path, config: Config, family: Family, found: KeyedRecords) -> None:
    """Shards whose indexes are real; whole entries of the samples of the first steps."""
    keys, draw, of = found.keys, np.random.default_rng(0), RecordSizes(config, family).of
    how: dict[str, Any] = {"samples_per_step": config.batch.samples_per_step, "seed": config.train.seed}
    plan = Plan([Lengths(1, 1, 1)] * len(keys), names=keys, max_tokens=2, layout="padded", **how)
    read = {index for step in range(2 * STEPS) for index in plan.step(step).indices}
    cache, (latents, width) = Cache(root / "cache", 10**9), family.token_widths()
    texts = draw.integers(20, 60, len(keys)).tolist()
    shard, offset = None, 0
    for number, (key, scanned) in enumerate(zip(keys, found.train, strict=True)):
        grids = family.grids(of(scanned).target, of(scanned).controls)
        if number in read:
            made = [torch.randn(grid.tokens, latents) for grid in grids]
            text = torch.randn(texts[number], width)
            controls = tuple(made[1:])
            cache.write(
                key,
                Sample(
                    name=key, target_latents=made[0], control_latents=controls, img_shapes=grids, prompt_embeds=text
                ),
            )
            continue
        if shard is None:
            (root / "cache" / FOLDER).mkdir(exist_ok=True)
            shard, offset = _OpenShard(root / "cache" / FOLDER), 512
        written = ",".join("x".join(map(str, grid)) for grid in grids)
        shard.rows[key] = f"{offset} {ENTRY_BYTES} {texts[number]} 0 0 {written}"
        offset += 512 - (-ENTRY_BYTES // 512) * 512
        if len(shard.rows) == IN_A_SHARD or number == len(keys) - 1:
            publish(shard)
            shard = None
    if shard:
        publish(shard)
    cache.close()


def publish(shard: _OpenShard) -> None:
    shard.finish()
    shard.path.rename(shard.path.with_name(shard.name))
    shard.file.close()


class Clock:
    """Seconds by the clock and of processor time by name, and the peak of memory so far."""

    def __init__(self) -> None:
        self.figures: dict[str, list[float]] = {}

    def __call__(self, what: str, work: Callable[[], T]) -> T:
        began, busy = time.perf_counter(), time.process_time()
        made = work()
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        status = Path("/proc/self/status").read_text()  # the peak of `getrusage` is that of the parent before too
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
        self.figures[what] = [round(figure, 4) for figure in (seconds, busy, peak)]
        return made


def start(root: Path, count: int, *, known: bool = False) -> dict[str, Any]:
    """A start as training makes it, in this process, `known`: with what an earlier one kept; the cost of steps."""
    clock, config = Clock(), configuration(root, count)
    family = load_family(config.model.family, config.model.pretrained_model_name_or_path)
    found = clock("scan and keys", lambda: keyed_records(config, family, is_main=False, known=known))
    assert len(found.keys) == count, "what a scan keeps is not written as a scan reads it"
    if not (root / "cache" / FOLDER).exists():
        write_entries(root, config, family, found)
        found = replace(found, cache=Cache(root / "cache", 10**9))
    encoded = clock("entries", lambda: encode(config, family, found, device=torch.device("cpu"), rank=0, world_size=1))
    plan = clock("plan", lambda: build_plan(config, encoded, world_size=4))
    clock("first step", lambda: plan.step(0))
    steps = range(1, min(1000, plan.steps_per_epoch))
    clock("steps", lambda: [plan.step(step) for step in steps])
    clock.figures["steps"] = [figure / len(steps) for figure in clock.figures["steps"][:2]]
    return {"records": count, **clock.figures}


def again(root: Path, count: int) -> dict[str, Any]:
    """A start that finds what an earlier one has kept, if there was one."""
    return start(root, count, known=True)


def index_alone(root: Path, count: int) -> dict[str, Any]:
    """Index, lookups and plan in a process that holds no records."""
    clock = Clock()
    with collector_paused():
        cache = clock("index", lambda: Cache(root / "cache"))
        keys = list(cache.shards.shard_of)
        lengths = clock("lengths", lambda: [lengths_of(entry) for key in keys if (entry := cache.lookup(key))])
        how: dict[str, Any] = {"samples_per_step": 8, "max_tokens": 4096, "layout": "packed", "seed": 0}
        plan = clock("plan", lambda: Plan(lengths, names=keys, world_size=4, **how))
        clock("first step", lambda: plan.step(0))
    return {"records": len(lengths), **clock.figures}


def first_step(root: Path, steps: int) -> dict[str, Any]:
    """A whole process of training: until its first step is in the metrics, then to its end."""
    metrics = root / "run" / "metrics.jsonl"
    before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    command = [sys.executable, "train.py", "--config", str(root / "run.yaml"), f"train.max_train_steps={steps}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    began, figures = time.perf_counter(), {}
    with (root / "out.txt").open("a") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=out, env=environment)
        while process.poll() is None and "seconds" not in figures:
            if metrics.exists() and len(metrics.read_text().splitlines()) > before:
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                busy = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                figures = {"seconds": round(time.perf_counter() - began, 2), "processor_seconds": round(busy, 2)}
            time.sleep(0.02)
        _, status, usage = os.wait4(process.pid, 0) if process.returncode is None else (0, process.returncode, None)
    assert status == 0 and usage, (root / "out.txt").read_text()[-2000:]
    step = json.loads(metrics.read_text().splitlines()[before])["seconds"]
    return {**figures, "step_seconds": round(step, 2), "peak_gb": round(usage.ru_maxrss / 1e6, 3)}


def real_files(root: Path, count: int) -> dict[str, Any]:
    """A manifest of so many small files: its first scan and the one that finds everything in the memo."""
    folder = root / f"files-{count}"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    image = (folder / "0.png").read_bytes()
    with (folder / "all.jsonl").open("w") as rows:
        for number in range(count):
            (folder / f"{number}.png").write_bytes(image)
            rows.write(json.dumps({"path_target": f"{number}.png", "prompt": f"picture {number}"}) + "\n")
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    clock = Clock()
    for what in ("first scan", "next scan"):
        found = clock(
            what, lambda: scan([f"{folder}/all.jsonl"], limits=Limits(), memo=folder / "memo", progress=False)
        )
        assert (len(found.records), found.decoded) == (count, count if what == "first scan" else 0)
    return {"files": count, **clock.figures}


def measured(root: Path, count: int, *, train: bool) -> dict[str, Any]:
    """All of one count, each in a process of its own; `train`: also whole processes of training."""
    write_data(root, count)
    in_process("start", root, count)  # writes the entries
    in_process("again", root, count)  # keeps what it finds
    parts: dict[str, Any] = {name: in_process(name, root, count) for name in ("start", "again", "index_alone")}
    if train:
        parts["process"] = {"first": first_step(root, STEPS), "resumed": first_step(root, 2 * STEPS)}
    return {**parts, "load": os.getloadavg()}


def in_process(name: str, root: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", name, "--folder", str(root), str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table(found: dict[str, Any]) -> str:
    """In Markdown; times are processor time."""
    lines = [
        "| records | scan and keys | entries | plan | all of it again | a step's plan |",
        "|---|---|---|---|---|---|",
    ]
    rows = sorted(found["counts"], key=lambda row: int(row["start"]["records"]))
    for start, again in ((row["start"], row["again"]) for row in rows):
        parts = "scan and keys", "entries", "plan"
        times = [f"{start[name][1]:.2f} s" for name in parts] + [f"{sum(again[name][1] for name in parts):.2f} s"]
        step = f"{1000 * again['steps'][1]:.2f} ms"
        lines.append(f"| {start['records']:,} | {' | '.join(times)} | {step} |")
    for row in rows:
        alone, process = row["index_alone"], row.get("process", {}).get("resumed")
        if process:
            seconds = sum(alone[name][1] for name in ("index", "lengths", "plan", "first step"))
            index = alone["index"][2] - rows[0]["index_alone"]["index"][2]
            lines += [
                "",
                f"A resumed `train.py` with {alone['records']:,} records, to the end of its first step: "
                f"{process['processor_seconds']:.0f} s of processor time, {process['seconds']:.0f} s by the clock at a "
                f"load of {row['load'][0]:.1f}, {process['step_seconds']:.0f} s of them the step's, "
                f"{process['peak_gb']:.2f} GB at the peak. Index and plan alone: "
                f"{seconds:.1f} s and at most {alone['first step'][2]:.2f} GB, {index:.2f} GB of it the index.",
            ]
    files = sorted(found["files"], key=lambda row: int(row["files"]))
    each = [
        (row["files"], *(1e6 * row[what][1] / row["files"] for what in ("first scan", "next scan"))) for row in files
    ]
    lines += ["", "| files of a manifest | first scan | next scan |", "|---|---|---|"] if each else []
    lines += [f"| {count:,} | {first:.0f} us a file | {again:.0f} us a file |" for count, first, again in each]
    return "\n".join(lines)


@contextmanager
def folder_for(given: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=given) as made:
        yield Path(made)


def measure(
    found: dict[str, Any], folder: str | None, counts: Sequence[int], files: Sequence[int], *, keep: bool = False
) -> dict[str, Any]:
    """Add what the results lack; each is written as it is done, with `keep`."""
    known = {("counts", row["start"]["records"]) for row in found["counts"]}
    known |= {("files", row["files"]) for row in found["files"]}
    for part, count in [*(("counts", count) for count in counts), *(("files", count) for count in files)]:
        if (part, count) in known:
            continue
        with folder_for(folder) as root:
            whole = part == "counts"
            row = measured(root, count, train=count == max(COUNTS)) if whole else real_files(root, count)
        found[part].append(row)
        found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        if keep:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(found) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int)
    parser.add_argument("--folder", help="for what is generated, where there is room")
    parser.add_argument(
        "--part", choices=("start", "again", "index_alone"), help="of a folder that is written, as JSON"
    )
    given = parser.parse_args()
    if given.part:
        print(json.dumps(globals()[given.part](Path(given.folder), *given.counts)))
        return
    if given.counts:
        print(json.dumps(measure({"counts": [], "files": []}, given.folder, given.counts, ())))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"counts": [], "files": []}
    measure(found, given.folder, COUNTS, FILES, keep=True)


if __name__ == "__main__":
    main()
