"""What a person watching sees of work that is counted."""

import re
import subprocess
import sys
from typing import Any

import pytest

from mixres import console
from mixres.console import Progress, amount, clock, counted

LINE: dict[str, Any] = {
    "step": 1, "samples": 8, "seconds": 2.5, "tokens": 90_000, "tokens_computed": 100_000, "loss": 0.5,
}  # fmt: skip


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(counted("abcd", "encode", "sample", enabled=True)) == list("abcd")
    assert capsys.readouterr() == ("", ""), "ten seconds have not passed"
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    assert list(counted("abcd", "encode", "sample", enabled=False)) == list("abcd")
    assert capsys.readouterr() == ("", ""), "not the main process"
    assert list(counted("abcd", "encode", "sample", enabled=True)) == list("abcd")
    shown = capsys.readouterr()
    line = r"encode    {}/4, \d+\.\d\d sample/s, left 0:00\n"
    assert re.fullmatch(line.format(2) + line.format(3), shown.out)
    assert shown.err == ""


def test_on_a_terminal_there_is_a_bar_and_without_one_a_run_logs_all_rates(monkeypatch: Any, capsys: Any) -> None:
    with Progress(first=0, last=10, enabled=True) as progress:
        progress.step(LINE)
    rates = r"3\.2 samples/s, 36000 tokens/s, padding 10%, left \d+:\d\d"
    assert re.fullmatch(rf"step 1/10  loss 0\.5000  {rates}\n", capsys.readouterr().out)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(counted("abcd", "encode", "sample", enabled=True)) == list("abcd")
    with Progress(first=0, last=10, enabled=True) as progress:
        progress.step(LINE)
    out, shown = capsys.readouterr()
    assert out == "" and "encode: 100%" in shown and ", loss 0.5000, 3.2 samples/s]" in shown
    assert [clock(seconds) for seconds in (0.4, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]
    assert [amount(count, "step") for count in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


LOGS = """
import sys
from mixres import console
from mixres.console import log
for step in range(5000):
    log(f"step {step}")
sys.stderr.write("to the end")
"""


@pytest.mark.parametrize("out", ["> /dev/full", "| true"], ids=["full disk", "reader that goes away"])
def test_a_log_that_cannot_be_written_stops_nothing(out: str) -> None:
    command = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {out}', sys.executable, LOGS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("to the end", 0)
