"""An exponential moving average of what is trained, beside the weights that the optimizer moves.

Promise: every update of the optimizer is averaged once, a skipped step is not; the average is part of the
optimizer's state, so it is saved, restored and split over ranks with it. Cost: one more copy of the trained parameters
and one pass over them a step.

Source: diffusers' `EMAModel`. In update n (from 1) the average moves to the new weights by 1 - d of its distance,
d = min(decay, n / (9 + n)), and d = 0 in the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_ENTRY, _UPDATES = "ema", "ema_updates"  # in the state of each parameter, in the optimizer's group


class Ema:
    """Follows `optimizer` from its next update on."""

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self._optimizer, self._decay = optimizer, decay
        optimizer.register_step_post_hook(self._average)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self._optimizer.param_groups[0]["params"])

    def _average(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        group = optimizer.param_groups[0]
        update = group[_UPDATES] = group.get(_UPDATES, 0) + 1
        decay = 0 if update == 1 else min(self._decay, update / (9 + update))
        for parameter in self._parameters:
            # Not before the first update: an optimizer takes an empty state for that of a new parameter.
            if _ENTRY not in optimizer.state[parameter]:
                optimizer.state[parameter][_ENTRY] = parameter.detach().clone()
            average = optimizer.state[parameter][_ENTRY]
            average.sub_((1 - decay) * (average - parameter.detach()))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters have the values of their average; afterwards their own, bit for bit.

        The two change places, one parameter after the other, so nothing of the optimizer may be saved inside.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter in self._parameters:
            if (average := self._optimizer.state[parameter].get(_ENTRY)) is not None:
                own = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(own)
