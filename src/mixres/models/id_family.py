"""What families share whose text encoders see no images, and what those of them share whose positions are ids.

Promise: as in `mixres.models.family`. A family adds its positions, its VAE and how its pipeline is called.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mixres.batch import Batch
from mixres.errors import UserError
from mixres.geometry import PATCH, Grid, Size, control_area, pack_latents, unpack_latents
from mixres.models.family import AreaRule, ControlSizes
from mixres.models.stock_family import StockFamily

# Of FLUX.1's base, and of Z-Image's (their vae/config.json), where they differ from the class's defaults.
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
TEXT_TOKENS = 512  # of every prompt: the pipelines pad to it, and the transformer attends to the padding too
_ENTRY_OVERHEAD = 5 * 1024  # bytes: the header, the rest of the last block of the disk, a part of folder and index
_PROMPTS = 2  # of an entry at most: its own, and the empty one


class SeparateTextFamily(StockFamily):
    """See `mixres.models.family.Family` for what each method gives."""

    label: ClassVar[str]  # what messages call it
    prompts_alone = True

    # What a family adds.

    def control_size(self, source: Size, area: int) -> Size:
        """The size of a control that is not aligned, of at most about `area` pixels."""
        raise NotImplementedError

    # Configuration files.

    def flow_shift(self, steps: int | None = None) -> dict[str, float]:
        """See `Family`. Without dynamic shifting (FLUX.1-schnell, Z-Image) the scheduler's own, at every size."""
        constants = super().flow_shift(steps)
        config = self._config("scheduler/scheduler_config.json")
        if config.get("use_dynamic_shifting"):
            return constants
        constant = math.log(config.get("shift", 1.0))
        return constants | {"base_shift": constant, "max_shift": constant}

    def pixels_per_token(self) -> int:
        """See `Family`: 16, from the VAE's configuration."""
        stages = self._config("vae/config.json").get("block_out_channels", (128, 256, 512, 512))
        return int(PATCH << (len(stages) - 1))

    def entry_bytes(self, *, image_tokens: int, text_tokens: int, mask_tokens: int, dtype: torch.dtype) -> int:
        """See `Family`."""
        latent_width, text_width = self.token_widths()
        values = image_tokens * latent_width + text_tokens * text_width + _PROMPTS * self.pooled_width()
        return values * dtype.itemsize + 4 * mask_tokens + _ENTRY_OVERHEAD

    # Records before they are encoded.

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """The text encoders see no images.

        Raises:
            UserError: `text_area` is given.
        """
        if text_area is not None:
            raise UserError(
                f"data.resize.control.text_area: {self.label} shows its text encoder no images: leave it out"
            )
        return {"control_area": area}

    def control_sizes(
        self,
        target: Size,
        controls: Sequence[Size],
        rules: Mapping[str, AreaRule] | None = None,
        aligned: Sequence[bool] = (),
    ) -> ControlSizes:
        """See `Family`. The text encoders see none."""
        if not controls:
            return ControlSizes()
        area = control_area((rules or self.control_areas(self.stock_control_area, None))["control_area"], target)
        pairs = itertools.zip_longest(controls, aligned)
        return ControlSizes(vae=tuple(target if same else self.control_size(size, area) for size, same in pairs))

    def load_preprocessors(self) -> Any:
        """See `Family`. Prompts need no tokenizer to be counted."""
        absent = dict.fromkeys((*self.components, "transformer", "scheduler"))
        return self.pipeline_class(**{**absent, "vae": self.vae_skeleton()})

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
        names = ["target", *(f"control {number}" for number in range(1, len(controls) + 1))]
        images = zip(names, (target, *controls), (target_size, *sizes.vae), strict=True)
        processor = preprocessors.image_processor
        return {
            name: processor.postprocess(processor.preprocess(image, size.height, size.width), output_type="pil")[0]
            for name, image, size in images
        }

    # Encoding.

    @torch.no_grad()
    def encode_image(self, pipeline: Any, image: Image.Image, size: Size) -> Tensor:
        """See `StockFamily`.

        With the arithmetic of Kontext's `_encode_vae_image`, which pipelines of text to image do not have.
        """
        vae = pipeline.vae
        pixels = pipeline.image_processor.preprocess(image, size.height, size.width)
        latents = vae.encode(pixels.to(device=pipeline._execution_device, dtype=vae.dtype)).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return pack_latents(latents.transpose(0, 1)).cpu()

    # Sampling.

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor, grid: Grid) -> Image.Image:
        """See `Family`. The end of the stock `__call__`."""
        vae = pipeline.vae
        unpacked = unpack_latents(latents.to(device=vae.device, dtype=vae.dtype), grid).transpose(0, 1)
        pixels = vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
        return image


class IdFamily(SeparateTextFamily):
    """See `mixres.models.family.Family` for what each method gives."""

    comfyui_alpha = False  # FLUX.2's stock pipelines refuse a file that has it
    padded_text = TEXT_TOKENS

    # What a family adds.

    def image_ids(self, grids: Sequence[Grid]) -> Tensor:
        """`(S, n)` int64: the positions of the tokens of a sample's images, target first."""
        raise NotImplementedError

    def text_ids(self, tokens: int) -> Tensor:
        """`(T, n)` int64: the positions of so many text tokens."""
        raise NotImplementedError

    # Records before they are encoded.

    def text_tokens(self, preprocessors: Any, *, prompt: str, sizes: ControlSizes) -> int:
        """See `Family`."""
        return TEXT_TOKENS

    def text_problem(self, grids: Sequence[Grid], text_tokens: int) -> str | None:
        """See `Family`. Positions are computed, not looked up."""
        return None

    # The transformer.

    def predict_velocity(
        self,
        transformer: nn.Module,
        batch: Batch,
        noisy_latents: Tensor,
        sigmas: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """See `Family`. The stock pipeline's `timestep / 1000` is the sigma."""
        dtype = next(p.dtype for p in transformer.parameters() if p.is_floating_point())
        device = noisy_latents.device
        images = [self.image_ids(grids) for grids in batch.img_shapes]
        if batch.layout == "packed":
            img_ids, txt_ids = torch.cat(images), torch.cat([self.text_ids(n) for n in batch.text_lengths])
        else:  # what stands at padding is not looked at
            longest = pad_sequence(images, batch_first=True)
            img_ids = nn.functional.pad(longest, (0, 0, 0, noisy_latents.shape[1] - longest.shape[1]))
            txt_ids = self.text_ids(batch.prompt_embeds.shape[1])
        pooled = batch.pooled_embeds
        velocity: Tensor = transformer(
            hidden_states=noisy_latents.to(dtype),
            encoder_hidden_states=batch.prompt_embeds.to(dtype),
            timestep=sigmas.to(dtype),
            img_ids=img_ids.to(device),
            txt_ids=txt_ids.to(device),
            guidance=None if guidance is None else guidance.to(dtype),
            joint_attention_kwargs={
                "image_lengths": [len(ids) for ids in images],
                "text_lengths": list(batch.text_lengths),
            },
            return_dict=False,
            **({} if pooled is None else {"pooled_projections": pooled.to(dtype)}),
        )[0]
        return velocity
