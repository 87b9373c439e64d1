"""What a run needs on its devices, and which keys to change so that it fits them: rehearsals, one after the other.

Promise: every figure is of a rehearsal (see `rehearsal.py`). That of the run itself goes through all blocks. Those of
changed configurations go through a few blocks of each list, and again through some more: the difference stands for each
block that is left out. Cost: some 10 s of processor time for each change.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import nn

from mixres.config.schema import Config
from mixres.inspection.rehearsal import peak_of, rehearse
from mixres.models.blocks import block_lists
from mixres.models.family import Family
from mixres.verification.synthetic import SampleTokens

_KEPT = 3  # blocks of each list: the first and the last may differ from those between them, and prefetch ends there
_KEPT_SPLIT = 4  # with fsdp2: while a block runs, the next is gathered, and gradients of the last one are on their way
_SLOTS = 2  # of offloaded blocks: from two on they are copied ahead

Change = Mapping[str, Any]  # of a section of the configuration, keys with dots


class _Shorter:
    """A family whose transformer has so many blocks in each of its lists: the first ones, and the last."""

    def __init__(self, family: Family, lengths: Sequence[int]) -> None:
        self._family, self._lengths = family, lengths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def transformer_skeleton(self) -> nn.Module:
        transformer: nn.Module = self._family.transformer_skeleton()
        for stack, length in zip(block_lists(transformer), self._lengths, strict=True):
            del stack[length - 1 : -1]
        return transformer


def rehearse_quickly(config: Config, family: Family, microbatch: Sequence[SampleTokens], **how: int) -> dict[str, Any]:
    """What `rehearse` gives, from a few blocks."""
    whole = [len(stack) for stack in block_lists(family.transformer_skeleton())]
    period = max(1, int(config.train.gradient_checkpointing))
    split = config.train.parallel == "fsdp2"
    kept = max(
        _KEPT_SPLIT if split else _KEPT, config.train.offload.blocks or 0
    )  # with fewer none would wait on a host
    missing = [max(0, length - kept) // period for length in whole]
    short = [length - count * period for length, count in zip(whole, missing, strict=True)]

    def figures(lengths: Sequence[int]) -> dict[str, Any]:
        shorter: Any = _Shorter(family, lengths)
        return rehearse(config, shorter, microbatch, **how)

    base = figures(short)
    total = _numbers(base)
    for i, count in enumerate(missing):
        if count:
            longer = figures([length + period * (i == j) for j, length in enumerate(short)])
            total = total + count * (_numbers(longer) - _numbers(base))
    left = iter(total.tolist())
    phases = {name: {kind: next(left) for kind in phase} for name, phase in base["phases"].items()}
    return {**base, **peak_of(phases), **{name: next(left) for name in _SUMS}, "blocks": sum(whole)}


_SUMS = ("host_bytes", "flops", "flops_needed", "wire_bytes")


def _numbers(found: Mapping[str, Any]) -> np.ndarray:
    phases = (count for phase in found["phases"].values() for count in phase.values())
    return np.array([*phases, *(found[name] for name in _SUMS)], dtype=np.int64)


def ladders(config: Config, microbatch: Sequence[SampleTokens], ranks: int) -> Iterator[list[tuple[str, Any]]]:
    """Keys to change one after the other, those that cost least time first; the ways are tried in turn."""
    first: list[tuple[str, Any]] = [("train.gradient_checkpointing", True)]
    if len(microbatch) > 1:
        first.append(("batch.max_tokens", max(_tokens(sample) for sample in microbatch)))
    activations = ("train.offload.activations", True)
    if ranks > 1:
        yield [*first, ("train.parallel", "fsdp2"), activations, ("train.cpu_offload", True)]
    if config.model.lora and config.train.parallel == "ddp":
        yield [*first, ("model.quantize", "int8"), ("train.offload.blocks", _SLOTS), activations]
    elif ranks == 1:
        yield first


def _tokens(sample: SampleTokens) -> int:
    grids, text = sample
    return sum(grid.tokens for grid in grids) + text


def changed(config: Config, key: str, value: Any) -> Config | None:
    """The configuration with another value; None where it has it already, or other keys do not allow it."""
    values = config.model_dump()
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    if section[name] == value or (key == "model.quantize" and section[name]):
        return None
    section[name] = value
    try:
        return Config.model_validate(values)
    except ValidationError:
        return None


def climb(
    config: Config, steps: Sequence[tuple[str, Any]], microbatch: Sequence[SampleTokens], measure: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each change that the configuration allows, as it is written, and what `measure` finds with it and those before.

    `measure` is called with a configuration and a microbatch.
    """
    for key, value in steps:
        following = changed(config, key, value)
        if following is None:
            continue
        config = following
        if key == "batch.max_tokens":
            microbatch = [max(microbatch, key=_tokens)]
        yield f"{key}={str(value).lower() if isinstance(value, bool) else value}", measure(config, microbatch)


def with_more_blocks(found: Mapping[str, Any], memory: int) -> tuple[int, int]:
    """How many blocks to keep on a device of `memory` bytes instead of `_SLOTS`, and the peak with them."""
    room = (memory - found["peak_bytes"]) // found["block_bytes"]
    more = max(0, min(room, found["blocks"] - _SLOTS - 1))
    return _SLOTS + more, found["peak_bytes"] + more * found["block_bytes"]


def rehearsed(
    config: Config,
    family: Family,
    microbatch: Sequence[SampleTokens],
    *,
    ranks: int,
    device_memory: int | None,
    microbatches: int = 1,
) -> dict[str, Any]:
    """The rehearsal of the run itself, and where it does not fit, the changes that help."""
    found = rehearse(config, family, microbatch, ranks=ranks, microbatches=microbatches)
    found |= {"device_memory_bytes": device_memory, "fits": None, "changes": []}
    if device_memory is None:
        return found
    found["fits"] = found["peak_bytes"] <= device_memory
    if not found["fits"]:
        measure = partial(_measured, family, ranks)
        for steps in ladders(config, microbatch, ranks):
            found["changes"] = changes = []
            for written, outcome in climb(config, steps, microbatch, measure):
                peak = outcome["peak_bytes"]
                if written.startswith("train.offload.blocks"):
                    blocks, peak = with_more_blocks(outcome, device_memory)
                    written = f"train.offload.blocks={blocks}"
                changes.append({"set": written, "bytes": peak, "fits": peak <= device_memory})
                if changes[-1]["fits"]:
                    return found
    return found


def _measured(family: Family, ranks: int, config: Config, microbatch: Sequence[SampleTokens]) -> dict[str, Any]:
    return rehearse_quickly(config, family, microbatch, ranks=ranks, microbatches=2)
