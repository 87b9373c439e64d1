"""Every family through the real command line: trained; its results in a process without mixres.

A family comes into these tests by its row in `family_cases.CASES`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mixres.preprocessing.fill import encode_all
from mixres.training.sample_sheets import HeldOutSampler
from support.family_cases import EVERY_CASE, FamilyCase
from support.jobs import LORA, REPOSITORY, Jobs, environment, newest, stock_calls

STOCK_PROCESS = REPOSITORY / "tests" / "support" / "stock_process.py"
STEPS = 6
CASES = {name: case.in_a_folder() for name, case in EVERY_CASE.items()}
EXTRAS = {"zero_cond_t": ("model.lora.use_dora=true", "train.ema_decay=0.5", "sample.use_ema=true")}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


class Runs(Jobs):
    """Runs of one family on pairs with as many controls as it takes, all with one cache."""

    case: FamilyCase
    base: Path
    extras: tuple[str, ...]


@pytest.fixture(scope="module", params=CASES)
def runs(
    request: pytest.FixtureRequest,
    small_run: Path,
    base_of: Callable[[FamilyCase], Path],
    pairs_of: Callable[[FamilyCase], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    case, extras, root = CASES[request.param], EXTRAS.get(request.param, ()), tmp_path_factory.mktemp("runs")
    base, pairs = base_of(case), pairs_of(case)
    data = (f"data.train={pairs / 'train'}", f"data.held_out={pairs / 'held_out'}", *case.overrides())
    often = (f"train.max_train_steps={STEPS}", "checkpoint.every=2", "sample.every=4")
    model = (f"model.pretrained_model_name_or_path={base}", *extras, "optimizer.init_args.lr=2e-2")
    made = Runs(small_run, root / "cache", root, (*model, *data, *often))
    made.case, made.base, made.extras = case, base, extras
    return made


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> Path:
    return runs.forked("unbroken")


def test_a_run_of_all_control_counts_leaves_what_is_promised(runs: Runs, unbroken: Path) -> None:
    with Image.open(unbroken / "samples" / "step-00000006.png") as grid:
        columns = max(runs.case.controls) + 2
        assert grid.width == 12 + columns * (224 + 12), "each control has a column"
    with safe_open(unbroken / LORA, "pt") as file:
        recipe = json.loads(file.metadata()["mixres"])
    assert (recipe["family"], recipe["base"]) == (runs.case.family, str(runs.base))
    assert {name: recipe[name] for name in ("control_area", "text_area") if name in recipe} == runs.case.areas
    if runs.extras:
        assert (unbroken / "ema" / LORA).read_bytes() != (unbroken / LORA).read_bytes()


@pytest.mark.parametrize("runs", ["flux2_klein", "flux_kontext", "qwen_image_21", "z_image"], indirect=True)
def test_two_ranks_that_split_the_weights_resume_to_the_same_end(runs: Runs, unbroken: Path) -> None:
    """In float32, whose roundings AdamW's division amplifies; `test_ranks.py` holds one family in float64.

    Each rank reads its rows into a skeleton, which has no values of its own to fall back on.
    """
    split = runs.copy_at(4, "unbroken", "split")
    early, end = trained(split), trained(unbroken)
    runs.forked("split", "train.parallel=fsdp2", "train.shard_read=rows", ranks=2)
    assert newest(split).step == STEPS
    assert (trained(split) - end).norm() < 1e-3 * (end - early).norm()


def test_what_is_trained_gives_the_same_images_in_a_process_without_mixres(
    runs: Runs, unbroken: Path, tmp_path: Path
) -> None:
    """The LoRA, and the transformer of a run that trains all weights."""
    whole = runs.here("whole", "model.lora=null", "train.max_train_steps=2", "sample.every=0") / "transformer"
    config, family = runs.config("unbroken"), runs.case.at(runs.base)
    encoded = encode_all(config, family, device=torch.device("cpu"))
    base, other = (family.load_transformer(trained=t, dtype=torch.float32, device="cpu") for t in (None, whole))
    lora, all_weights = (HeldOutSampler(config, family, transformer, encoded) for transformer in (base, other))
    lora.pipeline.load_lora_weights(unbroken)
    folders = [str(path) for path in (runs.base, unbroken, tmp_path, whole)]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(STOCK_PROCESS), *folders],
        input=json.dumps(stock_calls(lora)), env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for number, item in enumerate(lora.items):
        with_lora, without, with_whole = (
            pixels(Image.open(tmp_path / f"{number}-{part}.png")) for part in ("with", "without", "whole")
        )
        assert np.abs(with_lora - pixels(lora.predict(item))).max() <= 1
        assert np.abs(with_lora - without).max() > 8, "the LoRA changes the image"
        assert np.abs(with_whole - pixels(all_weights.predict(item))).max() <= 1
        assert np.abs(with_whole - without).max() > 8, "so do the weights"


def trained(run: Path) -> torch.Tensor:
    """All that the newest checkpoint has trained."""
    tensors = newest(run).tensors("trainable")
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def pixels(image: Image.Image) -> "np.ndarray[Any, Any]":
    return np.asarray(image).astype(int)
