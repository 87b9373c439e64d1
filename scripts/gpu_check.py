"""Tests, equality, speed and memory on this machine's CUDA device, within a time; `scripts/gpu_check.sh` starts it.

Each case is a command in a process of its own with a time limit: one that runs out of memory ends no other. A case for
which too little time is left is listed as not run. The results go to `benchmarks/<device>.json` beside the page
`benchmarks.md`, whose tables are written anew from all such files. Beside the cases, a process that uses no CUDA device
rehearses their peaks of memory. Without a CUDA device the same code runs on a few tiny shapes, on a copy of the page in
build/gpu_check.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: written by scripts/gpu_check.py -->", "<!-- /measured -->"
STARTS_S = 40  # importing the libraries and making random weights: with less left nothing is started
GIB = 2**30
NOT_ASKED = ("wandb",)  # imported only where a run logs to it
# What others published on an H100, and what is aimed at; docs/benchmarks.md names the sources.
BARS = {
    "image_rank_8": "published 1.202 s and 41.0 GiB",
    "edit_1mp": "parity by FLOPs 3.6 s, good 1.7 s; MFU published 0.22, goal 0.5",
}


class Case(NamedTuple):
    name: str
    limit: int  # seconds
    command: tuple[str, ...]  # of train.py; empty: the tests that are marked gpu
    report: str = "bench.json"
    samples: int = 1  # a step


def bench(name: str, limit: int, seconds: int, *words: str, config: str = "qwen_image_edit_lora", samples: int) -> Case:
    """A case of `mixres bench`, of one step."""
    own = ("--config", f"configs/{config}.yaml", f"batch.samples_per_step={samples}")
    command = ("bench", "--synthetic", "--steps", "1", "--seconds", str(seconds), *own, *words)
    return Case(name, limit, command, samples=samples)


ONE_MP = ("data.resize.target.upscale=true", "batch.max_tokens=20480")
MIXES = ("data.resize.target.max_pixels=262144", "data.resize.control.area=262144")
PACKED = ("--way", "packed")
VERIFY = ("verify", "--synthetic", "--config", "configs/qwen_image_edit_lora.yaml", *MIXES, "batch.max_tokens=12288")
GPU_CASES = (  # what matters most comes first
    Case("gpu_tests", 150, ()),
    Case("batch_equals_alone", 120, VERIFY, "verify.json"),
    bench("edit_1mp", 130, 25, *ONE_MP, samples=2),
    bench(
        "image_rank_8", 70, 8, *ONE_MP, *PACKED, "model.lora.r=8", "model.lora.lora_alpha=8",
        config="qwen_image_lora", samples=1,
    ),
    bench("mixes_quarter_mp", 100, 15, *MIXES, "batch.max_tokens=20480", samples=4),
    bench(
        "mixes_no_checkpointing", 70, 8, *MIXES, *PACKED, "train.gradient_checkpointing=false", "batch.max_tokens=3072",
        samples=4,
    ),
    bench("edit_1mp_int8", 90, 8, *ONE_MP, *PACKED, "model.quantize=int8", samples=1),
    bench("edit_1mp_swap_4_blocks", 150, 8, *ONE_MP, *PACKED, "train.offload.blocks=4", samples=1),
    bench(
        "edit_1mp_compiled", 180, 8, *ONE_MP, "--way", "padded", "batch.layout=padded", "train.compile=true", samples=1
    ),
    bench("edit_1mp_fp8", 90, 8, *ONE_MP, *PACKED, "model.quantize=fp8", samples=1),
    bench("edit_1mp_half_checkpointed", 80, 8, *ONE_MP, *PACKED, "train.gradient_checkpointing=2", samples=1),
)  # fmt: skip
TINY = (
    "model.dtype=bfloat16", "data.resize.target.max_pixels=4096", "data.resize.control.area=4096",
    "batch.max_tokens=1024", "train.mixed_precision=bf16",
)  # fmt: skip
CPU_CASES = (
    Case("gpu_tests", 0, ()),
    Case(
        "batch_equals_alone", 60, ("verify", "--synthetic", "--config", "configs/quickstart.yaml", *TINY), "verify.json"
    ),
    bench("tiny", 60, 1, *TINY, config="quickstart", samples=4),
    bench("tiny_int8", 60, 1, *TINY, *PACKED, "model.quantize=int8", config="quickstart", samples=1),
    bench("too_large", 60, 1, *TINY, "batch.max_tokens=8", config="quickstart", samples=1),
)

CASES = {"gpu": GPU_CASES, "cpu": CPU_CASES}
Peaks = dict[str, dict[str, int]]  # bytes by case and way


def unmet() -> Iterator[str]:
    """Packages that mixres needs, directly or not, and this machine lacks; or has in a version that does not do."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        own = list(map(Requirement, tomllib.load(file)["project"]["dependencies"]))
    needed, seen = list(own), set(NOT_ASKED)
    for requirement in needed:  # which grows
        name = requirement.name.lower().replace("_", "-")
        if name in seen or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield f"{requirement} (here: none)"
            continue
        if requirement in own and not requirement.specifier.contains(found):
            yield f"{requirement} (here: {found})"
        if name != "torch":  # its own parts come with it
            needed += map(Requirement, metadata.requires(name) or ())


DEVICE = """
import json, torch
found = {"name": "CPU", "memory_bytes": None, "torch": torch.__version__}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found |= {"name": properties.name, "memory_bytes": properties.total_memory}
print(json.dumps(found))
"""


def device() -> dict[str, Any]:
    """What the figures are measured on. Torch is asked in another process: here it would keep memory of the device."""
    asked = subprocess.run([sys.executable, "-c", DEVICE], stdout=subprocess.PIPE, text=True, check=True).stdout
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    state = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    return json.loads(asked) | {"driver_power_clock": state.stdout.strip() if state else None}


def run(case: Case, left: float, folder: Path) -> dict[str, Any]:
    """The case in a process of its own, and what became of it."""
    outcome = {"name": case.name, "samples": case.samples, "command": " ".join(case.command), "report": None}
    if not case.limit:
        return outcome | {"outcome": "not run", "reason": "there is no CUDA device"}
    if left < STARTS_S:
        return outcome | {"outcome": "not run", "reason": f"{max(0, left):.0f} s were left"}
    run_folder = folder / case.name
    words = (f"logging.output_dir={run_folder}", f"cache.cache_dir={folder / 'cache'}")
    command = [sys.executable, "train.py", *case.command, *words] if case.command else gpu_tests()
    started, limit = time.monotonic(), min(case.limit, left)
    with (
        (folder / f"{case.name}.log").open("w+", encoding="utf-8") as log,
        subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as job,
    ):
        try:
            code = job.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            code = None
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()] or [""]
    outcome |= {"seconds": round(time.monotonic() - started, 1), "tail": lines[-15:]}
    report = run_folder / "reports" / case.report
    if report.is_file():
        outcome["report"] = json.loads(report.read_text(encoding="utf-8"))
    if code is None:
        return outcome | {"outcome": "stopped", "reason": f"it ran past {limit:.0f} s"}
    if code:
        return outcome | {"outcome": "failed", "reason": next((x for x in lines if "error" in x.lower()), lines[-1])}
    return outcome | {"outcome": "done", "reason": None if case.command else lines[-1]}


def gpu_tests() -> list[str]:
    """Those that are marked gpu, and those of bitsandbytes only where it is installed. Other versions may warn."""
    files = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    with_bitsandbytes = any(metadata.distributions(name="bitsandbytes"))
    return [*command, *map(str, files), *(() if with_bitsandbytes else ("-k", "not nf4 and not bnb and not 8bit"))]


def rehearse(cases: Sequence[Case]) -> None:
    """Print for each case, as a line of JSON, the bytes at the peak of a step in each of its ways.

    They are those of the first step's largest microbatch, as `mixres.inspection.rehearsal` counts them.
    """
    sys.path.insert(0, str(REPOSITORY / "src"))
    from mixres.cli import parsers
    from mixres.config.load import load_config
    from mixres.errors import UserError
    from mixres.inspection.fitting import rehearse_quickly
    from mixres.verification.bench import WAYS, make_work
    from mixres.verification.setup import synthetic_source

    for case in cases:
        verb, *words = case.command or ("",)
        if verb != "bench":
            continue
        given = parsers()[1][verb].parse_intermixed_args(words)
        config = load_config(REPOSITORY / given.config, given.words)
        family, source = synthetic_source(config, config.batch.samples_per_step)
        found = {}
        try:
            work = make_work(config, source, 1)
        except UserError:  # as the case itself reports
            continue
        for way in given.way or WAYS:
            batches = work[way][0].batches
            largest = max(batches, key=lambda batch: batch.tokens_computed)
            sizes = list(zip(largest.img_shapes, largest.text_lengths, strict=True))
            own = config.model_copy(update={"batch": config.batch.model_copy(update={"layout": WAYS[way]})})
            phases = rehearse_quickly(own, family, sizes, microbatches=len(batches))["phases"]
            found[way] = max(phases[name]["bytes"] for name in ("forward", "backward", "optimizer"))
        print(json.dumps({"name": case.name, "bytes": found}), flush=True)


@contextmanager
def rehearsing(
    kind: str, cases: Sequence[Case], log: Path, end: float
) -> Iterator[Callable[[], dict[str, dict[str, int]]]]:
    """Rehearse beside what is done here, on processors alone. Yields what waits for the bytes by case and way."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rehearse", kind, *(f"--only={case.name}" for case in cases)]
    with (
        log.open("w+") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.DEVNULL) as job,
    ):

        def found() -> Peaks:
            with suppress(subprocess.TimeoutExpired):
                job.wait(timeout=max(0, end - time.monotonic()))
            out.seek(0)
            return {each["name"]: each["bytes"] for each in map(json.loads, out.read().splitlines())}

        try:
            yield found
        finally:
            job.kill()


def line(outcome: dict[str, Any]) -> str:
    """What became of a case, in one line."""
    found = f"{outcome['name']:<28} {outcome['outcome']:<8}"
    if "seconds" in outcome:
        found += f" {outcome['seconds']:>5.0f} s"
    return found + (f"  {outcome['reason']}" if outcome["reason"] else "")


def rows(outcome: dict[str, Any]) -> Iterator[str]:
    """The lines of the page's table for a case that timed something."""
    report = outcome["report"] or {}
    for row in report.get("rows", ()):
        cells = (
            outcome["name"],
            row["name"],
            f"{row['seconds'] / outcome['samples']:.3f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.2f}",
            *("-" if row.get(name) is None else f"{row[name] / GIB:.1f}" for name in ("peak_bytes", "rehearsed_bytes")),
            f"{row['padding']:.1%}",
            BARS.get(outcome["name"], ""),
        )
        yield f"| {' | '.join(cells)} |"


def section(result: dict[str, Any]) -> str:
    """The part of the page for one device."""
    machine, cases = result["device"], result["cases"]
    memory = f", {machine['memory_bytes'] / GIB:.0f} GiB" if machine["memory_bytes"] else ""
    lines = [f"### {machine['name']}", "", f"{result['date']}, torch {machine['torch']}{memory}.", ""]
    head = ("case", "way", "s a sample", "MFU", "peak GiB", "rehearsed GiB", "padding", "to compare")
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [row for outcome in cases for row in rows(outcome)]
    others = [x for x in cases if not (x["report"] or {}).get("rows")]
    lines += ["", *(f"- `{x['name']}`: {x['outcome']}{': ' + x['reason'] if x['reason'] else ''}" for x in others)]
    return "\n".join(lines)


def write_page(docs: Path) -> None:
    """The tables of `benchmarks.md` from the files in `benchmarks/`."""
    page = docs / "benchmarks.md"
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((docs / "benchmarks").glob("*.json"))]
    tables = "\n\n".join(map(section, found)) or "Nothing was measured yet."
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="for all cases together (8.5)")
    parser.add_argument("--only", action="append", metavar="CASE", help="only this case (several may be given)")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="where benchmarks.md is (docs; CPU: build/gpu_check)")
    parser.add_argument("--rehearse", choices=CASES, help="only print what rehearsals of these cases count")
    given = parser.parse_args(argv)

    def chosen(kind: str) -> list[Case]:
        return [case for case in CASES[kind] if not given.only or case.name in given.only]

    if given.rehearse:
        rehearse(chosen(given.rehearse))
        return 0
    end = time.monotonic() + 60 * given.minutes
    if lacking := list(unmet()):
        print("gpu_check: this machine lacks packages, carry them with --wheels DIR:", *lacking, sep="\n  ")
        return 2
    machine = device()
    on_cuda = machine["memory_bytes"] is not None
    docs: Path = given.docs or REPOSITORY / ("docs" if on_cuda else "build/gpu_check")
    (docs / "benchmarks").mkdir(parents=True, exist_ok=True)
    if not (docs / "benchmarks.md").exists():
        shutil.copyfile(REPOSITORY / "docs" / "benchmarks.md", docs / "benchmarks.md")
    result = {"device": machine, "date": date.today().isoformat(), "minutes": given.minutes, "cases": []}
    file = docs / "benchmarks" / f"{re.sub(r'[^a-z0-9]+', '_', machine['name'].lower()).strip('_')}.json"

    def write() -> None:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    kind = "gpu" if on_cuda else "cpu"
    with (
        tempfile.TemporaryDirectory() as folder,
        rehearsing(kind, chosen(kind), Path(folder) / "rehearsed.jsonl", end) as rehearsed,
    ):
        for case in chosen(kind):
            outcome = run(case, end - time.monotonic(), Path(folder))
            result["cases"].append(outcome)
            print(line(outcome), *rows(outcome), sep="\n", flush=True)
            write()  # what there is, if it is stopped
        counted = rehearsed()
    for outcome in result["cases"]:
        for row in (outcome["report"] or {}).get("rows", ()):
            row["rehearsed_bytes"] = counted.get(outcome["name"], {}).get(row["name"])
    write()
    write_page(docs)
    print(f"written   {file}, {docs / 'benchmarks.md'}")
    failed = [x["name"] for x in result["cases"][:2] if x["outcome"] == "failed"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
