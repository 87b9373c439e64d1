"""Fixtures of the training tests: models and accelerator, configurations and data of the small run, its jobs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.preprocessing.fill import CachedData, encode_all
from support.family_cases import with_family
from support.jobs import Jobs
from support.steps import make_model, new_accelerator


@pytest.fixture(scope="module")
def models(tiny_base: Path) -> dict[torch.dtype, nn.Module]:
    return {dtype: make_model(tiny_base, dtype) for dtype in (torch.float32, torch.float64)}


@pytest.fixture(scope="module")
def accelerator(tmp_path_factory: pytest.TempPathFactory) -> Accelerator:
    return new_accelerator(tmp_path_factory.mktemp("accelerator"))


@pytest.fixture(scope="module")
def setup(small_run: Path, small_cache: Path) -> Callable[..., Config]:
    """Called with overrides: a configuration of the small run over the session's cache."""
    common = (f"cache.cache_dir={small_cache}", "logging.output_dir=/nowhere")
    return lambda *overrides: load_config(small_run, [*common, *overrides])


@pytest.fixture(scope="module")
def encoded(setup: Callable[..., Config]) -> CachedData:
    return encode_all(*with_family(setup()), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def jobs(small_run: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(small_run, small_cache, tmp_path_factory.mktemp("jobs"))
