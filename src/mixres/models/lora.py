"""Adapters into the transformer, trainable parameters out, and the file the stock pipelines load.

Promise: every target pattern matches at least one layer and is told with what it matched; layers whose output
reaches no loss get no adapter. Adapters are float32 (float64 over a float64 base) whatever the base is.
Cost: none after set-up.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685), by peft through diffusers' `add_adapter`.
"""

import difflib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn

from mixres.errors import UserError

RECIPE_KEY = "mixres"
FILE_NAME = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer"
_DIFFUSERS_KEY = "lora_adapter_metadata"  # where diffusers looks for the adapter's configuration


@dataclass(frozen=True)
class TargetMatch:
    """One row of the table a run prints: a pattern, the layers it gave adapters, their new parameters."""

    pattern: str
    modules: int
    parameters: int


def check_targets(transformer: nn.Module, patterns: Sequence[str], *, untrained: Sequence[str] = ()) -> None:
    """All patterns that give no linear layer of `transformer` (a meta-device model will do) an adapter, at once.

    Raises:
        UserError: one line for each such pattern, with the nearest ending there is.
    """
    names = _linear_layers(transformer)
    endings = sorted({".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 3)})
    faults = []
    for pattern in patterns:
        matched = [name for name in names if _matches(name, pattern)]
        if not matched:
            close = difflib.get_close_matches(pattern, endings, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            faults.append(f"model.lora.target_modules: '{pattern}' matches no linear layer of the transformer{hint}")
        elif all(_within(name, untrained) for name in matched):
            faults.append(f"model.lora.target_modules: the output of '{pattern}' reaches no loss: take it out")
    if faults:
        raise UserError(faults)


def add_lora(
    transformer: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: Sequence[str],
    untrained: Sequence[str],
    seed: int,
) -> list[TargetMatch]:
    """Freeze `transformer` and give its target layers adapters; the first draw of A is a function of `seed`.

    `untrained` names modules whose output reaches no loss: nothing below them gets an adapter.
    """
    transformer.requires_grad_(False)
    linears = {name: m for name, m in _linear_layers(transformer).items() if not _within(name, untrained)}
    table = [_match(pattern, linears, r) for pattern in target_modules]
    # By their full names: peft's `exclude_modules`, kept in the file, makes a warning wherever the file is loaded.
    targets = [name for name in linears if any(_matches(name, pattern) for pattern in target_modules)]
    config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(config)  # type: ignore[operator]
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return table


def _linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _match(pattern: str, linears: Mapping[str, nn.Linear], r: int) -> TargetMatch:
    matched = [m for name, m in linears.items() if _matches(name, pattern)]
    return TargetMatch(pattern, len(matched), sum(r * (m.in_features + m.out_features) for m in matched))


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")  # peft's rule for a list of targets


def train_all(transformer: nn.Module, *, untrained: Sequence[str]) -> list[TargetMatch]:
    """Make every weight trainable that reaches the loss; all in float32 or better: bf16 would lose small updates.

    No adapters, so the table is empty.
    """
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(not _within(name, untrained))
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return []


def trainable_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in the order of the model."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def fill_adapters(parameters: Mapping[str, nn.Parameter], *, seed: int) -> None:
    """Draw every B. It starts at zero: until then outputs are the base's and the gradients of all A are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def lora_file(parameters: Mapping[str, Tensor], transformer: nn.Module, recipe: Mapping[str, Any]) -> bytes:
    """The adapters as a safetensors file that the stock pipeline's `load_lora_weights` takes.

    `parameters` are the trainable ones by name, whole. `recipe` (base, rank, alpha, targets, control area, version)
    goes into the metadata as JSON under `mixres`.
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


def _ordered(file: bytes) -> bytes:
    """The same safetensors file with its header sorted: the library writes metadata in an order of chance."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.dumps(json.loads(file[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + file[8 + length :]
