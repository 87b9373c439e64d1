"""A LoRA as a file: written so that the stock pipelines load it, read so that training continues from it.

Promise: equal adapters make equal bytes; only safetensors are opened. Cost: the file once, or its header.

The format is that of diffusers' `save_lora_adapter`, with the recipe of the run in the metadata under `mixres`.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from mixres.errors import UserError

RECIPE_KEY = "mixres"
RECIPE_FILE = "mixres.json"  # the same of a transformer whose weights were all trained, in its folder
FILE_NAME = "pytorch_lora_weights.safetensors"
KEY = "model.lora.pretrained_weight"
_PREFIX = "transformer"
_DIFFUSERS_KEY = "lora_adapter_metadata"  # where diffusers looks for the adapter's configuration
_MAGNITUDE = "lora_magnitude_vector"


def lora_file(parameters: Mapping[str, Tensor], transformer: nn.Module, recipe: Mapping[str, Any]) -> bytes:
    """The adapters as a safetensors file that the stock pipeline's `load_lora_weights` takes.

    `parameters` are the trainable ones by name, as full tensors. `recipe` (base, rank, alpha, targets, control area,
    version) goes into the metadata as JSON under `mixres`.
    """
    tensors: dict[str, Tensor] = get_peft_model_state_dict(transformer, state_dict=dict(parameters))
    config = transformer.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    plain = {f"{_PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {
        "format": "pt",
        _DIFFUSERS_KEY: json.dumps(plain, sort_keys=True),
        RECIPE_KEY: json.dumps(dict(recipe), sort_keys=True),
    }
    return _ordered(save({f"{_PREFIX}.{k}": v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))


def with_recipe(file: bytes, recipe: Mapping[str, Any]) -> bytes:
    """The same LoRA with another recipe in its metadata."""
    return _ordered(file, {RECIPE_KEY: json.dumps(dict(recipe), sort_keys=True)})


def _ordered(file: bytes, changes: Mapping[str, str] = {}) -> bytes:
    """The same safetensors file with its header sorted: the library writes metadata in an order of chance."""
    (length,) = struct.unpack("<Q", file[:8])
    values = json.loads(file[8 : 8 + length])
    values["__metadata__"] |= changes
    header = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + file[8 + length :]


@dataclass(frozen=True)
class LoraHeader:
    """The adapters of a LoRA file without their weights."""

    path: Path
    r: int
    lora_alpha: float
    use_dora: bool
    layers: Mapping[str, tuple[int, int]]  # inputs and outputs of each layer with an adapter, by its name in the model
    recipe: Any  # what mixres wrote of the run, as it stands there; None in a file of another program


def read_header(given: str, *, key: str = KEY) -> LoraHeader:
    """The header of the LoRA at `given`, a file or the folder that holds one; `key` names it in messages.

    Raises:
        UserError: there is none, or it is no LoRA for a transformer in diffusers' format.
    """
    path = _path(given, key)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        stated = json.loads(metadata.get(_DIFFUSERS_KEY, "{}"))
        recipe = json.loads(metadata.get(RECIPE_KEY, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read: {str(error).splitlines()[0]}; name another") from error
    layers: dict[str, tuple[int, int]] = {}
    ranks = set()
    for name, shape in shapes.items():
        layer, is_a, rest = name.removeprefix(f"{_PREFIX}.").partition(".lora_A.weight")
        up = shapes.get(f"{_PREFIX}.{layer}.lora_B.weight", ())
        if is_a and not rest and len(shape) == len(up) == 2:
            layers[layer] = shape[1], up[0]
            ranks |= {shape[0], up[1]}
    magnitudes = sum(name.endswith(f".{_MAGNITUDE}") for name in shapes)
    if len(ranks) != 1 or len(shapes) != 2 * len(layers) + magnitudes or magnitudes not in (0, len(layers)):
        raise UserError(f"{key}: {path} is no LoRA of one rank in diffusers' format for a transformer; name another")
    (r,) = ranks
    # Where nothing is stated diffusers takes the rank for lora_alpha.
    return LoraHeader(path, r, float(stated.get(f"{_PREFIX}.lora_alpha", r)), magnitudes > 0, layers, recipe)


def load_adapters(header: LoraHeader, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the file's weights into the adapters; that it fits has been checked."""
    tensors = load_file(header.path)
    for name, parameter in parameters.items():
        stored = name.replace(".default", "")
        if _MAGNITUDE in stored:
            stored = stored.removesuffix(".weight")
        parameter.data.copy_(tensors.pop(f"{_PREFIX}.{stored}"))
    assert not tensors, sorted(tensors)


def layer_tensors(header: LoraHeader, file: bytes) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """A `(r, inputs)`, B `(outputs, r)` and, of a DoRA, the magnitudes `(outputs,)` of each layer with an adapter."""
    tensors = load(file)
    return {
        layer: (
            tensors[f"{_PREFIX}.{layer}.lora_A.weight"],
            tensors[f"{_PREFIX}.{layer}.lora_B.weight"],
            tensors.get(f"{_PREFIX}.{layer}.{_MAGNITUDE}"),
        )
        for layer in header.layers
    }


def _path(given: str, key: str) -> Path:
    path = Path(given).expanduser()
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{key}: there is no file {str(path)!r}; correct the path")
    if path.suffix != ".safetensors":
        raise UserError(f"{key}: {path} is not a .safetensors file, and others are never opened: convert it")
    return path
