"""`mixres sample` makes the sizes of the training: image and control on one token grid, or a line that says why not."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from inference.test_sample import PROMPT, Result, difference, settings_of
from mixres.errors import UserError
from mixres.geometry import Size
from mixres.inference.artifact import RunResult
from mixres.inference.sample import sample
from mixres.models.lora_file import RECIPE_KEY, read_header
from support.family_cases import CASES
from support.lora_files import write_lora

RULE = {"max_pixels": 96 * 64, "multiple_of": 16, "upscale": False}
SIZES = [Size(301, 200), Size(150, 150)]
WORDS = [f"data.resize.target.max_pixels={RULE['max_pixels']}"]


@pytest.fixture(params=["qwen_image_edit", "qwen_image_edit_plus"])
def edit(request: pytest.FixtureRequest, base_of, tmp_path: Path) -> Result:  # type: ignore[no-untyped-def]
    """A LoRA whose targets have at most 96 x 64 pixels; two photographs, the second of another aspect."""
    case = CASES[request.param]
    base, images = base_of(case), []
    for name, size in zip("ab", SIZES, strict=True):
        images.append(tmp_path / f"{name}.png")
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB").save(images[-1])
    folder = tmp_path / "run"
    write_lora(folder, base, *case.overrides(), *WORDS)
    return Result(case, base, folder, images)


def test_the_default_is_the_size_of_the_training(edit: Result, tmp_path: Path) -> None:
    """Both grids are equal; a second control of another aspect keeps the rule of areas."""
    (job,) = edit.request(tmp_path / "out", image=[str(edit.images[0])]).jobs
    assert job.size == job.control_sizes.vae[0] == Size(96, 64)
    assert job.restored_size is None
    if edit.case.controls[1] > 1:
        (job,) = edit.request(tmp_path / "out", image=[str(path) for path in edit.images]).jobs
        by_area = edit.case.sizes(job.size, SIZES)
        assert job.control_sizes.vae == (Size(96, 64), by_area.vae[1])
        assert job.control_sizes.text == by_area.text


def test_the_image_is_the_stock_pipelines_on_one_grid_and_is_scaled_back(edit: Result, tmp_path: Path) -> None:
    first = edit.images[0]
    sample(edit.request(tmp_path / "out", image=[str(first)], steps=2, seed=7, restore_size=True))
    made, settings = tmp_path / "out" / "0001.png", settings_of(tmp_path / "out" / "0001.png")
    assert (settings["size"], settings["control_sizes"], settings["restored_size"]) == ("96x64", ["96x64"], "301x200")
    with Image.open(first) as control:
        control.load()
    with edit.case.stock_areas(edit.case.areas, aligned=Size(96, 64)):
        noise = torch.Generator().manual_seed(7)
        call = edit.case.call([control]) | {"prompt": PROMPT, "width": 96, "height": 64, "true_cfg_scale": 1.0}
        expected = edit.stock()(**call, num_inference_steps=2, generator=noise).images[0]
    assert difference(made, expected.resize((301, 200), Image.Resampling.LANCZOS)) <= 1


def test_a_size_of_another_aspect_is_warned_about(
    edit: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = [str(edit.images[0])]
    for size in ("96x64", "192x128", "128x80"):  # as the rounding of the training makes them of this aspect
        (job,) = edit.request(tmp_path / "out", image=image, size=size).jobs
        assert job.control_sizes.vae == (job.size,)
    assert capsys.readouterr().out == ""
    (job,) = edit.request(tmp_path / "out", image=image, size="320x128").jobs
    assert job.control_sizes == edit.case.sizes(job.size, SIZES[:1]), "by area, as in training"
    line = "size      0001.png: 320x128 has another aspect than its first image (301x200)"
    assert line in (said := capsys.readouterr().out) and said.endswith("the nearest size of that aspect is 256x160\n")
    with pytest.raises(UserError, match=r"^--restore-size: there is no image whose size could be restored"):
        edit.request(tmp_path / "out", image=[], restore_size=True)


def test_a_lora_of_an_earlier_version_keeps_its_rule(edit: Result, tmp_path: Path) -> None:
    """Its recipe has neither key: it was never aligned, and the default is the stock pipeline's."""
    path = edit.folder / "pytorch_lora_weights.safetensors"
    stated = dict(read_header(str(path), key="--lora").recipe)
    assert (stated.pop("control_align"), stated.pop("target_size")) == ("auto", RULE)
    save_file(load_file(path), path, {"format": "pt", RECIPE_KEY: json.dumps(stated)})
    (job,) = edit.request(tmp_path / "out", image=[str(edit.images[0])]).jobs
    assert job.size == edit.case.at("").default_size(Size(301, 200))
    assert job.control_sizes == edit.case.sizes(job.size, SIZES[:1])


def test_a_line_of_a_prompts_file_decides_for_its_own_controls(edit: Result, tmp_path: Path) -> None:
    line = {"path_control": "b.png", "size": "96x64"}
    file = Result.lines(tmp_path, *(line | {"align_control": value} for value in (True, False, None)))
    jobs = edit.request(tmp_path / "out", prompts=file).jobs
    by_area = edit.case.sizes(Size(96, 64), SIZES[1:]).vae
    assert [job.control_sizes.vae for job in jobs] == [(Size(96, 64),), by_area, by_area]


@pytest.mark.parametrize("rule", ["auto", "always", "never"])
def test_the_recipe_decides(rule: str) -> None:
    recipe = {"family": "qwen_image_edit", "base": "x", "control_area": 64 * 64, "control_align": rule}
    result = RunResult(Path("x"), None, recipe | {"target_size": RULE})
    for control, size in ((Size(301, 200), Size(96, 64)), (Size(150, 150), Size(96, 64))):
        same = rule == "always" or (rule == "auto" and control.width == 301)
        assert (result.control_sizes(size, [control]).vae == (size,)) is same
    assert result.trained_size(Size(3010, 2000)) == Size(96, 64)
