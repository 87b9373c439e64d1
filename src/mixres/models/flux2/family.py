"""FLUX.2: text to image and edits with any number of reference images, each of its own size.

Promise: latents and prompt embeddings are those of the stock pipelines, bit for bit. The pipelines cut up to 15 pixels
off a reference, so that its sides are multiples of 16; here it is resized to that size instead, and the pipeline gets
it at that size.

Legend: B samples, S image tokens, T text tokens, P channels of a token, D width of the text embeddings.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from mixres.batch import Batch, Sample, TextEmbeds
from mixres.errors import UserError
from mixres.geometry import PATCH, Grid, Size, control_area
from mixres.models import hub
from mixres.models.edit_mask import mask_on_grid
from mixres.models.family import AreaRule, ControlSizes, EmbeddedGuidance, PatchState
from mixres.models.flux2 import layers
from mixres.models.flux2_multi_resolution_patch import patch_flux2_model_for_multi_resolution, patch_state
from mixres.models.prompt_length import over_long
from mixres.models.stock_family import StockFamily, attributes_set, evaluating

STOCK_CONTROL_AREA = 1024 * 1024  # pixels of a reference; the stock pipelines scale larger ones down, none up
TEXT_TOKENS = 512  # of every prompt: the pipelines pad to it, and the transformer attends to the padding too
_MULTIPLE_OF = 16  # of a reference's sides
_MIN_SIDE = 64  # of a reference; the stock pipelines refuse smaller ones
_FRAME_STEP = 10  # between the positions of an image and the next on the first axis
_STOCK_STEPS = 50  # denoising steps of the stock pipelines where none are given
_LONG_FROM = 4300  # tokens
_ENTRY_OVERHEAD = 5 * 1024  # bytes: the header, the rest of the last block of the disk, a part of folder and index


class Flux2Klein(StockFamily):
    """The stock `Flux2KleinPipeline`, with Qwen3 as its text encoder."""

    name = "flux2"
    pipeline_class = Flux2KleinPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("black-forest-labs/FLUX.2-klein-base-4B",)
    controls = (0, 10)
    controls_problem = "FLUX.2 takes 0 to 10 control images, there are {}; give it so many"
    # Twelve tokens of the chat template stand around the prompt; what is over is cut.
    max_prompt_tokens = TEXT_TOKENS - 12
    stock_control_area = STOCK_CONTROL_AREA
    components = ("vae", "text_encoder", "tokenizer")
    transformer_class = Flux2Transformer2DModel
    lora_presets = layers.LORA_PRESETS
    quantize_exclusions = layers.QUANTIZE_EXCLUSIONS
    comfyui_prefix = layers.COMFYUI_PREFIX
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

    def patch(self, transformer: Any) -> Any:
        """See `StockFamily`."""
        return patch_flux2_model_for_multi_resolution(transformer)

    # Configuration files.

    def pixels_per_token(self) -> int:
        """See `Family`: 16, from the VAE's configuration."""
        stages = self._config("vae/config.json").get("block_out_channels", (128, 256, 512, 512))
        return int(PATCH << (len(stages) - 1))

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

    def embedded_guidance(self) -> EmbeddedGuidance | None:
        """See `Family`. In training as diffusers' commands, musubi and ai-toolkit; klein has no embedder."""
        embeds = self._config("transformer/config.json").get("guidance_embeds", True)  # the class's default
        return EmbeddedGuidance(training=1.0, sampling=4.0) if embeds else None

    def token_widths(self) -> tuple[int, int]:
        """See `Family`."""
        config = self._config("transformer/config.json")
        return config.get("in_channels", 128), config.get("joint_attention_dim", 15360)  # the class's defaults

    def entry_bytes(self, *, image_tokens: int, text_tokens: int, mask_tokens: int, dtype: torch.dtype) -> int:
        """See `Family`."""
        latent_width, text_width = self.token_widths()
        values = image_tokens * latent_width + text_tokens * text_width
        return values * dtype.itemsize + 4 * mask_tokens + _ENTRY_OVERHEAD

    # Records before they are encoded.

    def over_long(self, prompts: Iterable[str]) -> dict[str, tuple[int, str]]:
        """See `Family`."""
        return over_long(prompts, self.path, limit=self.max_prompt_tokens, revision=self.revision)

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """The text encoder sees no images.

        Raises:
            UserError: `text_area` is given.
        """
        if text_area is not None:
            raise UserError("data.resize.control.text_area: FLUX.2 shows its text encoder no images: leave it out")
        return {"control_area": area}

    def control_sizes(
        self,
        target: Size,
        controls: Sequence[Size],
        rules: Mapping[str, AreaRule] | None = None,
        aligned: Sequence[bool] = (),
    ) -> ControlSizes:
        """See `Family`. A reference keeps its size up to the area, its sides rounded down to multiples of 16."""
        rule = (rules or self.control_areas(STOCK_CONTROL_AREA, None))["control_area"]
        pairs = itertools.zip_longest(controls, aligned)
        return ControlSizes(
            vae=tuple(target if same else _reference_size(size, control_area(rule, target)) for size, same in pairs)
        )

    def load_preprocessors(self) -> Any:
        """See `Family`. The VAE has shapes and no values."""
        folder = hub.pipeline_folder(self.path, ("tokenizer",), revision=self.revision)
        with torch.device("meta"):
            vae = AutoencoderKLFlux2.from_config(self._config("vae/config.json"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        return self.pipeline_class(vae=vae, tokenizer=tokenizer, text_encoder=None, transformer=None, scheduler=None)

    def text_tokens(self, preprocessors: Any, *, prompt: str, sizes: ControlSizes) -> int:
        """See `Family`."""
        return TEXT_TOKENS

    def text_problem(self, grids: Sequence[Grid], text_tokens: int) -> str | None:
        """See `Family`. Positions are computed, not looked up."""
        return None

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
        found = {"target": _preview(preprocessors, target, target_size)}
        for number, (image, size) in enumerate(zip(controls, sizes.vae, strict=True), 1):
            found[f"control {number}"] = _preview(preprocessors, image, size)
        return found

    # Encoding.

    @torch.no_grad()
    def encode_prompt(
        self, encoders: Any, *, controls: Sequence[Image.Image], prompt: str, sizes: ControlSizes
    ) -> TextEmbeds:
        """See `Family`. It does not depend on the controls."""
        embeds, _ = encoders.encode_prompt(prompt=prompt, device=encoders.device)
        return TextEmbeds(embeds[0].cpu())

    def encode(
        self,
        encoders: Any,
        *,
        name: str,
        target: Image.Image,
        target_size: Size,
        controls: Sequence[Image.Image],
        prompt: str,
        sizes: ControlSizes,
        mask: Image.Image | None = None,
    ) -> Sample:
        """See `Family`."""
        if problem := self.record_problem(controls=len(controls), prompt=prompt):
            raise UserError(f"{name}: {problem}")
        images = zip((target, *controls), (target_size, *sizes.vae), strict=True)
        latents, grids = zip(*(encode_image(encoders, image, size) for image, size in images), strict=True)
        return Sample(
            name=name,
            target_latents=latents[0],
            control_latents=tuple(latents[1:]),
            prompt_embeds=self.encode_prompt(encoders, controls=controls, prompt=prompt, sizes=sizes).tokens,
            img_shapes=grids,
            edit_mask=None if mask is None else mask_on_grid(mask, grids[0]),
        )

    # The transformer.

    def patch_state(self, transformer: Flux2Transformer2DModel) -> PatchState:
        """See `Family`."""
        return patch_state(transformer)

    def untrained_modules(self, transformer: nn.Module) -> tuple[str, ...]:
        """See `Family`. The last text tokens end in the last single-stream block, whose layers serve images too."""
        return ()

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
        images, texts = [image_ids(grids) for grids in batch.img_shapes], [text_ids(n) for n in batch.text_lengths]
        if batch.layout == "packed":
            img_ids, txt_ids = torch.cat(images), torch.cat(texts)
        else:  # what stands at padding is not looked at
            img_ids = torch.stack([_filled(ids, noisy_latents.shape[1]) for ids in images])
            txt_ids = text_ids(batch.prompt_embeds.shape[1])
        lengths = {"image_lengths": [len(ids) for ids in images], "text_lengths": list(batch.text_lengths)}
        velocity: Tensor = transformer(
            hidden_states=noisy_latents.to(dtype),
            encoder_hidden_states=batch.prompt_embeds.to(dtype),
            timestep=sigmas.to(dtype),
            img_ids=img_ids.to(device),
            txt_ids=txt_ids.to(device),
            guidance=None if guidance is None else guidance.to(dtype),
            joint_attention_kwargs=lengths,
            return_dict=False,
        )[0]
        return velocity

    def comfyui_markers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Family`. The layers' names are enough."""
        return {}

    # Sampling.

    def default_size(self, control: Size | None) -> Size:
        """See `Family`: the control's, or 1024 x 1024."""
        return _reference_size(control or Size(1024, 1024), STOCK_CONTROL_AREA)

    def sample_image(
        self,
        pipeline: Any,
        *,
        controls: Sequence[Image.Image],
        text: TextEmbeds,
        size: Size,
        sizes: ControlSizes,
        steps: int,
        seed: int,
        negative: TextEmbeds | None = None,
        guidance: float | None = None,
    ) -> Image.Image:
        """See `Family`. `guidance` is the pipeline's `guidance_scale`; a distilled klein ignores it.

        The noise comes from a CPU generator, so that a seed means the same image on every device.
        """
        guidance = guidance or 1.0
        assert (guidance > 1) == (negative is not None), guidance
        transformer, call = pipeline.transformer, {}
        texts = {"prompt": text} | ({} if negative is None else {"negative_prompt": negative})
        for name, (embeds, *_) in texts.items():
            call[f"{name}_embeds"] = embeds.to(device=pipeline.device, dtype=transformer.dtype).unsqueeze(0)
        pairs = zip(controls, sizes.vae, strict=True)
        resized = [pipeline.image_processor.resize(image, wanted.height, wanted.width) for image, wanted in pairs]
        with evaluating(transformer), _any_reference_size(pipeline.image_processor):
            images = pipeline(
                image=resized or None,
                guidance_scale=guidance,
                width=size.width,
                height=size.height,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                **call,
            ).images
        image: Image.Image = images[0]
        return image

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor, grid: Grid) -> Image.Image:
        """See `Family`. The end of the stock `__call__`."""
        vae = pipeline.vae
        packed = latents.to(device=vae.device, dtype=vae.dtype)
        mean, variance = (x.view(1, -1, 1, 1).to(packed) for x in (vae.bn.running_mean, vae.bn.running_var))
        rows = packed.T.reshape(1, -1, grid.rows, grid.columns)
        unpacked = pipeline._unpatchify_latents(rows * torch.sqrt(variance + vae.config.batch_norm_eps) + mean)
        pixels = vae.decode(unpacked, return_dict=False)[0]
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
        return image


def image_ids(grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """`(S, 4)` int64: image, row, column, 0 of each token, target first. As `_prepare_latent_ids` and
    `_prepare_image_ids` of the pipelines: the target is image 0, references are 10, 20, ..."""
    parts = [
        torch.cartesian_prod(
            torch.tensor([_FRAME_STEP * number]), torch.arange(rows), torch.arange(columns), torch.arange(1)
        )
        for number, (_, rows, columns) in enumerate(grids)
    ]
    return torch.cat(parts)


def text_ids(tokens: int) -> Tensor:
    """`(T, 4)` int64: 0, 0, 0 and the place of each token."""
    return torch.nn.functional.pad(torch.arange(tokens)[:, None], (3, 0))


@torch.no_grad()
def encode_image(pipeline: Any, image: Image.Image, size: Size) -> tuple[Tensor, Grid]:
    """`(S, P)` normalised, packed latents of the image at `size`, the mode of the VAE's distribution, on the CPU."""
    pixels = _pixels(pipeline, image, size).to(device=pipeline.device, dtype=pipeline.vae.dtype)
    latents = pipeline._encode_vae_image(pixels, generator=None)
    return pipeline._pack_latents(latents)[0].contiguous().cpu(), Grid(1, *latents.shape[2:])


def _pixels(pipeline: Any, image: Image.Image, size: Size) -> Tensor:
    """`(1, 3, height, width)` in [-1, 1]."""
    pixels: Tensor = pipeline.image_processor.preprocess(image, size.height, size.width)
    return pixels


def _preview(pipeline: Any, image: Image.Image, size: Size) -> Image.Image:
    shown: Image.Image = pipeline.image_processor.postprocess(_pixels(pipeline, image, size), output_type="pil")[0]
    return shown


def _filled(ids: Tensor, slots: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, 0, 0, slots - len(ids)))


def _reference_size(source: Size, area: int) -> Size:
    """As the stock `__call__` makes it, with `area` for its 1024 x 1024."""
    if source.width * source.height > area:
        scale = math.sqrt(area / (source.width * source.height))
        source = Size(int(source.width * scale), int(source.height * scale))
    return Size(*(max(_MIN_SIDE, side // _MULTIPLE_OF * _MULTIPLE_OF) for side in source))


@contextmanager
def _any_reference_size(processor: Any) -> Iterator[None]:
    """Within it the pipeline takes references as they are: they have been resized, as in training."""
    with attributes_set(
        processor, check_image_input=lambda image: image, _resize_to_target_area=lambda image, area: image
    ):
        yield
