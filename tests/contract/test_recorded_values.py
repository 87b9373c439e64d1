"""The recorded numbers come again, and what the recorded version wrote is read: run, cache, LoRA file."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contract import record
from contract.record import CONFIG, FIXTURES, LORA


def test_the_plans_of_the_recipes(golden: dict[str, Any]) -> None:
    assert record.plans() == golden["plans"]


def test_the_keys_of_the_cache(finished: Path, golden: dict[str, Any]) -> None:
    """Where torchvision is installed transformers resizes differently, and the keys are others on purpose."""
    assert record.entries(finished / "cache") == golden["numbers"]["entries"]


def test_the_losses_of_a_run(finished: Path, golden: dict[str, Any]) -> None:
    record.assert_same_metrics(record.json_lines(finished / "run" / "metrics.jsonl"), golden["numbers"])


def test_the_lora_of_a_run(finished: Path, golden: dict[str, Any]) -> None:
    record.assert_same_lora(finished / "run" / LORA, golden["numbers"])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """`run`, stopped by a signal before its last step, and `cache`, to be written to."""
    for name in ("run", "cache"):
        shutil.copytree(FIXTURES / name, tmp_path / name, symlinks=True)
    return tmp_path


def written(cache: Path) -> dict[str, tuple[int, int]]:
    """What changes where an entry is encoded anew."""
    found = [(name, (cache / name).stat()) for name in record.entries(cache)]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def test_an_old_cache_is_found_and_an_old_run_goes_on_to_the_same_end(old: Path, golden: dict[str, Any]) -> None:
    before = written(old / "cache")
    assert list(before) == golden["numbers"]["entries"]
    given = ("--config", CONFIG, *record.folders(old))
    assert record.command("--cache", *given) == 0
    assert written(old / "cache") == before, "nothing is encoded again"
    assert record.command("cache", "--verify", *given) == 0
    recorded = (old / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert record.command("train", *given, "resume=required") == 0
    assert written(old / "cache") == before
    lines = (old / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert lines.startswith(recorded) and 0 < recorded.count('"loss"') < lines.count('"loss"')
    record.assert_same_metrics(record.json_lines(old / "run" / "metrics.jsonl"), golden["numbers"])
    record.assert_same_lora(old / "run" / LORA, golden["numbers"])
    status = json.loads((old / "run" / "run_status.json").read_bytes())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 5)


def test_an_old_run_refuses_what_would_make_it_another(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--config", CONFIG, *record.folders(old))
    assert record.command("train", *given, "train.seed=1", "model.lora.lora_alpha=4") == 2
    told = capsys.readouterr().err
    assert "train.seed" in told and "model.lora.lora_alpha" in told
    assert not (old / "run" / LORA).exists()


def test_an_old_checkpoint_is_exported(tmp_path: Path) -> None:
    (checkpoint,) = (FIXTURES / "run" / "checkpoints").glob("step-*")
    out = tmp_path / "of_checkpoint.safetensors"
    wanted = record.contents(FIXTURES / "lora" / LORA)["tensors"]
    assert record.exported(checkpoint, "diffusers", out)["tensors"] == wanted


def test_an_old_lora_is_exported_and_makes_the_recorded_picture(tmp_path: Path, golden: dict[str, Any]) -> None:
    lora = FIXTURES / "lora"
    assert hashlib.sha256((lora / LORA).read_bytes()).hexdigest() == golden["numbers"]["lora_sha256"]
    assert record.exported(lora, "comfyui", tmp_path / "comfyui.safetensors") == golden["comfyui"]
    found, wanted = (
        np.asarray(picture).astype(int)
        for picture in (record.sampled(lora, tmp_path / "pictures"), Image.open(FIXTURES / "sample.png"))
    )
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= (0 if record.machine() == golden["numbers"]["machine"] else 1)
