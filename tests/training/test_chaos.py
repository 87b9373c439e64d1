"""SIGKILL from outside at any instant, half of the time in the middle of a save; in the end the same bits.

`MIXRES_KILLS` is the number of kills, half of them with one process and half with two: `make chaos` takes 40.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.jobs import LORA, PYTHON, Jobs, kill_all, metrics, newest, processes, send, status, torchrun

KILLS = int(os.environ.get("MIXRES_KILLS", "6"))
STEPS_A_KILL = 10
SLOW_SYNC = Path(__file__).parents[1] / "support" / "slow_sync"
SLOW = {"PYTHONPATH": os.pathsep.join([str(SLOW_SYNC), os.environ.get("PYTHONPATH", "")]), "SLOW_SYNC_S": "0.02"}
SAVE_S = 0.5  # a slowed save: nine syncs of two pauses each, and the system's own time
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 60 * KILLS)]


def wait_for_a_save(folder: Path, process: "subprocess.Popen[str]") -> bool:
    """Until a temporary checkpoint is seen; False where the run came to its end first."""
    while process.poll() is None:
        if any(name.startswith(".tmp-step") for name in listed(folder / "checkpoints")):
            return True
        time.sleep(0.001)
    return False


def wait_for_a_step(folder: Path, process: "subprocess.Popen[str]", draw: random.Random) -> None:
    """Until some time in the start, or after a step that the life before did not reach."""
    if draw.random() < 0.3:
        return time.sleep(draw.uniform(0, 6))
    before = len(metrics(folder))
    while process.poll() is None and len(metrics(folder)) <= before:
        time.sleep(0.01)
    return time.sleep(draw.uniform(0, SAVE_S))


def listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - names may vanish while they are read


def kill_some(folder: Path, process: "subprocess.Popen[str]", draw: random.Random) -> None:
    """The whole job, or one of its processes: a launcher, a rank, a process of the loader."""
    if draw.random() < 0.5:
        kill_all(folder)
    elif pids := processes(folder):
        send(draw.choice(pids), signal.SIGKILL)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        kill_all(folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_instant_a_run_ends_with_the_bits_of_an_unbroken_one(jobs: Jobs, ranks: int) -> None:
    kills = KILLS // 2
    words = (f"train.max_train_steps={STEPS_A_KILL * (kills + 1)}", "data.num_workers=1", "model.lora.lora_dropout=0.1")
    launcher = PYTHON if ranks == 1 else torchrun(ranks)
    whole, folder = jobs.forked(f"whole-{ranks}", *words, ranks=ranks), jobs.root / f"killed-{ranks}"
    draw, in_saves, lives = random.Random(ranks), 0, 0
    while lives < kills:
        with jobs.started(folder.name, *words, launcher=launcher, extra=SLOW) as process:
            if lives % 2:
                in_saves += wait_for_a_save(folder, process)
                time.sleep(draw.uniform(0, SAVE_S))
            else:
                wait_for_a_step(folder, process, draw)
            assert process.poll() is None, "too few steps for so many kills"
            kill_some(folder, process, draw)
            lives += 1
    assert in_saves == kills // 2
    jobs(folder.name, *words, launcher=launcher)
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("done", 0)
    assert metrics(folder) == metrics(whole)
    assert not list((folder / "checkpoints").glob(".tmp*"))
    ours, theirs = (
        {path.name: path.read_bytes() for path in (run / LORA, *newest(run).path.glob("*.safetensors"))}
        for run in (folder, whole)
    )
    assert ours == theirs
    assert len(ours) == 3
