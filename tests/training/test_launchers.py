"""Runs that are stopped, orphaned, killed and refused under every launcher: what the user sees, what is left."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.jobs import (
    ACCELERATE,
    PYTHON,
    REPOSITORY,
    Jobs,
    children,
    environment,
    metrics,
    newest,
    send,
    status,
    torchrun,
    wait_for_steps,
    wait_until_ended,
)

ENDLESS = "train.max_train_steps=100000"
WORKERS = "data.num_workers=2"
STOP_S = 25  # torchrun kills after 30
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def ending(folder: Path) -> tuple[str, int]:
    return status(folder)["state"], status(folder)["exit_code"]


def assert_preempted(folder: Path) -> None:
    ended = wait_until_ended(folder, STOP_S)
    assert (ended["state"], ended["exit_code"]) == ("preempted", 75), ended
    assert ended["step"] == newest(folder).step == len(metrics(folder)) >= 3
    assert not list(folder.rglob(".tmp*"))


LAUNCHERS = {
    "python": (PYTHON, signal.SIGINT, 75),
    "torchrun 2": (torchrun(2), signal.SIGTERM, 1),
    "torchrun 2, Ctrl-C": (torchrun(2), signal.SIGINT, 1),
}


@pytest.mark.parametrize(("launcher", "number", "code"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_signal_saves_and_ends_the_run(
    jobs: Jobs, launcher: Sequence[str], number: signal.Signals, code: int
) -> None:
    run = f"stopped-{len(list(jobs.root.iterdir()))}"
    with jobs.started(run, ENDLESS, WORKERS, launcher=launcher) as process:
        wait_for_steps(jobs.root / run, 3, process)
        os.killpg(process.pid, number)  # the launcher and, under python, the loader's workers too
        assert process.wait(timeout=STOP_S) == code
        assert_preempted(jobs.root / run)
    assert status(jobs.root / run)["reason"] in jobs.output(run)


def test_accelerate_returns_at_once_and_the_same_command_waits_for_what_still_saves(jobs: Jobs) -> None:
    folder = jobs.root / "accelerate"
    with jobs.started("accelerate", ENDLESS, WORKERS, launcher=ACCELERATE) as process:
        wait_for_steps(folder, 3, process)
        (trainer,) = children(process.pid)
        send(trainer, signal.SIGSTOP)  # so that it is still there when the command comes again
        process.terminate()
        process.wait(timeout=STOP_S)
        done = len(metrics(folder))
        with jobs.started("accelerate", ENDLESS, WORKERS, launcher=ACCELERATE) as again:
            while "waiting   up to 40 s" not in jobs.output("accelerate"):
                assert again.poll() is None
                time.sleep(0.01)
            assert status(folder)["pid"] == trainer, "the one that waits for the lock has not touched the status"
            send(trainer, signal.SIGCONT)
            wait_for_steps(folder, done + 3, again)
            send(children(again.pid)[0], signal.SIGTERM)
            assert_preempted(folder)


def test_ranks_without_their_launcher_save_and_end(jobs: Jobs) -> None:
    with jobs.started("orphans", ENDLESS, WORKERS, launcher=torchrun(2)) as process:
        wait_for_steps(jobs.root / "orphans", 3, process)
        process.kill()
        assert_preempted(jobs.root / "orphans")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_rank_ends_the_job_and_is_named(jobs: Jobs, victim: int) -> None:
    run = f"lost-{victim}"
    folder = jobs.root / run
    with jobs.started(run, ENDLESS, launcher=torchrun(2)) as process:
        wait_for_steps(folder, 3, process)
        killed = children(process.pid)[victim]
        send(killed, signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        ended = wait_until_ended(folder, STOP_S)
    assert f"pid: {killed}" in jobs.output(run)
    assert ended["state"] == ("running" if victim == 0 else "failed"), "running with a free lock: killed"
    assert newest(folder).step >= 2


def test_a_killed_process_of_the_loader_is_one_line(jobs: Jobs) -> None:
    folder = jobs.root / "loader"
    with jobs.started("loader", ENDLESS, WORKERS) as process:
        wait_for_steps(folder, 3, process)
        killed = children(process.pid)[-1]
        send(killed, signal.SIGKILL)
        assert process.wait(timeout=STOP_S) == 1
    assert ending(folder) == ("failed", 1)
    (line,) = [line for line in jobs.output("loader").splitlines() if line.startswith("mixres: error: ")]
    # torch words it in two ways: the queue of results ended, or the signal came first.
    assert line.startswith("mixres: error: data.num_workers: DataLoader worker (pid") and str(killed) in line
    assert newest(folder).step >= 2


def test_ranks_with_different_configurations_stop_together(jobs: Jobs) -> None:
    """As two machines with two files would: no launcher gives both one command line."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29657", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [*PYTHON, "train.py", *jobs.words("differ", f"train.max_grad_norm={1 + rank}")],
            cwd=REPOSITORY, env=environment() | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert "mixres: error: ranks [1] read other data or another configuration than rank 0" in errors
        assert (rank.returncode, "Traceback" in errors) == (2, False)
    assert ending(jobs.root / "differ") == ("refused", 2)
    assert not (jobs.root / "differ" / "checkpoints").exists()


def test_frozen_keys_refuse_a_change_and_free_ones_take_it(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = jobs.here("frozen", "train.max_train_steps=2")
    before = metrics(folder)
    empty = f"cache.cache_dir={jobs.root / 'empty'}"
    jobs.here("frozen", "train.max_train_steps=4", "train.seed=7", "model.lora.r=8", empty, code=2)
    assert not list((jobs.root / "empty").rglob("*.safetensors")), "refused before anything is encoded"
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in errors] == ["model.lora.r", "train.seed"]
    assert (ending(folder), metrics(folder), newest(folder).step) == (("refused", 2), before, 2)
    free = ("train.max_train_steps=4", "optimizer.init_args.lr=1e-3")
    jobs.here("frozen", *free, "train.seed=7", "resume_allow_changes=[train.seed]")
    assert "changed   since the checkpoint: train.seed: 0 -> 7\n" in capsys.readouterr().out
    assert [line["lr"] for line in metrics(folder)] == [2e-3, 2e-3, 1e-3, 1e-3]


def test_no_file_and_no_line_holds_a_secret(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """References stay as they were written."""
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    folder = jobs.here("secret", "train.max_train_steps=2", "logging.tracker_project_name=${oc.env:MIXRES_TEST}")
    assert "s3cret" not in "".join(capsys.readouterr())
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"s3cret" in data for data in written)
    assert sum(b"${oc.env:MIXRES_TEST}" in data for data in written) == 2, "config.yaml and the checkpoint"
