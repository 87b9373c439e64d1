"""Z-Image: text to image, no control images.

Promise: latents and prompt embeddings are those of the stock pipeline, bit for bit. Targets have any sides that are
multiples of 16. Nothing is cropped.

The transformer fills text and image of each sample up to multiples of 32 with learned padding, alone as in a batch.
Counts of tokens here and in reports are without it.

Legend: B samples, S image tokens, T text tokens, P channels of a token, D width of the text embeddings.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from mixres.batch import Batch, TextEmbeds
from mixres.geometry import PATCH, Grid, Size, pack_latents, unpack_latents
from mixres.models import hub
from mixres.models.family import AreaRule, ControlSizes
from mixres.models.id_family import AUTOENCODER, SeparateTextFamily
from mixres.models.stock_family import no_control_areas
from mixres.models.z_image import layers
from mixres.models.z_image_multi_resolution_patch import patch_state, patch_z_image_model_for_multi_resolution


class ZImage(SeparateTextFamily):
    """The stock `ZImagePipeline`, with Qwen3 as its text encoder."""

    name = "z_image"
    label = "Z-Image"
    pipeline_class = ZImagePipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo")
    controls = (0, 0)
    controls_problem = "Z-Image takes no control images, there are {}: train an edit model, or take them out"
    max_prompt_tokens = 512 - 8  # eight tokens of the chat template stand around the prompt; what is over is cut
    stock_control_area = 1024 * 1024  # the default of a key that must be left as it is
    components = ("vae", "text_encoder", "tokenizer")
    vae_class = AutoencoderKL
    transformer_class = ZImageTransformer2DModel
    lora_presets = layers.LORA_PRESETS
    quantize_exclusions = layers.QUANTIZE_EXCLUSIONS
    patch, patch_state = staticmethod(patch_z_image_model_for_multi_resolution), staticmethod(patch_state)
    comfyui_prefix = layers.COMFYUI_PREFIX
    negative_prompt = ""
    comfyui_controls: ClassVar[str | None] = None
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "transformer/config.json": {},
        "vae/config.json": AUTOENCODER,
        "scheduler/scheduler_config.json": {"shift": 3.0},
    }

    # Configuration files.

    def token_widths(self) -> tuple[int, int]:
        """See `Family`."""
        config = self._config("transformer/config.json")
        return PATCH**2 * config.get("in_channels", 16), config.get("cap_feat_dim", 2560)  # the class's defaults

    # Records before they are encoded.

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """See `no_control_areas`."""
        return no_control_areas(self.label, area, text_area, stock=self.stock_control_area)

    def load_preprocessors(self) -> Any:
        """See `Family`. In place of the text encoder stands what hands on the tokens that it would see."""
        folder = hub.pipeline_folder(self.path, ("tokenizer",), revision=self.revision)
        pipeline = super().load_preprocessors()
        pipeline.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        pipeline.text_encoder = _tokens_alone
        return pipeline

    def text_tokens(self, preprocessors: Any, *, prompt: str, sizes: ControlSizes) -> int:
        """See `Family`."""
        (tokens,) = preprocessors._encode_prompt(prompt, device=torch.device("cpu"))
        return len(tokens)

    def text_problem(self, grids: Sequence[Grid], text_tokens: int) -> str | None:
        """See `Family`. Positions are looked up in tables: text, then the image behind it; its rows; its columns."""
        frames, *sides = self._config("transformer/config.json").get("axes_lens", (1024, 512, 512))
        (grid,) = grids
        text = -(-text_tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF
        if text + 1 < frames and all(a <= b for a, b in zip(grid[1:], sides, strict=True)):
            return None
        token = self.pixels_per_token()
        height, width = (side * token for side in sides)
        return (
            f"{text_tokens} text tokens and {grid.columns * token}x{grid.rows * token} pixels are more than the "
            f"{frames - 2} tokens and {width}x{height} pixels that this base has positions for: shorten the prompt, or "
            "lower data.resize.target.max_pixels"
        )

    # Encoding.

    @torch.no_grad()
    def encode_prompt(
        self, encoders: Any, *, controls: Sequence[Image.Image], prompt: str, sizes: ControlSizes
    ) -> TextEmbeds:
        """See `Family`."""
        (embeds,), _ = encoders.encode_prompt(prompt, device=encoders.device, do_classifier_free_guidance=False)
        return TextEmbeds(embeds.cpu())

    # The transformer.

    def predict_velocity(
        self,
        transformer: nn.Module,
        batch: Batch,
        noisy_latents: Tensor,
        sigmas: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """See `Family`. The transformer takes lists and 1 - sigma, as float32, and returns the negative velocity."""
        dtype = next(p.dtype for p in transformer.parameters() if p.is_floating_point())
        packed = batch.layout == "packed"
        images = _rows(noisy_latents.to(dtype), batch.target_lengths, packed)
        outputs = transformer(
            x=[unpack_latents(rows, grids[0]) for rows, grids in zip(images, batch.img_shapes, strict=True)],
            t=1 - sigmas,
            cap_feats=_rows(batch.prompt_embeds.to(dtype), batch.text_lengths, packed),
            joint_attention_kwargs={"packed": True} if packed else None,
            return_dict=False,
        )[0]
        velocities = [-pack_latents(output) for output in outputs]
        if packed:
            return torch.cat(velocities)[:, None]
        longest = pad_sequence(velocities, batch_first=True)
        return nn.functional.pad(longest, (0, 0, 0, noisy_latents.shape[1] - longest.shape[1]))

    # Sampling.

    def default_size(self, control: Size | None) -> Size:
        """See `Family`."""
        return Size(1024, 1024)

    def noise(self, grid: Grid, *, seed: int, dtype: torch.dtype) -> Tensor:
        """See `Family`. The pipeline denoises in float32 whatever the transformer computes in."""
        return super().noise(grid, seed=seed, dtype=torch.float32)

    def guide(self, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
        """See `Family`. The pipeline guides from 0 on: what is no guidance elsewhere, 1, is its 0."""
        return super().guide(positive.float(), negative.float(), 1 + guidance)


def _tokens_alone(*, input_ids: Tensor, **_: Any) -> SimpleNamespace:
    """A text encoder's output of one number a token."""
    return SimpleNamespace(hidden_states=(input_ids[..., None],) * 2)


def _rows(tokens: Tensor, lengths: Sequence[int], packed: bool) -> list[Tensor]:
    """The valid tokens of each sample, `(tokens, width)`."""
    if packed:
        return list(torch.split(tokens[:, 0], list(lengths)))
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)]
