"""What is Qwen-Image-Edit's own: its control area, its refusals, masks; `test_every_family.py` holds the rest."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from skimage import data

from mixres.errors import UserError
from mixres.geometry import Grid, Size, control_size
from mixres.models.qwen.edit import QwenImageEdit, control_area_set
from mixres.models.qwen.family import STOCK_CONTROL_AREA

AREA = 128 * 128  # small enough for a CPU; the area itself is a parameter
PROMPT = "swap red and blue"


def photograph(size: Size) -> Image.Image:
    return Image.fromarray(data.astronaut()).resize(size, Image.Resampling.LANCZOS)


def test_the_stock_area_is_the_pipelines_own(tiny_base: Path) -> None:
    """At 1024 x 1024 nothing is swapped, and the grid is what `calculate_dimensions` gives."""
    stock_function = pipeline_qwenimage_edit.calculate_dimensions
    with control_area_set(STOCK_CONTROL_AREA):
        assert pipeline_qwenimage_edit.calculate_dimensions is stock_function
    with control_area_set(AREA):
        for size in (Size(640, 427), Size(37, 211), Size(300, 300), Size(9000, 3)):
            assert pipeline_qwenimage_edit.calculate_dimensions(1, size.width / size.height)[:2] == control_size(
                size, area=AREA
            )
    assert pipeline_qwenimage_edit.calculate_dimensions is stock_function


def test_control_area_is_put_back_after_an_error() -> None:
    stock_function = pipeline_qwenimage_edit.calculate_dimensions
    with pytest.raises(ZeroDivisionError), control_area_set(AREA):
        raise ZeroDivisionError
    assert pipeline_qwenimage_edit.calculate_dimensions is stock_function


@pytest.mark.parametrize("size", [Size(96, 64), Size(100, 41)], ids=["whole_cells", "fractional_cells"])
def test_mask_is_the_area_mean_of_each_token(tiny_base: Path, size: Size) -> None:
    encoders = QwenImageEdit(str(tiny_base)).load_encoders(dtype=torch.float32, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (size.height, size.width), dtype=np.uint8)
    target_size = Size(96, 48)
    sample = QwenImageEdit("").encode(
        encoders, name="a", target=photograph(size), target_size=target_size, controls=[photograph(size)],
        prompt=PROMPT, mask=Image.fromarray(pixels), areas={"control_area": AREA},
    )  # fmt: skip
    rows, columns = target_size.height // 16, target_size.width // 16
    # Each pixel cut into rows x columns equal parts makes every cell a whole number of parts.
    fine = np.kron(pixels / 255, np.ones((rows, columns)))
    expected = fine.reshape(rows, size.height, columns, size.width).mean((1, 3)).flatten()
    assert sample.edit_mask is not None and sample.edit_mask.dtype == torch.float32
    np.testing.assert_allclose(sample.edit_mask.numpy(), expected, atol=1e-5)


def test_sample_is_unpadded_and_on_the_cpu(tiny_base: Path) -> None:
    encoders = QwenImageEdit(str(tiny_base)).load_encoders(dtype=torch.float32, device="cpu")
    image = photograph(Size(80, 80))
    sample = QwenImageEdit("").encode(
        encoders,
        name="a",
        target=image,
        target_size=Size(80, 80),
        controls=[image],
        prompt=PROMPT,
        areas={"control_area": AREA},
    )
    assert sample.img_shapes == (Grid(1, 5, 5), Grid(1, 8, 8))
    assert sample.prompt_embeds.shape[0] < 32  # the template's 64 tokens are dropped, every word is one token
    assert sample.edit_mask is None
    for tensor in (sample.target_latents, sample.prompt_embeds, *sample.control_latents):
        assert tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.requires_grad


@pytest.mark.parametrize("count", [0, 2])
def test_other_than_one_control_is_refused_by_name(tiny_base: Path, count: int) -> None:
    encoders = QwenImageEdit(str(tiny_base)).load_encoders(dtype=torch.float32, device="cpu")
    image = photograph(Size(80, 80))
    with pytest.raises(
        UserError, match=rf"^pictures/b.png: .*exactly one control image, there are {count}; give it one$"
    ):
        QwenImageEdit("").encode(
            encoders, name="pictures/b.png", target=image, target_size=Size(80, 80), controls=[image] * count,
            prompt=PROMPT,
        )  # fmt: skip


def test_a_vision_marker_in_a_prompt_is_refused_by_name(tiny_base: Path) -> None:
    encoders = QwenImageEdit(str(tiny_base)).load_encoders(dtype=torch.float32, device="cpu")
    image = photograph(Size(80, 80))
    with pytest.raises(UserError, match=r"^b.png: the prompt contains <\|image_pad\|>"):
        QwenImageEdit("").encode(
            encoders, name="b.png", target=image, target_size=Size(80, 80), controls=[image],
            prompt="put <|image_pad|> here",
        )  # fmt: skip


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampling(tiny_base: Path) -> QwenImageEditPipeline:
    transformer = QwenImageEdit(str(tiny_base)).load_transformer(dtype=torch.float32, device="cpu")
    return QwenImageEdit(str(tiny_base)).load_sampling_pipeline(
        transformer=transformer, dtype=torch.float32, device="cpu"
    )


def test_sampling_depends_on_seed_control_and_prompt(sampling: QwenImageEditPipeline) -> None:
    embeds = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    control = photograph(Size(64, 64))

    def picture(seed: int = 0, control: Image.Image = control, embeds: torch.Tensor = embeds) -> bytes:
        return (
            QwenImageEdit("")
            .sample_image(
                sampling,
                controls=[control],
                prompt_embeds=embeds,
                size=Size(64, 48),
                steps=2,
                seed=seed,
                areas={"control_area": AREA},
            )
            .tobytes()
        )

    reference = picture()
    assert picture() == reference
    assert picture(seed=1) != reference
    assert picture(control=control.rotate(180)) != reference
    assert picture(embeds=-embeds) != reference


def test_sampling_evaluates_and_leaves_the_transformer_as_it_was(sampling: QwenImageEditPipeline) -> None:
    before = {name: value.clone() for name, value in sampling.transformer.state_dict().items()}
    modes: list[bool] = []
    handle = sampling.transformer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for training in (True, False):
        sampling.transformer.train(training)
        QwenImageEdit("").sample_image(
            sampling, controls=[photograph(Size(64, 64))], prompt_embeds=torch.zeros(4, 64), size=Size(64, 64), steps=2,
            seed=0, areas={"control_area": AREA},
        )  # fmt: skip
        assert sampling.transformer.training is training
    handle.remove()
    assert modes == [False] * 4  # so that dropout is off
    after = sampling.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- configuration --------------------------------------------------------------------------------------------------


def test_sizes_and_shift_come_from_the_configuration(tiny_base: Path) -> None:
    assert QwenImageEdit(str(tiny_base)).pixels_per_token() == 16
    shift = QwenImageEdit(str(tiny_base)).flow_shift()
    assert shift == {"base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    assert pipeline_qwenimage_edit.calculate_shift(256, **shift) == pytest.approx(0.5)


def test_shift_defaults_are_the_pipelines(copy_of_base: Path) -> None:
    (copy_of_base / "scheduler" / "scheduler_config.json").write_text("{}")
    shift = QwenImageEdit(str(copy_of_base)).flow_shift()
    for tokens in (64, 4096):
        assert pipeline_qwenimage_edit.calculate_shift(tokens, **shift) == pipeline_qwenimage_edit.calculate_shift(
            tokens
        )
