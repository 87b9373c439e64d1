"""Sample grids: their geometry, their captions, and that making one leaves the training as it was."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixres.config.schema import Config
from mixres.data.images import BadImageError, read_image
from mixres.preprocessing.fill import CachedData
from mixres.preprocessing.training_data import image_limits
from mixres.training import sample_sheets
from mixres.training.drift import Drift
from mixres.training.sample_sheets import HeldOutSampler, Row, image_grid
from support.family_cases import with_family
from support.jobs import LORA, Jobs, status
from support.steps import moved_average

CELL, GAP = sample_sheets._CELL, sample_sheets._GAP


def plain(width: int, height: int, colour: str) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def bounds(grid: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the pixels of that very colour."""
    rows, columns = np.nonzero((np.asarray(grid) == colour).all(-1))
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


def test_images_stand_in_their_columns_and_rows_with_their_own_aspect() -> None:
    """An empty cell stays white."""
    rows = [
        Row((plain(400, 200, "red"), plain(100, 100, "lime"), plain(50, 200, "blue")), "first", "sizes"),
        Row((None, plain(640, 320, "cyan"), plain(224, 112, "magenta")), "second", "sizes"),
    ]
    grid = image_grid(("control", "target", "prediction"), rows)
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255))
    (left, top, *size), *others = (bounds(grid, colour) for colour in colours)
    step, below = CELL + GAP, others[-1][1]
    assert size == [224, 112]
    assert others == [
        (left + step, top, 224, 224), (left + 2 * step, top, 56, 224),
        (left + step, below, 224, 112), (left + 2 * step, below, 224, 112),
    ]  # fmt: skip
    assert below > top + CELL, "the caption stands between the rows"
    assert (np.asarray(grid.crop((left, below, left + step, below + 112))) == 255).all()


def test_what_a_font_cannot_draw_is_said_to_be_in_the_metadata() -> None:
    """It is drawn in the first font that can: Pillow's own has no Chinese."""
    latin, every = [sample_sheets.ImageFont.load_default(14)], sample_sheets._fonts()
    assert sample_sheets._drawable("naïve café", latin) == ("naïve café", latin[0])
    assert sample_sheets._drawable("交换", latin)[0].startswith("(no font here draws this prompt")
    assert sample_sheets._drawable("交换", [*latin, *every]) == ("交换", every[0])


@pytest.fixture(scope="module")
def sampler(setup: Callable[..., Config], encoded: CachedData) -> HeldOutSampler:
    config, family = with_family(setup())
    transformer = family.load_transformer(dtype=torch.float32, device="cpu")
    transformer.enable_gradient_checkpointing()
    return HeldOutSampler(config, family, transformer.train(), encoded)


def images_of(sampler: HeldOutSampler) -> dict[int, Image.Image]:
    made = sampler.predictions(range(len(sampler.items)))
    assert made is not None
    return made


def test_a_grid_shows_every_held_out_size_and_leaves_the_training_alone(
    sampler: HeldOutSampler, encoded: CachedData, tmp_path: Path
) -> None:
    transformer = sampler.pipeline.transformer
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    assert sampler.predictions([0], lambda: True) is None, "a run that is to stop makes no image more"
    sampler.write(tmp_path / "samples" / "step-00000003.png", images_of(sampler))
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


def test_samples_are_made_with_the_average_on_request(setup: Callable[..., Config], encoded: CachedData) -> None:
    _, family = with_family(setup())
    transformer = family.load_transformer(dtype=torch.float32, device="cpu")
    ema = moved_average([transformer.proj_out.weight], 0.1)

    def grid(*words: str) -> bytes:
        made = images_of(HeldOutSampler(setup(*words), family, transformer, encoded, ema))
        return b"".join(image.tobytes() for image in made.values())

    plain, averaged = grid(), grid("train.ema_decay=0.9", "sample.use_ema=true")
    with ema.averaged():
        assert grid() == averaged
    assert grid() == plain != averaged


def test_a_row_shows_control_and_target_as_they_are(sampler: HeldOutSampler) -> None:
    item, limits = sampler.items[-1], image_limits(sampler.config)
    row = sampler._row(item, sampler.predict(item), Drift(3.0, 4.0, 1.0, -2.0))
    control, target, prediction = row.images
    assert control.tobytes() == read_image(item.record.controls[0], limits).tobytes()
    assert target.tobytes() == read_image(item.record.target, limits).tobytes()
    assert prediction.size == item.target_size != target.size
    drift = "shift 5.0 px, scale -2.0 %"
    sizes = f"control {control.width}x{control.height}, target {target.width}x{target.height}"
    assert row.caption == item.record.prompt
    assert row.note == f"{sizes}, trained and predicted at {item.target_size}; {drift}"


def test_a_grid_that_cannot_be_written_is_a_line_and_no_more(
    sampler: HeldOutSampler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples").write_text("a file where the folder should be")
    path = tmp_path / "samples" / "a.png"
    sampler.write(path, images_of(sampler))
    line = f"samples   {path} could not be written (File exists): the run continues without it\n"
    assert capsys.readouterr().out == line


def test_the_result_is_there_before_the_last_grid_whose_failure_is_a_line(
    jobs: Jobs, few_pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two grids fail, one for memory, one for a control that has changed; the trainings before and after it do not."""
    words = ("sample.every=2", "train.max_train_steps=4", f"data.held_out={few_pairs / 'held_out'}")
    clean = jobs.here("clean", *words, "sample.every=0")
    result, there = jobs.root / "failing" / LORA, list[bool]()

    def failing(*arguments: Any, **options: Any) -> list[Image.Image]:
        there.append(result.exists())
        if len(there) == 1:
            raise torch.OutOfMemoryError("no room\nfor more lines")
        raise BadImageError("changed")

    monkeypatch.setattr(sample_sheets, "make_images", failing)
    run = jobs.here("failing", *words)
    assert there == [False, True]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("samples")][:2] == [
        "samples   step 2: no grid (OutOfMemoryError: no room): the run continues without it",
        "samples   step 4: no grid (BadImageError: changed): the run continues without it",
    ]
    assert (status(run)["state"], status(run)["exit_code"]) == ("done", 0)
    assert result.read_bytes() == (clean / LORA).read_bytes()


@pytest.mark.parametrize("lora", [True, False])
def test_a_full_fine_tune_is_sampled_in_the_precision_of_its_file(
    setup: Callable[..., Config], encoded: CachedData, lora: bool
) -> None:
    """Its weights are float32 while it trains. Over a bfloat16 base nothing is cast beside what stock casts."""
    words = () if lora else ("model.lora=null",)
    config, family = with_family(setup("model.dtype=bfloat16", "train.mixed_precision=bf16", *words))
    transformer = family.load_transformer(dtype=torch.bfloat16 if lora else torch.float32, device="cpu")
    sampler, seen = HeldOutSampler(config, family, transformer, encoded), set()
    for block in transformer.transformer_blocks:
        block.attn.to_q.register_forward_hook(lambda layer, args, output: seen.add((output.dtype, under_autocast())))
    sampler.predict(sampler.items[0])
    assert seen == {(torch.bfloat16, not lora)}


def under_autocast() -> bool:
    return torch.is_autocast_enabled("cpu")
