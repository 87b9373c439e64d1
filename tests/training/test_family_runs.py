"""Every family through the real command line: trained, stopped, resumed; its results in a process without mixres.

A family comes into these tests by its row in `family_cases.CASES`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.preprocessing.fill import encode_all
from mixres.training.checkpoint import Checkpoints
from mixres.training.sample_sheets import HeldOutSampler
from mixres.training.trainer import train
from support.family_cases import CASES, FamilyCase
from support.jobs import stock_calls

REPOSITORY = Path(__file__).parents[2]
STOCK_PROCESS = Path(__file__).parents[1] / "support" / "stock_process.py"
STEPS = 6
EXTRAS = {"zero_cond_t": ("model.lora.use_dora=true", "train.ema_decay=0.5", "sample.use_ema=true")}
LORA = "pytorch_lora_weights.safetensors"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class Runs:
    """Runs of one family on pairs with as many controls as it takes, all with one cache."""

    case: FamilyCase
    extras: tuple[str, ...]
    file: Path
    base: Path
    pairs: Path
    root: Path

    def words(self, name: str, *overrides: str) -> list[str]:
        return [
            f"model.pretrained_model_name_or_path={self.base}", f"data.train={self.pairs / 'train'}",
            f"data.held_out={self.pairs / 'held_out'}", *self.case.overrides(), *self.extras,
            f"cache.cache_dir={self.root / 'cache'}", f"logging.output_dir={self.root / name}",
            "optimizer.init_args.lr=2e-2", f"train.max_train_steps={STEPS}", "checkpoint.every=2",
            "sample.every=4", *overrides,
        ]  # fmt: skip

    def config(self, name: str) -> Config:
        return load_config(self.file, self.words(name))

    def __call__(self, name: str, *overrides: str) -> Path:
        done = process([sys.executable, "train.py", "--config", str(self.file), *self.words(name, *overrides)])
        assert done.returncode == 0, done.stderr[-3000:]
        return self.root / name


def process(command: list[str], text: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, input=text, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", params=CASES)
def runs(
    request: pytest.FixtureRequest,
    small_run: Path,
    base_of: Callable[[FamilyCase], Path],
    pairs_of: Callable[[FamilyCase], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    case = CASES[request.param]
    return Runs(
        case, EXTRAS.get(request.param, ()), small_run, base_of(case), pairs_of(case), tmp_path_factory.mktemp("runs")
    )


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> Path:
    return runs("unbroken")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines without what a clock put in."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_run_of_all_control_counts_leaves_what_is_promised(runs: Runs, unbroken: Path) -> None:
    assert [line["step"] for line in metrics(unbroken)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (unbroken / "samples").iterdir()) == ["step-00000004.png", "step-00000006.png"]
    with Image.open(unbroken / "samples" / "step-00000006.png") as sheet:
        columns = max(runs.case.controls) + 2
        assert sheet.width == 12 + columns * (224 + 12), "each control has a column"
    with safe_open(unbroken / LORA, "pt") as file:
        recipe = json.loads(file.metadata()["mixres"])
    assert (recipe["family"], recipe["base"]) == (runs.case.family, str(runs.base))
    assert {name: recipe[name] for name in ("control_area", "text_area") if name in recipe} == runs.case.areas


def test_a_checkpoint_of_adapters_is_small(runs: Runs, unbroken: Path) -> None:
    """Weights and two moments of each, their average where one is kept, and no frozen weight."""
    newest = Checkpoints(unbroken / "checkpoints", keep=2).newest_valid()
    assert newest is not None
    averages = [key for key in newest.shapes("optimizer") if key.startswith("ema|")]
    assert len(averages) == (len(newest.shapes("trainable")) if runs.extras else 0)
    trained = sum(tensor.nbytes for tensor in newest.tensors("trainable").values())
    size = sum(file.stat().st_size for file in newest.path.iterdir())
    assert size <= (4 if runs.extras else 3) * trained + 65536


def test_a_resumed_run_is_an_unbroken_one(runs: Runs, unbroken: Path) -> None:
    runs("halves", "train.max_train_steps=4")
    folder = runs("halves")
    assert metrics(folder) == metrics(unbroken)
    last = f"step-{STEPS:08d}"
    names = [LORA, f"samples/{last}.png", f"checkpoints/{last}/trainable.safetensors"]
    averaged = f"ema/{LORA}"
    assert (unbroken / averaged).exists() is bool(runs.extras)
    if runs.extras:
        names.append(averaged)
        assert (unbroken / averaged).read_bytes() != (unbroken / LORA).read_bytes()
    for name in names:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_what_is_trained_gives_the_same_pictures_in_a_process_without_mixres(
    runs: Runs, unbroken: Path, tmp_path: Path
) -> None:
    """The LoRA, by `mixres sample` too, and the transformer of a run that trains all weights."""
    AcceleratorState._reset_state(True)
    train(load_config(runs.file, runs.words("whole", "model.lora=null", "train.max_train_steps=2", "sample.every=0")))
    whole = runs.root / "whole" / "transformer"
    config, family = runs.config("unbroken"), runs.case.at(runs.base)
    encoded = encode_all(config, family, device=torch.device("cpu"))
    lora, all_weights = (
        HeldOutSampler(config, family, family.load_transformer(
            trained=trained, dtype=torch.float32, device="cpu"), encoded)
        for trained in (None, whole)
    )  # fmt: skip
    lora.pipeline.load_lora_weights(unbroken)
    cases = stock_calls(lora)
    words = [sys.executable, str(STOCK_PROCESS), str(runs.base), str(unbroken), str(tmp_path), str(whole)]
    done = process(words, json.dumps(cases))
    assert done.returncode == 0, done.stderr[-3000:]
    by_command = sampled(runs, unbroken, cases, tmp_path / "out")
    for number, item in enumerate(lora.items):
        with_lora, without, with_whole = (
            pixels(Image.open(tmp_path / f"{number}-{part}.png")) for part in ("with", "without", "whole")
        )
        assert np.abs(with_lora - pixels(lora.predict(item))).max() <= 1
        assert np.abs(with_lora - pixels(by_command[number])).max() <= 1
        assert np.abs(with_lora - without).max() > 8, "the LoRA changes the picture"
        assert np.abs(with_whole - pixels(all_weights.predict(item))).max() <= 1
        assert np.abs(with_whole - without).max() > 8, "so do the weights"


def pixels(picture: Image.Image) -> "np.ndarray[Any, Any]":
    return np.asarray(picture).astype(int)


def sampled(runs: Runs, run: Path, cases: list[dict[str, Any]], out: Path) -> list[Image.Image]:
    """The pictures of these calls by `mixres sample`."""
    lines = [
        {"prompt": case["prompt"], "size": f"{case['width']}x{case['height']}"}
        | {
            f"path_control_{slot}" if slot else "path_control": os.path.relpath(path, runs.pairs)
            for slot, path in enumerate(case["controls"])
        }
        for case in cases
    ]
    prompts = runs.pairs / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = ["--lora", str(run), "--prompts", str(prompts), "--steps", str(cases[0]["steps"])]
    done = process([sys.executable, "train.py", "sample", *words, "--seed", str(cases[0]["seed"]), "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    return [Image.open(out / f"{number + 1:04d}.png") for number in range(len(cases))]
