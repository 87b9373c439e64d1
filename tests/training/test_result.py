"""The result of a run that trains all weights: the one before it stays until the new one is whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixres.config.schema import Config
from mixres.errors import WorkError
from mixres.training.result import write_results
from mixres.training.setup import load_trained
from support.family_cases import with_family
from support.jobs import longest_file, names
from support.steps import new_accelerator


def test_the_old_result_stays_until_the_new_one_is_whole(setup: Callable[..., Config], tmp_path: Path) -> None:
    trained = load_trained(*with_family(setup("model.lora=null")), new_accelerator(tmp_path))
    run = tmp_path / "run"

    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (run / "transformer").iterdir()}

    write_results(trained, run, step=1, keep=True)
    before = written()
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.add_(1.0)
    with longest_file(100_000), pytest.raises(WorkError, match=r"the result could not be written .*; step 2 is saved"):
        write_results(trained, run, step=2, keep=True)
    assert written() == before
    assert names(run) == ["transformer"]
    (run / "transformer").rename(run / ".tmp-old-transformer")  # as a kill leaves it between the last two renames
    (run / ".tmp-transformer").mkdir()
    write_results(trained, run, step=2, keep=True)
    assert written().keys() == before.keys() and names(run) == ["transformer"]
    weights = load_file(run / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], parameter) for name, parameter in trained.parameters.items())
