"""Ranks that do not share one plan stop together (real processes over gloo); a missing tracker is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from mixres.errors import UserError
from mixres.training.distributed import make_accelerator

PROGRAM = """
import sys
from pathlib import Path
from mixres.errors import UserError
from mixres.training.distributed import make_accelerator, assert_same_on_all_ranks
accelerator = make_accelerator(mixed_precision="no", report_to="none", folder=Path("."))
try:
    assert_same_on_all_ranks(sys.argv[1 + accelerator.process_index])
except UserError as error:
    sys.stdout.write(f"{accelerator.process_index} refused: {error}" + chr(10))
else:
    sys.stdout.write(f"{accelerator.process_index} agreed" + chr(10))
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("digests", "word"), [(("a", "a"), "agreed"), (("a", "b"), "refused: ranks [1] read other")])
def test_ranks_with_other_plans_stop_together(digests: tuple[str, str], word: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(program), *digests],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"{rank} {word}" in done.stdout for rank in (0, 1)), done.stdout


def test_plugins_of_the_launcher_and_a_tracker_that_is_not_installed_are_told_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError) as caught:
        make_accelerator(mixed_precision="no", report_to="no_such_tracker", folder=tmp_path)
    fsdp, deepspeed, tracker = caught.value.messages
    assert fsdp.startswith("accelerate launch: its configuration turns on FSDP, which mixres does not use: turn it off")
    assert "turns on DeepSpeed" in deepspeed
    assert "train.parallel=ddp or fsdp2" in fsdp
    assert tracker.startswith("logging.report_to: no_such_tracker is not installed: pip install")


@pytest.mark.parametrize(("name", "processes"), [("single", 1), ("multi_gpu", 2), ("multi_node", 16)])
def test_the_shipped_launcher_files_are_read_by_accelerate(name: str, processes: int) -> None:
    file = Path(__file__).parents[2] / "configs" / "accelerate" / f"{name}.yaml"
    read = load_config_from_file(str(file))
    assert read.num_processes == processes
    assert read.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")
    assert not (read.fsdp_config or read.deepspeed_config)
