"""Qwen-Image-2.1: text to image and edits of one to three images in one model, with transparency.

Promise: latents and prompt embeddings are those of the stock pipeline, bit for bit, but for the rows that its text
encoder returns at image slots: the transformer puts latents there, so they are not kept. What is cached makes the
stock pipeline's image.

Legend: S image tokens, T text tokens, P channels of a token.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLProcessor

from mixres.batch import Batch, TextEmbeds
from mixres.errors import UserError
from mixres.geometry import Grid, Size
from mixres.models.family import ControlSizes
from mixres.models.qwen.family import QwenFamily
from mixres.models.qwen21 import layers
from mixres.models.qwen21.layout import TABLE
from mixres.models.qwen21_multi_resolution_patch import patch_qwen21_model_for_multi_resolution, patch_state
from mixres.models.stock_family import StockFamily

_TOKEN = 16  # pixels along a side; the pipeline has this number too
_SLOT = 4  # image tokens, 2 x 2, at one slot of the text encoder
_IMAGE = "<image{}><|vision_start|><|image_pad|><|vision_end|>"  # how the pipeline names each control


class QwenImage21(QwenFamily):
    """The stock `QwenImage21Pipeline`, which generates where it is given no image."""

    name = "qwen_image_21"
    label = "Qwen-Image-2.1"
    pipeline_class = QwenImage21Pipeline
    components = ("vae", "text_encoder", "processor")
    init_parts = ("processor",)
    tokenizer_folder = "processor"
    vae_class, processor_class = AutoencoderKLQwenImage21, Qwen3VLProcessor
    transformer_class, text_width = QwenImage21Transformer2DModel, ("context_in_dim", 4096)
    stock_bases: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-2.1",)
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # nothing is known to differ from the defaults
    controls = (0, 3)
    controls_problem = "Qwen-Image-2.1 takes 0 to 3 control images, there are {}; give it so many"
    max_prompt_tokens = TABLE // 2  # stock cuts no prompt; the other positions are left to images
    keeps_alpha = block_causal = True
    noise_patch = 1
    negative_prompt = " "
    lora_presets = layers.LORA_PRESETS
    quantize_exclusions = layers.QUANTIZE_EXCLUSIONS
    patch, patch_state = staticmethod(patch_qwen21_model_for_multi_resolution), staticmethod(patch_state)
    comfyui_prefix = layers.COMFYUI_PREFIX
    comfyui_controls: ClassVar[str | None] = "hand it to TextEncodeQwenImage21, which makes an empty latent of its grid"

    def training_notice(self) -> str | None:
        """See `Family`: the licence of the weights."""
        return f"{self.path}: weights under the Qwen RESEARCH LICENSE, for research, not for commercial use"

    # Configuration files.

    def pixels_per_token(self) -> int:
        """See `Family`."""
        return _TOKEN

    def size_multiple(self) -> int:
        """See `Family`: 32. Sides of an odd number of tokens would leave a slot of the text encoder half empty."""
        return 2 * _TOKEN

    # Records before they are encoded.

    @cached_property
    def _preprocessors(self) -> Any:
        return self.load_preprocessors()

    def sizes_problem(self, sizes: ControlSizes) -> str | None:
        """See `Family`."""
        return slots_problem(self._preprocessors.processor.image_processor, sizes) if sizes.text else None

    def text_tokens(self, preprocessors: Any, *, prompt: str, sizes: ControlSizes) -> int:
        """See `Family`. Those at image slots are not among them."""
        pipeline, controls, first = preprocessors, len(sizes.text), _IMAGE.format(1)
        images = " ".join(_IMAGE.format(number) for number in range(1, controls + 1))
        template = pipeline.prompt_template_ti2i.replace(first, images) if controls else pipeline.prompt_template_t2i
        words = pipeline.processor.tokenizer(template.format(prompt or " "), verbose=False)["input_ids"]
        return len(words) - controls - int(pipeline._drop_idx)

    def text_problem(self, grids: Sequence[Grid], text_tokens: int) -> str | None:
        """See `Family`. Controls move the positions on by their longer sides."""
        room = TABLE - 1 - sum(max(rows, columns) for _, rows, columns in grids[1:])
        if text_tokens <= room:
            return None
        return f"{text_tokens} text tokens are more than the {room} that there are positions for: shorten the prompt"

    # Encoding.

    def text_controls(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Image.Image]:
        """The controls at their sizes, laid on `background` once they have them, as the pipeline lays them on white."""
        shown, rgba = [], [control.convert("RGBA") for control in controls]
        for image in super().text_controls(pipeline, rgba, sizes):
            shown.append(Image.new("RGB", image.size, self.background))
            shown[-1].paste(image, mask=image.getchannel("A"))
        return shown

    def vae_pixels(self, pipeline: Any, image: Image.Image, size: Size) -> Tensor:
        """See `QwenFamily`: four channels."""
        return super().vae_pixels(pipeline, image.convert("RGBA"), size)

    def packed(self, latents: Tensor) -> Tensor:
        """See `QwenFamily`. A token is one latent pixel."""
        return latents.flatten(1).T.contiguous()

    def unpacked(self, tokens: Tensor, grid: Grid) -> Tensor:
        """See `QwenFamily`."""
        return tokens.T.reshape(-1, *grid)

    @torch.no_grad()
    def encode_prompt(
        self, encoders: Any, *, controls: Sequence[Image.Image], prompt: str, sizes: ControlSizes
    ) -> TextEmbeds:
        """See `Family`. Rows at image slots are left out; `before` says where they were.

        Raises:
            UserError: the text encoder does not take controls of these sizes.
        """
        if problem := slots_problem(encoders.processor.image_processor, sizes):
            raise UserError(problem)
        shown = self.text_controls(encoders, controls, sizes) or None
        embeds, mask, slots = encoders.encode_prompt(prompt=prompt, image=shown, device=encoders.device)
        assert mask is None, "one prompt is never padded"
        blocks = [(is_slot, len(list(rows))) for is_slot, rows in groupby(slots[0].tolist())]
        assert [rows for is_slot, rows in blocks if is_slot] == list(map(slot_count, sizes.text)), blocks
        before = [rows for is_slot, rows in blocks if not is_slot][:-1]
        return TextEmbeds(embeds[0][~slots[0]].cpu(), before=tuple(before))

    # The transformer.

    def layout_call(self, batch: Batch) -> dict[str, Any]:
        """See `QwenFamily`."""
        texts = zip(batch.text_before, batch.text_lengths, strict=True)
        return {"attention_kwargs": {"text_runs": [[*before, tokens - sum(before)] for before, tokens in texts]}}

    # Sampling.

    def schedule(self, pipeline: Any, steps: int) -> tuple[Any, Sequence[float] | None, dict[str, float]]:
        """See `Family`. A base with `sample_sigmas` has its own steps."""
        scheduler, sigmas, constants = super().schedule(pipeline, steps)
        return scheduler, pipeline.config.sample_sigmas or sigmas, constants

    def guide(self, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
        """See `Family`. Lengths are as they come, other than in Qwen-Image."""
        return StockFamily.guide(self, positive, negative, guidance)


def slots_problem(processor: Any, sizes: ControlSizes) -> str | None:
    """The text encoder's image processor enlarges small images and shrinks large ones: their slots would not fit."""
    for size in sizes.text:
        if processor.get_number_of_image_patches(size.height, size.width) != _SLOT * slot_count(size):
            low, high = (processor.size[f"{edge}_edge"] for edge in ("shortest", "longest"))
            return (
                f"a control becomes {size}, {size.width * size.height} pixels, and the text encoder takes {low} to "
                f"{high}: change data.resize.control.area or, where it gets its target's size, that of the target"
            )
    return None


def slot_count(size: Size) -> int:
    """Slots of the text encoder for a control of this size."""
    return size.width * size.height // (_SLOT * _TOKEN**2)
