"""The family Qwen-Image: text to image, no control images.

Promise: what `encode` returns is what the stock `QwenImagePipeline` hands to its transformer for the same words, bit
for bit; no prompt of up to `MAX_PROMPT_TOKENS` is cut. Cost: VAE and Qwen2.5-VL once a sample in `encode`; the stock
loop in `sample_image`.

Legend: T text token, D text width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from diffusers import QwenImagePipeline
from PIL import Image
from torch import Tensor

from mixres.batch import Sample
from mixres.errors import UserError
from mixres.geometry import Size
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

NAME = "qwen_image"  # as `model.family`, LoRA files and reports have it
CONTROLS = (0, 0)  # fewest and most control images of a sample
# The pipeline cuts what is over; its call cuts at 512 unless `max_sequence_length` says more. The five tokens of the
# template behind the prompt count too.
_MAX_TEXT_TOKENS = TOKENIZER_MAX_LENGTH
MAX_PROMPT_TOKENS = _MAX_TEXT_TOKENS - 5
_ENCODERS = ("vae", "text_encoder", "tokenizer")

encoder_fingerprint = partial(shared.encoder_fingerprint, _ENCODERS)
load_preprocessors = partial(inputs.load_preprocessors, QwenImagePipeline, _ENCODERS)
load_encoders = partial(shared.load_encoders, QwenImagePipeline, _ENCODERS)
load_sampling_pipeline = partial(shared.load_sampling_pipeline, QwenImagePipeline, _ENCODERS)


def control_areas(area: int | Literal["target"], text_area: int | None) -> dict[str, int | Literal["target"]]:
    """What `encode`, `encode_prompt` and `sample_image` are to be told of the controls' sizes: nothing.

    Raises:
        UserError: a size of controls is given.
    """
    given = {"area": area != STOCK_CONTROL_AREA, "text_area": text_area is not None}
    problems = [
        f"data.resize.control.{name}: Qwen-Image takes no control images: leave it out"
        for name, is_given in given.items()
        if is_given
    ]
    if problems:
        raise UserError(problems)
    return {}


def record_problem(*, controls: int, prompt: str) -> str | None:
    """Why this family cannot take an example with so many controls and this prompt; None where it can."""
    if controls:
        return f"Qwen-Image takes no control images, there are {controls}: train an edit model, or take them out"
    return shared.prompt_problem(prompt)


def vae_sizes(controls: Sequence[Size]) -> list[Size]:
    """The sizes that the VAE sees control images of these sizes at. There are none."""
    assert not controls
    return []


def text_tokens(pipeline: QwenImagePipeline, *, prompt: str, controls: Sequence[Size]) -> int:
    """T of the prompt's embeddings; `pipeline` may be that of `load_preprocessors`."""
    return inputs.text_tokens(pipeline, prompt, vae_sizes(controls))


def vae_controls(pipeline: QwenImagePipeline, controls: Sequence[Image.Image]) -> list[tuple[Image.Image, Size]]:
    """Control images for the VAE, each with the size it is seen at. There are none."""
    assert not controls
    return []


def text_controls(pipeline: QwenImagePipeline, controls: Sequence[Image.Image]) -> list[Image.Image]:
    """Control images for the text encoder. There are none."""
    assert not controls
    return []


def encode(
    pipeline: QwenImagePipeline,
    *,
    name: str,
    target: Image.Image,
    target_size: Size,
    controls: Sequence[Image.Image],
    prompt: str,
    mask: Image.Image | None = None,
) -> Sample:
    """One training example from an RGB picture of any size, on the CPU and in the encoders' dtype.

    The target is resized to `target_size` pixels. `mask` is as large as the target.

    Raises:
        UserError: there are controls, or the prompt has the text encoder's own image markers in it.
    """
    if problem := record_problem(controls=len(controls), prompt=prompt):
        raise UserError(f"{name}: {problem}")
    return shared.assembled(
        pipeline,
        name=name,
        target=target,
        target_size=target_size,
        controls=(),
        prompt_embeds=encode_prompt(pipeline, controls=controls, prompt=prompt),
        mask=mask,
    )


def encode_prompt(pipeline: QwenImagePipeline, *, controls: Sequence[Image.Image], prompt: str) -> Tensor:
    """`(T, D)` on the CPU: the prompt as the text encoder reads it. There are no controls."""
    assert not controls
    return shared.prompt_embeds(pipeline, prompt, max_sequence_length=_MAX_TEXT_TOKENS)


def sample_image(
    pipeline: QwenImagePipeline,
    *,
    controls: Sequence[Image.Image],
    prompt_embeds: Tensor,
    size: Size,
    steps: int,
    seed: int,
    negative_embeds: Tensor | None = None,
    guidance: float = 1.0,
) -> Image.Image:
    """One picture of `size` pixels, see `denoise`; there are no controls, `prompt_embeds` are `(T, D)`."""
    assert not controls
    return shared.denoise(
        pipeline,
        prompt_embeds=prompt_embeds,
        size=size,
        steps=steps,
        seed=seed,
        negative_embeds=negative_embeds,
        guidance=guidance,
        max_sequence_length=_MAX_TEXT_TOKENS,
    )
