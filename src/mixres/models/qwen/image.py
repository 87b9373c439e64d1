"""Qwen-Image: text to image, no control images."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import QwenImagePipeline
from PIL import Image

from mixres.models.family import AreaRule
from mixres.models.qwen.family import STOCK_CONTROL_AREA, TOKENIZER_MAX_LENGTH, QwenFamily
from mixres.models.stock_family import no_control_areas


class QwenImage(QwenFamily):
    """The stock `QwenImagePipeline`; no prompt of up to `max_prompt_tokens` is cut."""

    name = "qwen_image"
    pipeline_class = QwenImagePipeline
    components = ("vae", "text_encoder", "tokenizer")
    stock_bases: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image",)
    controls = (0, 0)
    comfyui_controls = None
    controls_problem = "Qwen-Image takes no control images, there are {}: train an edit model, or take them out"
    # The pipeline cuts what is over, the five tokens of the template behind the prompt among them.
    max_prompt_tokens = TOKENIZER_MAX_LENGTH - 5

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """See `no_control_areas`."""
        return no_control_areas("Qwen-Image", area, text_area, stock=STOCK_CONTROL_AREA)

    def control_call(self, controls: Sequence[Image.Image]) -> dict[str, Any]:
        """There are none. The stock call cuts prompts at 512 tokens unless it is told otherwise."""
        assert not controls
        return {"max_sequence_length": TOKENIZER_MAX_LENGTH}
