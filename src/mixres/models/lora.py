"""Adapters into the transformer, trainable parameters out.

Promise: every target pattern matches at least one layer and is reported with what it matched; layers whose output
reaches no loss get no adapter. Adapters are float32 (float64 over a float64 base) whatever the base is. A file that
does not fit a run is refused with the setting that would make it fit, before anything is computed. Cost: none after
set-up.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); DoRA, Liu et al. 2024 (arXiv 2402.09353); LoKr and LoHa, Yeh et al.
2023 (LyCORIS, arXiv 2309.14859); by peft through diffusers' `add_adapter`.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixres.config.problems import as_written
from mixres.config.schema import LYCORIS, Adapter
from mixres.errors import UserError
from mixres.models.lora_file import KEY, LoraHeader, load_adapters, read_header

Presets = Mapping[str, Sequence[str]]  # what one word of `target_modules` stands for
NO_PRESETS: Presets = {}
TARGETS_KEY = "model.lora.target_modules"
_ZERO = ("lokr_w2", "lokr_w2_b", "hada_w2_b")  # where adapters start, besides LoRA's B


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
    adapter: Adapter = "lora",
    use_dora: bool = False,
    factor: int = -1,
    decompose_both: bool = False,
    pretrained_weight: str | None = None,
) -> list[TargetMatch]:
    """Freeze `transformer` and give its target layers adapters; the first draw of A is a function of `seed`.

    `untrained` names modules whose output reaches no loss: nothing below them gets an adapter. With
    `pretrained_weight`, a LoRA file or its folder, the adapters are those of the file.

    Raises:
        UserError: the file is none, or does not fit.
    """
    patterns = expanded(target_modules, presets)
    chosen = _chosen(transformer, patterns, untrained)
    settings: dict[str, Any] = {"r": r, "lora_alpha": lora_alpha, "factor": factor, "decompose_both": decompose_both}
    kind = "dora" if use_dora else adapter
    with torch.random.fork_rng(devices=[]):  # A is drawn on the CPU, wherever the transformer is
        torch.default_generator.manual_seed(seed)
        _add(transformer, chosen, kind, **settings, lora_dropout=lora_dropout)
    if pretrained_weight is not None:
        load_adapters(read_header(pretrained_weight, names=chosen), trainable_parameters(transformer))
    return [_match(pattern, chosen, kind, settings) for pattern in patterns]


def attach(pipeline: Any, header: LoraHeader) -> None:
    """The adapters of a file on the pipeline's transformer: LoKr and LoHa too, which not all pipelines load."""
    if header.adapter not in LYCORIS:
        pipeline.load_lora_weights(header.path)
        return
    kept = {name: getattr(header, name) for name in ("r", "lora_alpha", "factor", "decompose_both")}
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        _add(pipeline.transformer, header.layers, header.adapter, **kept)
    load_adapters(header, trainable_parameters(pipeline.transformer))
    pipeline.transformer.requires_grad_(False)


def _add(
    transformer: Any,
    layers: Iterable[str],
    kind: Adapter,
    *,
    r: int,
    lora_alpha: float,
    factor: int,
    decompose_both: bool,
    lora_dropout: float = 0.0,
) -> None:
    """Freeze the transformer and give these layers adapters, in float32 or better."""
    config: Any
    # By their full names: peft's `exclude_modules`, kept in the file, makes a warning wherever the file is loaded.
    targets = list(layers)
    if kind == "lokr":
        config = LoKrConfig(r=r, alpha=lora_alpha, target_modules=targets)
        config.decompose_factor, config.decompose_both, config.init_weights = factor, decompose_both, "lycoris"
    elif kind == "loha":
        config = LoHaConfig(r=r, alpha=lora_alpha, target_modules=targets)
    else:
        use_dora = kind == "dora"
        config = LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets, use_dora=use_dora
        )
    transformer.requires_grad_(False)
    transformer.add_adapter(config)
    without_casts = not (kind == "dora" or lora_dropout)  # DoRA also computes outside of autocast's operations
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer) and without_casts:
            module.cast_input_dtype_enabled = _WithoutAutocast()
        if isinstance(module, LoKrLayer):
            _as_lycoris(module, {"r": r, "factor": factor, "decompose_both": decompose_both})
        if isinstance(module, LycorisLayer):
            module.forward = MethodType(_forward, module)
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


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
    adapter: Adapter = "lora",
    factor: int = -1,
    decompose_both: bool = False,
) -> None:
    """That adapters of these settings on `transformer` (a meta-device model will do) can start from the file.

    Raises:
        UserError: the file is none, or every setting that does not fit.
    """
    header, problems = read_header(pretrained_weight, names=_linear_layers(transformer)), []
    if adapter != header.adapter and {adapter, header.adapter} & {*LYCORIS}:
        raise UserError(f"model.adapter: {adapter} does not fit {header.path}, which has {header.adapter}: write that")
    whole = bool(header.shapes) and not any(part.endswith("_b") for own in header.shapes.values() for part in own)
    for name, own in {"r": r, "lora_alpha": lora_alpha, "use_dora": use_dora}.items():
        theirs = getattr(header, name)
        if own != theirs and not (whole and name != "use_dora"):  # whole factors are of any rank that makes them so
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
    if adapter == "lokr" and not problems:
        settings = {"r": r, "factor": factor, "decompose_both": decompose_both}
        splits = {name: adapter_shapes("lokr", layer, settings) for name, layer in layers.items()}
        if differing := [name for name in splits if splits[name] != header.shapes[name]]:
            name = differing[0]
            problems.append(
                f"model.lora.factor: {factor} splits {name} into {_listed(splits[name])}, {header.path} has "
                f"{_listed(header.shapes[name])}: write the factor and decompose_both it was made with"
            )
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


def _as_lycoris(layer: Any, settings: Mapping[str, Any]) -> None:
    """Split and scale a layer's LoKr as LyCORIS does, so that other programs compute the same from its file.

    peft's first factor can be the larger one, where a side of the weight is less than `factor` squared. Two whole
    factors have no rank to divide by: their scale is 1.
    """
    name, r = "default", settings["r"]
    shapes = adapter_shapes("lokr", layer, settings)
    parts = {part: getattr(layer, part) for part in layer.adapter_layer_names}
    if any(part not in shapes or tuple(own[name].shape) != shapes[part] for part, own in parts.items() if name in own):
        for own in parts.values():
            own.clear()
        sides = _split_sides(layer, settings["factor"])
        layer.create_adapter_parameters(name, r, sides, "lokr_w1" in shapes, "lokr_w2" in shapes, False)
        layer.reset_adapter_parameters_lycoris_way(name)
        layer._move_adapter_to_device_of_base_layer(name)
    if {"lokr_w1", "lokr_w2"} == shapes.keys():
        layer.alpha[name], layer.scaling[name] = r, 1.0


def _forward(layer: Any, x: Tensor) -> Tensor:
    """Of a layer with a LoKr or LoHa: peft's own draws a number in training, and leaves the adapter out where it is 0.

    A LoKr's weight is never made: (W1 kron W2) x is W2 X W1^T, of x as a matrix X. A LoHa's has to be.
    """
    result: Tensor = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return result
    for name in layer.active_adapters:
        if isinstance(layer, LoKrLayer):
            one, two = (
                whole[name] if name in (whole := getattr(layer, part)) else _product(layer, part, name)
                for part in ("lokr_w1", "lokr_w2")
            )
            rows = layer._cast_input_dtype(x, two.dtype).unflatten(-1, (one.shape[1], two.shape[1]))
            change = (one @ (rows @ two.mT)).flatten(-2) * layer.scaling[name]
        else:
            change = layer._get_delta_activations(name, x)
        result = result + change
    return result.to(x.dtype)


def _product(layer: Any, part: str, name: str) -> Tensor:
    product: Tensor = getattr(layer, f"{part}_a")[name] @ getattr(layer, f"{part}_b")[name]
    return product


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


def _match(pattern: str, linears: Mapping[str, nn.Linear], kind: Adapter, settings: Mapping[str, Any]) -> TargetMatch:
    matched = [m for name, m in linears.items() if _matches(name, pattern)]
    shapes = [shape for m in matched for shape in adapter_shapes(kind, m, settings).values()]
    return TargetMatch(pattern, len(matched), sum(math.prod(shape) for shape in shapes))


def adapter_shapes(kind: Adapter, linear: nn.Linear, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's adapter by the names of its parameters.

    LoKr splits outputs into a b and inputs into c d. W2 `(b, d)`, and W1 `(a, c)` where it may be decomposed, has rank
    r if that is less than half of its longer side.
    """
    r, inputs, outputs = settings["r"], linear.in_features, linear.out_features
    if kind == "loha":
        return {f"hada_w{n}_{side}": shape for n in (1, 2) for side, shape in (("a", (outputs, r)), ("b", (r, inputs)))}
    if kind != "lokr":
        length = {"lora_magnitude_vector": (outputs,)} if kind == "dora" else {}
        return {"lora_A": (r, inputs), "lora_B": (outputs, r), **length}
    shapes: dict[str, tuple[int, ...]] = {}
    sides = zip(*_split_sides(linear, settings["factor"]), strict=True)
    for name, (rows, columns) in zip(("lokr_w1", "lokr_w2"), sides, strict=True):
        if r < max(rows, columns) / 2 and (name == "lokr_w2" or settings["decompose_both"]):
            shapes |= {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
        else:
            shapes[name] = (rows, columns)
    return shapes


def _split_sides(linear: nn.Linear, factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Outputs and inputs as products of two, the smaller one first."""
    (a, b), (c, d) = (sorted(factorization(side, factor)) for side in (linear.out_features, linear.in_features))
    return (a, b), (c, d)


def _listed(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in sorted(shapes.items()))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}", f"*.{pattern}")  # peft's rule for a list of targets, and * for any text


def train_all(transformer: nn.Module, *, untrained: Sequence[str]) -> list[TargetMatch]:
    """Make every weight trainable that reaches the loss. No adapters, so the table is empty.

    `promote` is to follow, once a transformer that is to be split over processes is.
    """
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(not _within(name, untrained))
    return []


def promote(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Put all weights, rounded to `dtype`, in float32 or better: bf16 would lose small updates."""
    for precision in (dtype, torch.promote_types(dtype, torch.float32)):
        nn.Module.to(transformer, precision)  # not diffusers' own, which warns


@torch.no_grad()
def measure_magnitudes(transformer: nn.Module) -> None:
    """Set DoRA's magnitudes to the lengths of the base's rows, as peft does where the base has its values already.

    Of layers that are split over processes by rows each process measures its own.
    """
    for layer in transformer.modules():
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            weight, length = (
                tensor.to_local() if isinstance(tensor, DTensor) else tensor
                for tensor in (layer.get_base_layer().weight, magnitude.weight)  # type: ignore[operator]
            )
            length.copy_(torch.linalg.norm(weight, dim=1))


def trainable_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in the order of the model."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def fill_adapters(parameters: Mapping[str, nn.Parameter], *, seed: int) -> None:
    """Draw every B and what else starts at zero: until then outputs are the base's and most gradients are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.rsplit(".", 2)[-2] in _ZERO or ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
