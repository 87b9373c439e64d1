"""LoRA files whose adapters do something, without a run that trains them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixres.config.load import load_config
from mixres.models.lora import add_lora, trainable_parameters
from mixres.models.lora_file import FILE_NAME, lora_file
from mixres.preprocessing.fill import family_of
from mixres.training.setup import recipe

# Settings of every kind of adapter on layers of 128: LoKr's large factor, or both, of rank 4, or none.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True, "adapter": "dora"},
    "lokr": {"adapter": "lokr", "factor": 4},
    "lokr, whole": {"adapter": "lokr", "factor": 4, "r": 512},
    "lokr, both": {"adapter": "lokr", "factor": 16, "decompose_both": True},
    "loha": {"adapter": "loha"},
}


def overrides_of(kind: str) -> list[str]:
    """The settings of a row of `KINDS` as overrides of a configuration."""
    given = KINDS[kind]
    return [f"model.{'' if key == 'adapter' else 'lora.'}{key}={json.dumps(value)}" for key, value in given.items()]


def add_noise(parameters: dict[str, nn.Parameter]) -> None:
    """A and B then are not zero, and magnitudes are not the base's."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * noise.exp() if "magnitude" in name else parameter.data + noise


def write_lora(folder: Path, base: Path, *overrides: str, dtype: str = "float32") -> Path:
    """`FILE_NAME` in `folder`, of adapters on `base` whose B is not zero and whose magnitudes are not the base's."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.yaml"
    file.write_text(
        f"model: {{pretrained_model_name_or_path: {base}, lora: {{r: 4, lora_alpha: 6}}}}\ndata: {{train: x}}"
    )
    config = load_config(file, [f"model.dtype={dtype}", *overrides])
    family = family_of(config)
    transformer = family.load_transformer(dtype=getattr(torch, dtype), device="cpu")
    settings: dict[str, Any] = config.model.adapter_settings() | {"presets": family.lora_presets}
    add_lora(transformer, **settings, untrained=family.untrained_modules(transformer), seed=1)
    add_noise(trainable_parameters(transformer))
    path = folder / FILE_NAME
    path.write_bytes(lora_file(trainable_parameters(transformer), transformer, recipe(config, family, 7)))
    return path
