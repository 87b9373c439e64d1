"""Fixtures that several rooms share: the tiny base pipeline and the demo's data, written once a session."""

import shutil
from pathlib import Path

import pytest
import torch

from mixres.demo import write_demo


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """As many threads as the smallest machine has cores, so that timings and roundings are those of CI."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m mixres.demo` writes."""
    root = tmp_path_factory.mktemp("demo")
    write_demo(root)
    return root


@pytest.fixture(scope="session")
def tiny_base(demo_root: Path) -> Path:
    """A tiny random Qwen-Image-Edit pipeline on disk, in the stock layout. Read only."""
    return demo_root / "base"


@pytest.fixture(scope="session")
def demo_data(demo_root: Path) -> Path:
    """The demo's training folder: `training_images/` with captions, `control_images/`. Read only."""
    return demo_root / "train"


@pytest.fixture
def copy_of_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny pipeline once more, to be damaged."""
    return shutil.copytree(tiny_base, tmp_path / "base")
