"""What is Qwen-Image-Edit-Plus's own: two areas, one to three controls; `test_every_family.py` holds the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image

from mixres.errors import UserError
from mixres.geometry import Size, control_size
from mixres.models.qwen.edit_plus import QwenImageEditPlus, control_areas_set
from support.family_cases import CASES

SIZES = (Size(640, 427), Size(37, 211), Size(300, 300), Size(8000, 1000))


def test_the_stock_areas_are_the_pipelines_own() -> None:
    areas = QwenImageEditPlus("").control_areas(1024 * 1024, None)
    assert areas == {"control_area": stock.VAE_IMAGE_SIZE, "text_area": stock.CONDITION_IMAGE_SIZE}
    for area in areas.values():
        for size in SIZES:
            assert stock.calculate_dimensions(area, size.width / size.height) == control_size(size, area=area)


def test_areas_are_the_pipelines_for_a_while_and_no_side_is_zero() -> None:
    def constants() -> tuple[object, ...]:
        return stock.VAE_IMAGE_SIZE, stock.CONDITION_IMAGE_SIZE, stock.calculate_dimensions

    before = constants()
    with control_areas_set(control_area=4096, text_area=2048):
        assert constants()[:2] == (4096, 2048)
        for size in (*SIZES, Size(9000, 3)):
            assert stock.calculate_dimensions(4096, size.width / size.height) == control_size(size, area=4096)
    assert constants() == before
    with pytest.raises(ZeroDivisionError), control_areas_set(control_area=4096, text_area=2048):
        raise ZeroDivisionError
    assert constants() == before


@pytest.mark.parametrize(
    ("controls", "prompt", "reason"),
    [
        (0, "x", "takes 1 to 3 control images, there are 0; give it so many"),
        (4, "x", "takes 1 to 3 control images, there are 4; give it so many"),
        (2, "put <|image_pad|> here", "the prompt contains <|image_pad|>"),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(
    base_of: Callable[[Any], Path], controls: int, prompt: str, reason: str
) -> None:
    base = base_of(CASES["qwen_image_edit_plus"])
    encoders = QwenImageEditPlus(str(base)).load_encoders(dtype=torch.float32, device="cpu")
    image = Image.new("RGB", (64, 64))
    with pytest.raises(UserError) as caught:
        QwenImageEditPlus("").encode(
            encoders, name="b.png", target=image, target_size=Size(64, 64), controls=[image] * controls, prompt=prompt
        )
    assert caught.value.messages[0].startswith("b.png: ")
    assert reason in caught.value.messages[0]
