"""The table of families that every suite goes through: a new family adds a row, and its tiny base."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from PIL import Image

from mixres.config.schema import Config
from mixres.models.family import Family
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

    def stock_areas(self, areas: dict[str, int]) -> AbstractContextManager[None]:
        """Within it the stock pipeline gives its controls these areas."""
        return self.at("").stock_areas(areas)

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
