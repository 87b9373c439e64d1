"""A random FLUX.1 pipeline of the real architecture, small enough for a CPU: every part is the stock class.

Promise: one seed, one pipeline; on disk it is an ordinary diffusers folder that the stock pipeline loads. Cost: about a
second and 5 MB; a 128 x 128 image is 64 tokens, a prompt 512.
"""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast
from transformers.utils import logging as transformers_logging

from support.tiny_flux2 import flux_scheduler, give_contrast

_POOLED_WIDTH, _TEXT_WIDTH, _LATENT_CHANNELS, _HEAD_WIDTH = 32, 48, 4, 24


def write_tiny_flux(folder: Path, prompts: Sequence[str], *, pipeline_class: Any, seed: int = 0) -> None:
    """Writes a random pipeline to `folder`; words of `prompts` are one token of T5 each, others a token a character.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5 = _clip_tokenizer(), _t5_tokenizer(prompts)
        pipeline = pipeline_class(
            scheduler=flux_scheduler(),
            vae=_vae(),
            text_encoder=_clip(clip),
            tokenizer=clip,
            text_encoder_2=_t5(t5),
            tokenizer_2=t5,
            transformer=_transformer(),
        )
    transformers_logging.disable_progress_bar()
    pipeline.save_pretrained(folder)


def _clip_tokenizer() -> CLIPTokenizer:
    """A token a byte."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*bytes_, *(f"{symbol}</w>" for symbol in bytes_), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], model_max_length=77)


def _t5_tokenizer(prompts: Sequence[str]) -> T5TokenizerFast:
    words = sorted({f"▁{word}" for prompt in prompts for word in prompt.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0)]
    pieces += [(character, -4.0) for character in (*string.ascii_letters, *string.digits, *string.punctuation)]
    return T5TokenizerFast(vocab=[*pieces, *((word, -1.0) for word in words)], extra_ids=0)


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=_POOLED_WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=_POOLED_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return _with_distinct_words(CLIPTextModel(config).eval())


def _t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=_TEXT_WIDTH, d_kv=12, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return _with_distinct_words(T5EncoderModel(config).eval())


def _with_distinct_words(encoder: Any) -> Any:
    """The default initialisation (std 0.02) makes all words look alike."""
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=_LATENT_CHANNELS, norm_num_groups=4,
        sample_size=128, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    give_contrast(vae)
    return vae


@torch.no_grad()
def _transformer() -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * _LATENT_CHANNELS, num_layers=2, num_single_layers=2,
        attention_head_dim=_HEAD_WIDTH, num_attention_heads=4, joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_POOLED_WIDTH, guidance_embeds=True, axes_dims_rope=(4, 10, 10),
    ).eval()  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if ".attn.norm_" in name:  # of queries and keys: how sharp attention is
            parameter.fill_(2.0)
        elif "norm" in name and ".linear." in name:  # modulation
            parameter.mul_(4)
    return transformer
