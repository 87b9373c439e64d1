"""The same run on one, two and three ranks, replicated and sharded, padded and packed: real processes over gloo."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixres.config.load import load_config
from mixres.data.cache import Cache
from mixres.preprocessing.fill import encode_all
from mixres.training.checkpoint import Checkpoints
from mixres.training.setup import build_plan
from support.family_cases import with_family

REPOSITORY = Path(__file__).parents[2]
STEPS = 4
CLIP = 0.002  # well below the gradients of these runs, so that every step is clipped
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Runs:
    """Short runs of the real command over one data set and cache, each made once."""

    def __init__(self, base: Path, demo: Path, folder: Path) -> None:
        self.folder = folder
        self.common = [
            "--config",
            str(REPOSITORY / "configs" / "quickstart.yaml"),
            f"model.pretrained_model_name_or_path={base}",
            f"data.train={demo / 'train'}",
            f"data.held_out={demo / 'held_out'}",
            "batch.samples_per_step=5",
            f"train.max_train_steps={STEPS}",
            "lr_scheduler.warmup_steps=2",
            f"train.max_grad_norm={CLIP}",
            "checkpoint.every=2",
            "sample.every=0",
        ]

    def __call__(self, name: str, ranks: int, *overrides: str, dtype: str = "float64") -> Path:
        run = self.folder / name
        launcher = [sys.executable]
        if ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words = [f"model.dtype={dtype}", f"cache.cache_dir={self.folder / dtype}", f"logging.output_dir={run}"]
        command = [*launcher, "train.py", *self.common, *words, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return run


@pytest.fixture(scope="module")
def runs(tiny_base: Path, demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_base, demo_root, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Path:
    """One process, padded, everything of a step in one microbatch."""
    return runs("alone", 1, "batch.layout=padded")


def trained_tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoints(run / "checkpoints", keep=2).newest_valid()
    assert checkpoint is not None and checkpoint.step == STEPS
    return checkpoint.tensors("trainable")


def parameters(run: Path) -> torch.Tensor:
    tensors = trained_tensors(run)
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def distance(run: Path, reference: Path) -> float:
    a, b = parameters(run), parameters(reference)
    return float((a - b).norm() / b.norm())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ("batch.layout=packed", "batch.max_tokens=600")),
        (2, ("batch.layout=packed",)),
        (3, ("batch.layout=padded",)),
        (2, ("batch.layout=packed", "train.parallel=fsdp2", "batch.max_tokens=600")),
        (6, ("batch.layout=packed",)),  # more ranks than samples: fillers
    ],
    ids=["packed in small microbatches", "ddp 2", "ddp 3 padded", "fsdp2 2", "ddp 6, more than samples"],
)
def test_float64_parameters_do_not_depend_on_the_topology(
    runs: Runs, alone: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    run = runs(f"ranks-{ranks}-{len(list(runs.folder.iterdir()))}", ranks, *overrides)
    assert distance(run, alone) <= 1e-10
    assert all(line["grad_norm"] > CLIP for line in lines(run))
    for here, there in zip(lines(run), lines(alone), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-10)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-10)
        assert (here["samples"], here["tokens"]) == (there["samples"], there["tokens"])


def test_the_bar_would_see_a_wrong_divisor(runs: Runs, alone: Path) -> None:
    """Another divisor is a small change of each sample's weight; it moves the parameters far past the bar."""
    assert distance(runs("token", 1, "loss.normalization=token"), alone) > 1e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_all_weights_over_two_ranks_equal_one_process(runs: Runs, parallel: str) -> None:
    reference = runs(f"full-alone-{parallel}", 1, "model.lora=null")
    run = runs(f"full-{parallel}", 2, "model.lora=null", f"train.parallel={parallel}")
    assert distance(run, reference) <= 1e-10
    a, b = (load_file(next((r / "transformer").glob("*.safetensors"))) for r in (run, reference))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-12) for name in a)


def test_a_run_resumes_on_another_number_of_ranks(runs: Runs, alone: Path) -> None:
    for name, first, then in (("2-1", 2, 1), ("1-2", 1, 2)):
        overrides = ("train.parallel=fsdp2",)
        half = runs(name, first, "train.max_train_steps=2", *overrides)
        assert len(lines(half)) == 2
        assert distance(runs(name, then, *overrides), alone) <= 1e-10
        assert [line["step"] for line in lines(half)] == [1, 2, 3, 4]


def test_dropped_captions_do_not_depend_on_the_topology_or_a_resume(runs: Runs, alone: Path) -> None:
    """One whole run against one of two ranks that is stopped after two steps and goes on in one process."""
    dropout = ("data.caption_dropout=0.5", "batch.layout=padded")
    reference = runs("dropout", 1, *dropout)
    assert distance(reference, alone) > 1e-4
    assert all(here["tokens"] < there["tokens"] for here, there in zip(lines(reference), lines(alone), strict=True))
    dropout = ("data.caption_dropout=0.5", "batch.layout=packed", "batch.max_tokens=600", "train.parallel=fsdp2")
    runs("dropout-2", 2, *dropout, "train.max_train_steps=2")
    resumed = runs("dropout-2", 1, *dropout)
    assert distance(resumed, reference) <= 1e-10
    assert [line["tokens"] for line in lines(resumed)] == [line["tokens"] for line in lines(reference)]


def test_evaluations_and_a_weighed_set_do_not_depend_on_the_topology(runs: Runs, few_pairs: Path) -> None:
    """Of all weights' average, those outside the repeated blocks too: no step may go on with what it has gathered."""
    words = (
        *("model.lora=null", f"data.regularization={few_pairs / 'train'}", "loss.prior_loss_weight=0.2"),
        *("evaluate.every=2", "evaluate.sigmas=[0.2, 0.8]", "evaluate.use_ema=true", "train.ema_decay=0.5"),
    )
    one = runs("evaluated-1", 1, *words)
    for name, ranks, more in (("ddp", 3, ()), ("fsdp2", 2, ("train.parallel=fsdp2",))):
        run = runs(f"evaluated-{name}", ranks, *words, *more)
        assert distance(run, one) <= 1e-10, name
        here, there = evaluations(run), evaluations(one)
        assert [line["step"] for line in here] == [0, 2, 4]
        assert here[0] == there[0], "of the same weights, the same bits"
        for ours, theirs in zip(here, there, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9), name


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "eval/loss" in line]


def test_a_sample_that_is_not_finite_is_left_out_by_all_ranks(runs: Runs, alone: Path) -> None:
    config = load_config(Path(runs.common[1]), [*runs.common[2:], f"cache.cache_dir={runs.folder / 'float64'}",
                         "model.dtype=float64", f"logging.output_dir={runs.folder / 'none'}"])  # fmt: skip
    encoded = encode_all(*with_family(config), device=torch.device("cpu"))
    item = encoded.train[build_plan(config, encoded, world_size=1).step(1).indices[0]]
    poisoned = Cache(shutil.copytree(runs.folder / "float64", runs.folder / "poisoned"))
    sample = poisoned.read(item.key)
    poisoned.write(item.key, replace(sample, target_latents=sample.target_latents * torch.nan))
    words = (f"cache.cache_dir={poisoned.root}", "batch.max_tokens=250")
    one, two = (runs(f"poisoned-{ranks}", ranks, *words) for ranks in (1, 2))
    for run in (one, two):
        assert [line["loss"] is None for line in lines(run)] == [False, True, False, False]
        assert item.record.name in lines(run)[1]["skipped"]
        assert len(lines(run)[1]["skipped"]) < 5, "not those of other microbatches"
    assert distance(two, one) <= 1e-10
    assert distance(one, alone) > 1e-6, "a step is missing"


def test_fp32_losses_of_one_and_two_ranks_agree(runs: Runs) -> None:
    one, two = (runs(f"fp32-{ranks}", ranks, dtype="float32") for ranks in (1, 2))
    for here, there in zip(lines(one), lines(two), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


def test_bf16_base_with_fp32_adapters_trains_sharded(runs: Runs) -> None:
    run = runs("bf16", 2, "train.parallel=fsdp2", "train.mixed_precision=bf16", dtype="bfloat16")
    reference = runs("bf16-alone", 1, "train.mixed_precision=bf16", dtype="bfloat16")
    tensors = trained_tensors(run)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for here, there in zip(lines(run), lines(reference), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-2)
