"""The family Qwen-Image-Edit: load, encode, predict a velocity, sample. One control image a sample.

Promise: what `encode` returns is what the stock `QwenImageEditPipeline` hands to its transformer for the same pictures
and words, bit for bit, because the pipeline's own methods make it. Cost: VAE and Qwen2.5-VL once a sample in `encode`;
the stock denoising loop in `sample_image`.

Legend: B sample, S image token, T text token, P packed channel, D text width.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from mixres.batch import Batch, Sample
from mixres.errors import UserError
from mixres.geometry import PATCH, Size, control_size, pack_latents, token_grid
from mixres.models import pretrained
from mixres.models.edit_mask import mask_on_grid
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from mixres.models.qwen_processor import load_processor, torchvision_imports

STOCK_CONTROL_AREA = 1024 * 1024  # pixels; written out in the pipeline's __call__
ENCODERS = ("vae", "text_encoder", "tokenizer", "processor")
_CONTROL_MULTIPLE_OF = 32
_VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def pixels_per_token(path: str, *, revision: str | None = None) -> int:
    """Side in pixels of one image token (16 for Qwen-Image), from the VAE's configuration alone.

    Raises:
        UserError: the pipeline or its `vae/config.json` cannot be had.
    """
    stages = pretrained.pipeline_json(path, "vae/config.json", revision=revision).get("temperal_downsample")
    halvings: int = 3 if stages is None else len(stages)  # the class's default has three stages
    return PATCH << halvings


def flow_shift(path: str, *, revision: str | None = None) -> dict[str, float]:
    """Keyword arguments of `calculate_shift` for this base, its defaults filled in as the pipeline fills them.

    Raises:
        UserError: the pipeline or its `scheduler/scheduler_config.json` cannot be had.
    """
    config = pretrained.pipeline_json(path, "scheduler/scheduler_config.json", revision=revision)
    return {
        "base_seq_len": config.get("base_image_seq_len", 256),
        "max_seq_len": config.get("max_image_seq_len", 4096),
        "base_shift": config.get("base_shift", 0.5),
        "max_shift": config.get("max_shift", 1.15),
    }


def encoder_fingerprint(path: str, *, revision: str | None = None, memo: Path | None = None) -> str:
    """32 hex characters that change with any byte of VAE, text encoder, tokenizer or processor.

    The kind of processor is part of it: the resizers with and without torchvision round differently. `memo` is a JSON
    file that saves reading unchanged weights again.

    Raises:
        UserError: the pipeline or one of the four components cannot be had.
    """
    salt = "torchvision" if torchvision_imports() else "pil"
    return pretrained.fingerprint(path, ENCODERS, revision=revision, memo=memo, salt=salt)


def load_encoders(
    path: str, *, revision: str | None = None, dtype: torch.dtype, device: torch.device | str
) -> QwenImageEditPipeline:
    """The stock pipeline with frozen VAE and text encoder, and without a transformer.

    Raises:
        UserError: weights cannot be found or read, or are pickled.
    """
    folder = pretrained.pipeline_folder(path, (*ENCODERS, "scheduler"), revision=revision)
    with _reading(folder):
        pipeline = QwenImageEditPipeline.from_pretrained(
            folder, transformer=None, processor=None, dtype=dtype, use_safetensors=True
        )
        # Not through `from_pretrained`, which warns at every load that the class is not the annotated one.
        pipeline.register_modules(processor=load_processor(folder / "processor"))
    for encoder in (pipeline.vae, pipeline.text_encoder):
        encoder.requires_grad_(False).eval()
    return pipeline.to(device)


def example_fault(*, controls: int, prompt: str) -> str | None:
    """Why this family cannot take an example with so many controls and this prompt; None where it can."""
    if controls != 1:
        return f"Qwen-Image-Edit takes exactly one control image, there are {controls}"
    if markers := [token for token in _VISION_TOKENS if token in prompt]:
        return f"the prompt contains {markers[0]}, a marker of the text encoder: take it out"
    return None


@torch.no_grad()
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

    The target is resized to `target_size` pixels; the control to `control_area` pixels at its own aspect, as the
    pipeline does, for VAE and text encoder alike. `mask` ("L", as large as the target) becomes the foreground share of
    each target token by the mean over the token's area.

    Raises:
        UserError: not exactly one control, or a prompt with the text encoder's own image markers in it.
    """
    if fault := example_fault(controls=len(controls), prompt=prompt):
        raise UserError(f"{name}: {fault}")
    size = control_size(Size(*controls[0].size), area=control_area, multiple_of=_CONTROL_MULTIPLE_OF)
    control = pipeline.image_processor.resize(controls[0], size.height, size.width)
    prompt_embeds, prompt_mask = pipeline.encode_prompt(image=control, prompt=prompt, device=pipeline.device)
    assert prompt_mask is None, "one prompt is never padded"
    grids = tuple(token_grid(side, PATCH * pipeline.vae_scale_factor) for side in (target_size, size))
    return Sample(
        name=name,
        target_latents=_encode_image(pipeline, target, target_size),
        control_latents=(_encode_image(pipeline, control, size),),
        prompt_embeds=prompt_embeds[0].cpu(),
        img_shapes=grids,
        edit_mask=None if mask is None else mask_on_grid(mask, grids[0]),
    )


def _encode_image(pipeline: QwenImageEditPipeline, image: Image.Image, size: Size) -> Tensor:
    """`(S, P)`: normalised, packed latents of the image at `size`, the mode of the VAE's distribution."""
    pixels = pipeline.image_processor.preprocess(image, size.height, size.width).unsqueeze(2)
    pixels = pixels.to(device=pipeline.device, dtype=pipeline.text_encoder.dtype)
    return pack_latents(pipeline._encode_vae_image(pixels, generator=None)[0]).cpu()


def load_transformer(
    path: str, *, revision: str | None = None, dtype: torch.dtype, device: torch.device | str
) -> QwenImageTransformer2DModel:
    """The stock transformer, patched to take samples of different sizes in one batch.

    Raises:
        UserError: weights cannot be found or read, or are pickled.
    """
    folder = pretrained.pipeline_folder(path, ("transformer",), revision=revision)
    with _reading(folder):
        transformer = QwenImageTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", dtype=dtype, use_safetensors=True
        )
    return patch_qwen_model_for_multi_resolution(transformer.to(device))


def transformer_skeleton(path: str, *, revision: str | None = None) -> QwenImageTransformer2DModel:
    """The transformer without weights, on the meta device: names and shapes to check a configuration against.

    Raises:
        UserError: the pipeline or its `transformer/config.json` cannot be had.
    """
    config = pretrained.pipeline_json(path, "transformer/config.json", revision=revision)
    with torch.device("meta"):
        return QwenImageTransformer2DModel.from_config(config)


def untrained_modules(transformer: QwenImageTransformer2DModel) -> tuple[str, ...]:
    """Modules whose output reaches no loss: the last block's text stream ends there but for its keys and values.

    Trained, they would get no gradient or zeros, and data-parallel wrappers would wait for them in vain.
    """
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
    return tuple(f"{last}.{name}" for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"))


def predict_velocity(transformer: nn.Module, batch: Batch, noisy_latents: Tensor, sigmas: Tensor) -> Tensor:
    """The transformer's velocity at every image token, in the layout of the batch and the transformer's dtype.

    `noisy_latents` is as `batch.latents`, `sigmas` `(B,)` in [0, 1]; the stock pipeline's `timestep / 1000` is the
    sigma. Any wrapper that passes keyword arguments on may stand for the transformer.
    """
    dtype = next(p.dtype for p in transformer.parameters() if p.is_floating_point())
    packed = {"txt_seq_lens": list(batch.text_lengths)} if batch.layout == "packed" else None
    velocity: Tensor = transformer(
        hidden_states=noisy_latents.to(dtype),
        timestep=sigmas.to(dtype),
        encoder_hidden_states=batch.prompt_embeds.to(dtype),
        encoder_hidden_states_mask=batch.prompt_mask,
        img_shapes=[[tuple(grid) for grid in grids] for grids in batch.img_shapes],
        attention_kwargs=packed,
        return_dict=False,
    )[0]
    return velocity


def load_sampling_pipeline(
    path: str,
    *,
    transformer: QwenImageTransformer2DModel,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> QwenImageEditPipeline:
    """The stock pipeline around `transformer`, without a text encoder: prompt embeddings come from the cache.

    `dtype` is the VAE's; give it the transformer's own.

    Raises:
        UserError: the VAE or the scheduler cannot be found or read.
    """
    folder = pretrained.pipeline_folder(path, ("vae", "scheduler"), revision=revision)
    with _reading(folder):
        pipeline = QwenImageEditPipeline.from_pretrained(
            folder,
            transformer=transformer,
            text_encoder=None,
            tokenizer=None,
            processor=None,
            dtype=dtype,
            use_safetensors=True,
        )
    pipeline.vae.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def sample_image(
    pipeline: QwenImageEditPipeline,
    *,
    control: Image.Image,
    prompt_embeds: Tensor,
    size: Size,
    steps: int,
    seed: int,
    control_area: int = STOCK_CONTROL_AREA,
) -> Image.Image:
    """One picture of `size` pixels through the stock pipeline's `__call__`, without classifier-free guidance.

    `prompt_embeds` is `(T, D)`, of this very control. `steps` is at least 2: the stock scheduler's terminal shift
    divides by zero on one step. The noise comes from a CPU generator, so that a seed means the
    same picture on every device. The transformer's training mode is put back as it was.
    """
    assert steps >= 2, steps
    transformer = pipeline.transformer
    embeds = prompt_embeds.to(device=pipeline.device, dtype=transformer.dtype).unsqueeze(0)
    was_training = transformer.training
    transformer.eval()
    try:
        with control_area_set(control_area):
            images = pipeline(
                image=control,
                prompt_embeds=embeds,
                prompt_embeds_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                true_cfg_scale=1.0,
                width=size.width,
                height=size.height,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
            ).images
    finally:
        transformer.train(was_training)
    image: Image.Image = images[0]
    return image


@contextmanager
def control_area_set(area: int) -> Iterator[None]:
    """Within it every stock Qwen-Image-Edit pipeline resizes its control to `area` pixels instead of 1024 x 1024."""
    stock = pipeline_qwenimage_edit.calculate_dimensions

    def calculate_dimensions(target_area: int, ratio: float) -> tuple[int, int, Any]:
        width, height, rest = stock(area, ratio)
        return max(width, _CONTROL_MULTIPLE_OF), max(height, _CONTROL_MULTIPLE_OF), rest

    if area != STOCK_CONTROL_AREA:
        pipeline_qwenimage_edit.calculate_dimensions = calculate_dimensions
    try:
        yield
    finally:
        pipeline_qwenimage_edit.calculate_dimensions = stock


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Says which base could not be read, in one line, where a library stumbles over its files."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{pretrained.KEY}: {folder} cannot be loaded: {reason}") from error
