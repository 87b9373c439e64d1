"""Families other than those of the first Qwen-Image through every verb of the command line, in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from mixres.cli import main
from mixres.models.lora_file import FILE_NAME
from support.family_cases import EVERY_CASE, FamilyCase

# A base of each class of families; Qwen-Image has its own tests, and FLUX.2 shares FLUX.1's class.
NAMES = ("flux_kontext", "qwen_image_21", "z_image")
CASES = {name: EVERY_CASE[name].in_a_folder() for name in NAMES}


def command(*words: str | Path) -> int:
    AcceleratorState._reset_state(True)
    return main([str(word) for word in words])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_family_goes_through_every_verb(
    case: FamilyCase,
    base_of: Callable[[Any], Path],
    pairs_of: Callable[[Any], Path],
    small_run: Path,
    tmp_path: Path,
) -> None:
    base, pairs, run = base_of(case), pairs_of(case), tmp_path / "run"
    config = (
        "--config", small_run, f"model.pretrained_model_name_or_path={base}", f"data.train={pairs / 'train'}",
        f"data.held_out={pairs / 'held_out'}", f"cache.cache_dir={tmp_path / 'cache'}", f"logging.output_dir={run}",
        *case.overrides(), "data.caption_dropout=0.3", "train.max_train_steps=2", "sample.every=2",
        "model.lora.target_modules=attention+mlp",
    )  # fmt: skip
    areas = ["data.resize.control.area=4096"] if case.areas else []
    tiny = ("batch.samples_per_step=1", "data.resize.target.max_pixels=4096", *areas)
    for verb in (["cache"], ["inspect"], ["train"], ["verify"], ["bench", "--synthetic", "--seconds", "1"]):
        assert command(*verb, *config, *(tiny if "bench" in verb else ())) == 0, verb
    assert json.loads((run / "reports" / "verify.json").read_text())["passed"]

    cut = (*config, f"logging.output_dir={tmp_path / 'cut'}", "checkpoint.every=1")
    for steps in (1, 2):
        assert command("train", *cut, f"train.max_train_steps={steps}") == 0
    assert (tmp_path / "cut" / FILE_NAME).read_bytes() == (run / FILE_NAME).read_bytes(), "a resumed run"

    image = ("--image", min((pairs / "held_out" / "control_images").iterdir())) if max(case.controls) else ()
    call = (*image, "--prompt", "swap red and blue", "--size", "64x64", "--steps", "2")
    assert command("sample", "--lora", run, *call, "--out", tmp_path / "out") == 0
    (made,) = (tmp_path / "out").iterdir()
    embedded = case.at(base).embedded_guidance()
    with Image.open(made) as image_file:
        guidance = json.loads(image_file.info["mixres"])["guidance"]
    assert guidance == (embedded.sampling if embedded else 1.0)
    assert command("sample", "--lora", run, *call, "--negative-prompt", "red", "--out", tmp_path / "out") == 2
    for name in ("diffusers", "comfyui"):
        file = tmp_path / f"{name}.safetensors"
        assert command("export", run, "--format", name, "--out", file) == 0
        prefix = case.at("").comfyui_prefix if name == "comfyui" else "transformer"
        with safe_open(file, "pt") as opened:
            assert all(key.startswith(f"{prefix}.") for key in opened.keys())  # noqa: SIM118
        case.load_stock(base, torch.float32).load_lora_weights(file)
    assert command("export", run, "--format", "diffusers", "--merge", "--out", tmp_path / "merged") == 0
