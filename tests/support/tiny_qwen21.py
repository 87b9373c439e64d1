"""A random Qwen-Image-2.1 pipeline of the real architecture, small enough for a CPU: every part is the stock class.

Promise: one seed, one pipeline; on disk it is an ordinary diffusers folder that the stock pipeline loads. Cost: about a
second and 5 MB; a 128 x 128 image is 64 tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from torch.nn.functional import interpolate
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from mixres.models.qwen.processor import Qwen3TextProcessor
from support.tiny_pipeline import name_stock_processor, trained_tokenizer

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content[0].text + '<|im_end|>\n' }}"
    "{% endfor %}"
)
_SYSTEM = "system\nComprehend and analyze the provided prompt. user\n assistant\n"
_TEXT_WIDTH = 64
MIN_PIXELS, MAX_PIXELS = 32 * 32, 16_777_216  # of a control; the real processor has 65,536 and the same


def write_tiny_qwen21(folder: Path, prompts: Sequence[str], seed: int = 0) -> None:
    """Writes a random pipeline to `folder`; words of `prompts` become one token each, others fall back to bytes.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = trained_tokenizer([_SYSTEM, "<image1> <image2> <image3>", *prompts])
        looks = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
        image_processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, **looks)
        pipeline = QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            processor=Qwen3TextProcessor(image_processor, tokenizer, _TEMPLATE),
            transformer=_transformer(),
        )
    transformers_logging.disable_progress_bar()
    pipeline.save_pretrained(folder)
    name_stock_processor(folder, "Qwen3VL", patch_size=16)


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e6}
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": _TEXT_WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 4096,
            "rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": _TEXT_WIDTH,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )  # fmt: skip
    encoder = Qwen3VLForConditionalGeneration(config).eval()
    # The default initialisation (std 0.02) makes all words look alike; unit embeddings keep them apart.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


@torch.no_grad()
def _vae() -> AutoencoderKLQwenImage21:
    """What it decodes is spread: else each channel is nearly flat, and a change of latents is lost by rounding."""
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, dim_mult=[1, 2, 2, 4, 4], num_res_blocks=1, z_dim=16, latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    ).eval()  # fmt: skip
    clouds = interpolate(torch.randn(8, 4, 12, 12), size=(96, 96), mode="bicubic").clamp(-1, 1)
    latents = vae.encode(clouds.unsqueeze(2)).latent_dist.mode()
    channels = latents.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())
    pixels = vae.decode(latents + channels.std(1).view(-1, 1, 1, 1) * torch.randn_like(latents)).sample
    pixels = pixels.transpose(0, 1).flatten(1)
    gain, last = 0.4 / pixels.std(1), vae.decoder.conv_out
    gain, mean = (x.repeat_interleave(last.out_channels // 4) for x in (gain, pixels.mean(1)))
    last.weight.mul_(gain.view(-1, *[1] * (last.weight.dim() - 1)))
    last.bias.sub_(mean).mul_(gain)
    return vae


@torch.no_grad()
def _transformer() -> QwenImage21Transformer2DModel:
    transformer = QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=4,
        context_in_dim=_TEXT_WIDTH, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if ".norm_" in name:  # of queries and keys: how sharp attention is
            parameter.fill_(2.0)
        elif name.startswith("modulation"):
            parameter.mul_(4)
    return transformer
