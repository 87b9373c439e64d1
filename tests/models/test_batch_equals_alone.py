"""Any mix of samples, in either layout, trains as its samples alone: drawn mixes against the stock model."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from hypothesis import Phase, given, settings, strategies as st

from mixres.models.qwen.layers import untrained_modules
from support.mixes import (
    EVERY_LINEAR,
    FORWARDS,
    Mix,
    Shape,
    assert_same,
    backward,
    loss,
    make_mix,
    patched_model,
    run,
    stock_model,
)

# Without shrinking: it runs failing cases for minutes, and what is printed of the first one is enough to repeat it.
drawn_alike = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate])

grids = st.tuples(st.just(1), st.integers(1, 12), st.integers(1, 12))


@dataclass(frozen=True)
class Drawn:
    """Sizes of a mix; its values come from the seed."""

    shapes: list[list[Shape]]
    texts: list[int]
    seed: int

    def mix(self) -> Mix:
        return make_mix(self.shapes, self.texts, self.seed)


@st.composite
def mixes(draw: st.DrawFn) -> Drawn:
    """1 to 6 samples, each of its own target, 0 to 3 controls of their own sizes, and 1 to 64 text tokens."""
    shapes: list[list[Shape]] = draw(st.lists(st.lists(grids, min_size=1, max_size=4), min_size=1, max_size=6))
    texts = draw(st.lists(st.integers(1, 64), min_size=len(shapes), max_size=len(shapes)))
    return Drawn(shapes, texts, draw(st.integers(0, 2**32)))


@dataclass(frozen=True)
class Case:
    """Two microbatches of one step, and how the model that takes them is set up."""

    drawn: tuple[Drawn, Drawn]
    layouts: tuple[str, str]
    zero_cond_t: bool
    checkpointing: bool
    trained: str

    def model(self, make: Callable[[bool, list[str] | None], QwenImageTransformer2DModel]) -> torch.nn.Module:
        return trained_as(self.trained, make(self.zero_cond_t, EVERY_LINEAR if self.trained == "lora" else None))


layouts = st.sampled_from(("padded", "packed"))
cases = st.builds(
    Case, st.tuples(mixes(), mixes()), st.tuples(layouts, layouts), st.booleans(), st.booleans(),
    st.sampled_from(("lora", "all weights")),
)  # fmt: skip


def trained_as(trained: str, model: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """All weights but those that reach no loss, or adapters on every linear layer over a frozen base."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all weights" or ".lora_" in name)
    for name in untrained_modules(model):
        model.get_submodule(name).requires_grad_(False)
    return model


def assert_each_as_alone(case: Case) -> None:
    stock, patched = case.model(stock_model), case.model(patched_model)
    if case.checkpointing:
        patched.enable_gradient_checkpointing()
    both = [drawn.mix() for drawn in case.drawn]
    outputs = [FORWARDS[layout](patched, mix) for layout, mix in zip(case.layouts, both, strict=True)]
    losses = [loss(out, mix) for out, mix in zip(outputs, both, strict=True)]
    for mix, out, value in reversed(list(zip(both, outputs, losses, strict=True))):  # both forward, then back
        assert_same(backward(patched, out, value), run(stock, mix, "alone"))


@settings(drawn_alike, max_examples=30)
@given(cases)
def test_two_microbatches_of_any_samples_train_as_each_sample_alone(case: Case) -> None:
    assert_each_as_alone(case)


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(drawn_alike, max_examples=150)
@given(cases)
def test_many_microbatches_of_any_samples_train_as_each_sample_alone(case: Case) -> None:
    assert_each_as_alone(case)


MAIN = Drawn([[(1, 16, 32)], [(1, 24, 24), (1, 10, 14), (1, 6, 9)], [(1, 20, 28)]], [19, 7, 40], 0)
SMALL = Drawn([[(1, 5, 7), (1, 3, 3)], [(1, 1, 1)]], [8, 1], 1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_all_weights_get_the_gradients_that_they_get_alone(layout: str, zero_cond_t: bool, checkpointing: bool) -> None:
    case = Case((MAIN, SMALL), (layout, layout), zero_cond_t, checkpointing, "all weights")
    assert_each_as_alone(case)
    gradients = run(case.model(patched_model), MAIN.mix(), layout).gradients
    untrained = untrained_modules(stock_model())
    frozen = {name for name in gradients if name.startswith(untrained)}
    assert {name for name, gradient in gradients.items() if gradient is None} == frozen
    assert all(gradient is None or gradient.any() for gradient in gradients.values())
