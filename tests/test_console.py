"""What a person watching sees of work that is counted."""

import contextlib
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mixres.console import Progress, counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted("abcd", "encode", "sample", enabled=True, every_s=0.0)) == list("abcd")
    said = capsys.readouterr()
    line = r"encode    {}/4, \d+\.\d\d sample/s, left 0:00\n"
    assert re.fullmatch(line.format(2) + line.format(3), said.out)
    assert said.err == ""
    assert list(counted("abcd", "encode", "sample", enabled=True)) == list("abcd")
    assert capsys.readouterr() == ("", ""), "not ten seconds have passed"


def test_only_the_process_that_speaks_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted("abcd", "encode", "sample", enabled=False, every_s=0.0)) == list("abcd")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(counted("abcd", "encode", "sample", enabled=True, every_s=0.0)) == list("abcd")
    assert "encode: 100%" in terminal.getvalue()
    assert "sample/s" in terminal.getvalue()
    assert capsys.readouterr().out == ""


LINE = {"step": 1, "samples": 8, "seconds": 2.5, "tokens": 90_000, "tokens_computed": 100_000, "loss": 0.5}


def everything(terminal: int) -> str:
    """What was written to a terminal whose other side is closed."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 4096):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


@pytest.mark.parametrize(("columns", "rates"), [(80, False), (100, False), (160, True)])
def test_the_bar_of_a_run_fits_its_terminal(columns: int, rates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with Progress(first=0, last=10_000, enabled=True) as progress:
            progress._bar.start_t -= LINE["seconds"]  # as long as the step says: ten thousand a second are too wide
            progress._bar.last_print_t -= LINE["seconds"]
            progress.step(LINE)
            progress._bar.refresh()
    shown = everything(ours).rstrip("\r\n").split("\r")[-1]
    assert len(shown) <= columns
    assert shown.endswith(", padding 10%]" if rates else ", loss 0.5000, 3.2 samples/s]")
    assert ("36000 tokens/s" in shown) is rates
    assert columns < 100 or len(shown.split("|")[1]) >= 10, "the bar itself"


def test_without_a_terminal_a_run_says_all_rates(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(first=0, last=10, enabled=True) as progress:
        progress.step(LINE)
    rates = r"3\.2 samples/s, 36000 tokens/s, padding 10%, left \d+:\d\d"
    assert re.fullmatch(rf"step 1/10  loss 0\.5000  {rates}\n", capsys.readouterr().out)


SAYS = """
import sys
from mixres.console import log
sys.stdin.readline()
for step in range(5000):
    log(f"step {step}")
sys.stderr.write("to the end")
"""


def test_a_log_on_a_full_disk_stops_nothing() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SAYS], input="\n", stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "to the end")


def test_a_reader_that_goes_away_stops_nothing() -> None:
    """As `| head` does."""
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SAYS], text=True, **pipe) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == ("to the end", 0)
