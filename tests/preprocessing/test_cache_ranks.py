"""Caching with real processes: two ranks, kills at any moment, full disks, and an index of 100,000 entries."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixres.quickstart.data import HELD_OUT_PAIRS, TRAIN_PAIRS

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ALL, KILLS = TRAIN_PAIRS + HELD_OUT_PAIRS, 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Forks a process that has imported everything already: twenty restarts in seconds. Each is `main` with the arguments of
# the command, alone in its process, told its rank as torchrun tells it.
STARTER = """
import json, os, signal, sys
from mixres import cli
import mixres.preprocessing.fill, mixres.models.qwen.edit
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ |= order["environment"]
        os._exit(cli.main(order["arguments"]))
    print(pid, flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


class Command:
    """`train.py cache` over the demo's data."""

    def __init__(self, base: Path, demo: Path, folder: Path) -> None:
        self.base, self.demo, self.folder = base, demo, folder

    def words(self, cache: Path) -> list[str]:
        return [
            "cache",
            "--config",
            str(REPOSITORY / "configs" / "quickstart.yaml"),
            f"model.pretrained_model_name_or_path={self.base}",
            f"data.train={self.demo / 'train'}",
            f"data.held_out={self.demo / 'held_out'}",
            "data.resize.control.area=4096",
            f"cache.cache_dir={cache}",
            f"logging.output_dir={self.folder / 'run'}",
        ]

    def __call__(self, cache: Path, *launcher: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        command = [*(launcher or [sys.executable]), "train.py", *self.words(cache)]
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment(**environ), capture_output=True, text=True, check=False
        )

    def in_own_mounts(self, script: str) -> "subprocess.CompletedProcess[str]":
        """A shell script in a mount namespace of its own, in which it may mount small disks."""
        return subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc", script],
            cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip

    def line(self, cache: Path) -> str:
        return " ".join([sys.executable, "train.py", *self.words(cache)])


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def entries(root: Path) -> dict[str, tuple[int, int]]:
    """Which file each entry is: another one under the same name has been written anew."""
    files = {path.stem: path.stat() for path in root.glob("??/*.safetensors")}
    return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in files.items()}


def counts(text: str) -> tuple[int, int, int]:
    """Entries encoded by rank 0, found, encoded by other processes."""
    found = re.search(r"(\d+) encoded, (\d+) found(?:, (\d+) by other processes)?", text)
    assert found, text
    return int(found[1]), int(found[2]), int(found[3] or 0)


@pytest.fixture(scope="module")
def command(tiny_base: Path, demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tiny_base, demo_root, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def undisturbed(command: Command) -> Path:
    """What one process makes."""
    cache = command.folder / "undisturbed"
    done = command(cache)
    assert done.returncode == 0, done.stderr
    assert counts(done.stdout) == (ALL, 0, 0)
    return cache


# --- Ranks


def test_two_ranks_split_the_work_and_make_the_bytes_of_one(command: Command, undisturbed: Path) -> None:
    cache = command.folder / "two"
    done = command(cache, *TORCHRUN)
    assert done.returncode == 0, done.stderr
    own, found, others = counts(done.stdout)
    rank_1 = re.search(r"rank 1: (\d+) encoded", done.stdout)
    assert rank_1
    assert own > 0
    assert int(rank_1[1]) > 0
    assert own + int(rank_1[1]) == ALL, "nothing was encoded twice"
    assert own + found + others == ALL
    assert contents(cache) == contents(undisturbed)


def test_a_rank_alone_finishes_for_one_that_never_comes(command: Command, undisturbed: Path) -> None:
    cache = command.folder / "alone"
    done = command(cache, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"cache     rank 1: {ALL} encoded\n"
    assert entries(cache).keys() == entries(undisturbed).keys()


def test_two_runs_at_once_share_the_work(command: Command, undisturbed: Path) -> None:
    cache = command.folder / "both"
    line = [sys.executable, "train.py", *command.words(cache)]
    runs = [
        subprocess.Popen(line, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum(counts(text)[0] for text in said) == ALL
    assert contents(cache) == contents(undisturbed)


# --- Kills


class Starter:
    """Starts ranks of the command, and kills them."""

    def __init__(self, command: Command) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER], cwd=REPOSITORY, env=environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.command = command
        self.pids: list[int] = []

    def start(self, cache: Path) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for rank in range(2):
            order = {"arguments": self.command.words(cache), "environment": {"RANK": str(rank), "WORLD_SIZE": "2"}}
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            while not line.strip().isdigit():  # the ranks before it is_main too
                line = self.process.stdout.readline()
            self.pids.append(int(line))

    def alive(self) -> bool:
        return any(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def kill(self) -> None:
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it had come to its end
                continue
        while self.alive():
            time.sleep(0.005)
        self.pids.clear()


@pytest.fixture
def starter(command: Command) -> Iterator[Starter]:
    made = Starter(command)
    yield made
    made.kill()
    made.process.kill()
    made.process.communicate()


def test_killed_at_twenty_moments_the_cache_ends_as_if_nothing_had_been(
    command: Command, undisturbed: Path, starter: Starter
) -> None:
    cache, rng = command.folder / "killed", random.Random(0)
    seen: dict[str, tuple[int, int]] = {}
    during = 0
    for _ in range(KILLS):
        before, wanted = len(seen), rng.randint(0, 3)
        starter.start(cache)
        while len(entries(cache)) < before + wanted and starter.alive():
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.1 if wanted else 1.5))
        starter.kill()
        now = entries(cache)
        during += before < len(now) < ALL
        assert seen.items() <= now.items(), "an entry that is there is not encoded again"
        seen = now
    assert during >= KILLS // 2, "kills fell into the encoding"
    parts = [path for path in cache.rglob(".tmp-*") if path.suffix != ".json"]
    assert len(parts) <= 2 * KILLS, "at most one entry in flight a rank"
    done = command(cache, *TORCHRUN)
    assert done.returncode == 0, done.stderr
    own, found, others = counts(done.stdout)
    assert found >= len(seen)
    assert own + found + others == ALL
    assert seen.items() <= entries(cache).items()
    for path in parts:
        os.utime(path, (0, 0))  # what killed writers leave is swept when it is an hour old
    assert counts(command(cache).stdout) == (0, ALL, 0)
    assert contents(cache) == contents(undisturbed)


# --- Full disks


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(command: Command) -> None:
    disk = command.folder / "small"
    disk.mkdir()
    done = command.in_own_mounts(
        f"mount -t tmpfs -o size=200k none {disk}; set +e; {command.line(disk / 'cache')}; echo code $?; "
        f"find {disk} -name '*.safetensors' | wc -l"
    )
    assert done.stdout.splitlines()[-2:] == ["code 2", "0"], done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("mixres: error:")]
    assert re.fullmatch(
        rf"mixres: error: cache.cache_dir: {disk / 'cache'} needs about \d\.\d MB for {ALL} entries, 0.2 MB are free: "
        "make room, or name a folder on a larger disk",
        line,
    ), line
    assert "Loading" not in done.stderr, "no encoder was loaded"


def test_a_full_cache_on_a_disk_that_cannot_be_written_is_used(command: Command, undisturbed: Path) -> None:
    """Its memo of the scan is of other times: all files are decoded, and what was found cannot be kept."""
    cache = command.folder / "read-only"
    shutil.copytree(undisturbed, cache)
    (cache / "scan.json").unlink(missing_ok=True)
    part = next(cache.glob("??")) / ".tmp-of-a-killed-writer"
    part.write_bytes(b"x")
    os.utime(part, (0, 0))
    done = command.in_own_mounts(
        f"mount --bind {cache} {cache}; mount -o remount,bind,ro {cache}; {command.line(cache)}; "
        f"! touch {cache}/x 2>/dev/null"
    )
    assert done.returncode == 0, done.stderr
    assert counts(done.stdout) == (0, ALL, 0)
    assert part.exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_costs_nothing_that_was_written(command: Command, undisturbed: Path, ranks: int) -> None:
    """A small disk that has room for bytes and none for files, then for more of them."""
    disk, copy = command.folder / f"filling-{ranks}", command.folder / f"filled-{ranks}"
    disk.mkdir()
    launcher = " ".join(TORCHRUN) if ranks == 2 else sys.executable
    run = f"{launcher} train.py {' '.join(command.words(disk / 'cache'))}"
    done = command.in_own_mounts(
        f"mount -t tmpfs -o size=50m,nr_inodes=60 none {disk}; set +e; {run}; echo code $?; "
        f"find {disk} -name '*.safetensors' | wc -l; find {disk} -name '.tmp-*' | wc -l; "
        f"mount -o remount,nr_inodes=1000 {disk}; {run}; echo code $?; cp -r {disk}/cache {copy}"
    )
    said = done.stdout.splitlines()
    first = said.index("code 1")
    whole, parts = int(said[first + 1]), int(said[first + 2])
    assert 5 < whole < 50
    assert parts == 0
    assert said[-1] == "code 0", done.stderr
    own, found, others = counts("\n".join(said[first:]))
    assert (own + others, found) == (ALL - whole, whole) if ranks == 1 else own + found + others == ALL
    lines = [line for line in done.stderr.splitlines() if "mixres: error:" in line]
    assert 1 <= len(lines) <= ranks
    for line in lines:
        assert f"cache.cache_dir: {disk / 'cache'} cannot be written (No space left on device): make room, " in line
    assert ranks == 2 or f"for the {ALL - whole} entries to come, and run the same command again" in lines[0]
    assert ranks == 2 or "Traceback" not in done.stderr
    assert contents(copy) == contents(undisturbed)


# --- Scale

# VmHWM and not `ru_maxrss`: that one starts at the peak of the process which started this one, here all of pytest's.
LARGE = """
import json, sys, time
from pathlib import Path
begun = time.perf_counter()
from mixres.data.cache import Cache
from mixres.data.plan import Lengths, Plan
imported = time.perf_counter()
keys = Path(sys.argv[2]).read_text().split()
cache = Cache(sys.argv[1])
opened = time.perf_counter()
entries = [cache.lookup(key) for key in keys]
looked_up = time.perf_counter()
plan = Plan(
    [Lengths(e.text_tokens, e.image_tokens, e.target_tokens) for e in entries], names=keys, seed=0,
    samples_per_step=64, max_tokens=65536, layout="packed", world_size=8,
)
samples = sum(plan.step(step).samples for step in range(plan.steps_per_epoch))
planned = time.perf_counter()
print(json.dumps({
    "import": imported - begun, "open": opened - imported, "look up": looked_up - opened, "plan": planned - looked_up,
    "samples": samples, "peak": 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]),
}))
"""


def test_an_index_of_100000_entries_opens_and_plans_under_a_gigabyte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Entries without content, of the size that the index states: nothing opens them, as with a full cache."""
    count, rng = 100_000, random.Random(0)
    keys = [f"{rng.getrandbits(128):032x}" for _ in range(count)]
    rows = {}
    for key in keys:
        path = tmp_path / key[:2] / f"{key}.safetensors"
        path.parent.mkdir(exist_ok=True)
        grids = [[1, rng.randint(8, 64), rng.randint(8, 64)] for _ in range(2)]
        rows[key] = [1000 + rng.randrange(10**7), rng.randint(20, 1500), False, grids, 0]
        with path.open("wb") as file:
            file.truncate(rows[key][0])
    (tmp_path / "index.json").write_text(json.dumps({"format": 2, "entries": rows}))
    (tmp_path / "keys").write_text("\n".join(keys))
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path), str(tmp_path / "keys")],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        seconds = ", ".join(f"{name} {found[name]:.1f} s" for name in ("import", "open", "look up", "plan"))
        print(f"\n100,000 entries: {seconds}; peak {found['peak'] / 1e9:.2f} GB")  # noqa: T201
    assert found["samples"] == count
    assert found["peak"] < 1e9
