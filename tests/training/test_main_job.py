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
from support.jobs import BIN, LORA, Jobs, error_lines, metrics, names, newest, status

STEPS = 20
COMMON = (f"train.max_train_steps={STEPS}", "checkpoint.every=6", "sample.every=8", "optimizer.init_args.lr=2e-2")
TRACKED = "logging.report_to=tensorboard"
Launched = tuple[Path, "subprocess.CompletedProcess[str]"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file's bytes but those of the status, which records each start, and the tracker's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run_status.json", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "tfevents" not in path.name}


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
    expected = {"state": "done", "exit_code": 0, "verb": "train", "step": STEPS, "max_train_steps": STEPS}
    assert expected.items() <= status(folder).items()
    result, samples, written, tracker, then = done.stdout.splitlines()[-5:]
    for line, name in ((result, LORA), (samples, "samples"), (written, "metrics.jsonl"), (tracker, "mixres")):
        assert Path(line.split()[1].rstrip(",")) == folder / name, "each line names what is there"
        assert (folder / name).exists()
    what = r"next +mixres sample --lora \S+ --image IMAGE --prompt TEXT --size \d+x\d+ --steps 2 --out FOLDER"
    assert re.fullmatch(what, then), "as samples are trained, and the run's own are made"
    rows = re.findall(r"^ {10}([a-z_.0]+) +(\d+) layers +[\d,]+ parameters$", done.stdout, re.MULTILINE)
    assert rows == [(pattern, "1" if "add_q" in pattern or "to_add" in pattern else "2") for pattern in ATTENTION]


def test_metrics_have_one_line_a_step(launched: Launched) -> None:
    lines = metrics(launched[0])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in lines[:6]] == [4, 4, 2, 4, 4, 2], "ten samples, four a step: the last is short"
    assert [line["epoch"] for line in lines[:6]] == [0, 0, 0, 1, 1, 1]
    assert all(line["tokens"] == line["tokens_computed"] for line in lines), "packed computes no padding"
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_second_run_does_nothing_and_rewrites_nothing(
    launched: Launched, job: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = launched

    def modified() -> dict[Path, int]:
        return {p: p.lstat().st_mtime_ns for p in folder.rglob("*") if p.name not in ("run_status.json", ".lock")}

    before = modified()
    job.here("launched", TRACKED)
    output = capsys.readouterr().out
    assert f"done      {STEPS} steps were done before" in output
    assert "encoded" not in output, "there is nothing to encode for"
    assert modified() == before
    assert (status(folder)["state"], status(folder)["step"]) == ("done", STEPS)


def test_a_run_killed_before_its_result_was_written_writes_it(launched: Launched, job: Jobs) -> None:
    folder = shutil.copytree(launched[0], job.root / "killed", symlinks=True)
    before = fingerprints(folder)
    (folder / LORA).unlink()
    (folder / "samples" / f"step-{STEPS:08d}.png").unlink()
    (folder / "run_status.json").write_text(
        json.dumps(status(folder) | {"state": "running", "exit_code": None, "done_before": None})
    )
    done = job("killed", before="ulimit -f 16", code=1)  # KiB: no room for the grid or the weights
    assert f"step-{STEPS:08d}.png could not be written (File too large): the run continues without it" in done.stdout
    (line,) = error_lines(done)
    assert line.startswith(f"{folder}: the result could not be written (File too large); step {STEPS} is saved")
    job.here("killed")
    after = fingerprints(folder)
    assert after.pop("config.yaml") != before.pop("config.yaml")  # another output_dir
    assert after == before


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


def test_numbers_that_stay_not_finite_end_the_run_and_leave_the_checkpoints(
    job: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("optimizer.class_path=torch.optim.SGD", "sample.every=0", "checkpoint.every=1", "train.max_skips=2")
    folder = job.here("wild", *words, "optimizer.init_args={lr: 1e38}", code=1)
    assert "are more than train.max_skips = 2" in capsys.readouterr().err
    assert [line["loss"] for line in metrics(folder)][-2:] == [None, None], "JSON has no NaN"
    ended, kept = status(folder), newest(folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", 1)
    assert kept.step == ended["step"] == len(metrics(folder))
    assert all(tensor.isfinite().all() for tensor in kept.tensors("trainable").values())
    assert not (folder / LORA).exists()
