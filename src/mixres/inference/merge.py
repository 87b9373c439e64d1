"""A LoRA folded into its base: full weights, tensor by tensor from the base's own files.

Promise: the weight of a layer with an adapter is the one that layer and adapter together compute with, worked out in
float32 (float64 over a float64 base) and rounded once, to the base's precision; every other tensor keeps its bits.
Cost: each tensor of the base is read once; memory for the adapters and one tensor.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685): W + alpha/r B A. DoRA, Liu et al. 2024 (arXiv 2402.09353), equation 5,
with the rows of diffusers' weights for the paper's columns: m (W + alpha/r B A) / |W + alpha/r B A|.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mixres.errors import UserError
from mixres.inference.tensor_file import FLOATS, Entry, TensorFile
from mixres.models.lora_file import LoraHeader, layer_tensors

CONFIG = "config.json"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SINGLE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to one linear layer."""

    down: Tensor  # A, (r, inputs)
    up: Tensor  # B, (outputs, r)
    alpha: float  # lora_alpha
    magnitude: Tensor | None = None  # DoRA: (outputs,)

    def merged(self, weight: Tensor) -> Tensor:
        """`(outputs, inputs)`: the layer's weight with the adapter in it, in float32 or better."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        exact = weight.to(wide) + self.alpha / len(self.down) * (self.up.to(wide) @ self.down.to(wide))
        if self.magnitude is None:
            return exact
        lengths = torch.linalg.vector_norm(exact, dim=1)
        return exact.mul(self.magnitude.to(wide).div(lengths).unsqueeze(1))


def adapters_of(header: LoraHeader, file: bytes) -> dict[str, Adapter]:
    """The adapters of a LoRA file by the names of their layers."""
    return {
        layer: Adapter(down, up, header.lora_alpha, magnitude)
        for layer, (down, up, magnitude) in layer_tensors(header, file).items()
    }


@dataclass(frozen=True)
class ModelFiles:
    """A transformer's folder in diffusers' layout: its configuration, and which file holds which tensors."""

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, TensorFile]

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {name: entry for file in self.files.values() for name, entry in file.entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def read_model_files(folder: Path) -> ModelFiles:
    """What `from_pretrained` would load from `folder`, from JSON and headers alone.

    Raises:
        UserError: files are missing, damaged or do not fit their index, or hold quantised weights.
    """
    index = folder / INDEX
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        files = {name: TensorFile(folder / name) for name in sorted(set(where.values())) or [_SINGLE]}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read: {error}; fetch it again") from error
    found = {name: file for file, opened in files.items() for name in opened.entries}
    if where and where != found:
        raise UserError(f"{index} does not fit the files beside it: fetch the base again")
    model = ModelFiles(folder, config, files)
    if other := {name: entry.dtype for name, entry in model.entries.items() if entry.dtype not in FLOATS}:
        name, dtype = min(other.items())
        raise UserError(f"{folder} holds {dtype} weights ({name}): name a base of {', '.join(FLOATS)}")
    return model


class MergedTensors:
    """The tensors of `model` with the adapters, named by their layers, folded in."""

    def __init__(self, model: ModelFiles, adapters: Mapping[str, Adapter]) -> None:
        missing = adapters.keys() - {name.removesuffix(".weight") for name in model.entries}
        assert not missing, sorted(missing)
        self._adapters = adapters
        self._file = {name: file for file in model.files.values() for name in file.entries}
        self._changed = self._lost = 0.0  # squared: by the adapters, and of that by rounding

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the precision it has in the base."""
        tensor = self._file[name].tensor(name)
        adapter = self._adapters.get(name.removesuffix(".weight"))
        if adapter is None:
            return tensor
        exact = adapter.merged(tensor)
        rounded = exact.to(tensor.dtype)
        self._changed += float(torch.linalg.vector_norm(exact - tensor)) ** 2
        self._lost += float(torch.linalg.vector_norm(exact - rounded)) ** 2
        return rounded

    def rounding(self) -> float:
        """How far rounding has moved the weights over how far the adapters have, in norms, of those made so far."""
        return math.sqrt(self._lost / self._changed) if self._changed else 0.0
