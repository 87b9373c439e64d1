"""What a newcomer does: clone, `make quickstart`, look at the images. In a fresh clone, with a fresh environment."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mixres.batch import Sample
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.collate import collate
from mixres.data.plan import StepPlan
from mixres.preprocessing.fill import CachedData, encode_all, family_of
from mixres.training.distributed import make_accelerator
from mixres.training.optimizer import Schedule
from mixres.training.setup import build_objective, build_plan, load_trained
from mixres.training.step import run_step
from support.family_cases import with_family

REPOSITORY = Path(__file__).parents[2]
CURVE_STEPS = int(os.environ.get("MIXRES_CURVE_STEPS", "12"))  # of the run's 400; all of them take six minutes
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Clone:
    """The last commit, cloned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)

    def make(self, *words: str) -> "subprocess.CompletedProcess[str]":
        inherited = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
        command = ["make", f"PYTHON={sys.executable}", *words]
        done = subprocess.run(command, cwd=self.folder, env=inherited, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("clone") / "mixres")


def test_make_test_checks_style_and_types_and_runs_the_fast_tier(clone: Clone) -> None:
    """Only what it would do: the tier cannot run inside itself."""
    commands = clone.make("-n", "test").stdout
    for part in ("-e '.[demo,test,docs]'", "ruff check .", "ruff format --check .", "mypy", "python -m pytest -"):
        assert part in commands, part
    assert '-m "slow and not gpu"' in clone.make("-n", "test-slow").stdout


@pytest.fixture(scope="module")
def quickstart(clone: Clone) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    """The run folder of `make quickstart`, and its output."""
    clone.make(".venv/.installed-demo")
    start = time.monotonic()
    done = clone.make("quickstart")
    assert time.monotonic() - start < 300, "five minutes, install not counted"
    return clone.folder / "build" / "quickstart" / "run", done


Quickstart = tuple[Path, "subprocess.CompletedProcess[str]"]


def test_make_quickstart_trains_samples_and_writes_a_lora(clone: Clone, quickstart: Quickstart) -> None:
    run, done = quickstart
    status = json.loads((run / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, status["max_train_steps"] + 1))
    assert sum(line["loss"] for line in lines[-10:]) < 0.5 * sum(line["loss"] for line in lines[:10])
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["mixres"])
        assert (recipe["base"], recipe["control_area"]) == ("src/mixres/assets/tiny_base", "target")
        assert any(file.get_tensor(name).any() for name in file.keys() if ".lora_B." in name)  # noqa: SIM118
    for grid in (max((run / "samples").glob("step-*.png")), run / "results.png"):
        with Image.open(grid) as image:
            image.load()
            assert len({text for key, text in image.text.items() if key.startswith("caption-")}) > 1
            assert min(image.size) > 500
    with Image.open(run / "loss.png") as image:
        assert min(image.size) > 300
    for said in (
        "every one its own size",
        "result    build/quickstart/run/pytorch_lora_weights.safetensors",
        "images    build/quickstart/run/results.png",
        "loss      build/quickstart/run/loss.png",
        "next",
    ):
        assert said in done.stdout
    again = clone.make("quickstart").stdout
    assert "0 encoded" in again and "steps were done before" in again
    left = subprocess.check_output(["git", "status", "--porcelain"], cwd=clone.folder, text=True)
    assert left == "", "what a run writes is ignored by git"


def test_it_has_learnt_the_edit(quickstart: Quickstart) -> None:
    """On photographs, sizes and aspects that neither base nor LoRA was trained on."""
    results = json.loads((quickstart[0] / "results.json").read_text())
    assert len(results) >= 12
    assert len({result["size"] for result in results}) >= 6
    copy, base, lora, ceiling = (
        sum(result[column] for result in results) / len(results) for column in ("copy", "base", "lora", "ceiling")
    )
    assert lora >= max(copy, base) + 15, (copy, base, lora)
    assert lora >= ceiling - 6, (lora, ceiling)


@pytest.fixture
def trained(
    clone: Clone, quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Config, CachedData, nn.Module]:
    """The quickstart's configuration and data, and the base with its LoRA."""
    monkeypatch.chdir(clone.folder)
    config = load_config(Path("configs/quickstart.yaml"), [f"logging.output_dir={tmp_path}"])
    transformer = family_of(config).load_transformer(dtype=torch.float32, device="cpu")
    transformer.load_lora_adapter(load_file(quickstart[0] / "pytorch_lora_weights.safetensors"))
    return config, encode_all(*with_family(config), device=torch.device("cpu")), transformer.eval()


@torch.no_grad()
def test_it_edits_this_image(trained: tuple[Config, CachedData, nn.Module]) -> None:
    """With the control of another sample the loss is far worse: the image is not made up from the noise alone."""
    config, encoded, transformer = trained
    objective = build_objective(*with_family(config))
    samples = [encoded.cache.read(item.key, name=item.record.name) for item in encoded.held_out]
    others = {sample.img_shapes: sample for sample in samples}  # the last of its size
    pairs = [(sample, others[sample.img_shapes]) for sample in samples if others[sample.img_shapes] is not sample]
    assert len(pairs) >= 6

    def loss(batch: list[Sample]) -> float:
        indices = range(len(batch))  # with the step they make the noise
        steps = range(8)
        packed = collate(batch, indices=indices, weights=[1.0] * len(batch), layout="packed")
        return sum(float(objective.loss_sum(transformer, packed, step)) for step in steps) / len(batch) / len(steps)

    own = loss([sample for sample, _ in pairs])
    other = loss([replace(sample, control_latents=stranger.control_latents) for sample, stranger in pairs])
    assert other > 1.1 * own, (own, other)


def losses(config: Config, encoded: CachedData, groups: Callable[[StepPlan], list[tuple[int, ...]]]) -> list[float]:
    """The run's losses with the microbatches of each step as `groups` makes them, padded."""
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(mixed_precision="no", report_to="none", folder=Path())
    model = load_trained(*with_family(config), accelerator)
    last = config.train.max_train_steps  # of the schedule
    schedule = Schedule(model.optimizer, **config.lr_scheduler.model_dump(), max_train_steps=last)
    objective, plan = build_objective(*with_family(config)), build_plan(config, encoded, world_size=1)
    samples = [encoded.cache.read(item.key, name=item.record.name) for item in encoded.train]
    curve = []
    for number in range(CURVE_STEPS):
        step = plan.step(number)
        batches = [
            collate([samples[i] for i in group], indices=group, weights=[1.0] * len(group), layout="padded")
            for group in groups(step)
        ]
        schedule.set(number)
        result = run_step(
            accelerator, model.transformer, model.optimizer, objective, batches,
            count=len(batches), step=number, divisor=len(step.indices), max_grad_norm=config.train.max_grad_norm,
        )  # fmt: skip
        curve.append(result.loss)
    return curve


def test_padded_and_one_by_one_training_have_one_loss_curve(
    quickstart: Quickstart, trained: tuple[Config, CachedData, nn.Module]
) -> None:
    """Steps of this very run, in float32; both equal what the run itself logged."""
    config, encoded, _ = trained
    assert config.train.mixed_precision == "no"
    padded = losses(config, encoded, lambda step: [tuple(step.indices)])
    alone = losses(config, encoded, lambda step: [(i,) for i in step.indices])
    assert alone == pytest.approx(padded, rel=1e-4)
    logged = [json.loads(line)["loss"] for line in (quickstart[0] / "metrics.jsonl").read_text().splitlines()]
    assert padded == pytest.approx(logged[:CURVE_STEPS], rel=1e-4)
