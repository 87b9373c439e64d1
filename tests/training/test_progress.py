"""What a person watching sees of work that is counted."""

import io
import re
import sys

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
