"""How large an encoded example will be, from its token counts alone: for the free space that caching needs.

Promise: the bytes of the tensors are exact. Cost: two configuration files of the base; no weights are read, nothing is
encoded.
"""

import torch

from mixres.geometry import PATCH
from mixres.models import hub

_FILE_BYTES = 5 * 1024  # the header, the rest of the last block of the disk, a share of a folder and of the index


class EntrySize:
    """Call it with an example's tokens.

    Raises:
        UserError: the pipeline, or the configuration of its VAE or text encoder, cannot be had.
    """

    def __init__(self, path: str, *, revision: str | None = None, dtype: torch.dtype) -> None:
        vae = hub.pipeline_json(path, "vae/config.json", revision=revision)
        text = hub.pipeline_json(path, "text_encoder/config.json", revision=revision)
        self._itemsize = dtype.itemsize
        self._latent_width: int = PATCH**2 * vae.get("z_dim", 16)
        self._text_width: int = text.get("text_config", text).get("hidden_size", 3584)

    def __call__(self, *, image_tokens: int, text_tokens: int, mask_tokens: int) -> int:
        """Bytes on disk. `text_tokens` are those of all prompts, `mask_tokens` those of a target with an edit mask."""
        values = image_tokens * self._latent_width + text_tokens * self._text_width
        return values * self._itemsize + 4 * mask_tokens + _FILE_BYTES
