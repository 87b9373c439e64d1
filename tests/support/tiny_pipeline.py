"""A random Qwen-Image pipeline of the real architecture, small enough for a CPU: every part is the stock class.

Promise: the same pipeline each time; on disk it is an ordinary diffusers folder that the stock pipeline loads. It edits
nothing. Cost: about a second and 2 MB; a 128 x 128 image is 64 tokens.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from mixres import atomic
from mixres.models.qwen.processor import QwenImageTextProcessor

Pipeline = type[DiffusionPipeline]
_TEXT_WIDTH = 64
_VISION_PIXELS = 56 * 56  # what the text encoder gets of an image: 4 tokens, whatever the control's size
_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
_SPECIAL_TOKENS = [f"<|{name}|>" for name in _NAMES]


def write_tiny_pipeline(
    folder: Path, prompts: Sequence[str], *, pipeline_class: Pipeline = QwenImageEditPipeline, zero_cond_t: bool = False
) -> None:
    """Writes a random pipeline to `folder`; words of `prompts` become one token each, others fall back to bytes.

    `zero_cond_t` is as in Qwen-Image-Edit-2511. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer(prompts, pipeline_class)
        parts = {"vae": _vae(), "text_encoder": tiny_text_encoder(tokenizer), "transformer": _transformer(zero_cond_t)}
    save_pipeline(folder, pipeline_class=pipeline_class, tokenizer=tokenizer, **parts)


def save_pipeline(folder: Path, *, pipeline_class: Pipeline = QwenImageEditPipeline, **parts: Any) -> None:
    """Writes tokenizer, text encoder, VAE and transformer, each in its own dtype, as a stock pipeline.

    A scheduler is added and, where the pipeline takes images, a processor.
    """
    if _takes_images(pipeline_class):
        image_processor = Qwen2VLImageProcessorPil(min_pixels=_VISION_PIXELS, max_pixels=_VISION_PIXELS)
        parts["processor"] = QwenImageTextProcessor(image_processor, parts["tokenizer"])
    transformers_logging.disable_progress_bar()
    shift = {"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02}  # those of Qwen/Qwen-Image-Edit
    scheduler = FlowMatchEulerDiscreteScheduler(max_image_seq_len=8192, **shift)
    pipeline_class(scheduler=scheduler, **parts).save_pretrained(folder)
    if "processor" in parts:
        name_stock_processor(folder, "Qwen2VL", patch_size=14)


def _takes_images(pipeline_class: Pipeline) -> bool:
    return "processor" in inspect.signature(pipeline_class.__init__).parameters


def tiny_tokenizer(prompts: Sequence[str], pipeline_class: Pipeline = QwenImageEditPipeline) -> Qwen2Tokenizer:
    """Byte-level BPE trained until each word of template and prompts is one token.

    The pipeline drops the first tokens, the template's system part (64 where it edits), so a tokenizer that cut it into
    bytes would leave hundreds of template tokens in every prompt.
    """
    empty = pipeline_class(*[None] * (6 if _takes_images(pipeline_class) else 5))
    return trained_tokenizer([empty.prompt_template_encode.format(""), *prompts])


def trained_tokenizer(words: Sequence[str]) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's special tokens, trained until each of the words is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Qwen2Tokenizer(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    for token in _SPECIAL_TOKENS:
        words = [text.replace(token, "\n") for text in words]
    return base.train_new_from_iterator(
        words, vocab_size=1 << 14, new_special_tokens=_SPECIAL_TOKENS, show_progress=False
    )


def tiny_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL for the tokenizer's words, 64 wide."""
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": _TEXT_WIDTH,
            "intermediate_size": 2 * _TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": _TEXT_WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    # The default initialisation (std 0.02) makes all words look alike; unit embeddings keep them apart.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def _vae() -> AutoencoderKLQwenImage:
    sizes = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
    vae = AutoencoderKLQwenImage(**sizes).eval()
    mean, std = _latent_statistics(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    _stretch_contrast(vae, torch.tensor(mean), torch.tensor(std))
    return vae


@torch.no_grad()
def _stretch_contrast(vae: AutoencoderKLQwenImage, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Scales the decoder's last convolution so that random latents decode to images of mid grey and fair contrast.

    Untouched, each colour is nearly one flat value, in which a change of the latents is lost by rounding to 8 bits.
    """
    noise = mean.view(1, -1, 1, 1, 1) + std.view(1, -1, 1, 1, 1) * torch.randn(2, 16, 1, 12, 12)
    image = vae.decode(noise).sample.transpose(0, 1).flatten(1)
    gain = 0.4 / image.std(1)
    last = vae.decoder.conv_out
    last.weight.mul_(gain.view(-1, 1, 1, 1, 1))
    last.bias.sub_(image.mean(1)).mul_(gain)


@torch.no_grad()
def _latent_statistics(vae: AutoencoderKLQwenImage) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel on random clouds, so that normalised latents have unit size.

    Rounded, so that the configuration does not depend on a machine's last bits.
    """
    coarse = torch.randn(8, 3, 12, 12)
    clouds = torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic").clamp(-1, 1).unsqueeze(2)
    latents = vae.encode(clouds).latent_dist.mode().transpose(0, 1).flatten(1)
    return [round(x, 4) for x in latents.mean(1).tolist()], [round(x, 4) for x in latents.std(1).tolist()]


@torch.no_grad()
def _transformer(zero_cond_t: bool) -> QwenImageTransformer2DModel:
    """Control and prompt matter to the image: by default attention is flat and its gates are nearly shut.

    Queries and keys are normalised, so their norms' weights set how sharp attention is.
    """
    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=_TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
        zero_cond_t=zero_cond_t,
    ).eval()
    for block in transformer.transformer_blocks:
        attention = block.attn
        for norm in (attention.norm_q, attention.norm_k, attention.norm_added_q, attention.norm_added_k):
            norm.weight.fill_(2.0)
        for modulation in (block.img_mod, block.txt_mod):
            for part in modulation[-1].bias.chunk(6)[2::3]:  # shift, scale, gate of attention; the same of the MLP
                part.fill_(1.0)
    return transformer


def name_stock_processor(folder: Path, model: str, *, patch_size: int) -> None:
    """Names the model's stock processor wherever the files name ours, and adds the video half that it asks for."""
    index, stock = json.loads((folder / "model_index.json").read_text(encoding="utf-8")), f"{model}Processor"
    atomic.write_json(folder / "model_index.json", index | {"processor": ["transformers", stock]})
    video = {"video_processor_type": f"{model}VideoProcessor", "merge_size": 2, "patch_size": patch_size}
    for name, extra in (("processor_config.json", {"video_processor": video}), ("tokenizer_config.json", {})):
        file = folder / "processor" / name
        config = json.loads(file.read_text(encoding="utf-8"))
        atomic.write_json(file, config | {"processor_class": stock} | extra)
