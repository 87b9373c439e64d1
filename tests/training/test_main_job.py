"""The main job as a user runs it: the literal command, repeated, damaged, out of room; what it leaves."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file

from mixres.config.load import load_config
from mixres.models.qwen.layers import ATTENTION, untrained_modules
from support.jobs import BIN, LORA, Jobs, error_lines, names, newest, status

STEPS = 20
COMMON = (f"train.max_train_steps={STEPS}", "checkpoint.every=6", "sample.every=8", "optimizer.init_args.lr=2e-2")
TRACKED = "logging.report_to=tensorboard"
Launched = tuple[Path, "subprocess.CompletedProcess[str]"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def written(folder: Path) -> list[Path]:
    """Every file but those that record each start: the status, the lock, the tracker's."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run_status.json", ".lock")]
    return [path for path in found if "tfevents" not in path.name]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in written(folder)}


@pytest.fixture(scope="module")
def job(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    root = tmp_path_factory.mktemp("job")
    return Jobs(small_run, root / "cache", root, COMMON)


@pytest.fixture(scope="module")
def launched(job: Jobs) -> Launched:
    """The literal command, from an empty cache."""
    return job.root / "launched", job("launched", TRACKED, launcher=[str(BIN / "accelerate"), "launch"])


def test_the_literal_command_leaves_the_run_folder_that_is_promised(launched: Launched, job: Jobs) -> None:
    folder, done = launched
    assert "13 encoded, 0 found" in done.stdout
    assert names(folder / "checkpoints") == ["latest", "step-00000018", "step-00000020"]
    assert names(folder / "samples") == [f"step-{step:08d}.png" for step in (8, 16, 20)]
    assert not list(folder.rglob(".tmp*"))
    assert load_config(folder / "config.yaml") == job.config("launched", TRACKED)
    *lines, then = done.stdout.splitlines()[-4:]
    assert list((folder / "mixres").iterdir()), "the tracker's"
    for line, name in zip(lines, (LORA, "samples", "metrics.jsonl"), strict=True):
        assert Path(line.split()[1].rstrip(",")) == folder / name, "each line names what is there"
        assert (folder / name).exists()
    what = r"next +mixres sample --lora \S+ --image IMAGE --prompt TEXT --steps 2 --out FOLDER"
    assert re.fullmatch(what, then), "as samples are trained, and the run's own are made"
    rows = re.findall(r"^ {10}(\S+) +\d+ layers +[\d,]+ parameters$", done.stdout, re.MULTILINE)
    assert rows == list(ATTENTION)


def test_a_second_run_does_nothing_and_rewrites_nothing(
    launched: Launched, job: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = launched
    before = {path: path.stat().st_mtime_ns for path in written(folder)}
    job.here("launched", TRACKED)
    output = capsys.readouterr().out
    assert f"done      {STEPS} steps were done before" in output
    assert "encoded" not in output, "there is nothing to encode for"
    assert {path: path.stat().st_mtime_ns for path in written(folder)} == before
    assert (status(folder)["state"], status(folder)["step"]) == ("done", STEPS)


def test_a_run_killed_before_its_result_was_written_writes_it(launched: Launched, job: Jobs) -> None:
    folder = shutil.copytree(launched[0], job.root / "killed", symlinks=True)
    before = contents(folder)
    (folder / LORA).unlink()
    (folder / "samples" / f"step-{STEPS:08d}.png").unlink()
    (folder / "run_status.json").write_text(
        json.dumps(status(folder) | {"state": "running", "exit_code": None, "done_before": None})
    )
    done = job("killed", before="ulimit -f 16", code=1)  # KiB: no room for the weights
    (line,) = error_lines(done)
    assert line.startswith(f"{folder}: the result could not be written (File too large); step {STEPS} is saved")
    job.here("killed")
    del before[Path("config.yaml")]  # it names the folder
    assert contents(folder).items() >= before.items()


def test_all_weights_become_a_transformer_that_loads(job: Jobs, tiny_base: Path) -> None:
    """In bfloat16, with samples on the way: what is trained is float32, what is written is the base's precision."""
    words = ("model.lora=null", "model.dtype=bfloat16", "train.mixed_precision=bf16", "optimizer.init_args.lr=2e-2")
    folder = job.here("all", *words, "train.max_train_steps=3", "sample.every=2", "checkpoint.every=2")
    assert not (folder / LORA).exists()
    assert names(folder / "samples") == ["step-00000002.png", "step-00000003.png"]
    assert {tensor.dtype for tensor in newest(folder).tensors("trainable").values()} == {torch.float32}
    written = load_file(next((folder / "transformer").glob("*.safetensors")))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    trained = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    base = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer", dtype=torch.bfloat16)
    recipe = json.loads((folder / "transformer" / "mixres.json").read_text())
    assert (recipe["family"], recipe["base"], recipe["step"]) == ("qwen_image_edit", str(tiny_base), 3)
    untrained = tuple(f"{name}." for name in untrained_modules(base))
    weights = base.state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {name for name in weights if not name.startswith(untrained)}
