"""The figures of the pages are what the scripts draw, and the numbers beside them what the code that trains gives."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from mixres.quickstart.data import PROMPTS
from mixres.training.sample_sheets import _fonts
from support.pages import DOCS, script

MIXED, POSITIONS, FIRST = script("mixed_batch_figures"), script("position_figures"), script("first_screen")
FIGURES = {
    "four_sizes": lambda: FIRST.figure().convert("RGB"),
    "mixed_batch": MIXED.layout_figure,
    "bucket_crops": MIXED.crop_figure,
    "frequencies": POSITIONS.frequencies_figure,
    "image_grids": POSITIONS.grids_figure,
    "text_offset": POSITIONS.text_figure,
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_its_script_draws(name: str) -> None:
    with Image.open(DOCS / "images" / f"{name}.png") as image:
        assert image.convert("RGB").tobytes() == FIGURES[name]().tobytes(), "run the scripts/*_figures.py"


def test_the_badges_state_what_the_package_asks_for() -> None:
    assert (DOCS / "images" / "badges.svg").read_text(encoding="utf-8") == FIRST.badges(), "run scripts/first_screen.py"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_quickstarts_sheet_shows_its_prompts_in_both_languages(prompt: str) -> None:
    """The letters of each prompt are dark in the image and their surroundings are not; grey edges may be rounded."""
    with Image.open(DOCS / "images" / "quickstart.png") as image:
        dark = np.asarray(image.convert("L"))[:, :320] < 128
    drawn = Image.new("L", (200, 24), 255)
    ImageDraw.Draw(drawn).text((0, 0), prompt, fill=0, font=_fonts()[0])
    expected = np.asarray(drawn.crop(ImageOps.invert(drawn).getbbox()))
    windows = np.lib.stride_tricks.sliding_window_view(dark, expected.shape)[:, :20]
    assert (windows[..., expected < 64].all(axis=-1) & ~windows[..., expected > 250].any(axis=-1)).any()


def test_sample_0_positions_spoil_the_others_and_the_patch_does_not(tiny_base: Path) -> None:
    errors = POSITIONS.measure(tiny_base)
    assert max(*errors.patched, *(values[0] for values in vars(errors).values())) < 1e-6
    assert all(0.05 < value < 0.20 for value in errors.text_of_sample_0[1:])
    assert all(0.25 < value < 0.40 for value in (*errors.image_of_sample_0[1:], *errors.stock[1:]))
