"""What a person watching sees of work that is counted."""

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from mixres.console import Progress, amount, clock, counted

LINE: dict[str, Any] = {
    "step": 1, "samples": 8, "seconds": 2.5, "tokens": 90_000, "tokens_computed": 100_000, "loss": 0.5,
}  # fmt: skip


def test_without_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted("abcd", "encode", "sample", enabled=True, every_s=0.0)) == list("abcd")
    shown = capsys.readouterr()
    line = r"encode    {}/4, \d+\.\d\d sample/s, left 0:00\n"
    assert re.fullmatch(line.format(2) + line.format(3), shown.out)
    assert shown.err == ""
    assert list(counted("abcd", "encode", "sample", enabled=True)) == list("abcd")
    assert list(counted("abcd", "encode", "sample", enabled=False, every_s=0.0)) == list("abcd")
    assert capsys.readouterr() == ("", ""), "not ten seconds have passed; not the main process"


@contextlib.contextmanager
def terminal(columns: int, shown: list[str]) -> Iterator[IO[str]]:
    """A terminal of that width; `shown` gets what was written to it."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with os.fdopen(theirs, "w") as file:
        yield file
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(ours, 4096):
            parts.append(part)
    os.close(ours)
    shown.append(b"".join(parts).decode())


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    with terminal(160, shown) as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        assert list(counted("abcd", "encode", "sample", enabled=True, every_s=0.0)) == list("abcd")
    assert "encode: 100%" in shown[0] and "sample/s" in shown[0]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("columns", "rates"), [(80, False), (100, False), (160, True)])
def test_the_bar_of_a_run_fits_its_terminal(columns: int, rates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    with terminal(columns, written) as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        with Progress(first=0, last=10_000, enabled=True) as progress:
            progress._bar.start_t -= LINE["seconds"]  # as long as the step took: ten thousand a second are too wide
            progress._bar.last_print_t -= LINE["seconds"]
            progress.step(LINE)
            progress._bar.refresh()
    shown = written[0].rstrip("\r\n").split("\r")[-1]
    assert len(shown) <= columns
    assert shown.endswith(", padding 10%]" if rates else ", loss 0.5000, 3.2 samples/s]")
    assert ("36000 tokens/s" in shown) is rates
    assert columns < 100 or len(shown.split("|")[1]) >= 10, "the bar itself"


def test_without_a_terminal_a_run_logs_all_rates(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(first=0, last=10, enabled=True) as progress:
        progress.step(LINE)
    rates = r"3\.2 samples/s, 36000 tokens/s, padding 10%, left \d+:\d\d"
    assert re.fullmatch(rf"step 1/10  loss 0\.5000  {rates}\n", capsys.readouterr().out)
    assert [clock(seconds) for seconds in (0.4, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]
    assert [amount(count, "step") for count in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


LOGS = """
import sys
from mixres.console import log
sys.stdin.readline()
for step in range(5000):
    log(f"step {step}")
sys.stderr.write("to the end")
"""


@pytest.mark.parametrize("full_disk", [True, False])
def test_a_log_that_cannot_be_written_stops_nothing(full_disk: bool) -> None:
    """A full disk, or a reader that goes away as `| head` does."""
    with Path("/dev/full").open("w") as full:
        out: Any = full if full_disk else subprocess.PIPE
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", LOGS], stdin=pipe, stdout=out, stderr=pipe, text=True) as process:
            assert process.stdin and process.stderr
            if process.stdout:
                process.stdout.close()
            process.stdin.write("\n")
            process.stdin.close()
            assert (process.stderr.read(), process.wait()) == ("to the end", 0)
