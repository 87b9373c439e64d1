"""What a launcher's own files may ask for; ranks that disagree are in test_launchers.py."""

import inspect
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import launch

from mixres.errors import UserError
from mixres.training import distributed
from mixres.training.distributed import make_accelerator


def test_plugins_of_the_launcher_are_refused_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError) as caught:
        make_accelerator(mixed_precision="no", report_to="none", folder=tmp_path)
    expected = ("turns on FSDP, which mixres", "turns on DeepSpeed")
    assert all(part in message for part, message in zip(expected, caught.value.messages, strict=True))
    assert all(f'"{name}"' in inspect.getsource(launch) for name in distributed._PLUGINS), "as accelerate names them"


def test_autocast_keeps_no_copies_of_weights(tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)
    with make_accelerator(mixed_precision="bf16", report_to="none", folder=tmp_path).autocast():
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()


@pytest.mark.parametrize(("name", "processes"), [("single", 1), ("multi_gpu", 2), ("multi_node", 16)])
def test_the_shipped_launcher_files_are_read_by_accelerate(name: str, processes: int) -> None:
    file = Path(__file__).parents[2] / "configs" / "accelerate" / f"{name}.yaml"
    read = load_config_from_file(str(file))
    assert read.num_processes == processes
    assert read.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")
    assert not (read.fsdp_config or read.deepspeed_config)


@pytest.mark.parametrize("deterministic", [True, False])
def test_torch_is_held_to_kernels_that_repeat_their_results_on_request(tmp_path: Path, deterministic: bool) -> None:
    AcceleratorState._reset_state(True)
    try:
        make_accelerator(mixed_precision="no", report_to="none", folder=tmp_path, deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not deterministic or os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        AcceleratorState._reset_state(True)
