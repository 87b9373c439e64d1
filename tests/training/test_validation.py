"""The loss on held-out samples: what it is, what it does not depend on, and that the training is untouched."""

import itertools
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from accelerate import Accelerator

from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.data.cache import Cache
from mixres.geometry import Size
from mixres.models.lora import fill_adapters
from mixres.preprocessing.fill import CachedData
from mixres.training.run_folder import RunFolder
from mixres.training.setup import TrainState, load_trained
from mixres.training.validation import SIDES, HeldOutLoss, metrics_line, resolution_band
from support.family_cases import with_family
from support.jobs import Jobs, metrics, status
from support.steps import moved_average

STEPS, EVALUATED = 5, [0, 2, 4, 5]
SIGMAS = (0.2, 0.7)
WORDS = ("evaluate.every=2", "evaluate.sigmas=[0.2, 0.7]", "model.lora.lora_dropout=0.3", "sample.every=0")


@pytest.fixture(scope="module")
def config(setup: Callable[..., Config]) -> Config:
    return setup(*WORDS)


@pytest.fixture(scope="module")
def trained(config: Config, accelerator: Accelerator) -> TrainState:
    """With adapters that do something, dropout before them, in training mode."""
    made = load_trained(*with_family(config), accelerator)
    fill_adapters(made.parameters, seed=0)
    return made


Make = Callable[..., HeldOutLoss]


@pytest.fixture
def make(trained: TrainState, encoded: CachedData, tmp_path: Path) -> Make:
    """The evaluation of a run, of which each part may be another one."""
    run = RunFolder(tmp_path, verb="train", max_train_steps=STEPS, rank=0)
    parts = {"trained": trained, "encoded": encoded, "run": run, "sinks": ()}
    return lambda **other: HeldOutLoss(**parts | other)


def losses_of(evaluation: HeldOutLoss) -> dict[tuple[str, float], float]:
    """By key of the sample."""
    samples = evaluation.samples
    return {(samples[position].key, sigma): loss for (position, sigma), loss in evaluation.losses().items()}


def test_it_is_the_velocity_error_of_each_sample_at_each_sigma(
    make: Make, trained: TrainState, encoded: CachedData
) -> None:
    """Noise, interpolant and error once more by hand, through the stock call for one sample."""
    found = losses_of(make())
    assert len(found) == len(encoded.held_out) * len(SIGMAS) == 6
    trained.transformer.eval()
    for item, sigma in itertools.product(encoded.held_out, SIGMAS):
        sample = encoded.cache.read(item.key)
        clean = sample.target_latents.float()
        seed = xxhash.xxh3_64_intdigest(f"{item.key} {sigma}".encode())
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        tokens = torch.cat([(1 - sigma) * clean + sigma * noise, *sample.control_latents])
        with torch.no_grad():
            velocity = trained.transformer(
                hidden_states=tokens[None],
                timestep=torch.tensor([sigma]),
                encoder_hidden_states=sample.prompt_embeds[None],
                img_shapes=[[tuple(grid) for grid in sample.img_shapes]],
            ).sample
        error = (velocity[0, : len(clean)] - (noise - clean)).square().mean()
        assert found[item.key, sigma] == pytest.approx(float(error), rel=1e-5)
    trained.transformer.train()
    assert len(set(found.values())) == 6


def test_the_line_holds_means_over_all_sigmas_and_bands(encoded: CachedData) -> None:
    sizes = [Size(128, 128), Size(1024, 768), Size(1184, 880)]
    items = [item._replace(target_size=size) for item, size in zip(encoded.held_out, sizes, strict=True)]
    losses = {(i, sigma): 10.0 * i + sigma for i in range(3) for sigma in (0.25, 0.75)}
    line = metrics_line(losses, items)
    means = {"loss": 10.5, "sigma_0.25": 10.25, "sigma_0.75": 10.75, "resolution_128": 0.5, "resolution_1024": 15.5}
    assert line == {f"eval/{name}": mean for name, mean in means.items()}
    broken = metrics_line(losses | {(0, 0.25): math.nan}, items)
    assert [broken[f"eval/{name}"] for name in ("loss", "resolution_128", "resolution_1024")] == [None, None, 15.5]


@pytest.mark.parametrize(
    ("width", "height", "band"),
    [(16, 16, 128), (192, 128, 192), (176, 128, 128), (1008, 768, 768), (2896, 352, 1024), (4096, 4096, 2048)],
)
def test_bands_have_the_nearest_square(width: int, height: int, band: int) -> None:
    assert resolution_band(width * height) == band
    ratios = {side: abs(math.log(width * height / side**2)) for side in SIDES}
    assert ratios[band] == pytest.approx(min(ratios.values()))


def test_the_same_bits_whatever_the_training_does(
    make: Make, setup: Callable[..., Config], trained: TrainState, encoded: CachedData
) -> None:
    """Seed, step, dropout, losses' weights, order and number of the samples, and calls before it."""
    reference = losses_of(make())
    torch.manual_seed(99)
    assert losses_of(make()) == reference
    drawn = replace(trained.objective.timesteps, shift="none", density="uniform")
    other = replace(trained.objective, seed=7, normalization="token", foreground=9.0, background=0.1,
                    weighting="cosmap", timesteps=drawn)  # fmt: skip
    assert losses_of(make(trained=replace(trained, objective=other))) == reference
    turned = CachedData(encoded.cache, encoded.train[1:], encoded.held_out[::-1])
    assert losses_of(make(encoded=turned)) == reference
    fewer = losses_of(make(encoded=CachedData(encoded.cache, encoded.train, encoded.held_out[1:])))
    assert fewer == {key: loss for key, loss in reference.items() if key[0] != encoded.held_out[0].key}
    config = setup(*WORDS, "evaluate.sigmas=[0.7, 0.5]")
    other_sigmas = losses_of(make(trained=replace(trained, config=config)))
    assert all(other_sigmas[key] == loss for key, loss in reference.items() if key[1] == 0.7)


def test_the_average_is_evaluated_on_request(
    make: Make, setup: Callable[..., Config], config: Config, accelerator: Accelerator
) -> None:
    own = load_trained(*with_family(config), accelerator)
    own = replace(own, ema=moved_average(list(own.parameters.values()), 0.05))
    asked = replace(own, config=setup(*WORDS, "train.ema_decay=0.9", "evaluate.use_ema=true"))
    plain, averaged = losses_of(make(trained=own)), losses_of(make(trained=asked))
    assert all(plain[key] != averaged[key] for key in plain)
    with own.ema.averaged():
        assert losses_of(make(trained=own)) == averaged
    assert losses_of(make(trained=own)) == plain, "the weights are back"


def test_a_missing_entry_is_a_line_and_the_run_goes_on(
    make: Make, encoded: CachedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, lines = CachedData(Cache(tmp_path / "empty"), encoded.train, encoded.held_out), list[Any]()
    evaluation = make(encoded=gone, sinks=(lines.append,))
    assert evaluation(2), "nothing was stopped"
    assert not lines and all(module.training for module in evaluation.transformer.modules())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("evaluate  step 2: no evaluation (") and "run the same command again" in line


def test_every_sink_gets_the_line_and_a_stop_leaves_none(make: Make, encoded: CachedData) -> None:
    first, second = list[Any](), list[Any]()
    evaluation = make(sinks=(first.append, second.append))
    assert [step for step in range(STEPS + 1) if evaluation.due(step)] == EVALUATED
    assert evaluation(1) and evaluation(2)
    assert first == second
    assert [line["step"] for line in first] == [2]
    evaluation.run.stop_requested = True
    assert evaluation(3), "nothing was due, so nothing was stopped"
    assert not evaluation(4)
    assert make(encoded=CachedData(encoded.cache, encoded.train, []), sinks=(first.append,))(2), "there are no samples"
    assert [line["step"] for line in first] == [2]
    assert all(module.training for module in evaluation.transformer.modules())


@pytest.fixture(scope="module")
def run(small_run: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    often = (f"train.max_train_steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=9")
    runs = Jobs(small_run, small_cache, tmp_path_factory.mktemp("runs"), (*often, *WORDS))
    runs.here("whole")
    return runs


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    found = {line["step"]: line for line in metrics(folder) if "eval/loss" in line}
    assert not any("loss" in line for line in found.values())
    return found


def test_it_leaves_no_trace_in_the_training(run: Jobs) -> None:
    plain = run.here("plain", "evaluate.every=0")
    whole = run.root / "whole"
    assert [line for line in metrics(whole) if "loss" in line] == metrics(plain)
    assert sorted(evaluations(whole)) == EVALUATED
    assert len({line["eval/loss"] for line in evaluations(whole).values()}) == 4
    last = f"checkpoints/step-{STEPS:08d}/trainable.safetensors"
    assert (plain / last).read_bytes() == (whole / last).read_bytes()


def test_a_resumed_run_writes_the_same_lines_each_once(run: Jobs) -> None:
    """From a step that was evaluated: it is not evaluated again."""
    run.copy_at(4, "whole", "from 4")
    assert metrics(run.here("from 4")) == metrics(run.root / "whole")


def test_a_signal_during_an_evaluation_saves_and_the_resumed_run_evaluates_then(
    run: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of the second evaluation, after a step that would not be saved otherwise."""
    passes, loss = [], HeldOutLoss._loss

    def interrupted(self: HeldOutLoss, batch: Batch, position: int, sigma: float) -> float:
        passes.append((position, sigma))
        if len(passes) == 6 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, position, sigma)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOutLoss, "_loss", interrupted)
        run.here("stopped", "checkpoint.every=4", code=75)
    folder = run.root / "stopped"
    assert status(folder)["reason"].startswith("stopped by a signal after step 2, which is saved")
    assert len(passes) == 6 + 3
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert sorted(evaluations(folder)) == [0]
    assert metrics(run.here("stopped", "checkpoint.every=4")) == metrics(run.root / "whole")
