"""The fixture of all tests of preprocessing: the small data set and its filled cache, copied to be changed."""

import shutil
from pathlib import Path

import pytest

from support.caching import Caching


@pytest.fixture
def caching(
    small_run: Path, few_pairs: Path, filled_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Caching:
    data = shutil.copytree(few_pairs, tmp_path / "data")
    return Caching(small_run, data, shutil.copytree(filled_cache, tmp_path / "cache"), capsys)
