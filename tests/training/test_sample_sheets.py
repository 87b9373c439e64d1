"""Sample grids: their geometry, their captions, and that making one leaves the training as it was."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.images import read_image
from mixres.geometry import Size
from mixres.models.qwen.edit import QwenImageEdit
from mixres.preprocessing.fill import CachedData, encode_all
from mixres.preprocessing.training_data import image_limits
from mixres.training import sample_sheets
from mixres.training.ema import Ema
from mixres.training.sample_sheets import HeldOutSampler, Row, contact_sheet, save_png
from support.family_cases import with_family

HEADINGS = ("control", "target", "prediction")
CELL, GAP = sample_sheets._CELL, sample_sheets._GAP


def plain(width: int, height: int, colour: str) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def bounds(grid: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the pixels of that very colour."""
    rows, columns = np.nonzero((np.asarray(grid) == colour).all(-1))
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


def test_images_stand_in_their_columns_with_their_own_aspect() -> None:
    rows = [
        Row((plain(400, 200, "red"), plain(100, 100, "lime"), plain(50, 200, "blue")), "first", "sizes"),
        Row((plain(10, 10, "yellow"), plain(640, 320, "cyan"), plain(224, 112, "magenta")), "second", "sizes"),
    ]
    grid = contact_sheet(HEADINGS, rows)
    assert grid.width == GAP + 3 * (CELL + GAP)
    left = [GAP + column * (CELL + GAP) for column in range(3)]
    top = bounds(grid, (255, 0, 0))[1]
    assert bounds(grid, (255, 0, 0)) == (left[0], top, 224, 112)
    assert bounds(grid, (0, 255, 0)) == (left[1], top, 224, 224)
    assert bounds(grid, (0, 0, 255)) == (left[2], top, 56, 224)
    second = bounds(grid, (255, 255, 0))[1]
    assert second > top + 224, "the caption stands between the rows"
    assert bounds(grid, (255, 255, 0)) == (left[0], second, 224, 224)
    assert bounds(grid, (0, 255, 255)) == (left[1], second, 224, 112)
    assert bounds(grid, (255, 0, 255)) == (left[2], second, 224, 112)
    assert grid.height > second + 224


def test_an_empty_cell_stays_white() -> None:
    row = Row((plain(10, 10, "red"), None, plain(10, 10, "lime")), "one control", "sizes")
    grid = contact_sheet(("control 1", "control 2", "target"), [row])
    left, top, _, height = bounds(grid, (255, 0, 0))
    cell = grid.crop((left + CELL + GAP, top, left + 2 * CELL + GAP, top + height))
    assert (np.asarray(cell) == 255).all()
    assert bounds(grid, (0, 255, 0))[0] == GAP + 2 * (CELL + GAP)


def test_headings_and_captions_are_drawn() -> None:
    row = Row((plain(64, 64, "red"),) * 3, "swap red and blue", "control 64x64, target 64x64")
    grid = np.asarray(contact_sheet(HEADINGS, [row]).convert("L"))
    top = bounds(contact_sheet(HEADINGS, [row]), (255, 0, 0))[1]
    dark = grid < 100
    for column in range(3):
        left = GAP + column * (CELL + GAP)
        assert dark[:top, left : left + CELL].any(), "a heading above each column"
    assert dark[top + CELL :].any()
    other = np.asarray(contact_sheet(HEADINGS, [Row(row.pictures, "make it brighter", row.note)]).convert("L"))
    assert not np.array_equal(grid, other)


def test_captions_in_any_script_are_in_the_files_metadata(tmp_path: Path) -> None:
    captions = ["swap red and blue", "交换红色和蓝色", "line\nbreak"]
    save_png(plain(8, 8, "red"), tmp_path / "a.png", captions)
    with Image.open(tmp_path / "a.png") as image:
        assert [image.text[f"caption-{number}"] for number in range(3)] == captions
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_what_a_font_cannot_draw_is_said_to_be_in_the_metadata() -> None:
    font = sample_sheets.ImageFont.load_default(14)
    assert sample_sheets._drawable("naïve café", font) == "naïve café"
    assert sample_sheets._drawable("交换", font).startswith("(no font here draws this caption")


@pytest.fixture(scope="module")
def config(small_run: Path, small_cache: Path) -> Config:
    return load_config(small_run, [f"cache.cache_dir={small_cache}", "logging.output_dir=/nowhere"])


@pytest.fixture(scope="module")
def encoded(config: Config) -> CachedData:
    return encode_all(*with_family(config), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def sampler(config: Config, encoded: CachedData) -> HeldOutSampler:
    base = config.model.pretrained_model_name_or_path
    transformer = QwenImageEdit(base).load_transformer(dtype=torch.float32, device="cpu")
    transformer.enable_gradient_checkpointing()
    return HeldOutSampler(*with_family(config), transformer.train(), encoded)


def test_a_grid_shows_every_held_out_size_and_leaves_the_training_alone(
    sampler: HeldOutSampler, encoded: CachedData, tmp_path: Path
) -> None:
    transformer = sampler.pipeline.transformer
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    sampler.write(tmp_path / "samples" / "step-00000003.png")
    assert transformer.training
    assert all(module.training for module in transformer.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in transformer.state_dict().items())
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    with Image.open(tmp_path / "samples" / "step-00000003.png") as grid:
        captions = list(grid.text.values())
        assert grid.width == GAP + 3 * (CELL + GAP)
    assert sorted(captions) == sorted(item.record.prompt for item in encoded.held_out)


def test_a_prediction_has_the_targets_size_and_is_always_the_same(sampler: HeldOutSampler) -> None:
    for item in sampler.items:
        image = sampler.predict(item)
        assert image.size == item.target_size
        torch.manual_seed(99)
        assert image.tobytes() == sampler.predict(item).tobytes()


def test_samples_are_made_with_the_average_on_request(config: Config, encoded: CachedData, tmp_path: Path) -> None:
    base = config.model.pretrained_model_name_or_path
    transformer = QwenImageEdit(base).load_transformer(dtype=torch.float32, device="cpu")
    optimizer = torch.optim.SGD([transformer.proj_out.weight], lr=1.0)
    ema = Ema(optimizer, 0.9)
    for step in range(3):
        noise = torch.randn(transformer.proj_out.weight.shape, generator=torch.Generator().manual_seed(step))
        transformer.proj_out.weight.grad = 0.1 * noise
        optimizer.step()
    asked = config.model_copy(update={"sample": config.sample.model_copy(update={"use_ema": True})})

    def grid(name: str, config: Config) -> bytes:
        HeldOutSampler(*with_family(config), transformer, encoded, ema).write(tmp_path / name)
        return (tmp_path / name).read_bytes()

    plain, averaged = grid("plain.png", config), grid("averaged.png", asked)
    with ema.averaged():
        assert grid("inside.png", config) == averaged
    assert grid("again.png", config) == plain != averaged


def test_a_rank_that_only_takes_part_writes_nothing(sampler: HeldOutSampler, tmp_path: Path) -> None:
    sampler.write(tmp_path / "samples" / "a.png", keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_row_shows_control_and_target_as_they_are(sampler: HeldOutSampler, config: Config, tmp_path: Path) -> None:
    item = sampler.items[-1]
    row = sampler._row(item)
    control, target, _ = row.pictures
    small = tmp_path / "small.png"
    target.resize((64, 32)).save(small)
    limits = image_limits(config)
    assert control.tobytes() == read_image(item.record.controls[0], limits).tobytes()
    assert target.tobytes() == read_image(item.record.target, limits).tobytes()
    assert row.caption == item.record.prompt
    sizes = f"control {control.width}x{control.height}, target {target.width}x{target.height}"
    assert row.note == f"{sizes}, trained and predicted at {item.target_size}"
    assert row.pictures[2].size == item.target_size != target.size
    like_the_file = sampler._row(replace(item, target_size=Size(64, 32), record=replace(item.record, target=small)))
    assert like_the_file.note == f"control {control.width}x{control.height}, target 64x32"


def test_a_grid_that_cannot_be_written_is_a_line_and_no_more(
    sampler: HeldOutSampler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples").write_text("a file where the folder should be")
    path = tmp_path / "samples" / "a.png"
    sampler.write(path)
    line = f"samples   {path} could not be written (File exists): the run continues without it\n"
    assert capsys.readouterr().out == line
