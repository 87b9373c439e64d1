"""The average of what is trained: diffusers' own, once an update, in every checkpoint."""

from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from mixres.training.ema import Ema
from mixres.training.optimizer import optimizer_scalars, optimizer_tensors, restore_optimizer

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "plain_sgd": (torch.optim.SGD, {"lr": 0.1}),
}


class Run:
    """A small layer that is trained, and its average."""

    def __init__(self, kind: str, decay: float = 0.7) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2)
        optimizer, arguments = OPTIMIZERS[kind]
        self.optimizer = optimizer(self.module.parameters(), **arguments)
        self.ema = Ema(self.optimizer, decay)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]

    @property
    def average(self) -> list[torch.Tensor]:
        with self.ema.averaged():
            return self.weights

    def update(self, step: int) -> None:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        self.module(inputs).square().mean().backward()
        self.optimizer.step()


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_average_is_diffusers_own(kind: str) -> None:
    run = Run(kind)
    theirs = EMAModel(run.module.parameters(), decay=0.7)
    assert same(run.average, run.weights), "before the first update there is nothing to average"
    for step in range(6):
        run.update(step)
        theirs.step(run.module.parameters())
        for ours, other in zip(run.average, theirs.shadow_params, strict=True):
            assert torch.allclose(ours, other, rtol=1e-6, atol=1e-7)  # theirs rounds once more in the first update
    assert not same(run.average, run.weights)


def test_the_weights_come_back_after_an_error_too() -> None:
    run = Run("adamw")
    for step in range(3):
        run.update(step)
    before = run.weights
    with pytest.raises(ZeroDivisionError), run.ema.averaged():
        raise ZeroDivisionError
    assert same(run.weights, before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_saved_and_restored_with_the_optimizer(kind: str) -> None:
    unbroken, first, second = Run(kind), Run(kind), Run(kind)
    for step in range(6):
        unbroken.update(step)
    for step in range(3):
        first.update(step)
    names = [name for name, _ in first.module.named_parameters()]
    tensors: dict[str, Any] = {k: v.clone() for k, v in optimizer_tensors(first.optimizer, names).items()}
    scalars = optimizer_scalars(first.optimizer, names)
    second.module.load_state_dict(first.module.state_dict())
    restore_optimizer(second.optimizer, names, tensors, scalars)
    assert same(second.average, first.average)
    for step in range(3, 6):
        second.update(step)
    assert same(second.average, unbroken.average)
    assert same(second.weights, unbroken.weights)
