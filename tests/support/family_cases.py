"""The table of families that every suite goes through: a new family adds a row, and its tiny base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit as stock_edit,
    pipeline_qwenimage_edit_plus as stock_plus,
)
from PIL import Image

from mixres.config.schema import Config
from mixres.geometry import Size
from mixres.models.family import ControlSizes, Family
from mixres.models.qwen.processor import load_processor
from mixres.models.registry import FAMILIES
from mixres.preprocessing.fill import family_of

PROMPTS = ["swap red and blue", "交换红色和蓝色", "turn it into a sepia photograph"]


@dataclass(frozen=True)
class FamilyCase:
    """One family, or one kind of base of it."""

    family: str
    pipeline_class: type[DiffusionPipeline]
    controls: tuple[int, ...]  # how many control images the samples of a mixed batch have
    areas: dict[str, int] = field(default_factory=dict)  # small enough for a CPU
    zero_cond_t: bool = False

    def at(self, base: Path | str) -> Family:
        """The family, bound to this base."""
        return FAMILIES[self.pipeline_class.__name__](str(base))

    def call(self, controls: Sequence[Image.Image]) -> dict[str, Any]:
        """How the stock pipeline takes the control images."""
        return {0: {}, 1: {"image": controls[0] if controls else None}}.get(max(self.controls), {"image": [*controls]})

    def sizes(
        self, size: Size, controls: Sequence[Image.Image], areas: dict[str, int] | None = None, *, aligned: bool = False
    ) -> ControlSizes:
        """Those of controls beside a target of this size."""
        given, same = [Size(*control.size) for control in controls], [aligned] * len(controls)
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

    def load_stock(self, base: Path, dtype: torch.dtype) -> Any:
        """The whole pipeline by its own `from_pretrained`; only a processor is handed in, for want of torchvision."""
        processor = {"processor": load_processor(base / "processor")} if (base / "processor").exists() else {}
        pipeline = self.pipeline_class.from_pretrained(base, **processor, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def overrides(self) -> list[str]:
        """The areas as configuration, over that of another family."""
        if not self.areas:
            return ["data.resize.control.area=1048576"]
        keys = {"control_area": "area", "text_area": "text_area"}
        return [f"data.resize.control.{keys[name]}={value}" for name, value in self.areas.items()]


_PLUS = {"control_area": 112 * 112, "text_area": 80 * 80}
CASES = {
    "qwen_image": FamilyCase("qwen_image", QwenImagePipeline, (0, 0, 0)),
    "qwen_image_edit": FamilyCase("qwen_image_edit", QwenImageEditPipeline, (1, 1, 1), {"control_area": 112 * 112}),
    "qwen_image_edit_plus": FamilyCase("qwen_image_edit_plus", QwenImageEditPlusPipeline, (1, 3, 2), _PLUS),
    "zero_cond_t": FamilyCase("qwen_image_edit_plus", QwenImageEditPlusPipeline, (1, 3, 2), _PLUS, zero_cond_t=True),
}


def with_family(config: Config) -> tuple[Config, Family]:
    """The first two arguments of what works on a configuration."""
    return config, family_of(config)
