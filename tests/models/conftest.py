"""Makes `mixes`, the builders of mixed batches, importable by the tests of this folder."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def size_warnings() -> Iterator[list[str]]:
    """What diffusers logs about the transformer during the test; its loggers do not propagate to pytest's."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers.models.transformers.transformer_qwenimage")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
