"""A base of a real one's shape with random weights, to measure with where the real one is not: nothing is downloaded.

Promise: layers, widths and dtypes are those of the base, so that time and memory are; values are noise. Cost: making
the weights once, on the device itself.
"""

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from mixres.errors import UserError
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from mixres.models.registry import family_module

# Bases whose shape needs no file: `QwenImageTransformer2DModel`'s defaults are theirs.
STOCK_SHAPES = {
    "Qwen/Qwen-Image": "image",
    "Qwen/Qwen-Image-Edit": "edit",
    "Qwen/Qwen-Image-Edit-2509": "edit_plus",
}
_PIXELS_PER_TOKEN = 16
_FLOW_SHIFT = {"base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}


def synthetic_family(name: str | None, path: str, *, revision: str | None = None) -> ModuleType:
    """The base's family with a transformer of random weights.

    Of a base in a folder only configuration files are read, of one in `STOCK_SHAPES` nothing.

    Raises:
        UserError: any other base cannot be found, or is of no family that is known.
    """
    stock = path in STOCK_SHAPES and not Path(path).is_dir()
    real = importlib.import_module(f"mixres.models.qwen.{STOCK_SHAPES[path]}") if stock else None
    real = real or family_module(name, path, revision=revision)
    family = ModuleType(real.__name__, real.__doc__)
    family.__dict__.update(vars(real))
    replaced: dict[str, Any] = {"load_transformer": partial(_random_transformer, family)}
    if stock:
        replaced |= {"transformer_skeleton": _stock_skeleton, "pixels_per_token": _stock_pixels_per_token}
        replaced |= {"flow_shift": _stock_flow_shift}
    family.__dict__.update(replaced)
    return family


def _stock_skeleton(path: str, *, revision: str | None = None) -> QwenImageTransformer2DModel:
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
    return patch_qwen_model_for_multi_resolution(transformer)


def _stock_pixels_per_token(path: str, *, revision: str | None = None) -> int:
    return _PIXELS_PER_TOKEN


def _stock_flow_shift(path: str, *, revision: str | None = None) -> dict[str, float]:
    return dict(_FLOW_SHIFT)


@torch.no_grad()
def _random_transformer(
    family: ModuleType,
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None = None,
) -> QwenImageTransformer2DModel:
    """The skeleton filled with noise."""
    if quantize is not None:
        raise UserError("model.quantize: bench --synthetic has no weights that could be quantised: set it to null")
    skeleton = family.transformer_skeleton(path, revision=revision)
    nn.Module.to(skeleton, dtype)  # not diffusers' own, which warns about casts of pretrained weights
    transformer: QwenImageTransformer2DModel = skeleton.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight":
                parameter.normal_(std=module.in_features**-0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name == "bias" else 1.0)
    return transformer.eval()
