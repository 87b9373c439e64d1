"""The run folder: one writer, a status that records how the run ended, signals."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mixres.errors import Stopped, UserError, WorkError
from mixres.training import run_folder
from mixres.training.run_folder import STATUS, RunFolder
from support.jobs import status


def open_run(folder: Path, *, rank: int = 0, **options: float) -> RunFolder:
    return RunFolder(folder, verb="train", max_train_steps=10, rank=rank, **options)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (Stopped("saved"), "preempted", 75),
        (UserError(["a: wrong", "b: wrong"]), "refused", 2),
        (WorkError("not finite"), "failed", 1),
        (KeyError(), "failed", 1),
    ],
)
def test_the_status_records_how_a_run_ended(tmp_path: Path, error: BaseException, state: str, code: int) -> None:
    with pytest.raises(type(error)), open_run(tmp_path):
        raise error
    ended = status(tmp_path)
    assert (ended["state"], ended["exit_code"], ended["reason"]) == (state, code, str(error) or repr(error))


def test_a_child_that_dies_while_the_end_is_written_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's loader raises from the signal of a dead worker, be it in the middle of a write."""

    def raising(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker is killed")

    before, fsync = signal.signal(signal.SIGCHLD, raising), os.fsync
    try:
        with suppress(WorkError), open_run(tmp_path):
            monkeypatch.setattr(os, "fsync", lambda file: (os.kill(os.getpid(), signal.SIGCHLD), fsync(file)))
            raise WorkError("no")
        assert signal.getsignal(signal.SIGCHLD) is raising
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", 1)


def test_was_done_is_about_the_last_run_that_trained(tmp_path: Path) -> None:
    def run(found: bool, error: Exception | None = None, *, trained: bool = True) -> None:
        with suppress(UserError, WorkError), open_run(tmp_path) as held:
            assert (held.was_done(10), held.was_done(9)) == (found, False)
            if trained:
                held.stop_between_steps()
                held.update(step=10)
            if error:
                raise error

    run(False)
    run(True)
    run(True, UserError("no"), trained=False)
    run(True, WorkError("no"))  # what was refused has changed nothing
    run(False)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": "done"}'])
def test_a_status_that_cannot_be_read_stops_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS).write_text(text)
    with open_run(tmp_path) as held:
        assert not held.was_done(0)


def test_other_ranks_neither_lock_nor_write(tmp_path: Path) -> None:
    with open_run(tmp_path, rank=1) as other:
        other.update(step=3)
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from mixres.training import run_folder
run_folder._ONE_REQUEST_S = 0
with run_folder.RunFolder(Path(sys.argv[1]), verb="train", max_train_steps=10, rank=0) as run:
    run.stop_between_steps()
    print("held", flush=True)
    while not run.stop_requested:
        time.sleep(0.01)
    print("asked to stop", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process that writes to `folder` until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_refused_by_pid_and_host(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        before = (tmp_path / STATUS).read_bytes()
        who = f"process {process.pid} on {socket.gethostname()}"
        with pytest.raises(UserError, match=f"^logging.output_dir: .* in use by {who}"), open_run(tmp_path, wait_s=0.2):
            pass
    assert (tmp_path / STATUS).read_bytes() == before, "a refused writer leaves the status alone"
    with open_run(tmp_path):  # a killed holder holds nothing
        assert status(tmp_path)["pid"] == os.getpid()


REQUESTS = {  # and within how many seconds signals are one
    "one": ((signal.SIGTERM,), 0),
    "a launcher sends on what a group has got": ((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), 3600),
    "SIGUSR1 is never a second signal": ((signal.SIGUSR1,) * 3, 0),
}


@pytest.mark.parametrize(("numbers", "together_s"), REQUESTS.values(), ids=REQUESTS)
def test_signals_between_steps_ask_once_and_the_old_handlers_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[signal.Signals, ...], together_s: float
) -> None:
    monkeypatch.setattr(run_folder, "_ONE_REQUEST_S", together_s)
    before = [signal.getsignal(number) for number in numbers]
    with open_run(tmp_path) as held:
        held.stop_between_steps()
        assert not held.stop_requested
        for number in numbers:
            os.kill(os.getpid(), number)
        assert held.stop_requested
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="before the first step"), open_run(tmp_path):
        signal.raise_signal(signal.SIGTERM)
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("preempted", 75)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once_and_touches_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked to stop\n"
        before = (tmp_path / STATUS).read_bytes()
        process.send_signal(number)
        assert process.wait(timeout=10) == code
    assert (tmp_path / STATUS).read_bytes() == before
    assert status(tmp_path)["state"] == "running"


@pytest.mark.parametrize("launcher", [None, *run_folder.LAUNCHERS])
def test_the_death_of_a_launcher_sends_a_signal_and_that_of_a_shell_does_not(
    monkeypatch: pytest.MonkeyPatch, launcher: str | None
) -> None:
    """`nohup python train.py &` outlives its terminal. What the signal does is in test_launchers.py."""
    for name in run_folder.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "set")
    prctl, number = ctypes.CDLL(None).prctl, ctypes.c_int(-1)
    try:
        assert run_folder.end_with_launcher() is bool(launcher)
        prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        assert number.value == (signal.SIGUSR1 if launcher else 0)
    finally:
        prctl(1, 0)


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_run(tmp_path / "run") as held:
        (tmp_path / "run").rename(tmp_path / "gone")
        held.update(step=3)
        (tmp_path / "gone").rename(tmp_path / "run")
    (message,) = caplog.messages
    assert "run_status.json could not be written: No such file or directory" in message
    assert status(tmp_path / "run")["step"] == 3


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"logging.output_dir: .*/file/run cannot be written: Not a directory"):
        open_run(tmp_path / "file" / "run").__enter__()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
