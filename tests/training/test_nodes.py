"""Two machines, each with a launcher of its own, over one run folder: one of them is lost, and the run is resumed."""

import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.jobs import LORA, Jobs, children, metrics, newest, send, status, torchrun, wait_for_steps

STEPS = 30
WORDS = (f"train.max_train_steps={STEPS}", "model.lora.lora_dropout=0.1", "train.timeout_minutes=0.25")
LOSS_S = 120  # in which the other machine has noticed and ended
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def launchers() -> list[tuple[str, ...]]:
    """The command of each machine, as `accelerate launch` starts several: the first one's launcher holds the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
    return [(*torchrun(1)[:3], *meeting, f"--node-rank={number}") for number in (0, 1)]


def start(stack: ExitStack, jobs: Jobs, run: str) -> "list[subprocess.Popen[str]]":
    return [stack.enter_context(jobs.started(run, *WORDS, launcher=words)) for words in launchers()]


def finish(jobs: Jobs, run: str) -> Path:
    with ExitStack() as stack:
        machines = start(stack, jobs, run)
        assert [machine.wait(timeout=120) for machine in machines] == [0, 0], jobs.output(run)[-3000:]
    return jobs.root / run


def files(run: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (run / LORA, *newest(run).path.glob("*.safetensors"))}
    assert len(found) == 3
    return found


def lose(machine: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """All its processes at once, the launcher first: it would report the loss of its own."""
    for pid in (machine.pid, *children(machine.pid)):
        send(pid, number)


@pytest.fixture(scope="module")
def whole(jobs: Jobs) -> Path:
    return finish(jobs, "whole")


def test_two_machines_train_what_two_processes_of_one_do(jobs: Jobs, whole: Path) -> None:
    one = jobs.forked("one machine", *WORDS, ranks=2)
    assert metrics(one) == metrics(whole)
    assert files(one) == files(whole)


LOSSES = {
    "killed": (0, signal.SIGKILL),
    "silent": (1, signal.SIGSTOP),  # as without power: its connections stay open
}


@pytest.mark.parametrize(("victim", "number"), LOSSES.values(), ids=LOSSES)
def test_a_lost_machine_ends_the_other_and_the_same_commands_resume(
    jobs: Jobs, whole: Path, victim: int, number: signal.Signals
) -> None:
    """The first machine holds the launchers' store and the lock of the run folder, and writes the checkpoints."""
    folder = jobs.root / f"lost-{victim}"
    with ExitStack() as stack:
        machines = start(stack, jobs, folder.name)
        wait_for_steps(folder, 5, machines[victim])
        lose(machines[victim], number)
        assert machines[1 - victim].wait(timeout=LOSS_S) == 1
        assert 4 <= newest(folder).step < STEPS
    finish(jobs, folder.name)
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("done", 0)
    assert metrics(folder) == metrics(whole)
    assert files(folder) == files(whole)
