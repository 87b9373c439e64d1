"""Makes `steps`, the builders of recorded steps, importable by the tests of this folder; models and accelerator."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn


@pytest.fixture(scope="module")
def models(tiny_base: Path) -> dict[torch.dtype, nn.Module]:
    from support.steps import make_model

    return {dtype: make_model(tiny_base, dtype) for dtype in (torch.float32, torch.float64)}


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    """Its state is global: none is taken over from another test, none is left behind."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield Accelerator(cpu=True, mixed_precision="no")
    reset()


@pytest.fixture(params=["sample", "token"])
def normalization(request: pytest.FixtureRequest) -> Literal["sample", "token"]:
    return request.param
