"""From cached latents back to a picture, by the pipeline's own VAE and arithmetic.

Promise: what the stock pipeline would show for these latents. Cost: one VAE decoder pass.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mixres.geometry import unpack_latents


@torch.no_grad()
def decode_latents(pipeline: Any, latents: Tensor, grid: tuple[int, int, int]) -> Image.Image:
    """The picture of normalised, packed latents `(S, P)` on `grid`, in the VAE's dtype, RGB.

    The inverse of `_encode_vae_image` (diffusers, pipeline_qwenimage_edit.py) up to what the VAE loses.
    """
    vae = pipeline.vae
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device, dtype=vae.dtype)
    mean, std = statistics.view(2, -1, 1, 1, 1)
    unpacked = unpack_latents(latents.to(device=vae.device, dtype=vae.dtype), grid)
    pixels = vae.decode((unpacked * std + mean)[None], return_dict=False)[0][:, :, 0]
    picture: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
    return picture
