"""What a newcomer does: clone, `make quickstart`, look at the images. In a fresh clone, with a fresh environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def without_venv() -> dict[str, str]:
    """With one thread, as tests beside these have: two that share a core wait for each other."""
    own = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return own | {"OMP_NUM_THREADS": "1"}


def make(folder: Path, *words: str) -> str:
    """What it printed."""
    command = ["make", f"PYTHON={sys.executable}", "THREADS=1", *words]
    done = subprocess.run(command, cwd=folder, env=without_venv(), capture_output=True, text=True, check=False)
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
    printed = make(clone, "quickstart")
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


@pytest.fixture(scope="module")
def installed(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin/` of an environment with the wheel, which finds in the clone's what the wheel and its extra `demo` ask for.

    The editable install of the clone's own environment is not found: nested .pth files are not read.
    """
    make(clone, ".venv/.installed-demo")
    root = tmp_path_factory.mktemp("installed")
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", root, clone)
    subprocess.run(build, check=True, env=without_venv())
    subprocess.run((sys.executable, "-m", "venv", root / "venv"), check=True)
    (wheel,) = root.glob("*.whl")
    python = root / "venv" / "bin" / "python"
    subprocess.run((python, "-m", "pip", "install", "--quiet", "--no-deps", wheel), check=True, env=without_venv())
    (libraries,) = clone.glob(".venv/lib/python*/site-packages")
    (own,) = root.glob("venv/lib/python*/site-packages")
    (own / "libraries.pth").write_text(f"{libraries}\n")
    return python.parent


def test_the_wheel_alone_gives_what_the_clone_gives(clone: Path, installed: Path, tmp_path: Path) -> None:
    """`mixres quickstart` in an empty folder: the LoRA and the results of the three commands of `make quickstart`."""
    short = ("train.max_train_steps=20", "sample.every=0")

    def run(folder: Path, *command: str | Path) -> str:
        return subprocess.run(
            command, cwd=folder, env=without_venv(), check=True, capture_output=True, text=True
        ).stdout

    there = run(tmp_path, installed / "python", "-c", "import mixres; print(mixres.__file__)")
    assert Path(there.strip()).is_relative_to(installed.parent)
    printed = run(tmp_path, installed / "mixres", "quickstart", *short)
    assert "\nresult  " in printed and "\nimages  " in printed
    words = ("--config", "configs/quickstart.yaml", *short, "logging.output_dir=build/short")
    own, threads = clone / ".venv/bin", ("--num_cpu_threads_per_process", "1")
    run(clone, own / "mixres", "quickstart", "build/quickstart")
    run(clone, own / "accelerate", "launch", *threads, "train.py", *words)
    run(clone, own / "mixres", "quickstart", *words)
    for file in ("pytorch_lora_weights.safetensors", "results.json"):
        assert (tmp_path / "build/quickstart/run" / file).read_bytes() == (clone / "build/short" / file).read_bytes()
    run(tmp_path, installed / "mixres", "init", "qwen_image_edit_lora")
    assert (tmp_path / "qwen_image_edit_lora.yaml").is_file()
    launch = (installed / "python", "-m", "accelerate.commands.launch", "-m", "mixres")
    again = run(tmp_path, *launch, "--config", "quickstart", *short)
    assert "20 steps were done before" in again
