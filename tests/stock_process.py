"""The stock pipeline with a LoRA file of mixres, in a process without mixres: BASE LORA OUT, cases as JSON on stdin."""

import functools
import json
import sys

sys.modules["mixres"] = None  # any import of it fails

import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from safetensors import safe_open
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


class Processor(ProcessorMixin):  # the stock one needs torchvision for its video half
    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, **kwargs)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * int(image_inputs["image_grid_thw"][image_idx].prod() // 4)


base, lora, out = sys.argv[1:4]
with safe_open(f"{lora}/pytorch_lora_weights.safetensors", "pt") as file:
    recipe = json.loads(file.metadata()["mixres"])
stock = pipeline_qwenimage_edit.calculate_dimensions
processor = Processor(
    Qwen2VLImageProcessorPil.from_pretrained(f"{base}/processor"), Qwen2Tokenizer.from_pretrained(f"{base}/processor")
)
pipeline = QwenImageEditPipeline.from_pretrained(base, processor=processor, dtype=torch.float32)
cases = json.load(sys.stdin)


def control_dimensions(area, _, ratio):
    return stock(area, ratio)


def save_all(part):
    for number, case in enumerate(cases):
        area = case["width"] * case["height"] if recipe["control_area"] == "target" else recipe["control_area"]
        pipeline_qwenimage_edit.calculate_dimensions = functools.partial(control_dimensions, area)
        picture = pipeline(
            image=Image.open(case["control"]).convert("RGB"),
            prompt=case["prompt"],
            true_cfg_scale=1.0,
            width=case["width"],
            height=case["height"],
            num_inference_steps=case["steps"],
            generator=torch.Generator().manual_seed(case["seed"]),
        ).images[0]
        picture.save(f"{out}/{number}-{part}.png")


save_all("without")
pipeline.load_lora_weights(lora)
save_all("with")
