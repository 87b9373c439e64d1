"""One LoRA at sizes that are multiples of 8 and not of 32: held-out edits lie where their inputs lie."""

import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from mixres.config.load import load_config
from mixres.geometry import Size, control_size
from mixres.models.family import ControlSizes
from mixres.models.lora_file import FILE_NAME
from mixres.preprocessing.fill import encode_all, family_of
from mixres.preprocessing.samples import CachedSample
from mixres.quickstart import data
from mixres.quickstart.results import psnr
from mixres.training.denoising import image_inputs, make_images
from mixres.training.drift import Drift, measure_drift
from mixres.training.sample_sheets import HeldOutSampler
from support.jobs import environment

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
HELD_OUT = [Size(160, 96), Size(128, 160), Size(224, 96), Size(168, 136), Size(152, 184), Size(104, 168)]
STEPS = 200
TOKEN = 8  # pixels of the tiny base
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def is_of_32(size: Size) -> bool:
    return size.width % 32 == size.height % 32 == 0


def trained_sizes() -> list[Size]:
    """Sizes whose grid the rule of areas misses, since it rounds the sides of controls to 32 pixels."""
    drawn = random.Random(5)
    found: list[Size] = []
    while len(found) < 24:
        size = Size(*(drawn.randrange(64, 168, TOKEN) for _ in "wh"))
        if not is_of_32(size) and 0.5 <= size.width / size.height <= 2:
            found.append(size)
    return found


class Made(NamedTuple):
    size: Size
    psnr: float
    drift: Drift | None


class Trained:
    """Held-out images of a LoRA of so many steps."""

    def __init__(self, folder: Path) -> None:
        folders = [f"data.{name}={folder / name}" for name in ("train", "held_out")]
        folders += [f"logging.output_dir={folder / 'run'}", f"cache.cache_dir={folder / 'cache'}"]
        words = [
            *folders,
            f"data.resize.target.multiple_of={TOKEN}",
            f"train.max_train_steps={STEPS}",
            "sample.every=0",
        ]
        subprocess.run(
            [sys.executable, "train.py", "--config", CONFIG, *words], cwd=REPOSITORY, env=environment(), check=True
        )
        config = load_config(CONFIG, words)
        family = family_of(config)
        self.encoded = encode_all(config, family, device=torch.device("cpu"))
        transformer = family.load_transformer(dtype=torch.float32, device="cpu")
        self.sampler = HeldOutSampler(config, family, transformer, self.encoded)
        self.sampler.pipeline.load_lora_weights(folder / "run", weight_name=FILE_NAME)

    def made(self, items: Sequence[CachedSample]) -> list[Made]:
        found = []
        sampler, cache = self.sampler, self.encoded.cache
        for item in items:
            given = image_inputs(
                sampler.family,
                sampler.pipeline,
                controls=[sampler.read(path) for path in item.record.controls],
                text=cache.read(item.key, name=item.record.name).text,
                size=item.target_size,
                sizes=item.control_sizes,
                seed=0,
            )
            (image,) = make_images(sampler.family, sampler.pipeline, [given], steps=sampler.config.sample.steps)
            target = sampler.read(item.record.target)
            target = target.resize(item.target_size, Image.Resampling.LANCZOS)
            found.append(Made(item.target_size, psnr(image, target), measure_drift(image, target)))
        return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder, taken = tmp_path_factory.mktemp("shift"), set[Size]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MULTIPLE_OF", TOKEN)
        patch.setattr(data, "_JITTER", TOKEN // 2 - 1)  # files round back to the sizes named here
        pairs = data.plan_pairs(data.TRAIN_PHOTOGRAPHS, trained_sizes(), 96, 0, taken)
        data.write_pairs(folder / "train", pairs)
        data.write_pairs(folder / "held_out", data.plan_pairs(data.HELD_OUT_PHOTOGRAPHS, HELD_OUT, 12, 1, taken))
    return Trained(folder)


def test_sides_that_are_no_multiples_of_32_are_as_good_and_lie_still(trained: Trained) -> None:
    made = trained.made(trained.encoded.held_out)
    coarse, fine = ([one.psnr for one in made if is_of_32(one.size) is wanted] for wanted in (True, False))
    assert len(coarse) == len(fine) == 6
    assert statistics.fmean(fine) > statistics.fmean(coarse) - 1.5, made
    drifts = [one.drift for one in made if one.drift]
    assert len(drifts) >= 10 and max(drift.shift_px for drift in drifts) < 0.5, made
    assert max(abs(drift.scale_pct) for drift in drifts) < 0.5, made


def test_the_meter_sees_a_control_that_is_a_row_larger_and_one_by_area(trained: Trained) -> None:
    """The same LoRA; grids lie centre on centre, so that one more row moves the image by half a token."""
    items = [item for item in trained.encoded.held_out if not is_of_32(item.target_size)]
    for rule in ("a row larger", "by area"):
        others = []
        for item in items:
            width, height = item.target_size
            by_area = control_size(Size(*trained.sampler.read(item.record.controls[0]).size), area=width * height)
            size = Size(width, height + TOKEN) if rule == "a row larger" else by_area
            others.append(item._replace(control_sizes=ControlSizes((size,), (size,))))
        aligned, shifted = trained.made(items), trained.made(others)
        assert all(one.drift is None or one.drift.shift_px > 2 for one in shifted), (rule, shifted)
        assert statistics.fmean(one.psnr for one in shifted) < statistics.fmean(one.psnr for one in aligned) - 5
