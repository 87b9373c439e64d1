"""A random FLUX.2-klein pipeline of the real architecture, small enough for a CPU: every part is the stock class.

Promise: one seed, one pipeline; on disk it is an ordinary diffusers folder that the stock pipeline loads. Cost: about a
second and 5 MB; a 128 x 128 image is 64 tokens, a prompt 512.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
_TEXT_WIDTH, _HEAD_WIDTH = 32, 24


def write_tiny_flux2(folder: Path, prompts: Sequence[str], seed: int = 0) -> None:
    """Writes a random pipeline to `folder`; words of `prompts` become one token each, others fall back to bytes.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer(prompts)
        pipeline = Flux2KleinPipeline(
            scheduler=flux_scheduler(),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
            is_distilled=False,
        )
    transformers_logging.disable_progress_bar()
    pipeline.save_pretrained(folder)


def _tokenizer(prompts: Sequence[str]) -> Qwen2TokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Qwen2TokenizerFast(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    words = [*prompts, "user\n", "assistant\n", "\n\n"]
    tokenizer = base.train_new_from_iterator(
        words, vocab_size=1 << 12, new_special_tokens=_SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.chat_template, tokenizer.pad_token = _TEMPLATE, "<|endoftext|>"
    return tokenizer


def _text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    """28 layers, since the pipeline takes hidden states 9, 18 and 27."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=_TEXT_WIDTH, intermediate_size=48, num_hidden_layers=28,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = Qwen3ForCausalLM(config).eval()
    # The default initialisation (std 0.02) makes all words look alike; unit embeddings keep them apart.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


@torch.no_grad()
def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=8, norm_num_groups=4, sample_size=128
    ).eval()
    latents = Flux2KleinPipeline._patchify_latents(give_contrast(vae))
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))
    return vae


@torch.no_grad()
def give_contrast(vae: Any) -> Tensor:
    """Spread what the VAE decodes; the latents of some images.

    Untouched, each colour is nearly one flat value, in which a change of the latents is lost by rounding.
    """
    images = torch.nn.functional.interpolate(torch.randn(8, 3, 12, 12), size=(96, 96), mode="bicubic").clamp(-1, 1)
    latents: Tensor = vae.encode(images).latent_dist.mode()
    pixels = vae.decode(latents + torch.randn_like(latents)).sample.transpose(0, 1).flatten(1)
    gain, last = 0.4 / pixels.std(1), vae.decoder.conv_out
    last.weight.mul_(gain.view(-1, 1, 1, 1))
    last.bias.sub_(pixels.mean(1)).mul_(gain)
    return latents


@torch.no_grad()
def _transformer() -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=_HEAD_WIDTH,
        num_attention_heads=4, joint_attention_dim=3 * _TEXT_WIDTH, axes_dims_rope=(_HEAD_WIDTH // 4,) * 4,
        guidance_embeds=False,
    ).eval()  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if ".norm_" in name:  # of queries and keys: how sharp attention is
            parameter.fill_(2.0)
        elif "stream_modulation" in name:
            parameter.mul_(4)
    return transformer


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The settings of FLUX.1-dev, which diffusers' conversion script gives FLUX.2 too."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
