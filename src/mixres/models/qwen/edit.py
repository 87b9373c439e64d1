"""The family Qwen-Image-Edit: one control image a sample, seen by VAE and text encoder at one size.

Promise: what `encode` returns is what the stock `QwenImageEditPipeline` hands to its transformer for the same pictures
and words, bit for bit. Cost: VAE and Qwen2.5-VL once a sample in `encode`; the stock denoising loop in `sample_image`.

Legend: T text token, D text width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
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

NAME = "qwen_image_edit"  # as `model.family`, LoRA files and reports have it
CONTROLS = (1, 1)  # fewest and most control images of a sample
MAX_PROMPT_TOKENS = TOKENIZER_MAX_LENGTH  # the pipeline does not hold to it
_ENCODERS = ("vae", "text_encoder", "tokenizer", "processor")
_MULTIPLE_OF = 32

encoder_fingerprint = partial(shared.encoder_fingerprint, _ENCODERS)
load_preprocessors = partial(inputs.load_preprocessors, QwenImageEditPipeline, _ENCODERS)
load_encoders = partial(shared.load_encoders, QwenImageEditPipeline, _ENCODERS)
load_sampling_pipeline = partial(shared.load_sampling_pipeline, QwenImageEditPipeline, _ENCODERS)


def control_areas(area: int | Literal["target"], text_area: int | None) -> dict[str, int | Literal["target"]]:
    """What `encode`, `encode_prompt` and `sample_image` are to be told of the controls' sizes, by keyword.

    Raises:
        UserError: `text_area` is given.
    """
    if text_area is not None:
        raise UserError(
            "data.resize.control.text_area: Qwen-Image-Edit shows VAE and text encoder the same picture: leave it out, "
            "data.resize.control.area is for both"
        )
    return {"control_area": area}


def record_problem(*, controls: int, prompt: str) -> str | None:
    """Why this family cannot take an example with so many controls and this prompt; None where it can."""
    if controls != 1:
        return f"Qwen-Image-Edit takes exactly one control image, there are {controls}; give it one"
    return shared.prompt_problem(prompt)


def vae_sizes(controls: Sequence[Size], *, control_area: int = STOCK_CONTROL_AREA) -> list[Size]:
    """The sizes that VAE and text encoder see control images of these sizes at."""
    return [control_size(size, area=control_area, multiple_of=_MULTIPLE_OF) for size in controls]


def text_tokens(
    pipeline: QwenImageEditPipeline, *, prompt: str, controls: Sequence[Size], control_area: int = STOCK_CONTROL_AREA
) -> int:
    """T of the embeddings of the prompt beside controls of these sizes; `load_preprocessors` gives the pipeline."""
    return inputs.text_tokens(pipeline, prompt, vae_sizes(controls, control_area=control_area))


def vae_controls(
    pipeline: QwenImageEditPipeline, controls: Sequence[Image.Image], *, control_area: int = STOCK_CONTROL_AREA
) -> list[tuple[Image.Image, Size]]:
    """The control as the VAE is handed it, with its size."""
    sizes = vae_sizes([Size(*control.size) for control in controls], control_area=control_area)
    pairs = zip(controls, sizes, strict=True)
    return [(pipeline.image_processor.resize(control, size.height, size.width), size) for control, size in pairs]


def text_controls(
    pipeline: QwenImageEditPipeline, controls: Sequence[Image.Image], *, control_area: int = STOCK_CONTROL_AREA
) -> list[Image.Image]:
    """The control as the text encoder is handed it: the VAE's."""
    return [control for control, _ in vae_controls(pipeline, controls, control_area=control_area)]


def encode(
    pipeline: QwenImageEditPipeline,
    *,
    name: str,
    target: Image.Image,
    target_size: Size,
    controls: Sequence[Image.Image],
    prompt: str,
    mask: Image.Image | None = None,
    control_area: int = STOCK_CONTROL_AREA,
) -> Sample:
    """One training example from RGB pictures of any size, on the CPU and in the encoders' dtype.

    The target is resized to `target_size` pixels; the control to `control_area` pixels at its own aspect. `mask` is as
    large as the target.

    Raises:
        UserError: not exactly one control, or a prompt with the text encoder's own image markers in it.
    """
    if problem := record_problem(controls=len(controls), prompt=prompt):
        raise UserError(f"{name}: {problem}")
    return shared.assembled(
        pipeline,
        name=name,
        target=target,
        target_size=target_size,
        controls=vae_controls(pipeline, controls, control_area=control_area),
        prompt_embeds=encode_prompt(pipeline, controls=controls, prompt=prompt, control_area=control_area),
        mask=mask,
    )


def encode_prompt(
    pipeline: QwenImageEditPipeline,
    *,
    controls: Sequence[Image.Image],
    prompt: str,
    control_area: int = STOCK_CONTROL_AREA,
) -> Tensor:
    """`(T, D)` on the CPU: the prompt as the text encoder reads it beside this control."""
    (control,) = text_controls(pipeline, controls, control_area=control_area)
    return shared.prompt_embeds(pipeline, prompt, image=control)


def sample_image(
    pipeline: QwenImageEditPipeline,
    *,
    controls: Sequence[Image.Image],
    prompt_embeds: Tensor,
    size: Size,
    steps: int,
    seed: int,
    negative_embeds: Tensor | None = None,
    guidance: float = 1.0,
    control_area: int = STOCK_CONTROL_AREA,
) -> Image.Image:
    """One picture of `size` pixels, see `denoise`; the embeddings `(T, D)` are of this very control."""
    (control,) = controls
    with control_area_set(control_area):
        return shared.denoise(
            pipeline,
            prompt_embeds=prompt_embeds,
            size=size,
            steps=steps,
            seed=seed,
            negative_embeds=negative_embeds,
            guidance=guidance,
            image=control,
        )


@contextmanager
def control_area_set(area: int) -> Iterator[None]:
    """Within it every stock Qwen-Image-Edit pipeline resizes its control to `area` pixels instead of 1024 x 1024."""
    stock = pipeline_qwenimage_edit.calculate_dimensions

    def calculate_dimensions(target_area: int, ratio: float) -> tuple[int, int, Any]:
        width, height, rest = stock(area, ratio)
        return max(width, _MULTIPLE_OF), max(height, _MULTIPLE_OF), rest

    if area != STOCK_CONTROL_AREA:
        pipeline_qwenimage_edit.calculate_dimensions = calculate_dimensions
    try:
        yield
    finally:
        pipeline_qwenimage_edit.calculate_dimensions = stock
