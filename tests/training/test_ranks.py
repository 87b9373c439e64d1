"""The same run on one, two and more ranks, replicated and sharded, padded and packed: real processes over gloo."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mixres.data.cache import Cache
from mixres.preprocessing.fill import encode_all
from mixres.training.setup import build_plan
from support.family_cases import with_family
from support.jobs import LORA, REPOSITORY, Jobs, metrics, names, newest, status, torchrun

STEPS = 4
CLIP = 0.002  # well below the gradients of these runs, so that every step is clipped
PLANTED = "tests/support/planted.py"
FSDP2 = "train.parallel=fsdp2"
SMALL = "batch.max_tokens=150"  # two or three samples a microbatch
PAIRS = "batch.samples_per_step=2"
GROUPS = ("train.shard_size=2", "train.shard_read=rows", "train.cpu_offload=true")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Runs(Jobs):
    """Short runs over one data set; a run of one rank is made in this process."""

    def train(self, name: str, ranks: int, *overrides: str, dtype: str = "float64") -> Path:
        words = (f"model.dtype={dtype}", f"cache.cache_dir={self.root / dtype}", *overrides)
        if ranks == 1:
            return self.here(name, *words)
        return self.forked(name, *words, ranks=ranks)


@pytest.fixture(scope="module")
def runs(tiny_base: Path, demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    data = (f"data.train={demo_root / 'train'}", f"data.held_out={demo_root / 'held_out'}", "batch.samples_per_step=5")
    steps = (f"train.max_train_steps={STEPS}", "lr_scheduler.warmup_steps=2", f"train.max_grad_norm={CLIP}")
    common = (f"model.pretrained_model_name_or_path={tiny_base}", *data, *steps, "checkpoint.every=2", "sample.every=0")
    root = tmp_path_factory.mktemp("ranks")
    return Runs(REPOSITORY / "configs" / "quickstart.yaml", root / "float64", root, common)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Path:
    """One process, padded, everything of a step in one microbatch."""
    return runs.train("alone", 1, "batch.layout=padded")


def float64(runs: Runs) -> tuple[str, str]:
    return "model.dtype=float64", f"cache.cache_dir={runs.root / 'float64'}"


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def distance(run: Path, reference: Path) -> float:
    """Of all that is trained, relative."""
    a, b = (newest(folder).tensors("trainable") for folder in (run, reference))
    assert newest(run).step == newest(reference).step == STEPS
    one, other = (torch.cat([tensors[name].flatten().double() for name in sorted(b)]) for tensors in (a, b))
    return float((one - other).norm() / other.norm())


def lines(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    return [line for line in metrics(run) if key in line]


TOPOLOGIES = {
    "packed in small microbatches": (1, ("batch.layout=packed", SMALL)),
    "ddp 3 padded": (3, ("batch.layout=padded",)),
    "fsdp2 2": (2, ("batch.layout=packed", FSDP2, SMALL)),
    "fsdp2 4 in two groups, rows read, host memory": (4, (FSDP2, *GROUPS, SMALL)),
    "ddp 3, more than samples": (3, ("batch.layout=packed", PAIRS)),  # one gets a dummy microbatch
}


@pytest.mark.parametrize(
    ("kind", "ranks", "more"), [("lokr", 3, (FSDP2, "train.shard_read=rows")), ("loha", 2, ("train.parallel=ddp",))]
)
def test_float64_parameters_of_other_adapters_do_not_depend_on_it_either(
    runs: Runs, kind: str, ranks: int, more: tuple[str, ...]
) -> None:
    """Rows of a LoKr's small factor are fewer than ranks: some hold none."""
    words = (f"model.adapter={kind}", "model.lora.factor=2", "train.ema_decay=0.5")
    alone = runs.train(kind, 1, *words, "batch.layout=padded")
    split = runs.train(f"{kind}-split", ranks, *words, *more, "batch.layout=packed", SMALL)
    assert distance(split, alone) <= 1e-10
    averages = [load_file(run / "ema" / LORA) for run in (split, alone)]
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.allclose(averages[0][name], averages[1][name], rtol=1e-9, atol=1e-13) for name in averages[0])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_float64_parameters_do_not_depend_on_the_topology(runs: Runs, alone: Path, name: str) -> None:
    ranks, overrides = TOPOLOGIES[name]
    run = runs.train(name, ranks, *overrides)
    if PAIRS in overrides:
        alone = runs.train("alone in pairs", 1, "batch.layout=padded", PAIRS)
    assert distance(run, alone) <= 1e-10
    if SMALL in overrides and ranks <= 2:
        assert all(line["microbatches"] >= 2 * ranks for line in lines(run))
    for here, there in zip(lines(run), lines(alone), strict=True):
        assert here["grad_norm"] > CLIP
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-10)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-10)
        assert (here["samples"], here["tokens"]) == (there["samples"], there["tokens"])


def test_all_weights_evaluations_dropped_captions_and_a_weighted_set_do_not_depend_on_the_topology(
    runs: Runs, few_pairs: Path
) -> None:
    """With the average, of weights outside the repeated blocks too: no step may continue with what it has gathered.

    In groups every microbatch's gradients are reduced, and only the last one's sum goes from group to group.
    """
    words = (
        *("model.lora=null", f"data.regularization={few_pairs / 'train'}", "loss.prior_loss_weight=0.2"),
        *("evaluate.every=2", "evaluate.sigmas=[0.2, 0.8]", "evaluate.use_ema=true", "train.ema_decay=0.5"),
        *("data.caption_dropout=0.5", "batch.samples_per_step=10"),
    )
    one = runs.train("all-1", 1, *words)
    groups = (FSDP2, "train.shard_size=2", "train.cpu_offload=true", SMALL)
    for ranks, more in ((3, ()), (4, groups)):
        run = runs.train(f"all-{ranks}", ranks, *words, *more)
        assert distance(run, one) <= 1e-10
        assert all(line["microbatches"] >= (2 * ranks if more else ranks) for line in lines(run))
        assert [line["tokens"] for line in lines(run)] == [line["tokens"] for line in lines(one)]
        here, there = lines(run, "eval/loss"), lines(one, "eval/loss")
        assert [line["step"] for line in here] == [0, 2, 4]
        assert here[0] == there[0], "of the same weights, the same bits"
        for ours, theirs in zip(here, there, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
        a, b = (load_file(next((folder / "transformer").glob("*.safetensors"))) for folder in (run, one))
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-12) for name in a)


def test_a_sample_that_is_not_finite_is_skipped_by_all_ranks(runs: Runs, alone: Path) -> None:
    config = runs.config("none", "model.dtype=float64")
    encoded = encode_all(*with_family(config), device=torch.device("cpu"))
    item = encoded.train[build_plan(config, encoded, world_size=1).step(1).indices[0]]
    poisoned = Cache(shutil.copytree(runs.root / "float64", runs.root / "poisoned"))
    sample = poisoned.read(item.key)
    poisoned.write(item.key, replace(sample, target_latents=sample.target_latents * torch.nan))
    words = (f"cache.cache_dir={poisoned.root}", "batch.max_tokens=250")
    one, two = (runs.train(f"poisoned-{ranks}", ranks, *words) for ranks in (1, 2))
    for run in (one, two):
        assert [line["loss"] is None for line in lines(run)] == [False, True, False, False]
        assert item.record.name in lines(run)[1]["skipped"]
        assert len(lines(run)[1]["skipped"]) < 5, "not those of other microbatches"
    assert distance(two, one) <= 1e-10
    assert distance(one, alone) > 1e-6, "a step is missing"


def test_bf16_base_with_fp32_adapters_trains_sharded(runs: Runs) -> None:
    run = runs.train("bf16", 2, FSDP2, "train.mixed_precision=bf16", dtype="bfloat16")
    reference = runs.train("bf16-alone", 1, "train.mixed_precision=bf16", dtype="bfloat16")
    assert {tensor.dtype for tensor in newest(run).tensors("trainable").values()} == {torch.float32}
    for here, there in zip(lines(run), lines(reference), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-2)


GRIDS = ("sample.every=2", "sample.steps=2", "evaluate.every=2", "evaluate.sigmas=[0.5]")


def test_the_ranks_divide_a_grid_and_outlive_one_that_is_slow_or_fails(runs: Runs, few_pairs: Path) -> None:
    """No rank waits for a slow grid in a collective of the devices: those end the run after 15 s here."""
    words = ("batch.layout=packed", "train.timeout_minutes=0.25", *GRIDS, "evaluate.every=0")
    words = (*words, f"data.held_out={few_pairs / 'held_out'}")
    one = runs.train("grids-1", 1, *words)
    planted = "export SLOW_S=20 PLANTED=slow:0:0,memory:1:1"  # a batch of each grid
    done = runs("grids-2", *words, *float64(runs), launcher=torchrun(2), program=PLANTED, before=planted)
    two = runs.root / "grids-2"
    name = f"samples/step-{2:08d}.png"
    assert pixels(two / name) == pixels(one / name)
    assert names(two / "samples") == [f"step-{2:08d}.png"]
    assert "samples   step 4: no grid (OutOfMemoryError: planted): the run continues without it" in done.stdout
    assert (status(two)["state"], status(two)["step"]) == ("done", STEPS) and (two / LORA).exists()
    assert distance(two, one) <= 1e-10


def test_sharded_weights_outlive_a_grid_and_an_evaluation_that_fail(runs: Runs, few_pairs: Path) -> None:
    """The grid on all ranks, inside the second block; the evaluation where one rank reads."""
    words = ("batch.layout=packed", FSDP2, *GRIDS, f"data.held_out={few_pairs / 'held_out'}")
    planted = "export PLANTED=block:0:0,block:1:0,entry:1:2"  # the batch of step 2, a pass of step 2
    done = runs("failing", *words, *float64(runs), launcher=torchrun(2), program=PLANTED, before=planted)
    run, clean = runs.root / "failing", runs.train("no grids", 2, "batch.layout=packed", FSDP2)
    assert "samples   step 2: no grid (OutOfMemoryError: planted): the run continues without it" in done.stdout
    assert "evaluate  step 2: no evaluation (planted: a damaged entry): the run continues without it" in done.stdout
    assert names(run / "samples") == [f"step-{4:08d}.png"]
    assert [line["step"] for line in lines(run, "eval/loss")] == [0, 4]
    assert lines(run) == lines(clean) and distance(run, clean) == 0
