"""The family against the stock pipeline: the same tensors, the same velocity, the same picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from skimage import data

from mixres.batch import Batch, Sample
from mixres.data.collate import collate
from mixres.errors import UserError
from mixres.geometry import Grid, Size, control_size
from mixres.models import qwen_image_edit as family
from mixres.models.qwen_processor import load_processor

AREA = 128 * 128  # small enough for a CPU; the area itself is a parameter
PROMPT = "swap red and blue"
CASES = {  # control's size, target's size, control area
    "same_size": (Size(96, 96), Size(96, 96), AREA),
    "wide_control": (Size(200, 75), Size(64, 112), AREA),
    "tall_control": (Size(61, 190), Size(144, 80), AREA),
    "larger_area": (Size(320, 213), Size(112, 112), 256 * 256),
}


def photograph(size: Size) -> Image.Image:
    return Image.fromarray(data.astronaut()).resize(size, Image.Resampling.LANCZOS)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def encoders(tiny_base: Path, dtype: torch.dtype) -> QwenImageEditPipeline:
    return family.load_encoders(str(tiny_base), dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def stock(tiny_base: Path, dtype: torch.dtype) -> QwenImageEditPipeline:
    return load_stock(tiny_base, dtype)


def load_stock(base: Path, dtype: torch.dtype) -> QwenImageEditPipeline:
    """The whole pipeline by its own `from_pretrained`; only the processor is handed in, for want of torchvision."""
    pipeline = QwenImageEditPipeline.from_pretrained(base, processor=load_processor(base / "processor"), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _CapturedError(Exception):
    """Ends the stock pipeline once its transformer has been called."""


def transformer_arguments(pipeline: QwenImageEditPipeline, area: int, **call: Any) -> dict[str, Any]:
    """What the stock pipeline hands to its transformer at step 0."""
    captured: dict[str, Any] = {}

    def keep(_module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.update(kwargs)
        raise _CapturedError

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with family.control_area_set(area), pytest.raises(_CapturedError):
            pipeline(num_inference_steps=2, true_cfg_scale=1.0, generator=torch.Generator().manual_seed(0), **call)
    finally:
        handle.remove()
    return captured


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [PROMPT, "", "交换红色和蓝色", "a word {that} was never seen: zebra"])
def test_sample_equals_the_stock_transformer_arguments(
    encoders: QwenImageEditPipeline, stock: QwenImageEditPipeline, case: str, prompt: str
) -> None:
    control_pixels, target_pixels, area = CASES[case]
    control, target = photograph(control_pixels), photograph(Size(170, 90))
    sample = family.encode(
        encoders, name="a", target=target, target_size=target_pixels, controls=[control], prompt=prompt,
        control_area=area,
    )  # fmt: skip
    width, height = target_pixels
    seen = transformer_arguments(stock, area, image=control, prompt=prompt, width=width, height=height)

    assert seen["encoder_hidden_states_mask"] is None
    assert torch.equal(sample.prompt_embeds, seen["encoder_hidden_states"][0])
    assert [list(sample.img_shapes)] == seen["img_shapes"]
    target_tokens = sample.img_shapes[0].tokens
    assert sample.target_latents.shape[0] == target_tokens
    assert len(sample.control_latents) == 1
    assert torch.equal(sample.control_latents[0], seen["hidden_states"][0, target_tokens:])


@pytest.mark.parametrize("case", CASES)
def test_target_latents_equal_the_pipelines_own(
    encoders: QwenImageEditPipeline, stock: QwenImageEditPipeline, case: str
) -> None:
    _, size, area = CASES[case]
    target = photograph(Size(170, 90))
    sample = family.encode(
        encoders, name="a", target=target, target_size=size, controls=[target], prompt=PROMPT, control_area=area
    )
    pixels = stock.image_processor.preprocess(target, size.height, size.width).unsqueeze(2).to(stock.vae.dtype)
    with torch.no_grad():
        latents = stock._encode_vae_image(pixels, generator=None)
    packed = stock._pack_latents(latents, 1, 16, *latents.shape[3:])
    assert torch.equal(sample.target_latents, packed[0])
    assert sample.target_latents.dtype == stock.vae.dtype


def test_the_stock_area_is_the_pipelines_own(tiny_base: Path) -> None:
    """At 1024 x 1024 nothing is swapped, and the grid is what `calculate_dimensions` gives."""
    stock_function = pipeline_qwenimage_edit.calculate_dimensions
    with family.control_area_set(family.STOCK_CONTROL_AREA):
        assert pipeline_qwenimage_edit.calculate_dimensions is stock_function
    with family.control_area_set(AREA):
        for size in (Size(640, 427), Size(37, 211), Size(300, 300), Size(9000, 3)):
            assert pipeline_qwenimage_edit.calculate_dimensions(1, size.width / size.height)[:2] == control_size(
                size, area=AREA
            )
    assert pipeline_qwenimage_edit.calculate_dimensions is stock_function


def test_control_area_is_put_back_after_an_error() -> None:
    stock_function = pipeline_qwenimage_edit.calculate_dimensions
    with pytest.raises(ZeroDivisionError), family.control_area_set(AREA):
        raise ZeroDivisionError
    assert pipeline_qwenimage_edit.calculate_dimensions is stock_function


def test_encoders_are_frozen_and_alone(encoders: QwenImageEditPipeline) -> None:
    assert encoders.transformer is None
    for encoder in (encoders.vae, encoders.text_encoder):
        assert not encoder.training
        assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("size", [Size(96, 64), Size(100, 41)], ids=["whole_cells", "fractional_cells"])
def test_mask_is_the_area_mean_of_each_token(tiny_base: Path, size: Size) -> None:
    encoders = family.load_encoders(str(tiny_base), dtype=torch.float32, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (size.height, size.width), dtype=np.uint8)
    target_size = Size(96, 48)
    sample = family.encode(
        encoders, name="a", target=photograph(size), target_size=target_size, controls=[photograph(size)],
        prompt=PROMPT, mask=Image.fromarray(pixels), control_area=AREA,
    )  # fmt: skip
    rows, columns = target_size.height // 16, target_size.width // 16
    # Each pixel cut into rows x columns equal parts makes every cell a whole number of parts.
    fine = np.kron(pixels / 255, np.ones((rows, columns)))
    expected = fine.reshape(rows, size.height, columns, size.width).mean((1, 3)).flatten()
    assert sample.edit_mask is not None and sample.edit_mask.dtype == torch.float32
    np.testing.assert_allclose(sample.edit_mask.numpy(), expected, atol=1e-5)


def test_sample_is_unpadded_and_on_the_cpu(tiny_base: Path) -> None:
    encoders = family.load_encoders(str(tiny_base), dtype=torch.float32, device="cpu")
    image = photograph(Size(80, 80))
    sample = family.encode(
        encoders, name="a", target=image, target_size=Size(80, 80), controls=[image], prompt=PROMPT, control_area=AREA
    )
    assert sample.img_shapes == (Grid(1, 5, 5), Grid(1, 8, 8))
    assert sample.prompt_embeds.shape[0] < 32  # the template's 64 tokens are dropped, every word is one token
    assert sample.edit_mask is None
    for tensor in (sample.target_latents, sample.prompt_embeds, *sample.control_latents):
        assert tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.requires_grad


@pytest.mark.parametrize("count", [0, 2])
def test_other_than_one_control_is_refused_by_name(tiny_base: Path, count: int) -> None:
    encoders = family.load_encoders(str(tiny_base), dtype=torch.float32, device="cpu")
    image = photograph(Size(80, 80))
    with pytest.raises(UserError, match=rf"^pictures/b.png: .*exactly one control image, there are {count}$"):
        family.encode(
            encoders, name="pictures/b.png", target=image, target_size=Size(80, 80), controls=[image] * count,
            prompt=PROMPT,
        )  # fmt: skip


def test_a_vision_marker_in_a_prompt_is_refused_by_name(tiny_base: Path) -> None:
    encoders = family.load_encoders(str(tiny_base), dtype=torch.float32, device="cpu")
    image = photograph(Size(80, 80))
    with pytest.raises(UserError, match=r"^b.png: the prompt contains <\|image_pad\|>"):
        family.encode(
            encoders, name="b.png", target=image, target_size=Size(80, 80), controls=[image],
            prompt="put <|image_pad|> here",
        )  # fmt: skip


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampling(tiny_base: Path) -> QwenImageEditPipeline:
    transformer = family.load_transformer(str(tiny_base), dtype=torch.float32, device="cpu")
    return family.load_sampling_pipeline(str(tiny_base), transformer=transformer, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_sampling_from_cached_embeddings_is_the_stock_picture(
    tiny_base: Path, sampling: QwenImageEditPipeline, case: str
) -> None:
    control_pixels, size, area = CASES[case]
    control = photograph(control_pixels)
    encoders = family.load_encoders(str(tiny_base), dtype=torch.float32, device="cpu")
    sample = family.encode(
        encoders, name="a", target=control, target_size=size, controls=[control], prompt=PROMPT, control_area=area
    )
    image = family.sample_image(
        sampling, control=control, prompt_embeds=sample.prompt_embeds, size=size, steps=3, seed=7, control_area=area
    )
    stock = load_stock(tiny_base, torch.float32)
    with family.control_area_set(area):
        expected = stock(
            image=control, prompt=PROMPT, true_cfg_scale=1.0, width=size.width, height=size.height,
            num_inference_steps=3, generator=torch.Generator().manual_seed(7),
        ).images[0]  # fmt: skip
    assert image.size == tuple(size)
    assert largest_difference(image, expected) <= 1
    # The bound means something: another control, prompt or area is a picture farther away.
    call = {"control": control, "prompt_embeds": sample.prompt_embeds, "control_area": area}
    for change in (
        {"control": control.rotate(180)},
        {"prompt_embeds": -sample.prompt_embeds},
        {"control_area": 96 * 96},
    ):
        other = family.sample_image(sampling, **(call | change), size=size, steps=3, seed=7)
        assert largest_difference(other, expected) > 2, change.keys()


def largest_difference(image: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max())


def test_sampling_depends_on_seed_control_and_prompt(sampling: QwenImageEditPipeline) -> None:
    embeds = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    control = photograph(Size(64, 64))

    def picture(seed: int = 0, control: Image.Image = control, embeds: torch.Tensor = embeds) -> bytes:
        return family.sample_image(
            sampling, control=control, prompt_embeds=embeds, size=Size(64, 48), steps=2, seed=seed, control_area=AREA
        ).tobytes()

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
        family.sample_image(
            sampling, control=photograph(Size(64, 64)), prompt_embeds=torch.zeros(4, 64), size=Size(64, 64), steps=2,
            seed=0, control_area=AREA,
        )  # fmt: skip
        assert sampling.transformer.training is training
    handle.remove()
    assert modes == [False] * 4  # so that dropout is off
    after = sampling.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sampling_pipeline_has_no_text_encoder(sampling: QwenImageEditPipeline) -> None:
    assert sampling.text_encoder is None and sampling.tokenizer is None and sampling.processor is None


# --- the transformer ------------------------------------------------------------------------------------------------


def one_sample_batch(sample: Sample) -> Batch:
    return collate([sample], indices=(0,), weights=(1.0,), layout="padded")


def test_predicted_velocity_is_the_stock_call(encoders: QwenImageEditPipeline, stock: QwenImageEditPipeline) -> None:
    """At step 0 the stock pipeline's sigma is 1; the transformer here is the patched one."""
    control = photograph(Size(120, 72))
    sample = family.encode(
        encoders, name="a", target=control, target_size=Size(64, 48), controls=[control], prompt=PROMPT,
        control_area=AREA,
    )  # fmt: skip
    seen = transformer_arguments(stock, AREA, image=control, prompt=PROMPT, width=64, height=48)
    with torch.no_grad():
        expected = stock.transformer(**seen)[0]
    transformer = family.load_transformer(stock.config._name_or_path, dtype=stock.vae.dtype, device="cpu")
    noisy = seen["hidden_states"].float()
    with torch.no_grad():
        velocity = family.predict_velocity(transformer, one_sample_batch(sample), noisy, torch.ones(1))
    assert velocity.dtype == stock.vae.dtype
    assert (velocity - expected).norm() <= 1e-6 * expected.norm()


# --- configuration --------------------------------------------------------------------------------------------------


def test_sizes_and_shift_come_from_the_configuration(tiny_base: Path) -> None:
    assert family.pixels_per_token(str(tiny_base)) == 16
    shift = family.flow_shift(str(tiny_base))
    assert shift == {"base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    assert pipeline_qwenimage_edit.calculate_shift(256, **shift) == pytest.approx(0.5)


def test_shift_defaults_are_the_pipelines(copy_of_base: Path) -> None:
    (copy_of_base / "scheduler" / "scheduler_config.json").write_text("{}")
    shift = family.flow_shift(str(copy_of_base))
    for tokens in (64, 4096):
        assert pipeline_qwenimage_edit.calculate_shift(tokens, **shift) == pipeline_qwenimage_edit.calculate_shift(
            tokens
        )
