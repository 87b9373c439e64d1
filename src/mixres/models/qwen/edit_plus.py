"""The family Qwen-Image-Edit-Plus (2509, 2511): one to three control images a sample, each at its own aspect.

Promise: what `encode` returns is what the stock `QwenImageEditPlusPipeline` hands to its transformer for the same
pictures and words, bit for bit. A base with `zero_cond_t` (2511) needs nothing here: its transformer gives control
tokens the modulation of t = 0. Cost: VAE once a picture, Qwen2.5-VL once a sample; the stock loop in `sample_image`.

Legend: T text token, D text width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor

from mixres.batch import Sample
from mixres.errors import UserError
from mixres.geometry import Size, control_size
from mixres.models.qwen import family as shared, inputs as inputs
from mixres.models.qwen.family import (
    STOCK_CONTROL_AREA as STOCK_CONTROL_AREA,
    flow_shift as flow_shift,
    load_transformer as load_transformer,
    pixels_per_token as pixels_per_token,
    predict_velocity as predict_velocity,
    transformer_skeleton as transformer_skeleton,
    untrained_modules as untrained_modules,
)
from mixres.models.qwen.prompts import TOKENIZER_MAX_LENGTH

NAME = "qwen_image_edit_plus"  # as `model.family`, LoRA files and reports have it
CONTROLS = (1, 3)  # fewest and most control images of a sample; the model's authors name three as the most
STOCK_TEXT_AREA = 384 * 384  # pixels of a control for the text encoder
MAX_PROMPT_TOKENS = TOKENIZER_MAX_LENGTH  # the pipeline does not hold to it
_ENCODERS = ("vae", "text_encoder", "tokenizer", "processor")
_MULTIPLE_OF = 32
_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # how the pipeline names each picture

encoder_fingerprint = partial(shared.encoder_fingerprint, _ENCODERS)
load_preprocessors = partial(inputs.load_preprocessors, QwenImageEditPlusPipeline, _ENCODERS)
load_encoders = partial(shared.load_encoders, QwenImageEditPlusPipeline, _ENCODERS)
load_sampling_pipeline = partial(shared.load_sampling_pipeline, QwenImageEditPlusPipeline, _ENCODERS)


def control_areas(area: int | Literal["target"], text_area: int | None) -> dict[str, int | Literal["target"]]:
    """What `encode`, `encode_prompt` and `sample_image` are to be told of the controls' sizes, by keyword."""
    return {"control_area": area, "text_area": STOCK_TEXT_AREA if text_area is None else text_area}


def record_problem(*, controls: int, prompt: str) -> str | None:
    """Why this family cannot take an example with so many controls and this prompt; None where it can."""
    fewest, most = CONTROLS
    if not fewest <= controls <= most:
        return f"Qwen-Image-Edit-Plus takes {fewest} to {most} control images, there are {controls}; give it so many"
    return shared.prompt_problem(prompt)


def vae_sizes(
    controls: Sequence[Size], *, control_area: int = STOCK_CONTROL_AREA, text_area: int = STOCK_TEXT_AREA
) -> list[Size]:
    """The sizes that the VAE sees control images of these sizes at. Does not depend on `text_area`."""
    return [_size(size, control_area) for size in controls]


def text_tokens(
    pipeline: QwenImageEditPlusPipeline,
    *,
    prompt: str,
    controls: Sequence[Size],
    control_area: int = STOCK_CONTROL_AREA,
    text_area: int = STOCK_TEXT_AREA,
) -> int:
    """T of the embeddings of the prompt beside controls of these sizes; `load_preprocessors` gives the pipeline.

    Does not depend on `control_area`.
    """
    pictures = "".join(_PICTURE.format(number) for number in range(1, len(controls) + 1))
    return inputs.text_tokens(pipeline, pictures + prompt, [_size(size, text_area) for size in controls])


def vae_controls(
    pipeline: QwenImageEditPlusPipeline,
    controls: Sequence[Image.Image],
    *,
    control_area: int = STOCK_CONTROL_AREA,
    text_area: int = STOCK_TEXT_AREA,
) -> list[tuple[Image.Image, Size]]:
    """The controls as the VAE is handed them, which resizes each to the size beside it. As `vae_sizes`."""
    return [(control, _size(Size(*control.size), control_area)) for control in controls]


def text_controls(
    pipeline: QwenImageEditPlusPipeline,
    controls: Sequence[Image.Image],
    *,
    control_area: int = STOCK_CONTROL_AREA,
    text_area: int = STOCK_TEXT_AREA,
) -> list[Image.Image]:
    """The controls as the text encoder is handed them. Does not depend on `control_area`."""
    sizes = [_size(Size(*control.size), text_area) for control in controls]
    pairs = zip(controls, sizes, strict=True)
    return [pipeline.image_processor.resize(control, size.height, size.width) for control, size in pairs]


def encode(
    pipeline: QwenImageEditPlusPipeline,
    *,
    name: str,
    target: Image.Image,
    target_size: Size,
    controls: Sequence[Image.Image],
    prompt: str,
    mask: Image.Image | None = None,
    control_area: int = STOCK_CONTROL_AREA,
    text_area: int = STOCK_TEXT_AREA,
) -> Sample:
    """One training example from RGB pictures of any size, on the CPU and in the encoders' dtype.

    The target is resized to `target_size` pixels; each control at its own aspect to `control_area` pixels for the VAE
    and to `text_area` for the text encoder. `mask` is as large as the target.

    Raises:
        UserError: too few or too many controls, or a prompt with the text encoder's own image markers in it.
    """
    if problem := record_problem(controls=len(controls), prompt=prompt):
        raise UserError(f"{name}: {problem}")
    return shared.assembled(
        pipeline,
        name=name,
        target=target,
        target_size=target_size,
        controls=vae_controls(pipeline, controls, control_area=control_area),
        prompt_embeds=encode_prompt(pipeline, controls=controls, prompt=prompt, text_area=text_area),
        mask=mask,
    )


def encode_prompt(
    pipeline: QwenImageEditPlusPipeline,
    *,
    controls: Sequence[Image.Image],
    prompt: str,
    control_area: int = STOCK_CONTROL_AREA,
    text_area: int = STOCK_TEXT_AREA,
) -> Tensor:
    """`(T, D)` on the CPU: the prompt as the text encoder reads it behind "Picture 1: ...", "Picture 2: ..." and so on.

    Does not depend on `control_area`.
    """
    pictures = text_controls(pipeline, controls, text_area=text_area)
    return shared.prompt_embeds(pipeline, prompt, image=pictures)


def _size(control: Size, area: int) -> Size:
    return control_size(control, area=area, multiple_of=_MULTIPLE_OF)


def sample_image(
    pipeline: QwenImageEditPlusPipeline,
    *,
    controls: Sequence[Image.Image],
    prompt_embeds: Tensor,
    size: Size,
    steps: int,
    seed: int,
    negative_embeds: Tensor | None = None,
    guidance: float = 1.0,
    control_area: int = STOCK_CONTROL_AREA,
    text_area: int = STOCK_TEXT_AREA,
) -> Image.Image:
    """One picture of `size` pixels, see `denoise`; the embeddings `(T, D)` are of these very controls."""
    with control_areas_set(control_area=control_area, text_area=text_area):
        return shared.denoise(
            pipeline,
            prompt_embeds=prompt_embeds,
            size=size,
            steps=steps,
            seed=seed,
            negative_embeds=negative_embeds,
            guidance=guidance,
            image=list(controls),
        )


@contextmanager
def control_areas_set(*, control_area: int, text_area: int) -> Iterator[None]:
    """Within it every stock Edit-Plus pipeline resizes its controls to these areas, no side under 32 pixels."""
    module = pipeline_qwenimage_edit_plus
    names = ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE", "calculate_dimensions")
    before = {name: getattr(module, name) for name in names}

    def calculate_dimensions(target_area: int, ratio: float) -> tuple[int, int]:
        width, height = before["calculate_dimensions"](target_area, ratio)
        return max(width, _MULTIPLE_OF), max(height, _MULTIPLE_OF)

    try:
        for name, value in zip(names, (control_area, text_area, calculate_dimensions), strict=True):
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
