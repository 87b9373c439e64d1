"""`metrics.jsonl`: each step once, whatever was killed; a tracker that fails stops nothing."""

import io
import json
import logging
import os
import shlex
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from PIL import Image
from skimage import data
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from mixres.training.metrics import MetricsLog, Tracker
from mixres.training.run_folder import METRICS
from support.jobs import longest_file, metrics

TORN = ['{"step": 6, "lo', '{"step": 3', "\x00\x00\x00", "[]", "null", '{"loss": 1}']
EVALUATED = [
    {"step": 0, "eval/loss": 3.0}, {"step": 1}, {"step": 1, "eval/loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3},
    {"step": 3, "eval/loss": None},
]  # fmt: skip


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize(("step", "kept", "evaluated"), [(0, 0, False), (1, 3, True), (2, 4, False), (3, 6, True)])
def test_what_is_beyond_the_resumed_step_or_cut_short_goes_and_an_evaluation_at_it_is_known(
    tmp_path: Path, step: int, kept: int, evaluated: bool, torn: str
) -> None:
    file, lines = tmp_path / METRICS, [json.dumps(values) for values in EVALUATED]
    with MetricsLog(tmp_path, step=0) as log:
        for number, values in enumerate(EVALUATED, 1):
            log.write(values)
            assert file.read_text().splitlines() == lines[:number], "a line is there as soon as it is written"
    with file.open("a") as killed:
        killed.write(torn)
    with MetricsLog(tmp_path, step=step) as log:
        assert log.evaluated is evaluated
    assert file.read_text().splitlines() == lines[:kept]


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MetricsLog(tmp_path, step=0) as log:
        log.write({"step": 1})
        with longest_file(17):  # the second line fits in part, the third not at all
            log.write({"step": 2})
            log.write({"step": 3})
        log.write({"step": 4})
    assert metrics(tmp_path) == [{"step": step} for step in (1, 2, 3, 4)]
    assert "".join(caplog.messages).count("cannot be written (File too large)") == 1


def accelerator_with(tracker: Any, folder: Path) -> Accelerator:
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True, log_with=tracker, project_dir=str(folder))


def test_tensorboard_gets_every_step_and_images_as_they_are(tmp_path: Path) -> None:
    accelerator = accelerator_with("tensorboard", tmp_path)
    grid = Image.fromarray(data.astronaut()[:40, :60])
    with Tracker(accelerator, "tensorboard", "project", {"a": {"b": [1]}}) as tracker:
        for step in (1, 2):
            tracker.log({"step": step, "loss": step / 2})
        tracker.log_image("samples", grid, 3)
    (file,) = (tmp_path / "project").glob("events.out.tfevents.*")
    events = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    seen = [(event.step, event.summary.value[0].tag) for event in events]
    assert seen == [(1, "loss"), (2, "loss"), (3, "samples")]
    shown = Image.open(io.BytesIO(events[2].summary.value[0].tensor.string_val[2]))  # after width and height
    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(grid))
    assert accelerator.num_processes == 1  # still usable: closing a tracker must not take the processes down


def test_trackio_keeps_configuration_scalars_and_images_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real one, with a Pillow that its package does not ask for; nothing is sent anywhere."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    grid = Image.fromarray(data.astronaut()[:40, :60])
    with Tracker(accelerator_with("trackio", tmp_path), "trackio", "project", {"a": {"b": [1, None]}}) as tracker:
        for step in (1, 2):
            tracker.log({"step": step, "loss": step / 2, "skipped": ["a name"]})
        tracker.log_image("samples", grid, 3)
    assert not caplog.messages
    with sqlite3.connect(tmp_path / "project.db") as store:
        rows = {step: json.loads(text) for step, text in store.execute("select step, metrics from metrics")}
        ((config,),) = store.execute("select config from configs")
    store.close()
    assert [rows[step] for step in (1, 2)] == [{"loss": 0.5}, {"loss": 1.0}] and rows[3]["samples"]
    assert json.loads(config)["a"] == {"b": [1, None]}
    (file,) = (tmp_path / "media").rglob("*.png")
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), np.asarray(grid))


class Failing(GeneralTracker):
    """A tracker whose network is gone."""

    name = "failing"
    requires_logging_directory = False
    calls = 0

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls += 1
        raise ConnectionError("no network")

    def finish(self) -> None:
        raise ConnectionError("no network")


def test_a_tracker_that_fails_anywhere_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "project").write_text("a file where the tracker wants a folder")
    failing = Failing()
    with caplog.at_level(logging.WARNING):
        with Tracker(accelerator_with("tensorboard", tmp_path), "tensorboard", "project", {}) as tracker:
            tracker.log({"step": 1, "loss": 0.0})
        with Tracker(accelerator_with(failing, tmp_path), "custom", "project", {}) as tracker:
            for step in (1, 2, 3):
                tracker.log({"step": step, "loss": 0.0})
            tracker.log_image("samples", Image.new("RGB", (8, 8)), 3)
        with Tracker(accelerator_with(failing, tmp_path), "custom", "project", {}):
            pass
    assert failing.calls == 1
    reasons = ("could not be started", "failed (no network)", "could not be closed: no network")
    assert all(reason in message for reason, message in zip(reasons, caplog.messages, strict=True))


@pytest.mark.slow
def test_wandb_out_of_reach_continues_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing answers at that address."""
    values = {"BASE_URL": "http://127.0.0.1:9", "API_KEY": "0" * 40, "DIR": str(tmp_path), "SILENT": "true"}
    for name, value in values.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr("mixres.training.metrics._WANDB_TIMEOUT_S", 1)
    accelerator, config = accelerator_with("wandb", tmp_path), {"train": {"seed": 0}}
    with caplog.at_level(logging.WARNING), Tracker(accelerator, "wandb", "project", config) as tracker:
        tracker.log({"step": 1, "loss": 0.5})
        tracker.log_image("samples", Image.fromarray(data.astronaut()), 1)
    (image,) = tmp_path.glob("wandb/offline-run-*/files/media/images/samples_1_*.png")
    assert np.array_equal(np.asarray(Image.open(image).convert("RGB")), data.astronaut())
    assert any("logging offline" in message for message in caplog.messages)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


TRACKS = """
import sys
from pathlib import Path
from accelerate import Accelerator
from mixres.training import metrics
metrics._WANDB_TIMEOUT_S, metrics._WANDB_FINISH_S = 60, 1
accelerator = Accelerator(cpu=True, log_with="wandb", project_dir=sys.argv[1])
with metrics.Tracker(accelerator, "wandb", "project", {"train": {"seed": 0}}) as tracker:
    tracker.log({"step": 1, "loss": 0.5})
    print("begun", flush=True)
    sys.stdin.readline()
    for step in range(2, 100):
        tracker.log({"step": step, "loss": 0.5})
print("ended", flush=True)
"""


def tracking(folder: Path, **values: str) -> list[str]:
    """The command of somebody who has no key, no settings and no proxy, but for `values` in the environment."""
    kept = {key: value for key, value in os.environ.items() if "WANDB" not in key and "proxy" not in key.lower()}
    folders = {name: str(folder) for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
    kept |= {**folders, "NETRC": str(folder / "none"), "TERM": "xterm", **values}
    return ["env", "-i", *(f"{key}={value}" for key, value in kept.items()), sys.executable, "-c", TRACKS, str(folder)]


BUCKET = {"id": "1", "name": "run", "displayName": "run", "project": {"name": "project", "entity": {"name": "me"}}}
ANSWERS = {"upsertBucket": {"bucket": BUCKET, "inserted": True}, "serverInfo": {"features": []}, "entity": None}


class Answer(BaseHTTPRequestHandler):
    """What wandb needs of its server; once its `lost` is set nothing is answered any more."""

    def do_POST(self) -> None:
        if self.server.lost.is_set():
            time.sleep(600)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": ANSWERS} if self.path == "/graphql" else {}).encode())


@pytest.mark.slow
def test_a_network_that_goes_away_delays_neither_steps_nor_the_end(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as service:
        service.lost = threading.Event()
        threading.Thread(target=service.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{service.server_port}"
        command = tracking(tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
        with subprocess.Popen(command, text=True, **pipes) as process:
            try:
                while (line := process.stdout.readline()) and line != "begun\n":
                    pass
                service.lost.set()
                output, _ = process.communicate("\n")
            finally:
                process.kill()
                service.shutdown()
    assert (output.splitlines()[0], process.returncode) == ("ended", 0)
    assert list(tmp_path.glob("wandb/run-*/*.wandb")), "what could not be sent is kept"


@pytest.mark.slow
def test_without_a_key_wandb_continues_offline_and_asks_nobody(tmp_path: Path) -> None:
    """At a terminal, where it would ask and wait for an answer."""
    at_a_terminal = ["script", "-qec", shlex.join(tracking(tmp_path)), "/dev/null"]
    done = subprocess.run(at_a_terminal, input="\n", capture_output=True, text=True, check=True)
    assert "wandb cannot be used (no API key, `wandb login` keeps one): logging offline" in done.stdout
    assert "ended" in done.stdout.split()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")), "in the run folder, wherever it was started"
