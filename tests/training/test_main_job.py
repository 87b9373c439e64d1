"""The main job as a user runs it: the literal command, stopped, resumed, repeated; its LoRA in the stock pipeline."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from mixres.config.load import load_config
from mixres.config.schema import ATTENTION, Config
from mixres.models.qwen.layers import untrained_modules
from mixres.preprocessing.fill import encode_all
from mixres.training.checkpoint import Checkpoints
from mixres.training.distributed import make_accelerator
from mixres.training.sample_sheets import HeldOutSampler
from mixres.training.setup import load_trained
from support.family_cases import with_family
from support.jobs import stock_calls

REPOSITORY = Path(__file__).parents[2]
STOCK_PROCESS = Path(__file__).parents[1] / "support" / "stock_process.py"
BIN = Path(sys.executable).parent
STEPS = 20
LORA = "pytorch_lora_weights.safetensors"
COMMON = (f"train.max_train_steps={STEPS}", "checkpoint.every=6", "sample.every=8", "optimizer.init_args.lr=2e-2")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Job:
    """Runs `train.py` on the small data set, every run with a folder of its own, all with one cache."""

    def __init__(self, file: Path, cache: Path, root: Path) -> None:
        self.file, self.cache, self.root = file, cache, root

    def command(self, run: str, overrides: Sequence[str], launcher: Sequence[str]) -> list[str]:
        words = [f"cache.cache_dir={self.cache}", f"logging.output_dir={self.root / run}", *COMMON, *overrides]
        return [*launcher, "train.py", "--config", str(self.file), *words]

    def start(self, run: str, *overrides: str) -> "subprocess.Popen[str]":
        command = self.command(run, overrides, [sys.executable])
        return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, env=environment(), text=True)

    def __call__(
        self, run: str, *overrides: str, launcher: Sequence[str] = (sys.executable,), code: int = 0
    ) -> "subprocess.CompletedProcess[str]":
        done = call(self.command(run, overrides, launcher))
        assert done.returncode == code, done.stderr[-3000:]
        return done

    def config(self, run: str, *overrides: str) -> Config:
        words = [f"cache.cache_dir={self.cache}", f"logging.output_dir={self.root / run}", *COMMON, *overrides]
        return load_config(self.file, words)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def call(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)


def status(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "run_status.json").read_text())
    return values


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines without what a clock put in."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file's bytes but those of the status, which tells of each start, and the tracker's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run_status.json", ".lock")]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "tfevents" not in path.name
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def modified(folder: Path) -> dict[Path, int]:
    """When each file was written last, but for the status."""
    return {p: p.lstat().st_mtime_ns for p in folder.rglob("*") if p.name not in ("run_status.json", ".lock")}


@pytest.fixture(scope="module")
def job(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("job")
    return Job(small_run, root / "cache", root)


@pytest.fixture(scope="module")
def launched(job: Job) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    """The literal command, from an empty cache."""
    done = job("launched", "logging.report_to=tensorboard", launcher=[str(BIN / "accelerate"), "launch"])
    return job.root / "launched", done


def test_the_literal_command_leaves_the_run_folder_that_is_promised(
    launched: "tuple[Path, subprocess.CompletedProcess[str]]", job: Job
) -> None:
    folder, done = launched
    assert "13 encoded, 0 found" in done.stdout
    promised = {"config.yaml", "checkpoints", "samples", LORA, "metrics.jsonl", "run_status.json"}
    assert promised <= set(names(folder))
    assert names(folder / "checkpoints") == ["latest", "step-00000018", "step-00000020"]
    assert names(folder / "samples") == [f"step-{step:08d}.png" for step in (8, 16, 20)]
    assert not list(folder.rglob(".tmp*"))
    kept = load_config(folder / "config.yaml")
    assert kept == job.config("launched", "logging.report_to=tensorboard")
    ended = status(folder)
    expected = {"state": "done", "exit_code": 0, "reason": None, "verb": "train", "step": STEPS}
    assert (expected | {"max_train_steps": STEPS}).items() <= ended.items()
    assert {"host", "pid", "started", "updated"} <= ended.keys()
    assert "overhead  a step took" in done.stdout
    assert "next      mixres sample --lora " in done.stdout
    rows = re.findall(r"^ {10}([a-z_.0]+) +(\d+) layers +[\d,]+ parameters$", done.stdout, re.MULTILINE)
    assert rows == [(pattern, "1" if "add_q" in pattern or "to_add" in pattern else "2") for pattern in ATTENTION]


def test_metrics_have_one_line_a_step(launched: "tuple[Path, subprocess.CompletedProcess[str]]") -> None:
    folder, _ = launched
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    fields = {"step", "epoch", "loss", "grad_norm", "lr", "samples", "tokens", "tokens_computed", "microbatches"}
    assert all(line.keys() == fields | {"seconds"} for line in lines)
    assert [line["samples"] for line in lines[:6]] == [4, 4, 2, 4, 4, 2], "ten samples, four a step: the last is short"
    assert [line["epoch"] for line in lines[:6]] == [0, 0, 0, 1, 1, 1]
    assert all(line["tokens"] == line["tokens_computed"] for line in lines), "packed computes no padding"
    assert {line["lr"] for line in lines} == {2e-2}
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_tensorboard_has_the_same_losses(launched: "tuple[Path, subprocess.CompletedProcess[str]]") -> None:
    folder, _ = launched
    (file,) = folder.rglob("events.out.tfevents.*")
    seen = {
        event.step: event.summary.value[0].tensor.float_val[0]
        for event in EventFileLoader(str(file)).Load()
        if event.HasField("summary") and event.summary.value[0].tag == "loss"
    }
    assert seen == {line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in metrics(folder)}


def own_pictures(job: Job, run: str) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """What mixres's sampler makes of the run's last checkpoint, and the calls that make the same elsewhere."""
    config = job.config(run)
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(mixed_precision="no", report_to="none", folder=job.root)
    trained = load_trained(*with_family(config), accelerator)
    checkpoint = Checkpoints(job.root / run / "checkpoints", keep=2).newest_valid()
    assert checkpoint is not None
    saved = checkpoint.tensors("trainable")
    for name, parameter in trained.parameters.items():
        parameter.data.copy_(saved[name])
    sampler = HeldOutSampler(
        *with_family(config), trained.transformer, encode_all(*with_family(config), device=accelerator.device)
    )
    cases = stock_calls(sampler)
    return cases, [sampler.predict(item) for item in sampler.items]


def test_the_lora_gives_the_same_picture_in_a_process_without_mixres(
    launched: "tuple[Path, subprocess.CompletedProcess[str]]", job: Job, tiny_base: Path, tmp_path: Path
) -> None:
    folder, _ = launched
    cases, own = own_pictures(job, "launched")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(STOCK_PROCESS), str(tiny_base), str(folder), str(tmp_path)],
        input=json.dumps(cases), capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for number, picture in enumerate(own):
        with_lora, without = (
            np.asarray(Image.open(tmp_path / f"{number}-{part}.png")).astype(int) for part in ("with", "without")
        )
        assert np.abs(with_lora - np.asarray(picture).astype(int)).max() <= 1
        assert np.abs(with_lora - without).max() > 8, "the LoRA changes the picture"


def test_the_file_says_what_it_was_made_from(
    launched: "tuple[Path, subprocess.CompletedProcess[str]]", tiny_base: Path
) -> None:
    with safe_open(launched[0] / LORA, "pt") as file:
        recipe = json.loads(file.metadata()["mixres"])
    assert (recipe["base"], recipe["control_area"], recipe["r"], recipe["step"]) == (str(tiny_base), 4096, 4, STEPS)


def test_a_second_run_does_nothing_and_rewrites_nothing(
    launched: "tuple[Path, subprocess.CompletedProcess[str]]", job: Job
) -> None:
    folder, _ = launched
    before = modified(folder)
    done = job("launched", "logging.report_to=tensorboard")
    assert f"done      {STEPS} steps were done before" in done.stdout
    assert "encoded" not in done.stdout, "there is nothing to encode for"
    assert modified(folder) == before
    assert (status(folder)["state"], status(folder)["step"]) == ("done", STEPS)


def test_a_run_killed_before_its_result_was_written_writes_it(
    launched: "tuple[Path, subprocess.CompletedProcess[str]]", job: Job
) -> None:
    folder = job.root / "killed"
    shutil.copytree(launched[0], folder, symlinks=True)
    before = fingerprints(folder)
    (folder / LORA).unlink()
    (folder / "samples" / f"step-{STEPS:08d}.png").unlink()
    (folder / "run_status.json").write_text(
        json.dumps(status(folder) | {"state": "running", "exit_code": None, "done_before": None})
    )
    full = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", sys.executable]  # KiB: no room for sheet or weights
    done = job("killed", launcher=full, code=1)
    assert f"step-{STEPS:08d}.png could not be written (File too large): the run goes on without it" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mixres: error: ")]
    what = f"{folder}: the result could not be written (File too large); step {STEPS} is saved"
    assert line == f"mixres: error: {what}: make room and run the same command again"
    assert "Traceback" not in done.stderr
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("failed", 1)
    job("killed")
    after = fingerprints(folder)
    assert after.pop("config.yaml") != before.pop("config.yaml")  # another output_dir
    assert after == before


RESUMED = ("model.lora.lora_dropout=0.2", "data.num_workers=2", "batch.max_tokens=400")


@pytest.fixture(scope="module")
def unbroken(job: Job, launched: "tuple[Path, subprocess.CompletedProcess[str]]") -> Path:
    job("unbroken", *RESUMED)
    return job.root / "unbroken"


def test_a_stopped_and_resumed_run_equals_an_unbroken_one(job: Job, unbroken: Path) -> None:
    """With dropout, workers and samples on the way: nothing but the step number is needed to go on."""
    folder = job.root / "stopped"
    with job.start("stopped", *RESUMED) as process:
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=25)
    assert process.returncode == 75, errors
    stopped = status(folder)
    assert (stopped["state"], stopped["exit_code"]) == ("preempted", 75)
    assert 3 <= stopped["step"] < STEPS
    assert stopped["reason"] in errors
    assert "run the same command to go on" in stopped["reason"]
    assert len(metrics(folder)) == stopped["step"]
    assert not (folder / LORA).exists()

    job("stopped", *RESUMED)
    assert metrics(folder) == metrics(unbroken)
    ours, theirs = fingerprints(folder), fingerprints(unbroken)
    last = f"step-{STEPS:08d}"
    state = [f"checkpoints/{last}/{part}.safetensors" for part in ("trainable", "optimizer")]
    for name in (LORA, f"samples/{last}.png", *state):
        assert ours[name] == theirs[name], name


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_leads_to_the_same_end(job: Job, unbroken: Path) -> None:
    folder = job.root / "damaged"
    shutil.copytree(unbroken, folder, symlinks=True)
    before = fingerprints(folder)
    newest = folder / "checkpoints" / f"step-{STEPS:08d}" / "trainable.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = job("damaged", *RESUMED)
    assert f"step-{STEPS:08d} is damaged" in done.stderr
    assert metrics(folder) == metrics(unbroken)
    assert fingerprints(folder)[LORA] == before[LORA]

    for newest in (folder / "checkpoints").glob("step-*/trainable.safetensors"):
        newest.write_bytes(newest.read_bytes()[:-1])
    before = fingerprints(folder)
    done = job("damaged", *RESUMED, code=2)
    line = f"resume: no checkpoint in {folder / 'checkpoints'} is whole: remove them to start afresh"
    assert f"mixres: error: {line}" in done.stderr.splitlines()
    assert [status(folder)[key] for key in ("state", "exit_code", "reason")] == ["refused", 2, line]
    assert fingerprints(folder) == before, "nothing is begun anew"


def test_padded_and_packed_runs_have_the_same_losses(
    launched: "tuple[Path, subprocess.CompletedProcess[str]]", job: Job
) -> None:
    job("padded", "batch.layout=padded", "sample.every=0")
    padded, packed = metrics(job.root / "padded"), metrics(launched[0])
    for ours, theirs in zip(padded, packed, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["tokens"] == theirs["tokens"]
    assert any(line["tokens_computed"] > line["tokens"] for line in padded)


def test_bfloat16_with_the_defaults_of_the_real_recipe(job: Job) -> None:
    words = ("model.dtype=bfloat16", "train.mixed_precision=bf16", "train.gradient_checkpointing=true")
    few = ("train.max_train_steps=4", "sample.every=2", "optimizer.init_args.lr=3e-3")
    job("bfloat16", *words, *few)
    tensors = load_file(job.root / "bfloat16" / LORA)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(metrics(job.root / "bfloat16")) == 4
    assert names(job.root / "bfloat16" / "samples") == ["step-00000002.png", "step-00000004.png"]


def test_all_weights_become_a_transformer_that_loads(job: Job, tiny_base: Path) -> None:
    """In bfloat16, with samples on the way: what is trained is float32, what is written is the base's precision."""
    words = ("model.lora=null", "model.dtype=bfloat16", "train.mixed_precision=bf16", "optimizer.init_args.lr=2e-2")
    job("all", *words, "train.max_train_steps=3", "sample.every=2", "checkpoint.every=2")
    folder = job.root / "all"
    assert not (folder / LORA).exists()
    assert names(folder / "samples") == ["step-00000002.png", "step-00000003.png"]
    trained = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    base = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(next((folder / "transformer").glob("*.safetensors"))).values()} == {
        torch.bfloat16
    }
    recipe = json.loads((folder / "transformer" / "mixres.json").read_text())
    assert (recipe["family"], recipe["base"], recipe["step"]) == ("qwen_image_edit", str(tiny_base), 3)
    untrained = tuple(f"{name}." for name in untrained_modules(base))
    weights = base.state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {name for name in weights if not name.startswith(untrained)}


def test_numbers_that_stay_not_finite_end_the_run_and_leave_the_checkpoints(job: Job) -> None:
    words = ("optimizer.class_path=torch.optim.SGD", "sample.every=0", "checkpoint.every=1", "train.max_skips=2")
    done = job("wild", *words, "optimizer.init_args={lr: 1e38}", code=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mixres: error: ")]
    assert "not finite, and 3 steps in a row are more than train.max_skips = 2" in line
    assert "Traceback" not in done.stderr
    assert done.stdout.count("skipped   step ") == 2
    assert ["skipped" in line for line in metrics(job.root / "wild")][-2:] == [True, True]
    ended = status(job.root / "wild")
    assert (ended["state"], ended["exit_code"]) == ("failed", 1)
    kept = Checkpoints(job.root / "wild" / "checkpoints", keep=2).newest_valid()
    assert kept is not None
    assert kept.step == ended["step"] == len(metrics(job.root / "wild"))
    assert all(tensor.isfinite().all() for tensor in kept.tensors("trainable").values())
    assert not (job.root / "wild" / LORA).exists()


def test_a_base_that_is_not_there_is_a_plain_sentence(job: Job) -> None:
    done = job("absent", "model.pretrained_model_name_or_path=/no/such/base", code=2)
    assert (
        done.stderr
        == "mixres: error: model.pretrained_model_name_or_path: there is no folder '/no/such/base': correct the path\n"
    )
    ended = status(job.root / "absent")
    assert (ended["state"], ended["exit_code"]) == ("refused", 2)
    assert ended["reason"] == done.stderr.removeprefix("mixres: error: ").rstrip()


def test_the_real_recipe_ends_with_a_plain_sentence_without_its_weights(tmp_path: Path) -> None:
    file = REPOSITORY / "configs" / "qwen_image_edit_lora.yaml"
    words = [f"logging.output_dir={tmp_path / 'run'}", f"cache.cache_dir={tmp_path / 'cache'}"]
    done = call([sys.executable, "train.py", "--config", str(file), *words])
    assert done.returncode == 2
    line, *data = done.stderr.splitlines()
    what = "no configuration or tokenizer (a few MB) for 'Qwen/Qwen-Image-Edit'"
    assert line.startswith(f"mixres: error: model.pretrained_model_name_or_path: {what}")
    assert all(line.startswith("mixres: error: data.") and "no such folder or manifest" in line for line in data)
