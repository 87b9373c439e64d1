"""Threads for the tests of this folder."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def small_tensors(one_thread: None) -> None:
    """All tests of this folder."""
