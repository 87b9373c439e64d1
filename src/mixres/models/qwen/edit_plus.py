"""Qwen-Image-Edit-2509 and -2511: one to three control images a sample, at one area for the VAE and another for the
text encoder.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from mixres.geometry import Size
from mixres.models.family import AreaRule, Areas
from mixres.models.qwen.family import MULTIPLE_OF, STOCK_CONTROL_AREA, QwenFamily

STOCK_TEXT_AREA = 384 * 384  # pixels of a control for the text encoder
_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # how the pipeline names each control


class QwenImageEditPlus(QwenFamily):
    """The stock `QwenImageEditPlusPipeline`."""

    name = "qwen_image_edit_plus"
    pipeline_class = QwenImageEditPlusPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-Edit-2509",)
    controls = (1, 3)  # the model's authors name three as the maximum

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """One area for the VAE, one for the text encoder."""
        return {"control_area": area, "text_area": STOCK_TEXT_AREA if text_area is None else text_area}

    def record_problem(self, *, controls: int, prompt: str) -> str | None:
        """See `Family`."""
        low, high = self.controls
        if not low <= controls <= high:
            return f"Qwen-Image-Edit-Plus takes {low} to {high} control images, there are {controls}; give it so many"
        return super().record_problem(controls=controls, prompt=prompt)

    def vae_controls(
        self, pipeline: Any, controls: Sequence[Image.Image], areas: Areas
    ) -> list[tuple[Image.Image, Size]]:
        """The VAE's preprocessing resizes each by itself."""
        sizes = self.vae_sizes([Size(*control.size) for control in controls], areas)
        return list(zip(controls, sizes, strict=True))

    def text_sizes(self, controls: Sequence[Size], areas: Areas) -> list[Size]:
        """Does not depend on the VAE's area."""
        return self.vae_sizes(controls, {"control_area": areas.get("text_area", STOCK_TEXT_AREA)})

    def template_text(self, prompt: str, controls: int) -> str:
        """ "Picture 1: ...", "Picture 2: ..." and so on, then the prompt."""
        return "".join(_PICTURE.format(number) for number in range(1, controls + 1)) + prompt

    def control_call(self, controls: Sequence[Image.Image]) -> dict[str, Any]:
        """The controls."""
        return {"image": list(controls)}

    def stock_areas(self, areas: Areas) -> AbstractContextManager[None]:
        """See `QwenFamily`."""
        text_area = areas.get("text_area", STOCK_TEXT_AREA)
        return control_areas_set(control_area=areas.get("control_area", STOCK_CONTROL_AREA), text_area=text_area)


@contextmanager
def control_areas_set(*, control_area: int, text_area: int) -> Iterator[None]:
    """Within it every stock Edit-Plus pipeline resizes its controls to these areas, no side under 32 pixels."""
    module = pipeline_qwenimage_edit_plus
    names = ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE", "calculate_dimensions")
    before = {name: getattr(module, name) for name in names}

    def calculate_dimensions(target_area: int, ratio: float) -> tuple[int, int]:
        width, height = before["calculate_dimensions"](target_area, ratio)
        return max(width, MULTIPLE_OF), max(height, MULTIPLE_OF)

    try:
        for name, value in zip(names, (control_area, text_area, calculate_dimensions), strict=True):
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
