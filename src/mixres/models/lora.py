"""Adapters into the transformer, trainable parameters out, and the file the stock pipelines load.

Promise: every target pattern matches at least one layer and is told with what it matched; layers whose output
reaches no loss get no adapter. Adapters are float32 (float64 over a float64 base) whatever the base is.
Cost: none after set-up.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685), by peft through diffusers' `add_adapter`.
"""

import difflib
import json
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


def check_targets(transformer: nn.Module, patterns: Sequence[str]) -> None:
    """All patterns that match no linear layer of `transformer` (a meta-device model will do), at once.

    Raises:
        UserError: one line for each such pattern, with the nearest ending there is.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    endings = sorted({".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 3)})
    faults = []
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, endings, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            faults.append(f"model.lora.target_modules: '{pattern}' matches no linear layer of the transformer{hint}")
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
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    left_out = [name for name in linears if any(f"{name}.".startswith(f"{module}.") for module in untrained)]
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=list(target_modules),
        exclude_modules=left_out or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(config)  # type: ignore[operator]
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return [_match(pattern, linears, left_out, r) for pattern in target_modules]


def _match(pattern: str, linears: Mapping[str, nn.Linear], left_out: Sequence[str], r: int) -> TargetMatch:
    matched = [m for name, m in linears.items() if name not in left_out and _matches(name, pattern)]
    return TargetMatch(pattern, len(matched), sum(r * (m.in_features + m.out_features) for m in matched))


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")  # peft's rule for a list of targets


def train_all(transformer: nn.Module, *, untrained: Sequence[str]) -> list[TargetMatch]:
    """Make every weight trainable that reaches the loss, in float32 or better: bf16 would lose small updates.

    No adapters, so the table is empty.
    """
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(not any(name.startswith(f"{module}.") for module in untrained))
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return []


def trainable_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in the order of the model."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


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
    data: bytes = save({f"{_PREFIX}.{k}": v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    return data
