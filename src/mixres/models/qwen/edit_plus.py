"""Qwen-Image-Edit-2509 and -2511: one to three control images a sample, at one area for the VAE and another for the
text encoder.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import QwenImageEditPlusPipeline
from PIL import Image

from mixres.models.family import AreaRule
from mixres.models.qwen.family import QwenFamily

STOCK_TEXT_AREA = 384 * 384  # pixels of a control for the text encoder
_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # how the pipeline names each control


class QwenImageEditPlus(QwenFamily):
    """The stock `QwenImageEditPlusPipeline`."""

    name = "qwen_image_edit_plus"
    pipeline_class = QwenImageEditPlusPipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-Edit-2509",)
    controls = (1, 3)  # the model's authors name three as the maximum
    controls_problem = "Qwen-Image-Edit-Plus takes 1 to 3 control images, there are {}; give it so many"

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """One area for the VAE, one for the text encoder."""
        return {"control_area": area, "text_area": STOCK_TEXT_AREA if text_area is None else text_area}

    def template_text(self, prompt: str, controls: int) -> str:
        """ "Picture 1: ...", "Picture 2: ..." and so on, then the prompt."""
        return "".join(_PICTURE.format(number) for number in range(1, controls + 1)) + prompt

    def control_call(self, controls: Sequence[Image.Image]) -> dict[str, Any]:
        """The controls."""
        return {"image": list(controls)}
