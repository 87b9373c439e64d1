"""What the Qwen-Image families share: reading a base, encoding a picture, the transformer, one run of a stock pipeline.

Promise: latents are those of the stock pipelines bit for bit; a family adds its pipeline class, its prompts and its
control images in a file of its own. Cost: VAE once a picture in `encode_image`, the stock denoising loop in `denoise`.

Legend: B sample, S image token, T text token, P packed channel, D text width.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from mixres.batch import Batch, Sample
from mixres.errors import UserError
from mixres.geometry import PATCH, Size, pack_latents, token_grid
from mixres.models import hub
from mixres.models.edit_mask import mask_on_grid
from mixres.models.quantize import Method, quantization_config
from mixres.models.qwen.inputs import vae_pixels
from mixres.models.qwen.processor import load_processor, torchvision_imports
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution

STOCK_CONTROL_AREA = 1024 * 1024  # pixels of a control for the VAE in all stock edit pipelines
_VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def pixels_per_token(path: str, *, revision: str | None = None) -> int:
    """Side in pixels of one image token (16 for Qwen-Image), from the VAE's configuration alone.

    Raises:
        UserError: the pipeline or its `vae/config.json` cannot be had.
    """
    stages = hub.pipeline_json(path, "vae/config.json", revision=revision).get("temperal_downsample")
    halvings: int = 3 if stages is None else len(stages)  # the class's default has three stages
    return PATCH << halvings


def flow_shift(path: str, *, revision: str | None = None) -> dict[str, float]:
    """Keyword arguments of `calculate_shift` for this base, its defaults filled in as the pipeline fills them.

    Raises:
        UserError: the pipeline or its `scheduler/scheduler_config.json` cannot be had.
    """
    config = hub.pipeline_json(path, "scheduler/scheduler_config.json", revision=revision)
    return {
        "base_seq_len": config.get("base_image_seq_len", 256),
        "max_seq_len": config.get("max_image_seq_len", 4096),
        "base_shift": config.get("base_shift", 0.5),
        "max_shift": config.get("max_shift", 1.15),
    }


def encoder_fingerprint(
    components: Sequence[str], path: str, *, revision: str | None = None, memo: Path | None = None
) -> str:
    """32 hex characters that change with any byte of the encoders, the `components` of the pipeline that encode.

    The kind of processor is part of it: the resizers with and without torchvision round differently. `memo` is a JSON
    file that saves reading unchanged weights again.

    Raises:
        UserError: the pipeline or one of the components cannot be had.
    """
    salt = "torchvision" if torchvision_imports() else "pil"
    return hub.fingerprint(path, components, revision=revision, memo=memo, salt=salt)


def load_encoders(
    pipeline_class: type[DiffusionPipeline],
    components: Sequence[str],
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Any:
    """The stock pipeline with frozen VAE and text encoder, and without a transformer.

    Raises:
        UserError: weights cannot be found or read, or are pickled.
    """
    folder = hub.pipeline_folder(path, (*components, "scheduler"), revision=revision)
    absent = {name: None for name in ("transformer", "processor") if name != "processor" or name in components}
    with _reading(folder):
        pipeline = pipeline_class.from_pretrained(folder, **absent, dtype=dtype, use_safetensors=True)
        if "processor" in components:
            # Not through `from_pretrained`, which warns at every load that the class is not the annotated one.
            pipeline.register_modules(processor=load_processor(folder / "processor"))
    for encoder in (pipeline.vae, pipeline.text_encoder):
        encoder.requires_grad_(False).eval()
    return pipeline.to(device)


def prompt_problem(prompt: str) -> str | None:
    """Why no family can take this prompt; None where they can."""
    markers = [token for token in _VISION_TOKENS if token in prompt]
    return f"the prompt contains {markers[0]}, a marker of the text encoder: take it out" if markers else None


@torch.no_grad()
def prompt_embeds(pipeline: Any, prompt: str, **call: Any) -> Tensor:
    """`(T, D)` on the CPU: one prompt through the stock pipeline's `encode_prompt`, to which `call` goes too."""
    embeds, mask = pipeline.encode_prompt(prompt=prompt, device=pipeline.device, **call)
    assert mask is None, "one prompt is never padded"
    one: Tensor = embeds[0].cpu()
    return one


def assembled(
    pipeline: Any,
    *,
    name: str,
    target: Image.Image,
    target_size: Size,
    controls: Sequence[tuple[Image.Image, Size]],
    prompt_embeds: Tensor,
    mask: Image.Image | None,
) -> Sample:
    """The training example of a target and its controls, each encoded at the size beside it, on the CPU.

    `mask` ("L", as large as the target) becomes the foreground share of each target token by the mean over the token's
    area.
    """
    pictures = [(target, target_size), *controls]
    grids = tuple(token_grid(size, PATCH * pipeline.vae_scale_factor) for _, size in pictures)
    latents = [encode_image(pipeline, image, size) for image, size in pictures]
    return Sample(
        name=name,
        target_latents=latents[0],
        control_latents=tuple(latents[1:]),
        prompt_embeds=prompt_embeds,
        img_shapes=grids,
        edit_mask=None if mask is None else mask_on_grid(mask, grids[0]),
    )


@torch.no_grad()
def encode_image(pipeline: Any, image: Image.Image, size: Size) -> Tensor:
    """`(S, P)`: normalised, packed latents of the image at `size`, the mode of the VAE's distribution, on the CPU.

    The arithmetic of `_encode_vae_image` in the edit pipelines, in its order; the text-to-image pipeline has none.
    """
    vae = pipeline.vae
    pixels = vae_pixels(pipeline, image, size).to(device=pipeline.device, dtype=pipeline.text_encoder.dtype)
    latents = vae.encode(pixels).latent_dist.mode()
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1).to(latents) for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return pack_latents(((latents - mean) / std)[0]).cpu()


def load_transformer(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    trained: Path | None = None,
    quantize: Method | None = None,
) -> QwenImageTransformer2DModel:
    """The stock transformer, or that in the folder `trained`, patched to take samples of different sizes in one batch.

    Raises:
        UserError: weights cannot be found or read, or are pickled; or cannot be quantised so on this device.
    """
    folder = trained or hub.pipeline_folder(path, ("transformer",), revision=revision) / "transformer"
    quantization = quantization_config(quantize, dtype=dtype, device=device) if quantize else None
    with _reading(folder):
        transformer = QwenImageTransformer2DModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, quantization_config=quantization
        )
    return patch_qwen_model_for_multi_resolution(transformer.to(device))


def transformer_skeleton(path: str, *, revision: str | None = None) -> QwenImageTransformer2DModel:
    """The transformer without weights, patched, on the meta device: to check a configuration, or to plan memory on.

    Raises:
        UserError: the pipeline or its `transformer/config.json` cannot be had.
    """
    config = hub.pipeline_json(path, "transformer/config.json", revision=revision)
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel.from_config(config)
    return patch_qwen_model_for_multi_resolution(transformer)


def untrained_modules(transformer: QwenImageTransformer2DModel) -> tuple[str, ...]:
    """Modules whose output reaches no loss: the last block's text stream ends there but for its keys and values.

    TrainState, they would get no gradient or zeros, and data-parallel wrappers would wait for them in vain.
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
    pipeline_class: type[DiffusionPipeline],
    components: Sequence[str],
    path: str,
    *,
    transformer: QwenImageTransformer2DModel | None,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Any:
    """The stock pipeline around `transformer`, without a text encoder: prompt embeddings come from the cache.

    `dtype` is the VAE's; give it the transformer's own.

    Raises:
        UserError: the VAE or the scheduler cannot be found or read.
    """
    folder = hub.pipeline_folder(path, ("vae", "scheduler"), revision=revision)
    absent = {name: None for name in components if name != "vae"}
    with _reading(folder):
        pipeline = pipeline_class.from_pretrained(
            folder, transformer=transformer, **absent, dtype=dtype, use_safetensors=True
        )
    pipeline.vae.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def denoise(
    pipeline: Any,
    *,
    prompt_embeds: Tensor,
    size: Size,
    steps: int,
    seed: int,
    negative_embeds: Tensor | None = None,
    guidance: float = 1.0,
    **call: Any,
) -> Image.Image:
    """One picture of `size` pixels through the stock pipeline's `__call__`.

    `prompt_embeds` is `(T, D)`; `call` is what the family's pipeline takes besides. `guidance` above 1 is the
    pipeline's `true_cfg_scale`, away from `negative_embeds` `(T', D)`: two forward calls a step. `steps` is at least 2:
    the stock scheduler's terminal shift divides by zero on one step. The noise comes from a CPU generator, so that a
    seed means the same picture on every device. The transformer's training mode is put back as it was.
    """
    assert steps >= 2, steps
    assert (guidance > 1) == (negative_embeds is not None), guidance
    transformer = pipeline.transformer
    texts = {"prompt": prompt_embeds} | ({} if negative_embeds is None else {"negative_prompt": negative_embeds})
    for name, embeds in texts.items():
        call[f"{name}_embeds"] = embeds.to(device=pipeline.device, dtype=transformer.dtype).unsqueeze(0)
        call[f"{name}_embeds_mask"] = torch.ones((1, len(embeds)), dtype=torch.long, device=pipeline.device)
    was_training = transformer.training
    transformer.eval()
    try:
        images = pipeline(
            true_cfg_scale=guidance,
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            **call,
        ).images
    finally:
        transformer.train(was_training)
    image: Image.Image = images[0]
    return image


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Says which base could not be read, in one line, where a library stumbles over its files."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{hub.KEY}: {folder} cannot be loaded: {reason}; download it again") from error
