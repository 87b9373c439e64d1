"""How large an encoded example will be, from sizes and words alone: for the free space that caching needs.

Promise: the bytes of the tensors are exact but for a few text tokens of the template, whatever the base's processor
does. Cost: the processor's files once, a tokenizer call an example; no weights are read and nothing is encoded.
"""

import math
from collections.abc import Sequence

import torch

from mixres.geometry import PATCH, Size
from mixres.models import pretrained
from mixres.models.qwen_processor import load_processor

_TEMPLATE_TOKENS = 16  # what the pipelines keep of their template around picture and words; 9 with Qwen's tokenizer
_FILE_BYTES = 5 * 1024  # the header, the rest of the last block of the disk, a share of a folder and of the index


class EntrySize:
    """Call it with an example; see `pixels_per_token` of the family for that argument.

    Raises:
        UserError: the pipeline, or its VAE, text encoder or processor, cannot be had.
    """

    def __init__(self, path: str, *, revision: str | None = None, dtype: torch.dtype, pixels_per_token: int) -> None:
        folder = pretrained.pipeline_folder(path, ("vae", "text_encoder", "processor"), revision=revision)
        self._processor = load_processor(folder / "processor")
        self._pixels_per_token = pixels_per_token
        self._itemsize = dtype.itemsize
        self._latent_width = PATCH**2 * pretrained.pipeline_json(path, "vae/config.json", revision=revision)["z_dim"]
        text = pretrained.pipeline_json(path, "text_encoder/config.json", revision=revision)
        self._text_width: int = text.get("text_config", text)["hidden_size"]

    def __call__(self, *, target: Size, controls: Sequence[Size], prompt: str, mask: bool) -> int:
        """Bytes on disk. `target` and `controls` are the sizes that VAE and text encoder see."""
        tokens = [math.prod(size) // self._pixels_per_token**2 for size in (target, *controls)]
        merged = self._processor.image_processor.merge_size**2
        seen = [self._processor.image_processor.get_number_of_image_patches(s.height, s.width) for s in controls]
        words = len(self._processor.tokenizer(prompt)["input_ids"])
        text = sum(patches // merged for patches in seen) + words + _TEMPLATE_TOKENS
        values: int = sum(tokens) * self._latent_width + text * self._text_width
        return values * self._itemsize + (4 * tokens[0] if mask else 0) + _FILE_BYTES
