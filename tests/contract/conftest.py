import json
from pathlib import Path
from typing import Any

import pytest

from contract.record import CONFIG, GOLDEN, command, folders
from support.jobs import REPOSITORY


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(GOLDEN.read_bytes())
    return values


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of the recorded configuration are relative to the root of the repository."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` and `cache` of an unbroken run, started without a verb. Read only."""
    root = tmp_path_factory.mktemp("contract")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert command("--config", CONFIG, *folders(root)) == 0
    return root
