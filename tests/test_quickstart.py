"""What a newcomer does: clone, `make quickstart`, look at the pictures. In a fresh clone, with a fresh environment."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

REPOSITORY = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Clone:
    """The last commit, cloned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)

    def make(self, *words: str) -> "subprocess.CompletedProcess[str]":
        inherited = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
        command = ["make", f"PYTHON={sys.executable}", *words]
        done = subprocess.run(command, cwd=self.folder, env=inherited, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("clone") / "mixres")


def test_make_test_checks_style_and_types_and_runs_the_fast_tier(clone: Clone) -> None:
    """Only what it would do: the tier cannot run inside itself."""
    commands = clone.make("-n", "test").stdout
    for part in ("-e '.[demo,test]'", "ruff check .", "ruff format --check .", "mypy", "python -m pytest\n"):
        assert part in commands, part
    assert '-m "slow and not gpu"' in clone.make("-n", "test-slow").stdout


def test_make_quickstart_trains_samples_and_writes_a_lora(clone: Clone) -> None:
    clone.make(".venv/.installed-demo")
    start = time.monotonic()
    done = clone.make("quickstart")
    assert time.monotonic() - start < 300, "five minutes, install not counted"
    run = clone.folder / "build" / "quickstart" / "run"
    status = json.loads((run / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, status["max_train_steps"] + 1))
    assert sum(line["loss"] for line in lines[-10:]) < sum(line["loss"] for line in lines[:10])
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mixres"])["base"] == "build/quickstart/base"
        assert any(file.get_tensor(name).any() for name in file.keys() if ".lora_B." in name)  # noqa: SIM118
    with Image.open(max((run / "samples").glob("step-*.png"))) as sheet:
        sheet.load()
        assert len({text for key, text in sheet.text.items() if key.startswith("caption-")}) > 1
        assert min(sheet.size) > 500
    for said in ("every one its own size", "result    build/quickstart/run/pytorch_lora_weights.safetensors"):
        assert said in done.stdout
    again = clone.make("quickstart").stdout
    assert "0 encoded" in again
    assert "steps were done before" in again
    left = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone.folder, capture_output=True, text=True, check=True
    )
    assert left.stdout == "", "what a run writes is ignored by git"
