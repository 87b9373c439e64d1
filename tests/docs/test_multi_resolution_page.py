"""What docs/multi_resolution.md states is what the code that trains does."""

import re
from types import ModuleType

import pytest
from PIL import Image

from mixres.geometry import Size
from mixres.inspection.buckets import bucket_shapes
from mixres.verification.batch_diagram import padded_segments, runs
from support.pages import DOCS, script

PAGE = (DOCS / "multi_resolution.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return script("mixed_batch_figures")


def test_the_table_of_crops(figures: ModuleType) -> None:
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \d+x\d+ \|", line)]
    assert rows == figures.crop_table()
    lost = [figures.bucket_crop(source).lost for source in figures.PICTURES]
    assert f"{min(lost):.0f} to {max(lost):.1%} of their area".replace("%", " per cent") in PAGE.replace("\n", " ")


def test_a_bucket_crop_worked_by_hand(figures: ModuleType) -> None:
    """4000x3000 scaled to cover 1152x896 is 1194.7 x 896 pixels; 1152 of the width stay."""
    crop = figures.bucket_crop(Size(4000, 3000))
    assert crop.bucket == Size(1152, 896)
    assert crop.lost == pytest.approx(1 - 1152 / (4000 * 896 / 3000))
    assert figures.bucket_crop(Size(1000, 1000)).lost == pytest.approx(0, abs=1e-12)
    for bucket in bucket_shapes(figures.AREA):
        assert bucket.width % 64 == bucket.height % 64 == 0 and bucket.width * bucket.height <= 1024 * 1024


def test_the_numbers_of_the_batch(figures: ModuleType) -> None:
    numbers, text = figures.numbers(), " ".join(PAGE.split())
    assert f"each as long as the longest, {numbers['row']} tokens" in text
    assert f"computes {numbers['padded']} tokens, of which {numbers['valid']} are valid: {numbers['filler']} is" in text
    assert f"It computes the {numbers['valid']} valid tokens" in text
    assert f"fall into {numbers['buckets']} buckets" in text


def test_layout_and_mask_are_those_of_the_batch(figures: ModuleType) -> None:
    padded, packed = figures.batch_in("padded"), figures.batch_in("packed")
    mask = figures.mask_of(padded)
    assert packed.tokens_computed == packed.tokens == padded.tokens
    for b in range(len(padded.names)):
        valid = sum(tokens for what, tokens in padded_segments(padded, b) if what != "filler")
        assert int(mask[b].sum()) == valid
        assert sum(tokens for what, tokens in runs(mask[b].tolist()) if what == "attended key") == valid


def test_the_pictures_are_what_the_script_draws(figures: ModuleType) -> None:
    for name, draw in {"mixed_batch": figures.layout_figure, "bucket_crops": figures.crop_figure}.items():
        with Image.open(DOCS / "images" / f"{name}.png") as picture:
            assert picture.convert("RGB").tobytes() == draw().tobytes(), "run scripts/mixed_batch_figures.py"
