"""What the Qwen-Image families share: a base's files, encoding, the transformer.

Promise: latents and prompt embeddings are those of the stock pipelines, bit for bit; what is counted and shown before
encoding is what is encoded. A variant adds its pipeline class, its prompts and its control images.

Legend: B samples, S image tokens, T text tokens, P channels of a token, D width of the text embeddings.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLProcessor

from mixres.batch import Batch, TextEmbeds
from mixres.errors import UserError
from mixres.geometry import PATCH, Grid, Size, control_area, control_size, pack_latents, unpack_latents
from mixres.models import hub
from mixres.models.family import AreaRule, ControlSizes
from mixres.models.qwen import layers
from mixres.models.qwen.processor import load_processor, torchvision_imports
from mixres.models.qwen.rope import TABLE_HALF, text_start
from mixres.models.qwen_multi_resolution_patch import (
    TEXT_IS_PADDED,
    patch_qwen_model_for_multi_resolution,
    patch_state,
)
from mixres.models.stock_family import StockFamily

TOKENIZER_MAX_LENGTH = 1024  # `tokenizer_max_length` of the stock pipelines
STOCK_CONTROL_AREA = 1024 * 1024  # pixels of a control for the VAE in all stock edit pipelines
_VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_ENTRY_OVERHEAD = 5 * 1024  # bytes: the header, the rest of the last block of the disk, a part of folder and index


class QwenFamily(StockFamily):
    """Base class of the variants; see `mixres.models.family.Family` for what each method gives."""

    label: ClassVar[str]  # what messages call it
    components: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer", "processor")
    vae_class: ClassVar[Any] = AutoencoderKLQwenImage
    processor_class: ClassVar[Any] = Qwen2VLProcessor
    transformer_class: ClassVar[Any] = QwenImageTransformer2DModel
    text_width: ClassVar[tuple[str, int]] = ("joint_attention_dim", 3584)  # its name in the class, and default there
    quantize_exclusions: ClassVar[tuple[str, ...]] = layers.QUANTIZE_EXCLUSIONS
    patch, patch_state = staticmethod(patch_qwen_model_for_multi_resolution), staticmethod(patch_state)
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "scheduler/scheduler_config.json": {
            "base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9,
        },
    }  # fmt: skip
    max_prompt_tokens = TOKENIZER_MAX_LENGTH  # the edit pipelines do not hold to it
    stock_control_area = STOCK_CONTROL_AREA
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = layers.LORA_PRESETS
    comfyui_prefix = layers.COMFYUI_PREFIX
    negative_prompt = " "
    comfyui_controls: ClassVar[str | None] = (
        "VAE Encode it for ReferenceLatent; leave vae of the text node unconnected, which would scale to 1024 x 1024"
    )

    # A variant's prompts and controls.

    def text_controls(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Image.Image]:
        """The controls as the text encoder is handed them."""
        pairs = zip(controls, sizes.text, strict=True)
        return [pipeline.image_processor.resize(control, size.height, size.width) for control, size in pairs]

    def template_text(self, prompt: str, controls: int) -> str:
        """What stands in the pipeline's prompt template: `prompt`, behind what names the controls."""
        return prompt

    def control_call(self, controls: Sequence[Image.Image]) -> dict[str, Any]:
        """How `encode_prompt` of the stock pipeline takes the controls, and what else."""
        raise NotImplementedError

    def record_problem(self, *, controls: int, prompt: str) -> str | None:
        """See `Family`."""
        markers = [token for token in _VISION_TOKENS if token in prompt]
        if problem := super().record_problem(controls=controls, prompt=prompt):
            return problem
        return f"the prompt contains {markers[0]}, a marker of the text encoder: take it out" if markers else None

    def encoding_environment(self) -> str:
        """The kind of processor: with and without torchvision they round differently."""
        return "torchvision" if torchvision_imports() else "pil"

    def own_parts(self, folder: Path, names: Sequence[str]) -> dict[str, Any]:
        """The processor."""
        processor = {"processor": folder / "processor"} if "processor" in names else {}
        return {name: load_processor(files, self.processor_class) for name, files in processor.items()}

    # Configuration files.

    def pixels_per_token(self) -> int:
        """See `Family`: 16 for Qwen-Image, from the VAE's configuration."""
        stages = self._config("vae/config.json").get("temperal_downsample")
        halvings: int = 3 if stages is None else len(stages)  # the class's default has three stages
        return PATCH << halvings

    def entry_bytes(self, *, image_tokens: int, text_tokens: int, mask_tokens: int, dtype: torch.dtype) -> int:
        """See `Family`."""
        latent_width, text_width = self.token_widths()
        values = image_tokens * latent_width + text_tokens * text_width
        return values * dtype.itemsize + 4 * mask_tokens + _ENTRY_OVERHEAD

    # Records before they are encoded.

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """One area for VAE and text encoder, unless a variant has two.

        Raises:
            UserError: `text_area` is given.
        """
        if text_area is not None:
            raise UserError(
                f"data.resize.control.text_area: {self.label} shows VAE and text encoder the same image: leave it "
                "out, data.resize.control.area is for both"
            )
        return {"control_area": area}

    def control_sizes(
        self,
        target: Size,
        controls: Sequence[Size],
        rules: Mapping[str, AreaRule] | None = None,
        aligned: Sequence[bool] = (),
    ) -> ControlSizes:
        """See `Family`. Where the family has no area for the text encoder, that gets what the VAE gets."""
        rules = self.control_areas(STOCK_CONTROL_AREA, None) if rules is None else rules
        assert len(aligned) in (0, len(controls)), (aligned, controls)

        def resized(rule: str) -> list[Size]:
            area = control_area(rules[rule], target) if controls else 0
            return [control_size(control, area=area) for control in controls]

        pairs = itertools.zip_longest(resized("control_area"), aligned)
        vae = tuple(target if same else size for size, same in pairs)
        return ControlSizes(vae, tuple(resized("text_area")) if "text_area" in rules else vae)

    def load_preprocessors(self) -> Any:
        """See `Family`."""
        words = [name for name in self.components if name in ("tokenizer", "processor")]
        folder = hub.pipeline_folder(self.path, words, revision=self.revision)
        parts = self.own_parts(folder, words)
        if "tokenizer" in words:
            parts["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer")
        vae = self.vae_skeleton()
        return self.pipeline_class(**parts, vae=vae, text_encoder=None, transformer=None, scheduler=None)

    def text_tokens(self, preprocessors: Any, *, prompt: str, sizes: ControlSizes) -> int:
        """See `Family`. Each control stands once in the template's text, as one token before it is expanded."""
        pipeline, controls = preprocessors, len(sizes.text)
        text = self.template_text(prompt, controls)
        tokenizer = pipeline.processor.tokenizer if controls else pipeline.tokenizer
        words = len(tokenizer(pipeline.prompt_template_encode.format(text), verbose=False)["input_ids"])
        seen = 0
        for size in sizes.text:
            processor = pipeline.processor.image_processor
            seen += processor.get_number_of_image_patches(size.height, size.width) // processor.merge_size**2
        count: int = words - controls + seen - pipeline.prompt_template_encode_start_idx
        return count

    def text_problem(self, grids: Sequence[Grid], text_tokens: int) -> str | None:
        """See `Family`. Text stands behind the largest image in a table of fixed length."""
        room = TABLE_HALF - text_start(grids)
        if text_tokens <= room:
            return None
        return (
            f"{text_tokens} text tokens, those of its controls included, are more than the {room} that this base has "
            "positions for: lower data.resize.control, or shorten the prompt"
        )

    def previews(
        self,
        preprocessors: Any,
        *,
        target: Image.Image,
        target_size: Size,
        controls: Sequence[Image.Image],
        sizes: ControlSizes,
    ) -> dict[str, Image.Image]:
        """See `Family`."""
        found = {"target": self.vae_preview(preprocessors, target, target_size)}
        for number, image in enumerate(self.vae_controls(preprocessors, controls, sizes), 1):
            found[f"control {number}, VAE"] = self.vae_preview(preprocessors, image, sizes.vae[number - 1])
        for number, image in enumerate(self.text_controls(preprocessors, controls, sizes), 1):
            found[f"control {number}, text encoder"] = _text_preview(preprocessors, image)
        return found

    # Encoding.

    @torch.no_grad()
    def encode_prompt(
        self, encoders: Any, *, controls: Sequence[Image.Image], prompt: str, sizes: ControlSizes
    ) -> TextEmbeds:
        """See `Family`."""
        call = self.control_call(self.text_controls(encoders, controls, sizes))
        embeds, mask = encoders.encode_prompt(prompt=prompt, device=encoders.device, **call)
        assert mask is None, "one prompt is never padded"
        return TextEmbeds(embeds[0].cpu())

    @torch.no_grad()
    def encode_image(self, pipeline: Any, image: Image.Image, size: Size) -> Tensor:
        """See `StockFamily`.

        The arithmetic of `_encode_vae_image` in the edit pipelines, in its order; the text-to-image pipeline has none.
        """
        vae = pipeline.vae
        pixels = self.vae_pixels(pipeline, image, size).to(device=pipeline._execution_device, dtype=vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode()
        mean, std = _statistics(vae, latents)
        return self.packed(((latents - mean) / std)[0]).cpu()

    def packed(self, latents: Tensor) -> Tensor:
        """`(C, 1, height, width)` of an image -> `(S, P)`."""
        return pack_latents(latents)

    def unpacked(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Inverse of `packed`."""
        return unpack_latents(tokens, grid)

    def vae_pixels(self, pipeline: Any, image: Image.Image, size: Size) -> Tensor:
        """`(1, channels, 1, height, width)` in [-1, 1]: the image as the VAE gets it."""
        pixels: Tensor = pipeline.image_processor.preprocess(image, size.height, size.width).unsqueeze(2)
        return pixels

    def vae_preview(self, pipeline: Any, image: Image.Image, size: Size) -> Image.Image:
        """The image as the VAE gets it."""
        pixels = self.vae_pixels(pipeline, image, size)[:, :, 0]
        shown: Image.Image = pipeline.image_processor.postprocess(pixels)[0]
        return shown

    # The transformer.

    def transformer_skeleton(self) -> Any:
        """See `Family`.

        Raises:
            UserError: it has positions of layers, for samples with several target images.
        """
        if self._config("transformer/config.json").get("use_layer3d_rope"):
            why = "its positions are those of Qwen-Image-Layered (QwenEmbedLayer3DRope), which is not supported"
            raise UserError(f"{hub.KEY}: {self.path}: {why}: a sample has several target images there, and one here")
        return super().transformer_skeleton()

    def token_widths(self) -> tuple[int, int]:
        """See `Family`."""
        config = self._config("transformer/config.json")
        return config.get("in_channels", 64), config.get(*self.text_width)

    def untrained_modules(self, transformer: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return layers.untrained_modules(transformer)

    def predict_velocity(
        self,
        transformer: nn.Module,
        batch: Batch,
        noisy_latents: Tensor,
        sigmas: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """See `Family`. The stock pipeline's `timestep / 1000` is the sigma."""
        assert guidance is None
        dtype = next(p.dtype for p in transformer.parameters() if p.is_floating_point())
        velocity: Tensor = transformer(
            hidden_states=noisy_latents.to(dtype),
            timestep=sigmas.to(dtype),
            encoder_hidden_states=batch.prompt_embeds.to(dtype),
            img_shapes=[[tuple(grid) for grid in grids] for grids in batch.img_shapes],
            return_dict=False,
            **self.layout_call(batch),
        )[0]
        return velocity

    def layout_call(self, batch: Batch) -> dict[str, Any]:
        """What tells the patched transformer where the text of each sample is."""
        known = {"txt_seq_lens": list(batch.text_lengths)} if batch.layout == "packed" else {TEXT_IS_PADDED: True}
        return {"encoder_hidden_states_mask": batch.prompt_mask, "attention_kwargs": known}

    def comfyui_markers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Family`."""
        return {layers.COMFYUI_ZERO_COND_T: torch.empty(0)} if config.get("zero_cond_t") else {}

    # Sampling.

    def default_size(self, control: Size | None) -> Size:
        """See `Family`: 1024 x 1024 pixels in area, square without a control."""
        return control_size(control or Size(1, 1), area=STOCK_CONTROL_AREA)

    def guide(self, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
        """See `Family`. Each token keeps the length that its velocity has without guidance."""
        guided = super().guide(positive, negative, guidance)
        length: Tensor = positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return guided * length

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor, grid: Grid) -> Image.Image:
        """See `Family`. The inverse of `_encode_vae_image` (diffusers, pipeline_qwenimage_edit.py)."""
        vae = pipeline.vae
        unpacked = self.unpacked(latents.to(device=vae.device, dtype=vae.dtype), grid)[None]
        mean, std = _statistics(vae, unpacked)
        pixels = vae.decode(unpacked * std + mean, return_dict=False)[0][:, :, 0]
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
        return image


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, to be broadcast over `(B, C, frames, rows, columns)`."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return torch.tensor(mean).view(1, -1, 1, 1, 1).to(latents), torch.tensor(std).view(1, -1, 1, 1, 1).to(latents)


def _text_preview(pipeline: Any, image: Image.Image) -> Image.Image:
    """The image as the text encoder gets it: the processor's patches put back in their places.

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
