"""Adapters into the transformer, trainable parameters out.

Promise: every target pattern matches at least one layer and is reported with what it matched; layers whose output
reaches no loss get no adapter. Adapters are float32 (float64 over a float64 base) whatever the base is. A file that
does not fit a run is refused with the setting that would make it fit, before anything is computed. Cost: none after
set-up.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); DoRA, Liu et al. 2024 (arXiv 2402.09353); by peft through diffusers'
`add_adapter`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mixres.config.problems import as_written
from mixres.errors import UserError
from mixres.models.lora_file import KEY, LoraHeader, load_adapters, read_header

Presets = Mapping[str, Sequence[str]]  # what one word of `target_modules` stands for
NO_PRESETS: Presets = {}
TARGETS_KEY = "model.lora.target_modules"


@dataclass(frozen=True)
class TargetMatch:
    """One row of the table a run prints: a pattern, the layers it gave adapters, their new parameters."""

    pattern: str
    modules: int
    parameters: int


def expanded(targets: Sequence[str], presets: Presets = NO_PRESETS) -> list[str]:
    """The patterns that `targets` stand for, each once."""
    return list(dict.fromkeys(pattern for target in targets for pattern in presets.get(target, (target,))))


def check_targets(
    transformer: nn.Module, patterns: Sequence[str], *, untrained: Sequence[str] = (), presets: Presets = NO_PRESETS
) -> None:
    """All patterns that give no linear layer of `transformer` (a meta-device model will do) an adapter, at once.

    Raises:
        UserError: one line for each such pattern, with the nearest ending there is.
    """
    names = _linear_layers(transformer)
    endings = sorted({".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 3)})
    problems = []
    for pattern in expanded(patterns, presets):
        matched = [name for name in names if _matches(name, pattern)]
        if not matched:
            # Nothing as far as 'linear' for peft's 'all-linear': that one would train a single layer.
            close = difflib.get_close_matches(pattern.lower(), [*presets, *endings], n=1, cutoff=0.77)
            words = f"write one of {', '.join(presets)}, or the ending of a layer's name"
            hint = f"did you mean '{close[0]}'?" if close else words
            problems.append(f"{TARGETS_KEY}: '{pattern}' matches no linear layer of the transformer; {hint}")
        elif all(_within(name, untrained) for name in matched):
            problems.append(f"{TARGETS_KEY}: the output of '{pattern}' reaches no loss: take it out")
    if problems:
        raise UserError(problems)


def add_lora(
    transformer: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: Sequence[str],
    untrained: Sequence[str],
    seed: int,
    presets: Presets = NO_PRESETS,
    use_dora: bool = False,
    pretrained_weight: str | None = None,
) -> list[TargetMatch]:
    """Freeze `transformer` and give its target layers adapters; the first draw of A is a function of `seed`.

    `untrained` names modules whose output reaches no loss: nothing below them gets an adapter. With
    `pretrained_weight`, a LoRA file or its folder, the adapters are those of the file.

    Raises:
        UserError: the file is none, or does not fit.
    """
    transformer.requires_grad_(False)
    patterns = expanded(target_modules, presets)
    chosen = _chosen(transformer, patterns, untrained)
    table = [_match(pattern, chosen, r, use_dora) for pattern in patterns]
    # By their full names: peft's `exclude_modules`, kept in the file, makes a warning wherever the file is loaded.
    config = LoraConfig(
        r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=list(chosen), use_dora=use_dora
    )
    with torch.random.fork_rng(devices=[]):  # A is drawn on the CPU, wherever the transformer is
        torch.default_generator.manual_seed(seed)
        transformer.add_adapter(config)  # type: ignore[operator]
    if not (use_dora or lora_dropout):  # DoRA also computes outside of autocast's operations
        for module in transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = _WithoutAutocast()
    parameters = trainable_parameters(transformer)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if pretrained_weight is not None:
        load_adapters(read_header(pretrained_weight), parameters)
    return table


def check_pretrained(
    transformer: nn.Module,
    pretrained_weight: str,
    *,
    r: int,
    lora_alpha: float,
    use_dora: bool,
    target_modules: Sequence[str],
    untrained: Sequence[str],
    presets: Presets = NO_PRESETS,
) -> None:
    """That adapters of these settings on `transformer` (a meta-device model will do) can start from the file.

    Raises:
        UserError: the file is none, or every setting that does not fit.
    """
    header, problems = read_header(pretrained_weight), []
    for name, own in {"r": r, "lora_alpha": lora_alpha, "use_dora": use_dora}.items():
        theirs = getattr(header, name)
        if own != theirs:
            what = f"model.lora.{name}: {as_written(own)} does not fit {header.path}"
            problems.append(f"{what}, which has {as_written(theirs)}: write {as_written(theirs)}")
    layers = _chosen(transformer, expanded(target_modules, presets), untrained)
    missing, extra = sorted(layers.keys() - header.layers.keys()), sorted(header.layers.keys() - layers.keys())
    if missing or extra:
        parts = [f"it has none for {missing[0]} and {len(missing) - 1} more"] if missing else []
        parts += [f"it has one for {extra[0]} and {len(extra) - 1} more, which get none here"] if extra else []
        problems.append(
            f"{TARGETS_KEY}: the adapters of {header.path} are for others: write those it was made with; "
            f"{'; '.join(parts)}"
        )
    if problem := base_problem(transformer, header):
        problems.append(f"{KEY}: {header.path} is for another base: {problem}; name one of this base")
    if problems:
        raise UserError(problems)


def base_problem(transformer: nn.Module, header: LoraHeader) -> str | None:
    """Why `transformer` (a meta-device model will do) cannot carry the adapters of a file; None where it can."""
    linears = _linear_layers(transformer)
    for name, (inputs, outputs) in sorted(header.layers.items()):
        linear = linears.get(name)
        if linear is None:
            return f"it has no layer {name}"
        if (linear.in_features, linear.out_features) != (inputs, outputs):
            return f"its {name} is {linear.in_features} x {linear.out_features}, the adapter's {inputs} x {outputs}"
    return None


class _WithoutAutocast:
    """True while autocast is off. Else peft casts all adapters' inputs to float32, and autocast back: the same bits."""

    def __bool__(self) -> bool:
        return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


def _chosen(transformer: nn.Module, patterns: Sequence[str], untrained: Sequence[str]) -> dict[str, nn.Linear]:
    return {
        name: linear
        for name, linear in _linear_layers(transformer).items()
        if any(_matches(name, pattern) for pattern in patterns) and not _within(name, untrained)
    }


def _linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _match(pattern: str, linears: Mapping[str, nn.Linear], r: int, use_dora: bool) -> TargetMatch:
    matched = [m for name, m in linears.items() if _matches(name, pattern)]
    parameters = sum(r * (m.in_features + m.out_features) + use_dora * m.out_features for m in matched)
    return TargetMatch(pattern, len(matched), parameters)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}", f"*.{pattern}")  # peft's rule for a list of targets, and * for any text


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
