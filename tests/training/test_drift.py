"""The drift of a made image: known shifts and scales of photographs are found, edits are none, no drift is made up."""

import subprocess
import sys
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st
from PIL import Image

from mixres.quickstart.data import HELD_OUT_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, swap_red_and_blue
from mixres.training import drift
from mixres.training.drift import Drift, measure_drift

MAX_SHIFT, MAX_SCALE = 0.25, 0.2  # px and %: what the meter promises
PHOTOGRAPHS = {photograph.name: photograph.read() for photograph in (*TRAIN_PHOTOGRAPHS, *HELD_OUT_PHOTOGRAPHS)}
Edit = Callable[[Image.Image], Image.Image]


def view(name: str, size: tuple[int, int], shown: Drift, factor: int = 1) -> Image.Image:
    """The middle of a photograph, enlarged by `factor`, as an image in which its content has drifted by `shown`."""
    photograph = PHOTOGRAPHS[name]
    photograph = photograph.resize((photograph.width * factor, photograph.height * factor), Image.Resampling.BICUBIC)
    # A fifth and more is left around it, for what a shift and a stretch show of it.
    zoom = 0.8 * min(photograph.width / size[0], photograph.height / size[1])
    box = []
    for side, full, shift, scale in zip(size, photograph.size, shown[:2], shown[2:], strict=True):
        length, middle = side * zoom / (1 + scale / 100), full / 2 - shift * zoom / (1 + scale / 100)
        box.append((middle - length / 2, middle + length / 2))
    (left, right), (top, bottom) = box
    return photograph.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def assert_found(found: Drift | None, shown: Drift) -> None:
    assert found is not None
    assert found[:2] == pytest.approx(shown[:2], abs=MAX_SHIFT)
    assert found[2:] == pytest.approx(shown[2:], abs=MAX_SCALE)


def recoloured(matrix: list[list[float]]) -> Edit:
    return lambda image: Image.fromarray(np.clip(np.asarray(image, float) @ np.array(matrix), 0, 255).astype(np.uint8))


def swapped(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(swap_red_and_blue(np.asarray(image))))


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 12, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def replaced(image: Image.Image, left: float = 0.25) -> Image.Image:
    """A quarter of its area shows something else."""
    other = PHOTOGRAPHS["hubble_deep_field"].crop((0, 0, 200, 200)).resize((image.width // 2, image.height // 2))
    image.paste(other, (int(left * image.width), int(left * image.height)))
    return image


def jpeg(image: Image.Image) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


SEPIA = recoloured([[0.393, 0.349, 0.272], [0.769, 0.686, 0.534], [0.189, 0.168, 0.131]])
EDITS: dict[str, Edit] = {
    "none": lambda image: image,
    "sepia": SEPIA,
    "gray": lambda image: image.convert("L").convert("RGB"),
    "red and blue swapped": swapped,
    "inverted": lambda image: Image.eval(image, lambda value: 255 - value),
    "brighter": lambda image: Image.eval(image, lambda value: min(255, int(value * 1.3 + 20))),
    "noise": noisy,
    "JPEG": jpeg,
    "middle replaced": replaced,
    "corner replaced": lambda image: replaced(image, left=0),
    "replaced, sepia and noise": lambda image: noisy(SEPIA(replaced(image))),
}
STRIPES = Image.fromarray(np.repeat(np.random.default_rng(1).integers(0, 255, (32, 1, 3), np.uint8), 4, 0)).resize(
    (160, 128)
)


@pytest.mark.parametrize("examples", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_a_known_drift_is_found_under_every_edit(examples: int) -> None:
    @settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        size = data.draw(st.tuples(*[st.integers(96, 250)] * 2), "size")
        name, edit = data.draw(st.sampled_from(sorted(PHOTOGRAPHS))), data.draw(st.sampled_from(sorted(EDITS)))
        x, y = (data.draw(st.sampled_from([0.0, 1.0])) * data.draw(st.floats(-0.08, 0.08)) * side for side in size)
        stretch, both = data.draw(st.floats(-10, 10)), data.draw(st.floats(-2, 2))
        scales = data.draw(st.sampled_from([(0.0, 0.0), (stretch, 0.0), (0.0, stretch), (both, both)]))
        shown = Drift(x, y, *scales)
        assert_found(measure_drift(EDITS[edit](view(name, size, shown)), view(name, size, Drift(0, 0, 0, 0))), shown)

    check()


def test_colours_under_transparency_are_no_content() -> None:
    size = (160, 128)
    made, reference = (view("china", size, Drift(x, 0, 0, 0)) for x in (9.0, 0.0))
    hidden = Image.new("L", size, 255)
    hidden.paste(0, (0, 0, 160, 40))
    laid = [Image.composite(image, Image.new("RGB", size, "white"), hidden) for image in (made, reference)]
    for image, other in ((made, "chelsea"), (reference, "astronaut")):
        image.paste(view(other, size, Drift(0, 0, 0, 0)), (0, 0), Image.eval(hidden, lambda value: 255 - value))
        image.putalpha(hidden)
    assert measure_drift(made, reference) == measure_drift(*laid)


def test_the_scale_of_large_images_is_found_and_their_shift_is_in_their_own_pixels() -> None:
    shown = Drift(37.3, -20.0, 3.1, 0.0)
    made, reference = (view("china", (2048, 1360), each, factor=4) for each in (shown, Drift(0, 0, 0, 0)))
    assert_found(measure_drift(made, reference), shown)


def test_the_reference_is_stretched_over_the_made_image_and_nothing_is_cropped() -> None:
    reference = PHOTOGRAPHS["chelsea"]
    made = reference.resize((160, 128), Image.Resampling.LANCZOS)
    assert_found(measure_drift(made, reference), Drift(0, 0, 0, 0))


@pytest.mark.parametrize("rows", [8, 16])
def test_a_control_that_is_one_row_of_tokens_larger_is_seen(rows: int) -> None:
    """The model copies it token by token: the image shows all but the last row, at the larger size."""
    size = (160, 192)
    squeezed = PHOTOGRAPHS["coffee"].resize((size[0], size[1] + rows), Image.Resampling.LANCZOS)
    expected = Drift(0, rows / 2, 0, 100 * rows / size[1])
    assert_found(measure_drift(squeezed.crop((0, 0, *size)), PHOTOGRAPHS["coffee"]), expected)


def test_shift_and_scale_in_one_number_each() -> None:
    assert Drift(3, -4, 1, -2).shift_px == 5
    assert Drift(3, -4, 1, -2).scale_pct == -2


def test_the_same_images_give_the_same_numbers() -> None:
    made, reference = view("rocket", (128, 160), Drift(2, 1, 0, 3)), view("rocket", (128, 160), Drift(0, 0, 0, 0))
    assert measure_drift(made, reference) == measure_drift(made, reference) is not None


@pytest.mark.parametrize(
    ("made", "reference"),
    [
        pytest.param(Image.new("RGB", (128, 128), "gray"), PHOTOGRAPHS["coffee"], id="flat"),
        pytest.param(PHOTOGRAPHS["coffee"], Image.new("RGB", (128, 128)), id="flat reference"),
        pytest.param(Image.linear_gradient("L"), Image.linear_gradient("L"), id="a gradient"),
        pytest.param(noisy(STRIPES), STRIPES, id="stripes"),
        pytest.param(PHOTOGRAPHS["coffee"].resize((200, 40)), PHOTOGRAPHS["coffee"], id="too small"),
        pytest.param(PHOTOGRAPHS["coffee"].resize((160, 128)), PHOTOGRAPHS["china"], id="another photograph"),
        pytest.param(noisy(Image.new("RGB", (160, 128), "gray")), PHOTOGRAPHS["china"], id="noise"),
    ],
)
def test_what_cannot_be_measured_has_no_drift(made: Image.Image, reference: Image.Image) -> None:
    assert measure_drift(made, reference) is None


@pytest.mark.slow
def test_no_two_photographs_have_a_drift() -> None:
    names = sorted(PHOTOGRAPHS)
    for made, reference in zip(names, [*names[1:], names[0]], strict=True):
        assert measure_drift(PHOTOGRAPHS[made].resize((160, 128)), PHOTOGRAPHS[reference]) is None, (made, reference)


def test_without_the_library_there_is_no_drift_and_one_line_to_say_so() -> None:
    """A process of its own: an import that fails stays failed."""
    code = (
        "import sys; sys.modules['skimage'] = None\n"
        "from PIL import Image\n"
        "from mixres.training.drift import NOT_INSTALLED, is_installed, measure_drift\n"
        "image = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50)\n"
        "assert not is_installed() and measure_drift(image, image) is None\n"
        "print(NOT_INSTALLED)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [drift.NOT_INSTALLED]
    assert "pip install 'mixres[demo]'" in drift.NOT_INSTALLED
