"""What pictures and words become before an encoder sees them: sizes, pixels and token counts, without any weight.

Promise: resizing, templates and image processors are those of the stock pipeline object that encodes, so that what is
counted and shown here is what is encoded. Cost: `load_preprocessors` reads configuration and tokenizer files;
`text_tokens` calls the tokenizer once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from mixres.geometry import Size
from mixres.models import hub
from mixres.models.qwen.processor import load_processor


def load_preprocessors(
    pipeline_class: type[DiffusionPipeline], components: Sequence[str], path: str, *, revision: str | None = None
) -> Any:
    """The stock pipeline with tokenizer and, among its `components`, processor; its VAE has shapes and no values.

    Raises:
        UserError: the pipeline, or one of those files, cannot be had.
    """
    words = [name for name in components if name in ("tokenizer", "processor")]
    folder = hub.pipeline_folder(path, words, revision=revision)
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage.from_config(hub.pipeline_json(path, "vae/config.json", revision=revision))
    parts: dict[str, Any] = {"vae": vae, "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer")}
    if "processor" in words:
        parts["processor"] = load_processor(folder / "processor")
    return pipeline_class(**parts, text_encoder=None, transformer=None, scheduler=None)


def vae_pixels(pipeline: Any, image: Image.Image, size: Size) -> Tensor:
    """`(1, 3, 1, height, width)` in [-1, 1]: the image as the VAE gets it."""
    pixels: Tensor = pipeline.image_processor.preprocess(image, size.height, size.width).unsqueeze(2)
    return pixels


def vae_picture(pipeline: Any, image: Image.Image, size: Size) -> Image.Image:
    """`vae_pixels` to look at."""
    picture: Image.Image = pipeline.image_processor.postprocess(vae_pixels(pipeline, image, size)[:, :, 0])[0]
    return picture


def text_picture(pipeline: Any, image: Image.Image) -> Image.Image:
    """The image as the text encoder gets it, to look at: the processor's patches put back in their places.

    Patches come as (rows / m, columns / m, m, m) of (channel, frame, height, width), m merged along a side.
    """
    processor = pipeline.processor.image_processor
    given = processor(images=[image], return_tensors="pt")
    _, rows, columns = given["image_grid_thw"][0].tolist()
    m, side = processor.merge_size, processor.patch_size
    patches = given["pixel_values"].reshape(rows // m, columns // m, m, m, 3, -1, side, side)[..., 0, :, :]
    pixels = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)
    mean, std = (torch.tensor(values) for values in (processor.image_mean, processor.image_std))
    return Image.fromarray(((pixels * std + mean) * 255).round().clamp(0, 255).numpy().astype(np.uint8))


def text_tokens(pipeline: Any, text: str, pictures: Sequence[Size]) -> int:
    """Length of the embeddings of `text`, which names each of `pictures` (as large as they are handed over) once."""
    tokenizer = pipeline.processor.tokenizer if pictures else pipeline.tokenizer
    words = len(tokenizer(pipeline.prompt_template_encode.format(text), verbose=False)["input_ids"])
    seen = sum(_merged_patches(pipeline.processor.image_processor, size) for size in pictures)
    count: int = words - len(pictures) + seen - pipeline.prompt_template_encode_start_idx
    return count


def _merged_patches(processor: Any, size: Size) -> int:
    patches: int = processor.get_number_of_image_patches(size.height, size.width)
    merged: int = patches // processor.merge_size**2
    return merged
