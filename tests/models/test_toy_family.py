"""A family that comes as one file: what stands here and nowhere else is trained, sampled, exported and verified.

It is a variant of Qwen-Image-Edit under names that no module knows. The commands are the real ones, in this process.
"""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from accelerate.state import AcceleratorState
from diffusers import QwenImageEditPipeline
from PIL import Image
from safetensors import safe_open

from mixres.cli import main
from mixres.models import registry
from mixres.models.qwen.edit import QwenImageEdit

FAMILY_NAMES = sorted(family.name for family in registry.FAMILIES.values())


class ToyPipeline(QwenImageEditPipeline):  # type: ignore[misc]
    """The pipeline class that the base's model_index.json names."""


class Toy(QwenImageEdit):
    """Registered by `toy_base`."""

    name = "toy"
    pipeline_class = ToyPipeline
    stock_bases = ()
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {"toy layers": ("to_q", "to_v")}


@pytest.fixture
def toy_base(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": ToyPipeline.__name__}), encoding="utf-8")
    monkeypatch.setitem(registry.FAMILIES, ToyPipeline.__name__, Toy)
    return base


def command(*words: str | Path) -> int:
    AcceleratorState._reset_state(True)
    return main([str(word) for word in words])


@pytest.mark.slow
def test_a_family_of_one_file_goes_through_every_verb(
    toy_base: Path, small_run: Path, few_pairs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = (
        "--config", small_run, f"model.pretrained_model_name_or_path={toy_base}", "model.family=toy",
        f"cache.cache_dir={tmp_path / 'cache'}", f"logging.output_dir={run}",
        "train.max_train_steps=2", "sample.every=2", "optimizer.init_args.lr=2e-2",
        "model.lora.target_modules=toy layers",
    )  # fmt: skip
    for verb in ("cache", "inspect", "train", "verify"):
        assert command(verb, *config) == 0, verb
    with Image.open(run / "samples" / "step-00000002.png") as grid:
        assert grid.width > grid.height > 0
    assert json.loads((run / "reports" / "verify.json").read_text())["passed"]

    image = min((few_pairs / "held_out" / "control_images").iterdir())
    call = ("--image", image, "--prompt", "swap red and blue", "--size", "64x48", "--steps", "2")
    assert command("sample", "--lora", run, *call, "--out", tmp_path / "out") == 0
    assert [file.suffix for file in (tmp_path / "out").iterdir()] == [".png"]
    for name in ("diffusers", "comfyui"):
        file = tmp_path / f"{name}.safetensors"
        assert command("export", run, "--format", name, "--out", file) == 0
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["mixres"])["family"] == "toy"
            assert {key.split(".")[-3] for key in opened.keys() if ".lora_A." in key} == {"to_q", "to_v"}  # noqa: SIM118


def test_no_other_module_names_a_family() -> None:
    """Whoever asks for a name would treat a new family as none of those."""
    models = Path(registry.__file__).parent
    for path in models.parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert models in path.parents or not any(f'"{name}"' in text for name in FAMILY_NAMES), path
