"""The processor of Qwen2.5-VL: the stock `Qwen2VLProcessor` where torchvision imports, else one without video.

Promise: text and one image give the same token ids, whichever of the two is used (pixels may differ by the rounding of
the two resizers). The base on disk stays stock: this class is handed to `from_pretrained`, never saved by name.
Cost: the import of torchvision, once.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<|image_pad|>"


class QwenImageTextProcessor(ProcessorMixin):  # type: ignore[misc]
    """Image processor and tokenizer; `Qwen2VLProcessor` less the video half, which alone needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholder once per merged patch of image `image_idx`."""
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        merged: int = patches // self.image_processor.merge_size**2
        return IMAGE_TOKEN * merged


class Qwen3TextProcessor(QwenImageTextProcessor, Qwen3VLProcessor):  # type: ignore[misc]
    """The same of Qwen3-VL, by whose class a pipeline asks for it."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@functools.cache
def torchvision_imports() -> bool:
    """Whether torchvision can really be imported: a wheel built for another torch is found but fails with an error."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def load_processor(folder: Path, stock: type[ProcessorMixin] = Qwen2VLProcessor) -> ProcessorMixin:
    """The processor whose files lie in `folder` (both layouts: `processor_config.json` or `preprocessor_config.json`).

    Raises:
        OSError: a file is missing or cannot be read.
    """
    if torchvision_imports():
        return stock.from_pretrained(folder)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    if stock is Qwen2VLProcessor:
        return QwenImageTextProcessor(image_processor, tokenizer)
    template = stock.get_processor_dict(folder)[0].get("chat_template") or tokenizer.chat_template
    return Qwen3TextProcessor(image_processor, tokenizer, template)
