"""What is done to the repeated blocks of a transformer as they are: recomputing them in backward, compiling them.

Promise: the same gradients, bit for bit where blocks are recomputed, to rounding where they are compiled. Cost: a
recomputed block keeps its inputs instead of its activations, and runs forward once more in backward; compiling takes
a minute or so for each graph, see `most_graphs`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn

from mixres.errors import UserError


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers declares as repeated, in the order of the model, also those that FSDP2 has split."""
    kinds = set(transformer._repeated_blocks)  # type: ignore[arg-type]
    return [m for m in transformer.modules() if not kinds.isdisjoint(kind.__name__ for kind in type(m).__mro__)]


def block_lists(transformer: nn.Module) -> list[nn.ModuleList]:
    """The lists of the model that hold its repeated blocks, in its order."""
    repeated = repeated_blocks(transformer)
    return [module for module in transformer.modules() if _holds(module, repeated)]


@contextmanager
def fewer_blocks(transformer: nn.Module, count: int) -> Iterator[None]:
    """Within it the transformer has about `count` of its repeated blocks, but two of each list at least.

    The first ones of each list, and its last: patches hang hooks on it, and its text stream ends there.
    """
    stacks = {stack: list(stack) for stack in block_lists(transformer)}
    repeated = sum(map(len, stacks.values()))
    try:
        for stack, blocks in stacks.items():
            kept = min(len(blocks), max(2, len(blocks) * count // repeated))
            del stack[kept - 1 : -1]
        yield
    finally:
        for stack, blocks in stacks.items():
            del stack[:]
            stack.extend(blocks)


def _holds(module: nn.Module, blocks: Sequence[nn.Module]) -> TypeGuard[nn.ModuleList]:
    return isinstance(module, nn.ModuleList) and not set(blocks).isdisjoint(module)


def recompute_blocks(transformer: nn.Module, *, every: int) -> None:
    """Gradient checkpointing of every `every`-th block from the first on, 1 being all; the others keep activations."""
    assert every >= 1, every
    chosen = {id(block) for block in repeated_blocks(transformer)[::every]}

    def call(block: nn.Module, *args: Any) -> Any:
        if id(block) in chosen:
            return torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=False)
        return block(*args)

    transformer.enable_gradient_checkpointing(call)  # type: ignore[operator]


def most_graphs(*, rows: int, lengths: int) -> int:
    """Graphs that compiled blocks can need: for up to `rows` rows of `lengths` text and as many image lengths.

    Each with and without a mask, and for the first, the last and the other blocks: the first one's inputs may need no
    gradient, the last one's text stream trains nothing.
    """
    return 3 * 2 * rows * lengths**2


def compile_blocks(transformer: nn.Module, *, graphs: int, backend: str = "inductor") -> None:
    """torch.compile of each repeated block, for at most so many `graphs`; one more would be an error.

    Only where gradients are computed: images and evaluations have lengths of their own, and run uncompiled.
    """
    # Tracing looks at this attribute of a block's inputs, which is what the warning is about; nothing here does.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, graphs)
    transformer.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=False)  # type: ignore[operator]
    for block in repeated_blocks(transformer):
        block._compiled_call_impl = _in_training(block._compiled_call_impl, block._call_impl)  # type: ignore[arg-type]


def _in_training(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return compiled(*map(_real, args), **{name: _real(value) for name, value in kwargs.items()})

    return call


def _real(argument: Any) -> Any:
    """An argument of a block with real tensors in place of complex ones, for which the compiler generates no code."""
    if isinstance(argument, dict):  # of what the blocks hand on to their attention processors
        return {name: _real(value) for name, value in argument.items()}
    if isinstance(argument, torch.Tensor) and argument.is_complex():
        return torch.view_as_real(argument)
    return argument.without_complex() if hasattr(argument, "without_complex") else argument


def check_compiler(device: torch.device) -> None:
    """That torch.compile works on `device`, tried on one addition.

    Raises:
        UserError: it does not; a CPU needs a C++ compiler, CUDA needs triton.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler stumbles over
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"train.compile: torch.compile does not work on {device} ({type(error).__name__}: {reason}): install a C++ "
            "compiler such as g++ (for CUDA: triton), or set it to false"
        ) from error
