"""What the pre-hooks of all patches ask of a forward call: its arguments by name, its shapes, a whole patch."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixres.models.family import PatchState

Call = dict[str, Any]


def argument_names(forward: Any) -> tuple[str, ...]:
    """The names of a forward's arguments in order, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """All arguments of a call by name; checkpointing passes them by position."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def require_whole(state: PatchState, patch: Callable[[Any], Any]) -> None:
    """Refuse a mixed call of a model that carries only a part of what `patch` does.

    Raises:
        ValueError: it does.
    """
    if not state.whole:
        raise ValueError(
            "a batch of mixed sizes needs the whole patch, and something has replaced attention processors: call "
            f"{patch.__name__}(model)"
        )


def check_shapes(
    call: Call,
    image: Sequence[int],
    text: Sequence[int],
    *,
    packed: bool,
    stated_by: str,
    others: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Check that tensors hold the image and text tokens of all samples, which `stated_by` names.

    `others` are further tensors with the shapes that they need, without the channels.

    Raises:
        ValueError: one does not.
    """
    needed: dict[str, tuple[int, ...]] = {}
    for name, lengths in (("hidden_states", image), ("encoder_hidden_states", text)):
        needed[name] = (sum(lengths), 1) if packed else (len(lengths), max(call[name].shape[1], *lengths))
    for name, expected in {**needed, **(others or {}), "timestep": (len(image),)}.items():
        given = tuple(call[name].shape if name == "timestep" else call[name].shape[:-1])
        if given != expected:
            layout = "packed" if packed else "padded"
            raise ValueError(f"{layout} batch: {name} has leading shape {given}, {stated_by} say {expected}")
