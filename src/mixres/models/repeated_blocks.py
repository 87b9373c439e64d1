"""What is done to the repeated blocks of a transformer as they are: recomputing them in backward.

Promise: the same gradients, bit for bit. Cost: a recomputed block keeps its inputs instead of its activations, and
runs forward once more in backward.
"""

from typing import Any

import torch
from torch import nn


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers declares as repeated, in the order of the model."""
    kinds = set(transformer._repeated_blocks)  # type: ignore[arg-type]
    return [module for module in transformer.modules() if type(module).__name__ in kinds]


def recompute_blocks(transformer: nn.Module, *, every: int) -> None:
    """Gradient checkpointing of every `every`-th block from the first on, 1 being all; the others keep activations."""
    assert every >= 1, every
    chosen = {id(block) for block in repeated_blocks(transformer)[::every]}

    def call(block: nn.Module, *args: Any) -> Any:
        if id(block) in chosen:
            return torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=False)
        return block(*args)

    transformer.enable_gradient_checkpointing(call)  # type: ignore[operator]
