"""Qwen-Image-Edit: one control image a sample, seen by VAE and text encoder at one size."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import QwenImageEditPipeline
from PIL import Image

from mixres.models.family import ControlSizes
from mixres.models.qwen.family import QwenFamily


class QwenImageEdit(QwenFamily):
    """The stock `QwenImageEditPipeline`."""

    name = "qwen_image_edit"
    label = "Qwen-Image-Edit"
    pipeline_class = QwenImageEditPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-Edit",)
    controls = (1, 1)
    controls_problem = "Qwen-Image-Edit takes exactly one control image, there are {}; give it one"

    def vae_controls(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Image.Image]:
        """The pipeline resizes once, for the text encoder and the VAE."""
        return self.text_controls(pipeline, controls, sizes)

    def control_call(self, controls: Sequence[Image.Image]) -> dict[str, Any]:
        """The control."""
        (control,) = controls
        return {"image": control}
