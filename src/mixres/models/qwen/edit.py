"""Qwen-Image-Edit: one control image a sample, seen by VAE and text encoder at one size."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

from mixres.errors import UserError
from mixres.geometry import Size
from mixres.models.family import AreaRule, Areas
from mixres.models.qwen.family import MULTIPLE_OF, STOCK_CONTROL_AREA, QwenFamily


class QwenImageEdit(QwenFamily):
    """The stock `QwenImageEditPipeline`."""

    name = "qwen_image_edit"
    pipeline_class = QwenImageEditPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-Edit",)
    controls = (1, 1)

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """One area for VAE and text encoder.

        Raises:
            UserError: `text_area` is given.
        """
        if text_area is not None:
            raise UserError(
                "data.resize.control.text_area: Qwen-Image-Edit shows VAE and text encoder the same image: leave it "
                "out, data.resize.control.area is for both"
            )
        return {"control_area": area}

    def record_problem(self, *, controls: int, prompt: str) -> str | None:
        """See `Family`."""
        if controls != 1:
            return f"Qwen-Image-Edit takes exactly one control image, there are {controls}; give it one"
        return super().record_problem(controls=controls, prompt=prompt)

    def vae_controls(
        self, pipeline: Any, controls: Sequence[Image.Image], areas: Areas
    ) -> list[tuple[Image.Image, Size]]:
        """The pipeline resizes once, for the text encoder and the VAE."""
        sizes = self.vae_sizes([Size(*control.size) for control in controls], areas)
        return list(zip(self.text_controls(pipeline, controls, areas), sizes, strict=True))

    def control_call(self, controls: Sequence[Image.Image]) -> dict[str, Any]:
        """The control."""
        (control,) = controls
        return {"image": control}

    def stock_areas(self, areas: Areas) -> AbstractContextManager[None]:
        """See `QwenFamily`."""
        return control_area_set(areas.get("control_area", STOCK_CONTROL_AREA))


@contextmanager
def control_area_set(area: int) -> Iterator[None]:
    """Within it every stock Qwen-Image-Edit pipeline resizes its control to `area` pixels instead of 1024 x 1024."""
    stock = pipeline_qwenimage_edit.calculate_dimensions

    def calculate_dimensions(target_area: int, ratio: float) -> tuple[int, int, Any]:
        width, height, rest = stock(area, ratio)
        return max(width, MULTIPLE_OF), max(height, MULTIPLE_OF), rest

    if area != STOCK_CONTROL_AREA:
        pipeline_qwenimage_edit.calculate_dimensions = calculate_dimensions
    try:
        yield
    finally:
        pipeline_qwenimage_edit.calculate_dimensions = stock
