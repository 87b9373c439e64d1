"""The page of a run: what it draws, what it reports of runs that ended otherwise, and what a server of it hands out."""

import http.client
import json
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from mixres import cli
from mixres.report import page as pages
from mixres.report.charts import HEIGHT, charts, smoothed, thinned
from mixres.report.page import page
from mixres.report.run import PAGE, column, read_run
from mixres.report.serve import Service
from support.pages import script

EVIL = """<script>alert("1")</script>'&"""
make_run = script("report_benchmark").make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 steps and 3 grids; names of samples and prompts are markup."""
    return make_run(tmp_path_factory.mktemp("made") / "run", steps=120, grids=3, prompt=EVIL)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it, in a folder and with a file whose names are markup too."""
    folder = shutil.copytree(made, tmp_path / EVIL.replace("/", ""))
    (folder / f"{EVIL.replace('/', '')}.txt").write_text("a file")
    return folder


def recorded(folder: Path, **changes: Any) -> Path:
    status = json.loads((folder / "run_status.json").read_text(encoding="utf-8"))
    (folder / "run_status.json").write_text(json.dumps(status | changes), encoding="utf-8")
    return folder


def test_of_many_steps_no_extreme_is_lost_and_a_mean_skips_what_is_missing() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    values[[3, 7_777, 19_998]] = [50.0, -50.0, 99.0]
    values[5_000:5_400] = math.nan
    kept = thinned(values)
    assert len(kept) <= 1200 and {0, 3, 7_777, 19_998, 19_999} <= set(kept)
    assert np.isnan(values[kept]).any(), "the gap stays one"
    for start in range(0, 20_000, 200):  # whatever is looked at closely has its own highest and lowest
        part = values[start : start + 200]
        near = values[kept[(kept >= start - 67) & (kept < start + 267)]]
        assert np.isnan(part).all() or (np.nanmax(near) >= np.nanmax(part) and np.nanmin(near) <= np.nanmin(part))
    assert list(thinned(values[:1200])) == list(range(1200))
    means = smoothed(np.array([1.0, 3.0, math.nan, 5.0]), 2)
    np.testing.assert_allclose(means, [1.0, 2.0, math.nan, 5.0])


def test_a_chart_gives_back_the_numbers_it_was_drawn_from(run: Path) -> None:
    read = read_run(run)
    drawn = {chart.title: chart for chart in charts(read)}
    for title, key in (
        ("Training loss", "loss"),
        ("Gradient norm, before the clip", "grad_norm"),
        ("Learning rate", "lr"),
    ):
        chart = drawn[title]
        points = [part.split() for part in chart.curves[0].path.replace("M", "L").split("L")[1:]]
        found = {int(x): 1 - float(y) / HEIGHT for x, y in points}
        steps, values = column(read.steps, "step"), column(read.steps, key)
        assert list(found) == list(steps[np.isfinite(values)])
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                ends = np.array([chart.low, chart.high])
                low, high = np.log(ends) if chart.log else ends
                own = low + found[int(step)] * (high - low)
                assert math.isclose(math.exp(own) if chart.log else own, value, abs_tol=2e-5 * chart.high)
    assert drawn["Training loss"].marks == [10]
    assert [curve.name for curve in drawn["Held-out loss by size, side in pixels"].curves] == [
        "256", "384", "512", "768", "1024", "1536",
    ]  # fmt: skip


STATES = {
    "done": ({"state": "done"}, "Done: 120 steps."),
    "failed": ({"state": "failed", "reason": f"no memory {EVIL}"}, "Failed after step 120: no memory &lt;script&gt;"),
    "refused": (
        {"state": "refused", "reason": "a.b: no\nc.d: no"},
        "Refused, nothing was trained by this start: a.b: no\nc.d",
    ),
    "preempted": ({"state": "preempted", "reason": "stopped by a signal"}, "Stopped: stopped by a signal"),
    "killed": ({"state": "running", "host": socket.gethostname()}, "ended after step 120 without writing why"),
    "elsewhere": ({"state": "running", "host": "another"}, "on another, which cannot be asked from here"),
}


@pytest.mark.parametrize("state", STATES)
def test_the_page_reports_how_a_run_ended(run: Path, state: str) -> None:
    changes, sentence = STATES[state]
    text = page(read_run(recorded(run, **changes)), embed=False).decode()
    assert sentence in text and f'class="badge {state}"' in text
    assert EVIL not in text and "<script>alert" not in text and text.count("<script>") == 1


def test_a_lock_that_is_held_is_a_run_that_runs(run: Path) -> None:
    recorded(run, state="running", host=socket.gethostname())
    with FileLock(run / ".lock"):
        assert read_run(run).state == "running"
    assert read_run(run).state == "killed"


DAMAGED = {
    "nothing but a status": ["metrics.jsonl", "config.yaml", "samples"],
    "nothing but metrics": ["run_status.json", "config.yaml", "samples"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_missing_or_torn_is_left_out(run: Path, name: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[]\n{"step": "x", "loss": 1}\n{"step": -1, "loss": 1}\n{"step": true, "loss": 1}\n')
        file.write(
            f'{{"step": 121, "loss": "x", "seconds": NaN, "skipped": 1, "tokens": 1{"0" * 400}}}\n{{"step": 122, "lo'
        )
    (run / "samples" / "step-00000120.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (run / "samples" / "step-00000080.png").unlink()
    (run / "samples" / "step-00000080.png").symlink_to(Path(__file__).parents[2] / "docs" / "images" / "quickstart.png")
    text = page(read_run(run)).decode()
    assert "samples/step-00000120.png cannot be read" in text and "step-00000080" not in text
    for part in DAMAGED[name]:
        (run / part).rename(run.parent / part)
    (run / "run_status.json").exists() or (run / "run_status.json").write_bytes(b"{")
    text = page(read_run(run)).decode()
    assert ("No run was started" in text) == (name == "nothing but metrics") and ("<svg" in text) == ("metrics" in name)


def test_the_command_writes_the_page_or_gives_a_line_for_each_problem(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(run)]) == 0
    text = (run / PAGE).read_text(encoding="utf-8")
    assert text.count("data:image/webp;base64,") == 3 and "http" not in text.replace("http-equiv", "")
    assert f"mixres: report    {run / PAGE}"[8:] in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert cli.main(["report", str(tmp_path / "empty")]) == 0
        empty = (tmp_path / "empty" / PAGE).read_text(encoding="utf-8")
        assert "No run was started in this folder." in empty and PAGE not in empty
    capsys.readouterr()
    for words in (
        [],
        [tmp_path / "nowhere"],
        [tmp_path],
        [run, "--port", "80"],
        [run, "--port", "80000", "--serve"],
    ):
        assert cli.main(["report", *map(str, words)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def service(run: Path) -> Iterator[Service]:
    """The server on a free port, in a thread."""
    with Service(run, 0, lambda: page(read_run(run), embed=False)) as server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        yield server
        server.shutdown()


def asked(service: Service, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", service.server_address[1], timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_the_server_shows_what_is_new_and_nothing_outside_the_folder(run: Path, service: Service, capsys: Any) -> None:
    code, text, headers = asked(service, "/")
    assert code == 200 and b"data:image/webp" not in text and b'src="samples/step-00000120.png"' in text
    assert asked(service, "/", If_None_Match=headers["ETag"])[0] == 304
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "loss": 0.5, "seconds": 1}\n')
    code, text, _ = asked(service, "/", If_None_Match=headers["ETag"])
    assert code == 200 and b"<b>121</b>" in text
    port = service.server_address[1]
    assert service.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "", "127.0.0.1"):
        assert asked(service, "/", Host=host)[0] == 421
    assert asked(service, "/", Host=f"localhost:{port}")[0] == 200
    (run / "inner.yaml").symlink_to("config.yaml")
    (run / "outer.txt").symlink_to("/etc/hostname")
    (run / "outside").symlink_to(run.parent)
    (run.parent / "secret.txt").write_text("secret")
    os.mkfifo(run / "pipe")
    outside = "../secret.txt %2e%2e/secret.txt ..%2fsecret.txt samples/../../secret.txt outer.txt /etc/hostname"
    outside += " outside/secret.txt pipe samples . %00 %ff " + "a/" * 3000
    for path in outside.split():
        assert asked(service, f"/{path}")[0] == 404, path
    assert asked(service, "/inner.yaml")[:2] == (200, (run / "config.yaml").read_bytes())
    code, data, headers = asked(service, "/samples/step-00000120.png")
    assert (code, data) == (200, (run / "samples" / "step-00000120.png").read_bytes())
    assert headers["Content-Type"] == "image/png" and "sandbox" in headers["Content-Security-Policy"]
    code, data, headers = asked(service, "/metrics.jsonl", "HEAD")
    assert (code, data) == (200, b"") and int(headers["Content-Length"]) == (run / "metrics.jsonl").stat().st_size
    assert asked(service, "/", "POST")[0] == 501
    assert not (run / PAGE).exists()
    assert cli.main(["report", str(run), "--serve", "--port", str(port)]) == 2
    assert f"--port: {port} is in use on 127.0.0.1" in capsys.readouterr().err


def test_a_page_of_many_grids_stays_small(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MAX_GRIDS", 2)
    monkeypatch.setattr(pages, "_GRID_BYTES", 20_000)
    text = page(read_run(run)).decode()
    assert "2 of 3 grids" in text and len(text) < 20_000 * 4 / 3 + 120_000
    assert 'data-step="40"' in text and 'data-step="120"' in text, "the ends"
