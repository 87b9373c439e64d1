"""Adapters as a file: written so that other programs load them, read so that training continues from them.

Promise: equal adapters make equal bytes; only safetensors are opened. Cost: the file once, or its header.

LoRA and DoRA have the format of diffusers' `save_lora_adapter`. LoKr and LoHa have the names of LyCORIS, a layer's dots
as underscores behind `lycoris_`, which lycoris-lora and ComfyUI read. The metadata have the adapter's configuration
and, under `mixres`, the recipe of the run.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); DoRA, Liu et al. 2024 (arXiv 2402.09353); LoKr and LoHa, Yeh et al.
2023 (LyCORIS, arXiv 2309.14859).
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from mixres.config.schema import LYCORIS, Adapter
from mixres.errors import UserError

RECIPE_KEY = "mixres"
RECIPE_FILE = "mixres.json"  # the same of a transformer whose weights were all trained, in its folder
FILE_NAME = "pytorch_lora_weights.safetensors"
KEY = "model.lora.pretrained_weight"
_PREFIX = "transformer"
_DIFFUSERS_KEY = "lora_adapter_metadata"  # where diffusers looks for the adapter's configuration
MAGNITUDE = "lora_magnitude_vector"
_LYCORIS_PREFIX = "lycoris_"
_OTHER_PREFIXES = ("diffusion_model.", "transformer.", "lora_unet_")  # of the same names in files of other programs
_ALPHA = "alpha"
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR = [  # a weight's small factor and its large one, each whole or of low rank
    {*left, *right}
    for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
]
ADAPTER_PARTS = (".lora_", ".lokr_", ".hada_")  # of names of parameters that belong to an adapter, not to the base
# The tensors of each layer with an adapter, by their names in the file behind the layer's.
Adapters = Mapping[str, Mapping[str, Tensor]]


def lora_file(parameters: Mapping[str, Tensor], transformer: nn.Module, recipe: Mapping[str, Any]) -> bytes:
    """The adapters as a safetensors file: of LoRA and DoRA one that the pipelines' `load_lora_weights` takes.

    `parameters` are the trainable ones by name, as full tensors. `recipe` (base, rank, alpha, targets, control area,
    version) goes into the metadata as JSON under `mixres`.
    """
    config = _peft_config(transformer).to_dict()
    if kind_of(transformer) in LYCORIS:
        tensors = _lycoris_tensors(parameters, transformer)
        # All names in full, where peft leaves the shortest endings: the tensors' names have lost their dots.
        config["target_modules"] = {name.rsplit(".", 2)[0] for name in parameters}
    else:
        found: dict[str, Tensor] = get_peft_model_state_dict(transformer, state_dict=dict(parameters))
        tensors = {f"{_PREFIX}.{name}": tensor for name, tensor in found.items()}
    plain = {f"{_PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {
        "format": "pt",
        _DIFFUSERS_KEY: json.dumps(plain, sort_keys=True),
        RECIPE_KEY: json.dumps(dict(recipe), sort_keys=True),
    }
    return _ordered(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))


def kind_of(transformer: nn.Module) -> Adapter:
    """Which adapters the transformer carries."""
    config = _peft_config(transformer)
    if isinstance(config, LoKrConfig):
        return "lokr"
    return "loha" if isinstance(config, LoHaConfig) else "dora" if config.use_dora else "lora"


def _peft_config(transformer: Any) -> Any:
    return transformer.peft_config["default"]


def _lycoris_tensors(parameters: Mapping[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """With an alpha for each layer, without which programs take alpha / r for 1."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        layer, part, adapter = name.rsplit(".", 2)
        assert adapter == "default", name
        alpha = transformer.get_submodule(layer).alpha["default"]  # type: ignore[index]
        stem = _stem(layer)
        tensors |= {f"{stem}.{part}": parameter, f"{stem}.{_ALPHA}": torch.tensor(float(alpha))}
    return tensors


def _stem(layer: str) -> str:
    return _LYCORIS_PREFIX + layer.replace(".", "_")


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
    """The adapters of a file without their weights."""

    path: Path
    r: int
    lora_alpha: float
    use_dora: bool
    layers: Mapping[str, tuple[int, int]]  # inputs and outputs of each layer with an adapter, by its name in the model
    recipe: Any  # what mixres wrote of the run, as it stands there; None in a file of another program
    adapter: Adapter = "lora"
    factor: int = -1  # of a LoKr, as `decompose_both`; -1 where the file does not say
    decompose_both: bool = False
    stems: Mapping[str, str] = field(default_factory=dict)  # of LoKr and LoHa: the names of the layers in the file
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # and of their tensors, by part

    def stored_name(self, parameter: str) -> str:
        """The file's name for a parameter of a transformer with these adapters."""
        if self.stems:
            layer, part, _ = parameter.rsplit(".", 2)
            return f"{self.stems[layer]}.{part}"
        stored = parameter.replace(".default", "")
        return f"{_PREFIX}.{stored.removesuffix('.weight') if MAGNITUDE in stored else stored}"


def header_of(transformer: nn.Module, path: Path, recipe: Any) -> LoraHeader:
    """Of the file at `path` that `lora_file` would make of this transformer with adapters."""
    kind, config = kind_of(transformer), _peft_config(transformer)
    layers = {
        name: (int(layer.in_features), int(layer.out_features))
        for name, layer in transformer.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    stems = {layer: _stem(layer) for layer in layers} if kind in LYCORIS else {}
    alpha = config.alpha if stems else config.lora_alpha
    return LoraHeader(path, config.r, float(alpha), kind == "dora", layers, recipe, adapter=kind, stems=stems)


def read_header(given: str, *, key: str = KEY, names: Iterable[str] = ()) -> LoraHeader:
    """The header of the adapters at `given`, a file or the folder that holds one; `key` names it in messages.

    `names` are those of a transformer's layers: files of LyCORIS name them without dots.

    Raises:
        UserError: there is none, or it is no LoRA for a transformer in diffusers' format, nor a LoKr or LoHa.
    """
    path = _path(given, key)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            alphas = {name: float(file.get_tensor(name)) for name, shape in shapes.items() if _is_alpha(name, shape)}
        stated = json.loads(metadata.get(_DIFFUSERS_KEY, "{}"))
        recipe = json.loads(metadata.get(RECIPE_KEY, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read: {str(error).splitlines()[0]}; name another") from error
    if any(part in name for name in shapes for part in ADAPTER_PARTS[1:]):
        own = {name.removeprefix(f"{_PREFIX}."): value for name, value in stated.items()}
        return _lycoris_header(path, key, shapes, alphas, own, recipe, names)
    layers: dict[str, tuple[int, int]] = {}
    ranks = set()
    for name, shape in shapes.items():
        layer, is_a, rest = name.removeprefix(f"{_PREFIX}.").partition(".lora_A.weight")
        up = shapes.get(f"{_PREFIX}.{layer}.lora_B.weight", ())
        if is_a and not rest and len(shape) == len(up) == 2:
            layers[layer] = shape[1], up[0]
            ranks |= {shape[0], up[1]}
    magnitudes = sum(name.endswith(f".{MAGNITUDE}") for name in shapes)
    if len(ranks) != 1 or len(shapes) != 2 * len(layers) + magnitudes or magnitudes not in (0, len(layers)):
        raise UserError(f"{key}: {path} is no LoRA of one rank in diffusers' format for a transformer; name another")
    (r,) = ranks
    # Where nothing is stated diffusers takes the rank for lora_alpha.
    kind: Adapter = "dora" if magnitudes else "lora"
    alpha = float(stated.get(f"{_PREFIX}.lora_alpha", r))
    return LoraHeader(path, r, alpha, kind == "dora", layers, recipe, adapter=kind)


def load_adapters(header: LoraHeader, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the file's weights into the adapters; that it fits has been checked."""
    tensors = load_file(header.path)
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors.pop(header.stored_name(name)))
    assert all(name.endswith(f".{_ALPHA}") for name in tensors), sorted(tensors)


def layer_tensors(header: LoraHeader, file: bytes) -> Adapters:
    """The tensors of each layer with an adapter."""
    stems = header.stems or {layer: f"{_PREFIX}.{layer}" for layer in header.layers}
    layers = {stem: layer for layer, stem in stems.items()}
    found: dict[str, dict[str, Tensor]] = {layer: {} for layer in header.layers}
    for name, tensor in load(file).items():
        stem = name.partition(".lora_")[0] if not header.stems else name.rpartition(".")[0]
        found[layers[stem]][name.removeprefix(f"{stem}.")] = tensor
    return found


def weight_change(parts: Mapping[str, Tensor], alpha: float) -> Tensor:
    """`(outputs, inputs)`: what a layer's adapter, a DoRA before its lengths, adds to the weight.

    LoRA: alpha/r B A. LoHa: alpha/r (A1 B1) * (A2 B2), value by value. LoKr: alpha/r (W1 kron W2), of which each may be
    a product A B of rank r; where neither is, the factor is 1.
    """
    if "lora_A.weight" in parts:
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        return alpha / len(down) * (up @ down)
    if "hada_w1_a" in parts:
        scale = alpha / len(parts["hada_w1_b"])
        return scale * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    ranks = [len(tensor) for part, tensor in parts.items() if part in ("lokr_w1_b", "lokr_w2_b")]
    one, two = (
        parts[f"lokr_w{n}"] if f"lokr_w{n}" in parts else parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"] for n in (1, 2)
    )
    return (alpha / ranks[0] if ranks else 1.0) * torch.kron(one, two)


def _sides(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Inputs and outputs of the layer that a LoHa or LoKr of these shapes is for."""
    names = ("hada_w1",) if "hada_w1_a" in parts else ("lokr_w1", "lokr_w2")
    rows = [parts.get(name, parts.get(f"{name}_a", ()))[0] for name in names]
    columns = [parts.get(name, parts.get(f"{name}_b", ()))[1] for name in names]
    return math.prod(columns), math.prod(rows)


def _is_alpha(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(f".{_ALPHA}") and math.prod(shape) == 1


def _lycoris_header(
    path: Path,
    key: str,
    shapes: Mapping[str, tuple[int, ...]],
    alphas: Mapping[str, float],
    stated: Mapping[str, Any],
    recipe: Any,
    names: Iterable[str],
) -> LoraHeader:
    """As `read_header`, of a file whose tensors have the names of LyCORIS. `stated` is the adapter's configuration."""
    layer_of = {name.replace(".", "_"): name for name in (*names, *stated.get("target_modules", ()))}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        stem, _, part = name.rpartition(".")
        parts.setdefault(stem, {})[part] = shape
    stems: dict[str, str] = {}
    kinds, scales, largest = set[Adapter](), set[tuple[int, float]](), 0
    for stem, own in parts.items():
        own.pop(_ALPHA, None)
        if not (own.keys() == _LOHA or own.keys() in _LOKR) or any(len(shape) != 2 for shape in own.values()):
            raise UserError(f"{key}: {path} is no LoKr or LoHa of linear layers alone, see {stem}; name another")
        flat = next((stem.removeprefix(p) for p in (_LYCORIS_PREFIX, *_OTHER_PREFIXES) if stem.startswith(p)), stem)
        stems[layer_of.get(flat.replace(".", "_"), flat)] = stem
        kinds.add("loha" if own.keys() == _LOHA else "lokr")
        ranks = {shape[0] for part, shape in own.items() if part.endswith("_b")}
        scales |= {(rank, alphas.get(f"{stem}.{_ALPHA}", float(rank))) for rank in ranks}
        largest = max(largest, *(max(shape) for shape in own.values()))
    if len(kinds) != 1 or len(scales) > 1 or len(stems) != len(parts):
        raise UserError(f"{key}: {path} has adapters of several kinds, ranks or alphas; name another")
    # Whole factors have no rank: the smallest one that makes them whole, and the scale of 1 that they have.
    rank, alpha = next(iter(scales), (-(-largest // 2), float(-(-largest // 2))))
    found = {layer: parts[stem] for layer, stem in stems.items()}
    layers = {layer: _sides(own) for layer, own in found.items()}
    if not stated and isinstance(recipe, dict):  # an exported file has the recipe alone
        names_of = {"r": "r", "alpha": "lora_alpha", "decompose_factor": "factor", "decompose_both": "decompose_both"}
        stated = {name: recipe[own] for name, own in names_of.items() if isinstance(recipe.get(own), int | float)}
    return LoraHeader(
        path,
        int(stated.get("r", rank)),
        float(stated.get("alpha", alpha)),
        False,
        layers,
        recipe,
        adapter=kinds.pop(),
        factor=int(stated.get("decompose_factor", -1)),
        decompose_both=bool(stated.get("decompose_both", False)),
        stems=stems,
        shapes=found,
    )


def _path(given: str, key: str) -> Path:
    path = Path(given).expanduser()
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{key}: there is no file {str(path)!r}; correct the path")
    if path.suffix != ".safetensors":
        raise UserError(f"{key}: {path} is not a .safetensors file, and others are never opened: convert it")
    return path
