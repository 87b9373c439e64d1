"""A random Z-Image pipeline of the real architecture, small enough for a CPU: every part is the stock class.

Promise: one seed, one pipeline; on disk it is an ordinary diffusers folder that the stock pipeline loads. Cost: about a
second and 3 MB; a 128 x 128 image is 64 tokens, a prompt a few.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model
from transformers.utils import logging as transformers_logging

from support.tiny_flux2 import chat_tokenizer, give_contrast

_TEXT_WIDTH = 32


def write_tiny_z_image(folder: Path, prompts: Sequence[str], seed: int = 0) -> None:
    """Writes a random pipeline to `folder`; words of `prompts` become one token each, others fall back to bytes.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer(prompts)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),  # that of Z-Image-Turbo
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
    transformers_logging.disable_progress_bar()
    pipeline.save_pretrained(folder)


def _text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=_TEXT_WIDTH, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = Qwen3Model(config).eval()
    # The default initialisation (std 0.02) makes all words look alike; unit embeddings keep them apart.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=128,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    give_contrast(vae)
    return vae


@torch.no_grad()
def _transformer() -> ZImageTransformer2DModel:
    """Neither deep nor sharp: this architecture rounds more than others, 1.2e-6 in float32 with 16 layers."""
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=_TEXT_WIDTH,
        axes_dims=[8, 12, 12], axes_lens=[1024, 64, 64],
    ).eval()  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "adaLN_modulation" in name:
            parameter.mul_(2)
        elif name.endswith("pad_token"):
            parameter.normal_()
    return transformer
