"""What a newcomer does: clone, `make quickstart`, look at the images. In a fresh clone, with a fresh environment."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def make(folder: Path, *words: str) -> str:
    """What it printed."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    command = ["make", f"PYTHON={sys.executable}", *words]
    done = subprocess.run(command, cwd=folder, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last commit, cloned."""
    folder = tmp_path_factory.mktemp("clone") / "mixres"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def quickstart(clone: Path) -> tuple[Path, str]:
    """The run folder of `make quickstart`, and its output."""
    make(clone, ".venv/.installed-demo")
    start = time.monotonic()
    printed = make(clone, "quickstart")
    assert time.monotonic() - start < 300, "five minutes, install not counted"
    return clone / "build" / "quickstart" / "run", printed


def test_make_quickstart_trains_samples_and_writes_a_lora(clone: Path, quickstart: tuple[Path, str]) -> None:
    run, printed = quickstart
    status = json.loads((run / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)
    lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, status["max_train_steps"] + 1))
    assert sum(line["loss"] for line in lines[-10:]) < 0.5 * sum(line["loss"] for line in lines[:10])
    for grid in (max((run / "samples").glob("step-*.png")), run / "results.png"):
        with Image.open(grid) as image:
            image.load()
            assert len({text for key, text in image.text.items() if key.startswith("caption-")}) > 1
            assert min(image.size) > 500
    with Image.open(run / "loss.png") as image:
        assert min(image.size) > 300
    for said in ("result", "images", "loss", "next"):
        assert f"\n{said}  " in printed
    again = make(clone, "quickstart")
    assert "0 encoded" in again and "steps were done before" in again
    left = subprocess.check_output(["git", "status", "--porcelain"], cwd=clone, text=True)
    assert left == "", "what a run writes is ignored by git"


def test_it_has_learnt_the_edit(quickstart: tuple[Path, str]) -> None:
    """On photographs, sizes and aspects that neither base nor LoRA was trained on."""
    results = json.loads((quickstart[0] / "results.json").read_text())
    assert len(results) >= 12
    assert len({result["size"] for result in results}) >= 6
    copy, base, lora, ceiling = (
        sum(result[column] for result in results) / len(results) for column in ("copy", "base", "lora", "ceiling")
    )
    assert lora >= max(copy, base) + 15, (copy, base, lora)
    assert lora >= ceiling - 6, (lora, ceiling)
