"""Runs that are stopped, orphaned and killed under every launcher: what the user sees, and that the command goes on."""

import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mixres.config.load import load_config
from mixres.preprocessing.fill import encode_all
from mixres.training.checkpoint import Checkpoints
from mixres.training.setup import build_plan
from support.family_cases import with_family
from support.jobs import (
    ACCELERATE,
    PYTHON,
    REPOSITORY,
    Jobs,
    children,
    environment,
    metrics,
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


@pytest.fixture(scope="module")
def jobs(small_run: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(small_run, small_cache, tmp_path_factory.mktemp("launchers"))


def last_step(folder: Path) -> int:
    newest = Checkpoints(folder / "checkpoints", keep=2).newest_valid()
    return newest.step if newest else 0


def assert_preempted(folder: Path) -> None:
    ended = wait_until_ended(folder, STOP_S)
    assert (ended["state"], ended["exit_code"]) == ("preempted", 75), ended
    assert ended["step"] == last_step(folder) == len(metrics(folder)) >= 3
    assert not list(folder.rglob(".tmp*"))


LAUNCHERS = {
    "python": (PYTHON, signal.SIGINT, 75),
    "torchrun 1": (torchrun(1), signal.SIGTERM, 1),
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
    output = jobs.output(run)
    assert f"pid: {killed}" in output
    assert "Signal 9 (SIGKILL)" in output
    assert ended["state"] == ("running" if victim == 0 else "failed"), "running with a free lock: killed"
    kept = last_step(folder)
    assert kept >= 2
    jobs(run, f"train.max_train_steps={kept + 2}", launcher=torchrun(2))
    assert (status(folder)["state"], status(folder)["step"]) == ("done", kept + 2)
    assert len(metrics(folder)) == kept + 2


def test_an_error_in_one_rank_ends_the_job_and_is_told(jobs: Jobs, tmp_path: Path) -> None:
    """A damaged entry that the second rank alone reads, in the third step."""
    cache = shutil.copytree(jobs.cache, tmp_path / "cache")
    words = ("train.max_train_steps=4", f"cache.cache_dir={cache}")
    config = load_config(jobs.file, jobs.words("error", *words)[2:])
    encoded = encode_all(*with_family(config), device=torch.device("cpu"))
    hurt = build_plan(config, encoded, world_size=2).step(2).ranks[1][0].indices[0]
    path = encoded.cache.path(encoded.train[hurt].key)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = jobs("error", *words, launcher=torchrun(2), code=1)
    assert f"mixres: error: {path}: the checksum of its tensors is wrong; the entry has been removed" in done.stderr
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : 1 (pid: " in done.stderr
    folder = jobs.root / "error"
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("failed", 1)
    assert last_step(folder) == 2


def test_a_killed_process_of_the_loader_is_one_line(jobs: Jobs) -> None:
    folder = jobs.root / "loader"
    with jobs.started("loader", ENDLESS, WORKERS) as process:
        wait_for_steps(folder, 3, process)
        send(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=STOP_S) == 1
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("failed", 1)
    (line,) = [line for line in jobs.output("loader").splitlines() if line.startswith("mixres: error: ")]
    assert "is killed by signal: Killed" in line
    assert line.startswith("mixres: error: data.num_workers: ") and line.endswith("lower it")
    assert last_step(folder) >= 2


def test_a_plugin_of_the_launcher_is_refused_with_a_sentence(jobs: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "fsdp.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nnum_processes: 1\n"
        "mixed_precision: 'no'\nfsdp_config: {fsdp_version: 2}\n"
    )
    launcher = [ACCELERATE[0], "launch", "--config_file", str(file)]
    done = jobs("plugin", launcher=launcher, code=1)
    line = "accelerate launch: its configuration turns on FSDP, which mixres does not use: turn it off there"
    assert f"mixres: error: {line}" in done.stderr
    ended = status(jobs.root / "plugin")
    assert (ended["state"], ended["exit_code"]) == ("refused", 2)
    assert ended["reason"].startswith(line)


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
        assert rank.returncode == 2, errors
        assert "mixres: error: ranks [1] read other data or another configuration than rank 0" in errors
        assert "Traceback" not in errors
    ended = status(jobs.root / "differ")
    assert (ended["state"], ended["exit_code"]) == ("refused", 2)
    assert not (jobs.root / "differ" / "checkpoints").exists()


def test_a_second_run_on_the_folder_is_refused_and_the_first_goes_on(jobs: Jobs) -> None:
    folder = jobs.root / "shared"
    with jobs.started("shared", ENDLESS) as process:
        wait_for_steps(folder, 3, process)
        done = jobs("shared", ENDLESS, code=2)
        assert f"is in use by process {process.pid} on " in done.stderr
        assert status(folder)["pid"] == process.pid
        steps = len(metrics(folder))
        wait_for_steps(folder, steps + 3, process)
        process.terminate()
        assert_preempted(folder)


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(jobs: Jobs) -> None:
    jobs("room", "train.max_train_steps=6")
    jobs("full", "train.max_train_steps=2")
    folder = jobs.root / "full"
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    optimizer = folder / "checkpoints" / "step-00000002" / "optimizer.safetensors"
    blocks = optimizer.stat().st_size // 1024 - 1
    done = jobs("full", "train.max_train_steps=6", before=f"ulimit -f {blocks}", code=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mixres: error: ")]
    assert line.startswith(f"mixres: error: {folder / 'checkpoints'}: the checkpoint of step 4 needs ")
    assert "File too large" in line
    assert "Traceback" not in done.stderr
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("failed", 1)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    jobs("full", "train.max_train_steps=6")
    assert metrics(folder) == metrics(jobs.root / "room")


def test_frozen_keys_refuse_a_change_and_free_ones_take_it(jobs: Jobs) -> None:
    folder = jobs.root / "frozen"
    jobs("frozen", "train.max_train_steps=2")
    shutil.copytree(folder, jobs.root / "before")
    empty = f"cache.cache_dir={jobs.root / 'empty'}"
    done = jobs("frozen", "train.max_train_steps=4", "train.seed=7", "model.lora.r=8", empty, code=2)
    assert not list((jobs.root / "empty").rglob("*.safetensors")), "told before anything is encoded"
    lines = done.stderr.splitlines()
    assert [line.partition(", this run has")[0] for line in lines if line.startswith("mixres: error: ")] == [
        "mixres: error: model.lora.r: checkpoint step-00000002 was made with 4",
        "mixres: error: train.seed: checkpoint step-00000002 was made with 0",
    ]
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("refused", 2)
    assert metrics(folder) == metrics(jobs.root / "before")
    assert last_step(folder) == 2
    done = jobs("frozen", "train.max_train_steps=1", empty)
    assert done.stdout.endswith("done      2 steps were done before; raise train.max_train_steps, now 1, to go on\n")
    assert not list((jobs.root / "empty").rglob("*.safetensors"))
    assert (folder / "config.yaml").read_bytes() == (jobs.root / "before" / "config.yaml").read_bytes()
    free = ("train.max_train_steps=4", "optimizer.init_args.lr=1e-3")
    done = jobs("frozen", *free, "train.seed=7", "resume_allow_changes=[train.seed]")
    changed = [line for line in done.stdout.splitlines() if line.startswith("changed ")]
    assert changed[0] == "changed   since the checkpoint: train.seed: 0 -> 7"
    assert "changed   since the checkpoint: optimizer.init_args.lr: 0.002 -> 0.001" in changed
    assert [line["lr"] for line in metrics(folder)] == [2e-3, 2e-3, 1e-3, 1e-3]


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


PICKLED = ("optimizer.pt", "pytorch_model.bin", "custom_checkpoint_0.pkl", ".metadata", "x.ckpt", "diffusion.pth")


def test_planted_pickles_run_nothing(jobs: Jobs, tiny_base: Path, tmp_path: Path) -> None:
    """In checkpoints, run folder, cache and base, while a run resumes, encodes, trains and writes its result."""
    base, cache, mark = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "cache", tmp_path / "opened"
    words = (f"model.pretrained_model_name_or_path={base}", f"cache.cache_dir={cache}")
    jobs("planted", *words, "train.max_train_steps=2")
    folder, payload = jobs.root / "planted", pickle.dumps(Payload(mark))
    entries = sorted(cache.glob("??"))
    entry = next(entries[0].glob("*.safetensors"))
    entry.write_bytes(payload)  # and one in the place of an entry
    places = [*base.iterdir(), base, cache, *entries, folder, *(folder / "checkpoints").glob("step-*")]
    for place in places:
        for name in PICKLED if place.is_dir() else ():
            (place / name).write_bytes(payload)
    (folder / "pytorch_lora_weights.bin").write_bytes(payload)
    done = jobs("planted", *words, "train.max_train_steps=4")
    assert "1 encoded, 9 found" in done.stdout
    assert last_step(folder) == 4
    assert not mark.exists()
    pickle.loads(payload)  # it would have left its mark
    assert mark.exists()


def test_a_checkpoint_of_adapters_is_small_and_no_file_tells_a_secret(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and two moments of each, no frozen weight; references as they were written."""
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    done = jobs("size", "train.max_train_steps=2", "logging.tracker_project_name=${oc.env:MIXRES_TEST}")
    assert "s3cret" not in done.stdout + done.stderr
    written = [path.read_bytes() for path in (jobs.root / "size").rglob("*") if path.is_file()]
    assert not any(b"s3cret" in data for data in written)
    assert sum(b"${oc.env:MIXRES_TEST}" in data for data in written) == 2, "config.yaml and the checkpoint"
    path = jobs.root / "size" / "checkpoints" / "step-00000002"
    newest = Checkpoints(path.parent, keep=2).newest_valid()
    assert newest is not None
    trained = sum(tensor.nbytes for tensor in newest.tensors("trainable").values())
    assert sum(file.stat().st_size for file in path.iterdir()) <= 3 * trained + 65536


def test_a_step_larger_than_the_data_takes_them_all_and_saves_from_the_first_on(jobs: Jobs) -> None:
    jobs("few", "batch.samples_per_step=16", "train.max_train_steps=2", "checkpoint.every=1")
    assert [line["samples"] for line in metrics(jobs.root / "few")] == [10, 10]
    saved = sorted(path.name for path in (jobs.root / "few" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000001", "step-00000002"]
