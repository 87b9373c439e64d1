"""How large an encoded example will be, from sizes and words alone: for the free space that caching needs.

Promise: the bytes of the tensors are exact but for a few text tokens of the template, whatever the base's processor
does. Cost: the files of tokenizer and processor once, a tokenizer call an example; no weights are read, nothing is
encoded.
"""

import math
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from mixres.geometry import PATCH, Size, control_size
from mixres.models import pretrained
from mixres.models.qwen_processor import load_processor

_TEMPLATE_TOKENS = 16  # what the pipelines keep of their template around picture and words; 9 with Qwen's tokenizer
_PICTURE_TOKENS = 8  # "Picture 1: " and the two marks around a picture, in the pipeline of several
_FILE_BYTES = 5 * 1024  # the header, the rest of the last block of the disk, a share of a folder and of the index


class EntrySize:
    """Call it with an example. `pixels_per_token` is the side of an image token, as the family tells it.

    `shows_controls`: the family's text encoder sees controls, so that the base has a processor for them.

    Raises:
        UserError: the pipeline, or its VAE, text encoder, tokenizer or processor, cannot be had.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype,
        pixels_per_token: int,
        shows_controls: bool,
    ) -> None:
        components = ("vae", "text_encoder", "tokenizer", *(["processor"] if shows_controls else []))
        folder = pretrained.pipeline_folder(path, components, revision=revision)
        self._tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self._images = load_processor(folder / "processor").image_processor if shows_controls else None
        self._pixels_per_token = pixels_per_token
        self._itemsize = dtype.itemsize
        vae = pretrained.pipeline_json(path, "vae/config.json", revision=revision)
        text = pretrained.pipeline_json(path, "text_encoder/config.json", revision=revision)
        self._latent_width: int = PATCH**2 * vae.get("z_dim", 16)
        self._text_width: int = text.get("text_config", text).get("hidden_size", 3584)

    def __call__(
        self,
        *,
        target: Size,
        controls: Sequence[Size],
        prompts: Sequence[str],
        mask: bool,
        control_area: int = 0,
        text_area: int | None = None,
    ) -> int:
        """Bytes on disk. `target` is the size that is trained, `controls` are the sizes of the files. Each of
        `prompts` is embedded with all controls.

        The areas are the pixels of each control for the VAE and, where that is another, for the text encoder.
        """
        latents = [target, *(control_size(size, area=control_area) for size in controls)]
        tokens = [math.prod(size) // self._pixels_per_token**2 for size in latents]
        shown = [control_size(size, area=text_area or control_area) for size in controls]
        seen = sum(self._picture_tokens(size) for size in shown)
        words = (len(self._tokenizer(prompt)["input_ids"]) for prompt in prompts)
        text = sum(count + seen + _TEMPLATE_TOKENS for count in words)
        values: int = sum(tokens) * self._latent_width + text * self._text_width
        return values * self._itemsize + (4 * tokens[0] if mask else 0) + _FILE_BYTES

    def _picture_tokens(self, size: Size) -> int:
        """Text tokens of one control: its patches, and the words that name it."""
        assert self._images is not None, "this family has no controls"
        patches: int = self._images.get_number_of_image_patches(size.height, size.width)
        merged: int = patches // self._images.merge_size**2
        return merged + _PICTURE_TOKENS
