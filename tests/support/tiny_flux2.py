"""Random FLUX.2 pipelines of the real architecture, small enough for a CPU: every part is the stock class.

Promise: one seed, one pipeline; on disk it is an ordinary diffusers folder that the stock pipeline loads. Cost: about a
second and 5 MB; a 128 x 128 image is 64 tokens, a prompt 512.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
_DEV_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]"]
_DEV_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{%- set mark = 'SYSTEM_PROMPT' if message.role == 'system' else "
    "'INST' %}{{- '[' + mark + ']' }}{%- for part in message.content %}{{- part.text }}{%- endfor %}"
    "{{- '[/' + mark + ']' }}{%- endfor %}"
)
_TEXT_WIDTH, _HEAD_WIDTH = 32, 24


def write_tiny_flux2(folder: Path, prompts: Sequence[str], kind: type[Any] = Flux2KleinPipeline, seed: int = 0) -> None:
    """Writes a random pipeline to `folder`; words of `prompts` become one token each, others fall back to bytes.

    The global random state is left as it was.
    """
    dev = kind is Flux2Pipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _dev_tokenizer(prompts) if dev else chat_tokenizer(prompts)
        pipeline = kind(
            scheduler=flux_scheduler(),
            vae=_vae(),
            text_encoder=_dev_text_encoder(tokenizer) if dev else _text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(guidance_embeds=dev),
            **({} if dev else {"is_distilled": False}),
        )
    transformers_logging.disable_progress_bar()
    pipeline.save_pretrained(folder)
    if dev:  # a processor needs torchvision, and is what the stock folder names
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["tokenizer"] = ["transformers", "PixtralProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def chat_tokenizer(prompts: Sequence[str]) -> Qwen2TokenizerFast:
    """Qwen3's, with the chat template."""
    words = [*prompts, "user\n", "assistant\n", "\n\n"]
    tokenizer = _trained_tokenizer(words, _SPECIAL_TOKENS)
    tokenizer.chat_template, tokenizer.pad_token = _TEMPLATE, "<|endoftext|>"
    return tokenizer


def _trained_tokenizer(words: Sequence[str], special_tokens: Sequence[str]) -> Qwen2TokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Qwen2TokenizerFast(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    return base.train_new_from_iterator(
        words, vocab_size=1 << 12, new_special_tokens=list(special_tokens), show_progress=False
    )


def _dev_tokenizer(prompts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Pads on the left."""
    trained = _trained_tokenizer([*prompts, *[SYSTEM_MESSAGE] * 2], _DEV_SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = _DEV_TEMPLATE
    return tokenizer


def _dev_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """30 layers of text, since the pipeline takes hidden states 10, 20 and 30, and one for images."""
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=_TEXT_WIDTH, intermediate_size=48, num_hidden_layers=30,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, sliding_window=None,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(vision_config=vision, text_config=text, image_token_index=image, spatial_merge_size=2)
    ).eval()
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


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
def _transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=_HEAD_WIDTH,
        num_attention_heads=4, joint_attention_dim=3 * _TEXT_WIDTH, axes_dims_rope=(_HEAD_WIDTH // 4,) * 4,
        guidance_embeds=guidance_embeds,
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
