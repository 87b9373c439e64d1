"""The table of families that every suite goes through: a new family adds a row, and its tiny base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImage21Pipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    ZImagePipeline,
)
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit as stock_edit,
    pipeline_qwenimage_edit_plus as stock_plus,
)
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as stock_21
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen3VLProcessor

from mixres.batch import Sample, TextEmbeds
from mixres.config.schema import Config
from mixres.data.plan import Layout
from mixres.geometry import Size, pack_latents
from mixres.models.family import ControlSizes, Family
from mixres.models.qwen.processor import load_processor
from mixres.models.qwen21_multi_resolution_patch import patch_qwen21_model_for_multi_resolution
from mixres.models.registry import FAMILIES
from mixres.preprocessing.fill import family_of
from support.tiny_flux import write_tiny_flux
from support.tiny_flux2 import write_tiny_flux2
from support.tiny_pipeline import write_tiny_pipeline
from support.tiny_qwen21 import write_tiny_qwen21
from support.tiny_z_image import write_tiny_z_image

PROMPTS = ["swap red and blue", "交换红色和蓝色", "turn it into a sepia photograph"]


@contextmanager
def attributes_set(owner: Any, **values: Any) -> Iterator[None]:
    """Within it a stock module or object has these values."""
    before = dict(vars(owner))
    try:
        vars(owner).update(values)
        yield
    finally:
        for name in values:
            if name in before:
                vars(owner)[name] = before[name]
            else:
                del vars(owner)[name]


@dataclass(frozen=True)
class FamilyCase:
    """One family, or one kind of base of it."""

    family: str
    pipeline_class: type[DiffusionPipeline]
    controls: tuple[int, ...]  # how many control images the samples of a mixed batch have
    areas: dict[str, int] = field(default_factory=dict)  # small enough for a CPU
    zero_cond_t: bool = False
    multiple: int = 16  # of sides of what is made
    exact: Layout = "padded"  # the layout in which one sample is computed as stock computes it, in half precision too

    def fitted(self, size: Size) -> Size:
        """The size, or one near it that the stock pipeline makes."""
        return Size(*(-(-side // self.multiple) * self.multiple for side in size))

    def at(self, base: Path | str) -> Family:
        """The family, bound to this base."""
        return FAMILIES[self.pipeline_class.__name__](str(base))

    def in_a_folder(self) -> Self:
        """With samples as a folder can have them: each has a control, or none has."""
        return replace(self, controls=tuple(max(n, 1) for n in self.controls) if max(self.controls) else self.controls)

    def call(self, controls: Sequence[Image.Image], size: Size | None = None) -> dict[str, Any]:
        """How the stock pipeline takes the control images, and what else it needs to make an image of this size."""
        return {0: {}, 1: {"image": controls[0] if controls else None}}.get(max(self.controls), {"image": [*controls]})

    def sizes(
        self,
        size: Size,
        controls: Sequence[Image.Image | Size],
        areas: dict[str, int] | None = None,
        *,
        aligned: bool = False,
    ) -> ControlSizes:
        """Those of controls beside a target of this size."""
        given = [control if isinstance(control, Size) else Size(*control.size) for control in controls]
        same = [aligned] * len(controls)
        if not self.areas:
            return ControlSizes()
        return self.at("").control_sizes(size, given, self.areas if areas is None else areas, same)

    @contextmanager
    def stock_areas(self, areas: dict[str, int], aligned: Size | None = None) -> Iterator[None]:
        """Within it the stock pipeline gives its controls these areas, the VAE those that are `aligned` this size."""
        module = stock_plus if "text_area" in areas else stock_edit
        before, stock = dict(vars(module)), module.calculate_dimensions

        def calculate_dimensions(area: Any, ratio: float) -> Any:
            if module is stock_edit:
                return (*aligned, None) if aligned else stock(areas["control_area"], ratio)
            return tuple(aligned) if aligned and area == areas["control_area"] else stock(area, ratio)

        if areas:
            module.calculate_dimensions = calculate_dimensions
        if "text_area" in areas:
            module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = areas["control_area"], areas["text_area"]
        try:
            yield
        finally:
            vars(module).update(before)

    def write(self, folder: Path) -> None:
        """A tiny random base."""
        write_tiny_pipeline(folder, PROMPTS, pipeline_class=self.pipeline_class, zero_cond_t=self.zero_cond_t)

    def stock_controls(self, controls: Sequence[Image.Image], sizes: ControlSizes) -> Sequence[Image.Image]:
        """The control images as the stock pipeline is given them, which makes them of these sizes."""
        return controls

    def guidance(self, negative: TextEmbeds) -> dict[str, Any]:
        """The arguments of `sample_image` that guide otherwise than by default."""
        return {"negative": negative, "guidance": 4.0}

    def guided(self, prompt: str, negative: str, embeds: TextEmbeds) -> dict[str, Any]:
        """The arguments of a stock call with the same guidance."""
        return {"prompt": prompt, "negative_prompt": negative, "true_cfg_scale": 4.0}

    def unguided(self) -> dict[str, Any]:
        """What keeps the stock call from guiding."""
        return {"true_cfg_scale": 1.0}

    def latents(self, stock: Any, image: Image.Image, size: Size) -> Tensor:
        """`(S, P)` of an image at this size by the stock pipeline's own methods.

        The text-to-image pipeline has no encoding of its own: the edit pipeline's, on the same VAE.
        """
        pipeline = QwenImageEditPipeline(None, stock.vae, None, None, None, None)
        pixels = pipeline.image_processor.preprocess(image, size.height, size.width).unsqueeze(2)
        latents = pipeline._encode_vae_image(pixels.to(stock.vae.dtype), generator=None)
        packed: Tensor = pipeline._pack_latents(latents, 1, 16, *latents.shape[3:])[0]
        return packed

    def seen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the stock transformer is handed, by names that all families share."""
        return kwargs

    def stock_velocity(self, transformer: Any, seen: dict[str, Any]) -> Tensor:
        """`(1, ...)` of the stock transformer for what it was handed."""
        velocity: Tensor = transformer(**seen)[0]
        return velocity

    def check_text(self, seen: dict[str, Any], sample: Sample) -> None:
        """What the stock transformer is handed of positions, masks and text is what the sample holds."""
        assert seen["encoder_hidden_states_mask"] is None
        assert [list(sample.img_shapes)] == seen["img_shapes"]
        assert torch.equal(sample.prompt_embeds, seen["encoder_hidden_states"][0])

    def controls_of(self, seen: dict[str, Any], sample: Sample) -> Tensor:
        """The controls' tokens among those that the stock transformer is handed."""
        found: Tensor = seen["hidden_states"][0, sample.img_shapes[0].tokens :]
        return found

    def taking_batches(self, transformer: Any) -> Any:
        """The stock transformer, which takes the call of one sample as it is."""
        return transformer

    def target_of(self, rows: Tensor, tokens: int) -> Tensor:
        """So many tokens of the target in what the stock transformer takes, or returns, `(1, ...)`."""
        return rows[0, :tokens]

    def stock_parts(self, base: Path) -> dict[str, Any]:
        """What the stock pipeline cannot load without torchvision."""
        return {"processor": load_processor(base / "processor")} if (base / "processor").exists() else {}

    def load_stock(self, base: Path, dtype: torch.dtype) -> Any:
        """The whole pipeline by its own `from_pretrained`."""
        parts = self.stock_parts(base)
        early = {name: parts[name] if name in self.at("").init_parts else None for name in parts}
        pipeline = self.pipeline_class.from_pretrained(base, **early, dtype=dtype)
        pipeline.register_modules(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def overrides(self) -> list[str]:
        """The areas as configuration, over that of another family."""
        if not self.areas:
            return ["data.resize.control.area=1048576"]
        keys = {"control_area": "area", "text_area": "text_area"}
        return [f"data.resize.control.{keys[name]}={value}" for name, value in self.areas.items()]


class Flux2Case(FamilyCase):
    """FLUX.2: the stock pipeline crops a control's sides to multiples of 16; it is given controls of their sizes."""

    def call(self, controls: Sequence[Image.Image], size: Size | None = None) -> dict[str, Any]:
        return {"image": [*controls] or None}

    @contextmanager
    def stock_areas(self, areas: dict[str, int], aligned: Size | None = None) -> Iterator[None]:
        yield

    def write(self, folder: Path) -> None:
        write_tiny_flux2(folder, PROMPTS, self.pipeline_class)

    def stock_controls(self, controls: Sequence[Image.Image], sizes: ControlSizes) -> Sequence[Image.Image]:
        return [image.resize(size, Image.Resampling.LANCZOS) for image, size in zip(controls, sizes.vae, strict=True)]

    def overrides(self) -> list[str]:
        # A prompt has 512 tokens; a process without mixres resizes by area alone.
        return [*super().overrides(), "batch.max_tokens=2048", "data.resize.control.align=never"]

    def guided(self, prompt: str, negative: str, embeds: TextEmbeds) -> dict[str, Any]:
        return {"prompt": prompt, "negative_prompt_embeds": embeds.tokens[None], "guidance_scale": 4.0}

    def unguided(self) -> dict[str, Any]:
        return {"guidance_scale": 1.0}

    def latents(self, stock: Any, image: Image.Image, size: Size) -> Tensor:
        pixels = stock.image_processor.preprocess(image, size.height, size.width).to(stock.vae.dtype)
        packed: Tensor = stock._pack_latents(stock._encode_vae_image(pixels, generator=None))[0]
        return packed

    def check_text(self, seen: dict[str, Any], sample: Sample) -> None:
        family = self.at("")
        assert torch.equal(sample.prompt_embeds, seen["encoder_hidden_states"][0])
        for name, ids in (("img_ids", family.image_ids(sample.img_shapes)), ("txt_ids", family.text_ids(512))):
            assert torch.equal(ids.to(seen[name]), seen[name].reshape(ids.shape)), name
        if sample.pooled_embeds is not None:
            assert torch.equal(sample.pooled_embeds, seen["pooled_projections"][0])


class Flux2DevCase(Flux2Case):
    """FLUX.2-dev embeds its guidance, 4 unless another is given."""

    def guidance(self, negative: TextEmbeds) -> dict[str, Any]:
        return {"guidance": 2.0}

    def guided(self, prompt: str, negative: str, embeds: TextEmbeds) -> dict[str, Any]:
        return {"prompt": prompt, "guidance_scale": 2.0}

    def unguided(self) -> dict[str, Any]:
        return {}

    def stock_parts(self, base: Path) -> dict[str, Any]:
        return {"tokenizer": AutoTokenizer.from_pretrained(base / "tokenizer")}


class FluxCase(Flux2Case):
    """FLUX.1 embeds its guidance. Kontext takes a control at its size only where it is told not to choose one."""

    def call(self, controls: Sequence[Image.Image], size: Size | None = None) -> dict[str, Any]:
        if not self.areas:
            return {}
        area = {"max_area": size.width * size.height} if size else {}
        return {"image": controls[0] if controls else None, "_auto_resize": False, **area}

    def write(self, folder: Path) -> None:
        write_tiny_flux(folder, PROMPTS, pipeline_class=self.pipeline_class)

    def guidance(self, negative: TextEmbeds) -> dict[str, Any]:
        return {"guidance": 8.0}

    def guided(self, prompt: str, negative: str, embeds: TextEmbeds) -> dict[str, Any]:
        return {"prompt": prompt, "guidance_scale": 8.0}

    def unguided(self) -> dict[str, Any]:
        return {"guidance_scale": 2.5 if self.areas else 3.5}

    def overrides(self) -> list[str]:
        return [*(super().overrides() if self.areas else FamilyCase.overrides(self)), "batch.max_tokens=2048"]

    def latents(self, stock: Any, image: Image.Image, size: Size) -> Tensor:
        return _kontext_latents(stock, image, size)


class ZImageCase(FamilyCase):
    """Z-Image takes lists, as positional arguments; the time of its transformer runs from noise to image."""

    def write(self, folder: Path) -> None:
        write_tiny_z_image(folder, PROMPTS)

    def guided(self, prompt: str, negative: str, embeds: TextEmbeds) -> dict[str, Any]:
        return {"prompt": prompt, "negative_prompt": negative, "guidance_scale": 4.0}

    def unguided(self) -> dict[str, Any]:
        return {"guidance_scale": 0.0}

    def latents(self, stock: Any, image: Image.Image, size: Size) -> Tensor:
        return _kontext_latents(stock, image, size)

    def seen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        (image,), _, (text,) = args
        return {"hidden_states": pack_latents(image)[None], "encoder_hidden_states": text[None], "lists": args}

    def stock_velocity(self, transformer: Any, seen: dict[str, Any]) -> Tensor:
        return -pack_latents(transformer(*seen["lists"], return_dict=False)[0][0])[None]

    def check_text(self, seen: dict[str, Any], sample: Sample) -> None:
        (image,), _, (text,) = seen["lists"]
        assert torch.equal(sample.prompt_embeds, text)
        assert [2 * side for side in sample.img_shapes[0][1:]] == list(image.shape[2:])


def _kontext_latents(stock: Any, image: Image.Image, size: Size) -> Tensor:
    """By Kontext's methods; pipelines of text to image, on a VAE of this class, have no encoding of their own."""
    parts = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    kontext = FluxKontextPipeline(vae=stock.vae, transformer=None, **parts)
    pixels = kontext.image_processor.preprocess(image, size.height, size.width).to(stock.vae.dtype)
    latents = kontext._encode_vae_image(pixels, generator=None)
    packed: Tensor = kontext._pack_latents(latents, 1, *latents.shape[1:])[0]
    return packed


class Qwen21Case(FamilyCase):
    """Qwen-Image-2.1: the stock call has controls first, target last, and rows of the text encoder at image slots."""

    def call(self, controls: Sequence[Image.Image], size: Size | None = None) -> dict[str, Any]:
        return {"image": [*controls] or None}

    @contextmanager
    def stock_areas(self, areas: dict[str, int], aligned: Size | None = None) -> Iterator[None]:
        stock = stock_21.calculate_dimensions
        sized = {
            "calculate_dimensions": lambda _, ratio: (*aligned, None) if aligned else stock(*areas.values(), ratio)
        }
        with attributes_set(stock_21, **sized):
            yield

    def write(self, folder: Path) -> None:
        write_tiny_qwen21(folder, PROMPTS)

    def stock_parts(self, base: Path) -> dict[str, Any]:
        return {"processor": load_processor(base / "processor", Qwen3VLProcessor)}

    def latents(self, stock: Any, image: Image.Image, size: Size) -> Tensor:
        pixels = stock.image_processor.preprocess(image.convert("RGBA"), size.height, size.width).unsqueeze(2)
        latents = stock._encode_vae_image(pixels.to(stock.vae.dtype), generator=None)
        packed: Tensor = stock._pack_latents(latents, 1, 16, *latents.shape[3:])[0]
        return packed

    def check_text(self, seen: dict[str, Any], sample: Sample) -> None:
        target, *controls = sample.img_shapes
        assert seen["encoder_hidden_states_mask"] is None and seen["img_shapes"] == [[*controls, target]]
        embeds = seen["encoder_hidden_states"][0]
        is_slot = seen["img_mask"][0]
        assert is_slot[len(embeds) :].all() and len(is_slot) == len(embeds) + target.tokens // 4
        assert torch.equal(sample.prompt_embeds, embeds[~is_slot[: len(embeds)]])
        runs = [*sample.text_before, len(sample.prompt_embeds) - sum(sample.text_before)]
        slots = [grid.tokens // 4 for grid in (*controls, target)]
        expected = [value for run, count in zip(runs, slots, strict=True) for value in [False] * run + [True] * count]
        assert is_slot.tolist() == expected

    def controls_of(self, seen: dict[str, Any], sample: Sample) -> Tensor:
        found: Tensor = seen["hidden_states"][0, : -sample.img_shapes[0].tokens]
        return found

    def target_of(self, rows: Tensor, tokens: int) -> Tensor:
        return rows[0, -tokens:]

    def taking_batches(self, transformer: Any) -> Any:
        return patch_qwen21_model_for_multi_resolution(transformer)

    def overrides(self) -> list[str]:
        # A process without mixres resizes by area alone.
        return [*super().overrides(), "data.resize.target.multiple_of=32", "data.resize.control.align=never"]


_PLUS = {"control_area": 112 * 112, "text_area": 80 * 80}
CASES = {
    "qwen_image": FamilyCase("qwen_image", QwenImagePipeline, (0, 0, 0)),
    "qwen_image_edit": FamilyCase("qwen_image_edit", QwenImageEditPipeline, (1, 1, 1), {"control_area": 112 * 112}),
    "qwen_image_edit_plus": FamilyCase("qwen_image_edit_plus", QwenImageEditPlusPipeline, (1, 3, 2), _PLUS),
    "zero_cond_t": FamilyCase("qwen_image_edit_plus", QwenImageEditPlusPipeline, (1, 3, 2), _PLUS, zero_cond_t=True),
}
# Whole runs do not go through these yet.
EVERY_CASE = CASES | {
    "flux2_klein": Flux2Case("flux2", Flux2KleinPipeline, (0, 3, 1), {"control_area": 112 * 112}),
    "flux2_dev": Flux2DevCase("flux2", Flux2Pipeline, (0, 3, 1), {"control_area": 112 * 112}),
    "flux_kontext": FluxCase("flux_kontext", FluxKontextPipeline, (0, 1, 1), {"control_area": 112 * 112}),
    "flux": FluxCase("flux", FluxPipeline, (0, 0, 0)),
    "qwen_image_21": Qwen21Case(
        "qwen_image_21", QwenImage21Pipeline, (0, 3, 1), {"control_area": 112 * 112}, multiple=32, exact="packed"
    ),
    "z_image": ZImageCase("z_image", ZImagePipeline, (0, 0, 0)),
}


def with_family(config: Config) -> tuple[Config, Family]:
    """The first two arguments of what works on a configuration."""
    return config, family_of(config)
