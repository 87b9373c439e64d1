"""What was written by the recorded version is still read: a run stopped halfway, a cache, a LoRA file."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contract.record import (
    CONFIG,
    FIXTURES,
    LORA,
    assert_same_lora,
    assert_same_metrics,
    command,
    contents,
    entries,
    exported,
    folders,
    json_lines,
    machine,
    sampled,
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """`run`, stopped by a signal before its last step, and `cache`, to be written to."""
    for name in ("run", "cache"):
        shutil.copytree(FIXTURES / name, tmp_path / name, symlinks=True)
    return tmp_path


def written(cache: Path) -> dict[str, tuple[int, int]]:
    """What changes where an entry is encoded anew."""
    found = [(name, (cache / name).stat()) for name in entries(cache)]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def test_an_old_cache_is_found_and_an_old_run_goes_on_to_the_same_end(old: Path, golden: dict[str, Any]) -> None:
    before = written(old / "cache")
    assert list(before) == golden["numbers"]["entries"]
    given = ("--config", CONFIG, *folders(old))
    assert command("--cache", *given) == 0
    assert written(old / "cache") == before, "nothing is encoded again"
    assert command("cache", "--verify", *given) == 0
    recorded = (old / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert command("train", *given, "resume=required") == 0
    assert written(old / "cache") == before
    lines = (old / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert lines.startswith(recorded) and 0 < recorded.count('"loss"') < lines.count('"loss"')
    assert_same_metrics(json_lines(old / "run" / "metrics.jsonl"), golden["numbers"])
    assert_same_lora(old / "run" / LORA, golden["numbers"])
    status = json.loads((old / "run" / "run_status.json").read_bytes())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 5)


def test_an_old_run_refuses_what_would_make_it_another(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--config", CONFIG, *folders(old))
    assert command("train", *given, "train.seed=1", "model.lora.lora_alpha=4") == 2
    told = capsys.readouterr().err
    assert "train.seed" in told and "model.lora.lora_alpha" in told
    assert not (old / "run" / LORA).exists()


def test_an_old_checkpoint_is_exported(tmp_path: Path) -> None:
    (checkpoint,) = (FIXTURES / "run" / "checkpoints").glob("step-*")
    out = tmp_path / "of_checkpoint.safetensors"
    assert exported(checkpoint, "diffusers", out)["tensors"] == contents(FIXTURES / "lora" / LORA)["tensors"]


def test_an_old_lora_is_exported_and_makes_the_recorded_picture(tmp_path: Path, golden: dict[str, Any]) -> None:
    lora = FIXTURES / "lora"
    assert hashlib.sha256((lora / LORA).read_bytes()).hexdigest() == golden["numbers"]["lora_sha256"]
    assert exported(lora, "comfyui", tmp_path / "comfyui.safetensors") == golden["comfyui"]
    found, wanted = (
        np.asarray(picture).astype(int)
        for picture in (sampled(lora, tmp_path / "pictures"), Image.open(FIXTURES / "sample.png"))
    )
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= (0 if machine() == golden["numbers"]["machine"] else 1)
