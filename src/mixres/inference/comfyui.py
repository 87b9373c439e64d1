"""The names under which ComfyUI's loaders find a Qwen-Image LoRA and a Qwen-Image transformer.

Promise: the strength at which ComfyUI applies the LoRA by default is the one it was trained at. Cost: none.

ComfyUI's own names are those of diffusers. A LoRA is looked up as `diffusion_model.<layer>` with `.lora_A.weight`,
`.lora_B.weight` and `.alpha`; without the last ComfyUI takes alpha / r for 1. diffusers reads these names too, but not
where `transformer` stands for `diffusion_model`, which ComfyUI would take as well. A transformer is recognised by
`txt_norm.weight`, and one with `zero_cond_t` by an empty tensor.

Source (read, nothing copied): Comfy-Org/ComfyUI, comfy/lora.py at 17358c8f73b5 (`model_lora_keys_unet`, `load_lora`),
comfy/weight_adapter/lora.py at 6f98b150e065, comfy/model_detection.py at 0b61ce5baa9e.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mixres.inference.merge import Adapter

ZERO_COND_T = "__index_timestep_zero__"
_PREFIX = "diffusion_model"


def lora_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of a LoRA for ComfyUI. A DoRA has none: see `docs/sampling.md`."""
    tensors = {}
    for layer, adapter in adapters.items():
        assert adapter.magnitude is None, layer
        tensors[f"{_PREFIX}.{layer}.lora_A.weight"] = adapter.down
        tensors[f"{_PREFIX}.{layer}.lora_B.weight"] = adapter.up
        tensors[f"{_PREFIX}.{layer}.alpha"] = _number(adapter.alpha)
    return tensors


def _number(value: float) -> Tensor:
    """A number as a tensor that gives it back: float32, which all programs read, wherever that holds it."""
    narrow = torch.tensor(value, dtype=torch.float32)
    return narrow if float(narrow) == value else torch.tensor(value, dtype=torch.float64)
