"""FLUX.2: text to image and edits with any number of reference images, each of its own size.

Promise: latents and prompt embeddings are those of the stock pipelines, bit for bit. The pipelines cut up to 15 pixels
off a reference, so that its sides are multiples of 16; here it is resized to that size instead, and the pipeline gets
it at that size.

Legend: B samples, S image tokens, T text tokens, P channels of a token, D width of the text embeddings.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor

from mixres.batch import TextEmbeds
from mixres.geometry import Grid, Size
from mixres.models.family import ControlSizes
from mixres.models.flux2 import layers
from mixres.models.flux2_multi_resolution_patch import patch_flux2_model_for_multi_resolution, patch_state
from mixres.models.id_family import TEXT_TOKENS, IdFamily

STOCK_CONTROL_AREA = 1024 * 1024  # pixels of a reference; the stock pipelines scale larger ones down, none up
_MULTIPLE_OF = 16  # of a reference's sides
_MIN_SIDE = 64  # of a reference; the stock pipelines refuse smaller ones
_FRAME_STEP = 10  # between the positions of an image and the next on the first axis
_STOCK_STEPS = 50  # denoising steps of the stock pipelines where none are given
_LONG_FROM = 4300  # tokens


class Flux2Klein(IdFamily):
    """The stock `Flux2KleinPipeline`, with Qwen3 as its text encoder."""

    name = "flux2"
    label = "FLUX.2"
    pipeline_class = Flux2KleinPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("black-forest-labs/FLUX.2-klein-base-4B",)
    controls: ClassVar[tuple[int, int | None]] = (0, None)
    # Twelve tokens of the chat template stand around the prompt; what is over is cut.
    max_prompt_tokens = TEXT_TOKENS - 12
    stock_control_area = STOCK_CONTROL_AREA
    components = ("vae", "text_encoder", "tokenizer")
    vae_class = AutoencoderKLFlux2
    noise_patch = 1
    transformer_class = Flux2Transformer2DModel
    lora_presets = layers.LORA_PRESETS
    quantize_exclusions = layers.QUANTIZE_EXCLUSIONS
    patch, patch_state = staticmethod(patch_flux2_model_for_multi_resolution), staticmethod(patch_state)
    comfyui_prefix, comfyui_names = layers.COMFYUI_PREFIX, layers.COMFYUI_NAMES
    # It knows FLUX by this layout, asks for FLUX.1's biases then, and has no names for the modulations. Source: as in
    # `layers`, comfy/model_detection.py at 0b61ce5baa9e (`convert_diffusers_mmdit`).
    comfyui_reads_layout = False
    negative_prompt = ""
    comfyui_controls: ClassVar[str | None] = "VAE Encode it for ReferenceLatent"
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "transformer/config.json": {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "text_encoder/config.json": {"hidden_size": 2560},
        "scheduler/scheduler_config.json": {},
    }  # fmt: skip

    # Configuration files.

    def training_notice(self) -> str | None:
        """See `Family`. Training on the velocity undoes what distillation to four steps has taught."""
        distilled = self._config("model_index.json").get("is_distilled")
        return f"{self.path} is distilled: train on its -base; the LoRA works on this one too" if distilled else None

    def flow_shift(self, steps: int | None = None) -> dict[str, float]:
        """See `Family`. The pipelines ask no scheduler, but `compute_empirical_mu` of tokens and steps.

        For a number of steps it is a line up to 4,300 tokens; behind, it is another line, whatever the steps.
        """
        anchors = {"base_seq_len": 256, "max_seq_len": 4096}
        short = (compute_empirical_mu(tokens, steps or _STOCK_STEPS) for tokens in anchors.values())
        # The line behind is that of 200 steps: taken from there up to the anchors.
        long = (compute_empirical_mu(tokens, 200) for tokens in anchors.values())
        return {
            **anchors,
            **dict(zip(("base_shift", "max_shift"), short, strict=True)),
            "long_from": _LONG_FROM,
            **dict(zip(("long_base_shift", "long_max_shift"), long, strict=True)),
        }

    def token_widths(self) -> tuple[int, int]:
        """See `Family`."""
        config = self._config("transformer/config.json")
        return config.get("in_channels", 128), config.get("joint_attention_dim", 15360)  # the class's defaults

    # Encoding.

    def control_size(self, source: Size, area: int) -> Size:
        """See `IdFamily`. As the stock `__call__` makes it, with `area` for its 1024 x 1024, and none enlarged."""
        if source.width * source.height > area:
            scale = math.sqrt(area / (source.width * source.height))
            source = Size(int(source.width * scale), int(source.height * scale))
        return Size(*(max(_MIN_SIDE, side // _MULTIPLE_OF * _MULTIPLE_OF) for side in source))

    @torch.no_grad()
    def encode_prompt(
        self, encoders: Any, *, controls: Sequence[Image.Image], prompt: str, sizes: ControlSizes
    ) -> TextEmbeds:
        """See `Family`. It does not depend on the controls."""
        embeds, _ = encoders.encode_prompt(prompt=prompt, device=encoders.device)
        return TextEmbeds(embeds[0].cpu())

    @torch.no_grad()
    def encode_image(self, pipeline: Any, image: Image.Image, size: Size) -> Tensor:
        """See `StockFamily`."""
        pixels = pipeline.image_processor.preprocess(image, size.height, size.width)
        pixels = pixels.to(device=pipeline._execution_device, dtype=pipeline.vae.dtype)
        packed: Tensor = pipeline._pack_latents(pipeline._encode_vae_image(pixels, generator=None))[0]
        return packed.contiguous().cpu()

    def image_ids(self, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """`(S, 4)` int64: image, row, column, 0 of each token. As `_prepare_latent_ids` and `_prepare_image_ids`.

        The target is image 0, references are 10, 20, ...
        """
        parts = [
            torch.cartesian_prod(
                torch.tensor([_FRAME_STEP * number]), torch.arange(rows), torch.arange(columns), torch.arange(1)
            )
            for number, (_, rows, columns) in enumerate(grids)
        ]
        return torch.cat(parts)

    def text_ids(self, tokens: int) -> Tensor:
        """`(T, 4)` int64: 0, 0, 0 and the place of each token."""
        return torch.nn.functional.pad(torch.arange(tokens)[:, None], (3, 0))

    # Sampling.

    def default_size(self, control: Size | None) -> Size:
        """See `Family`: the control's, or 1024 x 1024."""
        return self.control_size(control or Size(1024, 1024), STOCK_CONTROL_AREA)

    def schedule(self, pipeline: Any, steps: int) -> tuple[Any, Sequence[float] | None, dict[str, float]]:
        """See `Family`. The shift depends on the steps."""
        return *super().schedule(pipeline, steps)[:2], self.flow_shift(steps)

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor, grid: Grid) -> Image.Image:
        """See `Family`. The end of the stock `__call__`."""
        vae = pipeline.vae
        packed = latents.to(device=vae.device, dtype=vae.dtype)
        mean, variance = (x.view(1, -1, 1, 1).to(packed) for x in (vae.bn.running_mean, vae.bn.running_var))
        rows = packed.T.reshape(1, -1, grid.rows, grid.columns)
        patches = rows * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        pixels = vae.decode(self.pipeline_class._unpatchify_latents(patches), return_dict=False)[0]
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
        return image
