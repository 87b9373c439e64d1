"""Images of a LoRA through its base's stock pipeline, in a process that cannot import mixres.

`python stock_process.py BASE FOLDER_OF_THE_LORA OUT [TRANSFORMER]` reads calls as JSON from its input and writes each
image without the LoRA and with it, and with a transformer whose weights were all trained in place of the base's.
"""

import itertools
import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit, pipeline_qwenimage_edit_plus as plus
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as qwen21
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

assert "mixres" not in sys.modules
sys.modules["mixres"] = None  # type: ignore[assignment] # any import of it fails from here on


class Processor(ProcessorMixin):
    """The stock one needs torchvision for its video half."""

    def __init__(self, image_processor=None, tokenizer=None, **kwargs) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, **kwargs)

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        return self.image_token * int(image_inputs["image_grid_thw"][image_idx].prod() // 4)


base, lora, out = map(Path, sys.argv[1:4])
with safe_open(lora / "pytorch_lora_weights.safetensors", "pt") as file:
    recipe = json.loads(file.metadata()["mixres"])
parts = {}
if (base / "processor").is_dir():
    folder = base / "processor"
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    parts["processor"] = Processor(
        Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, chat_template=tokenizer.chat_template
    )
if (base / "tokenizer" / "chat_template.jinja").is_file():  # FLUX.2-dev names a processor
    parts["tokenizer"] = AutoTokenizer.from_pretrained(base / "tokenizer")
pipeline_class = getattr(diffusers, json.loads((base / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
if pipeline_class is diffusers.QwenImage21Pipeline:  # it asks its processor as it is made
    parts["processor"].return_mm_token_type_ids = True
    pipeline = pipeline_class.from_pretrained(base, **parts, dtype=torch.float32)
else:
    pipeline = pipeline_class.from_pretrained(base, **dict.fromkeys(parts), dtype=torch.float32)
pipeline.register_modules(**parts)
calls = json.load(sys.stdin)


stock_dimensions = edit.calculate_dimensions


def set_control_sizes(width: int, height: int, aligned: list[float]) -> None:
    """The sizes that the LoRA was trained with: the image's for controls of these aspects; others have an area."""
    area = recipe.get("control_area")
    area = width * height if area == "target" else area
    if "text_area" in recipe:
        plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE = area, recipe["text_area"]
        plus.calculate_dimensions = lambda given, ratio: (
            (width, height) if given == area and ratio in aligned else stock_dimensions(given, ratio)[:2]
        )
    elif area:
        edit.calculate_dimensions = qwen21.calculate_dimensions = lambda _, ratio: (
            (width, height, None) if ratio in aligned else stock_dimensions(area, ratio)
        )


def of_flux2_size(control: Image.Image, aligned: tuple[int, int] | None) -> Image.Image:
    """Resized to the size of the image, or to that to which the stock pipeline would crop it."""
    scale = min(1.0, (recipe["control_area"] / (control.width * control.height)) ** 0.5)
    by_area = [max(64, int(side * scale) // 16 * 16) for side in control.size]
    return control.resize(aligned or by_area, Image.Resampling.LANCZOS)


def of_kontext_size(control: Image.Image) -> Image.Image:
    """At its own aspect: the pipeline has sizes of 1 MP only."""
    width = (recipe["control_area"] * control.width / control.height) ** 0.5
    sides = width, width * control.height / control.width
    return control.resize([round(side / 16) * 16 for side in sides], Image.Resampling.LANCZOS)


def save_all(part: str) -> None:
    for number, call in enumerate(calls):
        words, draw = call["words"], torch.Generator().manual_seed(call["seed"])
        controls = [Image.open(path).convert("RGB") for path in call["controls"]]
        aspects = [control.width / control.height for control in controls]
        width, height = words["width"], words["height"]
        set_control_sizes(width, height, list(itertools.compress(aspects, call["aligned"])))
        if "Flux2" in type(pipeline).__name__:
            sizes = [(width, height) if same else None for same in call["aligned"]]
            images = {"image": [of_flux2_size(*pair) for pair in zip(controls, sizes, strict=True)]}
            images |= {"guidance_scale": 1.0} if "Klein" in type(pipeline).__name__ else {}
        elif "Kontext" in type(pipeline).__name__:
            images = {"image": of_kontext_size(*controls), "_auto_resize": False, "guidance_scale": 2.5}
            images["max_area"] = words["width"] * words["height"]
        elif "Flux" in type(pipeline).__name__:
            images = {}
        else:
            one = "text_area" not in recipe and "21" not in type(pipeline).__name__
            images = {"image": controls[0] if one else controls} if controls else {}
            images |= {"guidance_scale": 0.0} if "ZImage" in type(pipeline).__name__ else {"true_cfg_scale": 1.0}
        pipeline(**images, **words, generator=draw).images[0].save(out / f"{number}-{part}.png")


save_all("without")
pipeline.load_lora_weights(lora)
save_all("with")
if len(sys.argv) > 4:
    pipeline.transformer = type(pipeline.transformer).from_pretrained(sys.argv[4], dtype=torch.float32)
    save_all("whole")
