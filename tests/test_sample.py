"""`mixres sample` on every family: the pictures of the stock pipeline, what they say of themselves, what is refused."""

import json
import random
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_plus
from PIL import Image

from family_cases import CASES, FamilyCase
from mixres import __version__, cli
from mixres.assemble import recipe
from mixres.config import load_config
from mixres.data.images import Limits, read_image
from mixres.errors import UserError
from mixres.models.lora import add_lora, fill_adapters, trainable_parameters
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, lora_file
from mixres.models.pretrained import file_digest
from mixres.sample import sample
from mixres.sample_request import make_request

PROMPT, NEGATIVE = "swap red and blue", "交换红色和蓝色"
SIZE = (96, 64)
CALL = ("--size", "96x64", "--steps", "2", "--seed", "7")
pytestmark = pytest.mark.usefixtures("tiny_base", "one_thread")  # the base first: its bytes depend on threads


@dataclass(frozen=True)
class Trained:
    """A run folder with a LoRA that changes pictures visibly, its base, and images to be edited."""

    case: FamilyCase
    base: Path
    folder: Path
    images: list[Path]

    def words(self, *more: str, count: int | None = None) -> list[str]:
        count = max(self.case.controls) if count is None else count
        images = [word for path in self.images[:count] for word in ("--image", str(path))]
        return ["sample", "--lora", str(self.folder), *images, "--prompt", PROMPT, *CALL, *more]

    def request(self, out: Path, **options: Any) -> Any:
        given = {"lora": str(self.folder), "prompt": PROMPT, "out": str(out)} | options
        if "prompts" not in given:
            given.setdefault("image", [str(path) for path in self.images[: max(self.case.controls)]])
        return make_request(**{name: value for name, value in given.items() if value is not None})

    def stock(self, lora: bool = True) -> Any:
        pipeline = self.case.load_stock(self.base, torch.float32)
        if lora:
            pipeline.load_lora_weights(self.folder / FILE_NAME)
        return pipeline

    def pictures(self, count: int | None = None) -> list[Image.Image]:
        paths = self.images[: max(self.case.controls) if count is None else count]
        return [Image.open(path).convert("RGB") for path in paths]

    def stock_picture(self, pipeline: Any, images: list[Image.Image] | None = None, **call: Any) -> Image.Image:
        images = self.pictures() if images is None else images
        given = {"prompt": PROMPT, "true_cfg_scale": 1.0, "width": SIZE[0], "height": SIZE[1]} | call
        noise = torch.Generator().manual_seed(given.pop("seed", 7))
        with self.case.stock_areas(self.case.areas):
            made = pipeline(**self.case.call(images), num_inference_steps=2, generator=noise, **given)
        picture: Image.Image = made.images[0]
        return picture


@pytest.fixture(scope="module")
def trained_of(
    base_of: Callable[[FamilyCase], Path],
    small_run: Path,
    demo_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Trained]:
    """By the name of a row of `CASES`; the LoRA is a DoRA for one of them."""
    made: dict[str, Trained] = {}

    def trained(name: str) -> Trained:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp("run")
            base = base_of(case)
            words = [f"model.pretrained_model_name_or_path={base}", *case.overrides()]
            config = load_config(small_run, [*words, f"model.lora.use_dora={str(case.zero_cond_t).lower()}"])
            assert config.model.lora is not None
            transformer = case.module.load_transformer(str(base), dtype=torch.float32, device="cpu")
            untrained = case.module.untrained_modules(transformer)
            add_lora(transformer, **config.model.lora.model_dump(), untrained=untrained, seed=1)
            parameters = trainable_parameters(transformer)
            fill_adapters(parameters, seed=2)
            for key, parameter in parameters.items():
                parameter.data *= 10.0 if ".lora_B." in key else 1.0
            said = recipe(config, case.module, 5)
            (folder / FILE_NAME).write_bytes(lora_file(parameters, transformer, said))
            images = sorted((demo_data / "control_images").glob("*.png"))[:3]
            made[name] = Trained(case, base, folder, images)
        return made[name]

    return trained


@pytest.fixture(params=CASES)
def trained(request: pytest.FixtureRequest, trained_of: Callable[[str], Trained]) -> Trained:
    return trained_of(request.param)


@pytest.fixture
def edit(trained_of: Callable[[str], Trained]) -> Trained:
    return trained_of("qwen_image_edit")


def difference(a: Image.Image | Path, b: Image.Image | Path) -> int:
    one, other = (np.asarray(Image.open(x) if isinstance(x, Path) else x).astype(int) for x in (a, b))
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def said(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return dict(json.loads(picture.text["mixres"]))


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> list[str]:
    assert cli.main(words) == 2
    return [line.removeprefix("mixres: error: ") for line in capsys.readouterr().err.splitlines()]


# --- Pictures ------------------------------------------------------------------------------------------------------


def test_the_picture_is_the_stock_pipelines_with_the_lora(trained: Trained, tmp_path: Path) -> None:
    assert cli.main([*trained.words("--compare"), "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "0001.png"
    without, stock = trained.stock_picture(trained.stock(lora=False)), trained.stock()
    expected = trained.stock_picture(stock)
    assert difference(path, expected) <= 1
    assert difference(tmp_path / "out" / "0001-without.png", without) <= 1
    # The bound means something: each of these is a picture farther away.
    others = [without, *(trained.stock_picture(stock, **other) for other in ({"seed": 8}, {"prompt": NEGATIVE}))]
    if trained.images and max(trained.case.controls):
        others.append(trained.stock_picture(stock, trained.pictures()[::-1] if len(trained.pictures()) > 1 else None))
        with trained.case.stock_areas({name: 64 * 64 for name in trained.case.areas}):
            pass
    for number, other in enumerate(others[:3]):
        print(trained.case.family, number, difference(other, expected))
