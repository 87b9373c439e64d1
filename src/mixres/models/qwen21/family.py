"""Qwen-Image-2.1: text to image and edits of one to three images in one model, with transparency.

Promise: latents and prompt embeddings are those of the stock pipeline, bit for bit, but for the rows that its text
encoder returns at image slots: the transformer puts latents there, so they are not kept. What is cached makes the
stock pipeline's image.

Legend: S image tokens, T text tokens, P channels of a token.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3VLProcessor

from mixres.batch import Batch, TextEmbeds
from mixres.errors import UserError
from mixres.geometry import Grid, Size
from mixres.models import hub
from mixres.models.family import AreaRule, ControlSizes, PatchState
from mixres.models.prompt_length import over_long
from mixres.models.qwen.family import QwenFamily
from mixres.models.qwen.processor import load_processor
from mixres.models.qwen21 import layers
from mixres.models.qwen21.layout import TABLE
from mixres.models.qwen21_multi_resolution_patch import patch_qwen21_model_for_multi_resolution, patch_state
from mixres.models.stock_family import attributes_set, evaluating

_TOKEN = 16  # pixels along a side; the pipeline has this number too
_SLOT = 4  # image tokens, 2 x 2, at one slot of the text encoder
_IMAGE = "<image{}><|vision_start|><|image_pad|><|vision_end|>"  # how the pipeline names each control


class QwenImage21(QwenFamily):
    """The stock `QwenImage21Pipeline`, which generates where it is given no image."""

    name = "qwen_image_21"
    pipeline_class = QwenImage21Pipeline
    components = ("vae", "text_encoder", "processor")
    init_parts = ("processor",)
    transformer_class = QwenImage21Transformer2DModel
    stock_bases: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-2.1",)
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # nothing is known to differ from the defaults
    controls = (0, 3)
    controls_problem = "Qwen-Image-2.1 takes 0 to 3 control images, there are {}; give it so many"
    max_prompt_tokens = TABLE // 2  # stock cuts no prompt; the other positions are left to images
    keeps_alpha = True
    negative_prompt = " "
    lora_presets = layers.LORA_PRESETS
    quantize_exclusions = layers.QUANTIZE_EXCLUSIONS
    comfyui_prefix = layers.COMFYUI_PREFIX
    comfyui_controls: ClassVar[str | None] = "hand it to TextEncodeQwenImage21, which makes an empty latent of its grid"

    def patch(self, transformer: Any) -> Any:
        """See `StockFamily`."""
        return patch_qwen21_model_for_multi_resolution(transformer)

    def training_notice(self) -> str | None:
        """See `Family`: the licence of the weights."""
        return f"{self.path}: weights under the Qwen RESEARCH LICENSE, for research, not for commercial use"

    def own_parts(self, folder: Path, names: Sequence[str]) -> dict[str, Any]:
        """The processor."""
        return {"processor": load_processor(folder / "processor", Qwen3VLProcessor)} if "processor" in names else {}

    # Configuration files.

    def pixels_per_token(self) -> int:
        """See `Family`."""
        return _TOKEN

    def size_multiple(self) -> int:
        """See `Family`: 32. Sides of an odd number of tokens would leave a slot of the text encoder half empty."""
        return 2 * _TOKEN

    def token_widths(self) -> tuple[int, int]:
        """See `Family`."""
        config = self._config("transformer/config.json")
        return config.get("in_channels", 64), config.get("context_in_dim", 4096)  # the class's defaults

    # Records before they are encoded.

    def over_long(self, prompts: Iterable[str]) -> dict[str, tuple[int, str]]:
        """See `Family`."""
        limit = self.max_prompt_tokens
        return over_long(prompts, self.path, limit=limit, revision=self.revision, tokenizer="processor")

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """One area for VAE and text encoder, whose slots have to match.

        Raises:
            UserError: `text_area` is given.
        """
        if text_area is not None:
            raise UserError(
                "data.resize.control.text_area: Qwen-Image-2.1 shows VAE and text encoder the same image: leave it "
                "out, data.resize.control.area is for both"
            )
        return {"control_area": area}

    @cached_property
    def _preprocessors(self) -> Any:
        return self.load_preprocessors()

    def sizes_problem(self, sizes: ControlSizes) -> str | None:
        """See `Family`."""
        return slots_problem(self._preprocessors.processor.image_processor, sizes) if sizes.text else None

    def load_preprocessors(self) -> Any:
        """See `Family`. The VAE has shapes and no values."""
        folder = hub.pipeline_folder(self.path, ("processor",), revision=self.revision)
        with torch.device("meta"):
            vae = AutoencoderKLQwenImage21.from_config(self._config("vae/config.json"))
        absent = dict.fromkeys(("text_encoder", "transformer", "scheduler"))
        return self.pipeline_class(**self.own_parts(folder, ("processor",)), vae=vae, **absent)

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

    def vae_controls(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Image.Image]:
        """See `QwenFamily`. The VAE resizes each from its file, as the text encoder's is."""
        return list(controls)

    def text_controls(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Image.Image]:
        """The controls at their sizes, on white where they are transparent, as the pipeline lays them."""
        shown = []
        for image in super().text_controls(pipeline, [_rgba(control) for control in controls], sizes):
            shown.append(Image.new("RGB", image.size, "white"))
            shown[-1].paste(image, mask=image.getchannel("A"))
        return shown

    def vae_pixels(self, pipeline: Any, image: Image.Image, size: Size) -> Tensor:
        """See `QwenFamily`: four channels."""
        return super().vae_pixels(pipeline, _rgba(image), size)

    def packed(self, latents: Tensor) -> tuple[Tensor, Grid]:
        """See `QwenFamily`. A token is one latent pixel."""
        return latents.flatten(1).T.contiguous(), Grid(1, *latents.shape[2:])

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
        is_slot = slots[0].cpu()
        counts = [slot_count(size) for size in sizes.text]
        places = is_slot.nonzero()[:, 0].tolist()
        assert len(places) == sum(counts), (len(places), counts)
        seen = accumulate(counts, initial=0)  # slots before each control
        starts = [0, *(places[before] - before for before in list(seen)[:-1])]
        return TextEmbeds(embeds[0].cpu()[~is_slot], before=tuple(b - a for a, b in pairwise(starts)))

    # The transformer.

    def patch_state(self, transformer: QwenImage21Transformer2DModel) -> PatchState:
        """See `Family`."""
        return patch_state(transformer)

    def untrained_modules(self, transformer: nn.Module) -> tuple[str, ...]:
        """See `Family`. Text and images share all layers."""
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
        assert guidance is None
        dtype = next(p.dtype for p in transformer.parameters() if p.is_floating_point())
        texts = zip(batch.text_before, batch.text_lengths, strict=True)
        velocity: Tensor = transformer(
            hidden_states=noisy_latents.to(dtype),
            encoder_hidden_states=batch.prompt_embeds.to(dtype),
            timestep=sigmas.to(dtype),
            img_shapes=[[tuple(grid) for grid in grids] for grids in batch.img_shapes],
            attention_kwargs={"text_runs": [[*before, tokens - sum(before)] for before, tokens in texts]},
            return_dict=False,
        )[0]
        return velocity

    def comfyui_markers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Family`. The layers' names are enough."""
        return {}

    # Sampling.

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
        """See `Family`. `guidance` is the pipeline's `true_cfg_scale`. A base with `sample_sigmas` has its own steps.

        The noise comes from a CPU generator, so that a seed means the same image on every device. The pipeline takes no
        embeddings beside images, so its own method of encoding returns them.
        """
        guidance = guidance or 1.0
        assert (guidance > 1) == (negative is not None), guidance
        transformer, texts = pipeline.transformer, iter((text, negative))

        def encode_prompt(**_call: Any) -> tuple[Tensor, None, Tensor]:
            embeds, slots = with_slots(next(texts), sizes)
            device = pipeline._execution_device  # not that of its modules where they are offloaded
            return embeds[None].to(device, transformer.dtype), None, slots[None].to(device)

        asked = iter([*sizes.vae[-1:], *sizes.vae])  # first the default size of what is made
        with (
            evaluating(transformer),
            attributes_set(pipeline, encode_prompt=encode_prompt),
            attributes_set(pipeline_qwenimage21, calculate_dimensions=lambda area, ratio: (*next(asked), None)),
        ):
            images = pipeline(
                prompt="",
                negative_prompt=None if negative is None else "",
                image=list(controls) or None,
                true_cfg_scale=guidance,
                width=size.width,
                height=size.height,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
            ).images
        image: Image.Image = images[0]
        return image


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


def with_slots(text: TextEmbeds | None, sizes: ControlSizes) -> tuple[Tensor, Tensor]:
    """Embeddings with zeros at image slots, and where these are: what the pipeline's `encode_prompt` returns."""
    assert text is not None
    tokens = text.tokens
    runs = torch.split(tokens, [*text.before, len(tokens) - sum(text.before)])
    parts, slots = [runs[0]], [torch.zeros(len(runs[0]))]
    for size, run in zip(sizes.text, runs[1:], strict=True):
        parts += [tokens.new_zeros(slot_count(size), tokens.shape[1]), run]
        slots += [torch.ones(slot_count(size)), torch.zeros(len(run))]
    return torch.cat(parts), torch.cat(slots).bool()


def _rgba(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGBA" else image.convert("RGBA")
