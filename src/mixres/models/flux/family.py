"""FLUX.1: text to image, and Kontext, which edits an image. Text is 512 tokens of T5 and one vector of CLIP.

Promise: latents, prompt embeddings and pooled embeddings are those of the stock pipelines, bit for bit. Targets have
any sides that are multiples of 16. Nothing is cropped.

Legend: S image tokens, T text tokens, P channels of a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from mixres.batch import TextEmbeds
from mixres.geometry import Size, control_size
from mixres.models.family import AreaRule, ControlSizes, EmbeddedGuidance
from mixres.models.flux import layers
from mixres.models.flux_multi_resolution_patch import patch_flux_model_for_multi_resolution, patch_state
from mixres.models.id_family import AUTOENCODER, TEXT_TOKENS, IdFamily
from mixres.models.stock_family import no_control_areas

STOCK_CONTROL_AREA = 1024 * 1024  # pixels of Kontext's reference
_MULTIPLE_OF = 16  # of a reference's sides
_TRAINING_GUIDANCE = 1.0  # as in the commands of diffusers' training scripts, in musubi-tuner and in ai-toolkit


class FluxFamily(IdFamily):
    """What text to image and Kontext share."""

    # T5's; the end of text stands behind them. CLIP sees the first 75 of its own, whatever follows.
    max_prompt_tokens = TEXT_TOKENS - 1
    tokenizer_folder = "tokenizer_2"
    stock_control_area = STOCK_CONTROL_AREA
    components = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    vae_class = AutoencoderKL
    transformer_class = FluxTransformer2DModel
    lora_presets = layers.LORA_PRESETS
    quantize_exclusions = layers.QUANTIZE_EXCLUSIONS
    patch, patch_state = staticmethod(patch_flux_model_for_multi_resolution), staticmethod(patch_state)
    comfyui_prefix = layers.COMFYUI_PREFIX
    negative_prompt = ""  # where a base without embedded guidance is led away from one
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "transformer/config.json": {"guidance_embeds": True},
        "vae/config.json": AUTOENCODER,
        "scheduler/scheduler_config.json": {"use_dynamic_shifting": True},
    }
    sampling_guidance: ClassVar[float]  # of the model card

    # Configuration files.

    def embedded_guidance(self) -> EmbeddedGuidance | None:
        """See `Family`."""
        embeds = self._config("transformer/config.json").get("guidance_embeds", False)
        return EmbeddedGuidance(_TRAINING_GUIDANCE, self.sampling_guidance) if embeds else None

    def token_widths(self) -> tuple[int, int]:
        """See `Family`."""
        config = self._config("transformer/config.json")
        return config.get("in_channels", 64), config.get("joint_attention_dim", 4096)  # the class's defaults

    def pooled_width(self) -> int:
        """See `Family`."""
        width: int = self._config("transformer/config.json").get("pooled_projection_dim", 768)
        return width

    # Encoding.

    @torch.no_grad()
    def encode_prompt(
        self, encoders: Any, *, controls: Sequence[Image.Image], prompt: str, sizes: ControlSizes
    ) -> TextEmbeds:
        """See `Family`. It does not depend on the controls."""
        embeds, pooled, _ = encoders.encode_prompt(prompt=prompt, device=encoders.device)
        return TextEmbeds(embeds[0].cpu(), pooled[0].cpu())

    def image_ids(self, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """`(S, 3)` int64: image, row and column of each token. As in `prepare_latents`: the reference is image 1.

        The pipelines hold them in the prompt's dtype: in bfloat16 they are exact up to 256, sides of 4096 pixels.
        """
        parts = [
            torch.cartesian_prod(torch.tensor([number]), torch.arange(rows), torch.arange(columns))
            for number, (_, rows, columns) in enumerate(grids)
        ]
        return torch.cat(parts)

    def text_ids(self, tokens: int) -> Tensor:
        """`(T, 3)` zeros."""
        return torch.zeros(tokens, 3, dtype=torch.int64)

    # Sampling.

    def default_size(self, control: Size | None) -> Size:
        """See `Family`."""
        return preferred_size(control or Size(1, 1))


class Flux(FluxFamily):
    """The stock `FluxPipeline`."""

    name = "flux"
    label = "FLUX.1"
    pipeline_class = FluxPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("black-forest-labs/FLUX.1-dev",)
    controls = (0, 0)
    controls_problem = "FLUX.1 takes no control images, there are {}: train FLUX.1 Kontext, or take them out"
    comfyui_controls: ClassVar[str | None] = None
    sampling_guidance = 3.5

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """See `no_control_areas`."""
        return no_control_areas(self.label, area, text_area, stock=STOCK_CONTROL_AREA)


class FluxKontext(FluxFamily):
    """The stock `FluxKontextPipeline`: text to image, and edits of one image."""

    name = "flux_kontext"
    label = "FLUX.1 Kontext"
    pipeline_class = FluxKontextPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("black-forest-labs/FLUX.1-Kontext-dev",)
    controls = (0, 1)
    controls_problem = "FLUX.1 Kontext takes at most one control image, there are {}; give it one or none"
    comfyui_controls: ClassVar[str | None] = "VAE Encode it for ReferenceLatent"
    sampling_guidance = 2.5

    def control_size(self, source: Size, area: int) -> Size:
        """See `IdFamily`. Of the stock area it is one of the pipeline's own sizes, of the nearest aspect.

        For other areas the pipeline has no sizes: so many pixels at the reference's own aspect, as near as whole
        tokens allow.
        """
        if area == STOCK_CONTROL_AREA:
            return preferred_size(source)
        return control_size(source, area=area, multiple_of=_MULTIPLE_OF)


def preferred_size(source: Size) -> Size:
    """The size of those that Kontext was trained on whose aspect is nearest, as its pipeline chooses it."""
    aspect = source.width / source.height
    _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return Size(width, height)
