"""Real runs of `train.py` on the small data set, for the tests that start, stop and kill them."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from mixres.cli import main
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.training.checkpoint import Checkpoint, Checkpoints
from mixres.training.sample_sheets import HeldOutSampler
from support.ranks import run_ranks

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PYTHON = (sys.executable,)
ACCELERATE = (str(BIN / "accelerate"), "launch", "--config_file", "configs/accelerate/single.yaml")
LORA = "pytorch_lora_weights.safetensors"
COMMON = ("sample.every=0", "checkpoint.every=2", "data.held_out=null", "optimizer.init_args.lr=2e-3")

# Of the two blocks of the tiny base one is on the device at a time.
OFFLOADED = ("train.gradient_checkpointing=true", "train.offload={blocks: 1, activations: true}")


def torchrun(ranks: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def stock_calls(sampler: HeldOutSampler) -> list[dict[str, Any]]:
    """The calls of `stock_process.py` for the images that the sampler makes."""
    config = sampler.config
    return [
        {
            "controls": [str(path) for path in item.record.controls],
            "aligned": [size == item.target_size for size in item.control_sizes.vae],
            "seed": config.train.seed,
            "words": {
                "prompt": item.record.prompt,
                "width": item.target_size.width,
                "height": item.target_size.height,
                "num_inference_steps": config.sample.steps,
            },
        }
        for item in sampler.items
    ]


class Jobs:
    """Commands over one data set and one filled cache; each run has a folder of its own under `root`."""

    def __init__(self, file: Path, cache: Path, root: Path, common: Sequence[str] = COMMON) -> None:
        self.file, self.cache, self.root, self.common = file, cache, root, common

    def words(self, run: str, *overrides: str) -> list[str]:
        folders = (f"cache.cache_dir={self.cache}", f"logging.output_dir={self.root / run}")
        return ["--config", str(self.file), *folders, *self.common, *overrides]

    def config(self, run: str, *overrides: str) -> Config:
        return load_config(self.file, self.words(run, *overrides)[2:])

    def here(self, run: str, *overrides: str, code: int = 0) -> Path:
        """The same command in this process: a process of its own costs more than so short a run. Its run folder."""
        AcceleratorState._reset_state(True)
        assert main(self.words(run, *overrides)) == code
        return self.root / run

    def forked(self, run: str, *overrides: str, ranks: int = 1) -> Path:
        """The same command by so many ranks that need no start of their own, see `ranks.py`. Its run folder."""
        self.many([(run, overrides)], ranks)
        return self.root / run

    def many(self, runs: Sequence[tuple[str, tuple[str, ...]]], ranks: int) -> None:
        """Such commands one after the other in the same processes."""
        commands = [self.words(run, *overrides) for run, overrides in runs]
        out = self.root / f"{runs[0][0]}.out"
        run_ranks(commands, ranks, cwd=REPOSITORY, environment=environment(), out=out)

    def __call__(
        self,
        run: str,
        *overrides: str,
        launcher: Sequence[str] = PYTHON,
        program: str = "train.py",
        before: str = "",
        code: int = 0,
    ) -> "subprocess.CompletedProcess[str]":
        """Run to the end; `before` is shell text, such as limits that the process gets."""
        command = [*launcher, program, *self.words(run, *overrides)]
        if before:
            command = ["bash", "-c", f'{before}; exec "$@"', "bash", *command]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done

    @contextmanager
    def started(
        self, run: str, *overrides: str, launcher: Sequence[str] = PYTHON, extra: dict[str, str] | None = None
    ) -> Iterator["subprocess.Popen[str]"]:
        """A run in a session of its own; whatever is left of it in the end is killed."""
        with (
            (self.root / f"{run}.out").open("a") as out,
            subprocess.Popen(
                [*launcher, "train.py", *self.words(run, *overrides)],
                cwd=REPOSITORY, env=environment() | (extra or {}), stdout=out, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            ) as process,
        ):  # fmt: skip
            try:
                yield process
            finally:
                kill_all(self.root / run)

    def output(self, run: str) -> str:
        return (self.root / f"{run}.out").read_text()

    def copy_at(self, step: int, run: str, name: str) -> Path:
        """A copy of the folder of `run` as it was after `step`, but for lines that were written later."""
        folder = shutil.copytree(self.root / run, self.root / name, symlinks=True)
        for result in (LORA, "run_status.json"):
            (folder / result).unlink(missing_ok=True)
        for result in ("transformer", "ema"):
            shutil.rmtree(folder / result, ignore_errors=True)
        for path in [*folder.glob("checkpoints/step-*"), *folder.glob("samples/step-*")]:
            if int(path.stem.partition("-")[2]) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder


def processes(folder: Path) -> list[int]:
    """Every process whose command line names the run folder: launchers, ranks and their loader workers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may be gone by now
            if f"logging.output_dir={folder}".encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return sorted({*found} - {os.getpid()})


def kill_all(folder: Path) -> None:
    while pids := processes(folder):
        for pid in pids:
            send(pid, signal.SIGKILL)
        time.sleep(0.01)


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """The system refuses this process longer files, as a full disk would."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def send(pid: int, number: signal.Signals) -> None:
    """To a process that may be gone by now."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Direct children, oldest first."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "run_status.json").read_text())
    return values


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines without what a clock put in."""
    if not (folder / "metrics.jsonl").exists():
        return []
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def newest(folder: Path) -> Checkpoint:
    found = Checkpoints(folder / "checkpoints", keep=2).newest_valid()
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def error_lines(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """What the command says of an error; nothing of the interpreter's is beside it."""
    assert "Traceback" not in done.stderr
    prefix = "mixres: error: "
    return [line.removeprefix(prefix) for line in done.stderr.splitlines() if line.startswith(prefix)]


def wait_for_steps(folder: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Until `count` steps are in the metrics."""
    while len(metrics(folder)) < count:
        assert process.poll() is None, "it ended before"
        time.sleep(0.01)


def wait_until_ended(folder: Path, seconds: float) -> dict[str, Any]:
    """The status after every process of the run is gone."""
    end = time.monotonic() + seconds
    while processes(folder):
        assert time.monotonic() < end, f"still there: {processes(folder)}"
        time.sleep(0.05)
    return status(folder)
