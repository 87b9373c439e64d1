"""What a person watching sees of work that is counted."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixres.training.progress import counted


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


SAYS = """
import sys
from mixres.training.progress import say
sys.stdin.readline()
for step in range(5000):
    say(f"step {step}")
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
