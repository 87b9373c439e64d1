"""What a start finds: which checkpoint it goes on from, and when it must not."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mixres import trainer
from mixres.assemble import Trained
from mixres.config import Config, load_config
from mixres.errors import UserError, WorkError
from mixres.training.checkpoint import Checkpoints

FROZEN: dict[str, Any] = {"train.seed": 0, "model.lora": {"r": 4, "target_modules": ["to_q"]}, "model.revision": None}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        made.save(step, {"trainable": {"a": torch.full((2,), step)}}, {"frozen": FROZEN})
    return made


def config(small_run: Path, resume: str) -> Config:
    return load_config(small_run, [f"resume={resume}"])


def found(small_run: Path, checkpoints: Checkpoints, resume: str, frozen: dict[str, Any] = FROZEN) -> int | None:
    checkpoint = trainer._checkpoint_to_resume(config(small_run, resume), checkpoints, frozen)
    return checkpoint.step if checkpoint else None


def test_a_start_goes_on_from_the_newest(small_run: Path, checkpoints: Checkpoints) -> None:
    assert found(small_run, checkpoints, "auto") == 2
    assert found(small_run, checkpoints, "required") == 2
    with pytest.raises(UserError, match=r"resume: never, but .* holds checkpoints"):
        found(small_run, checkpoints, "never")


def test_without_checkpoints_a_start_is_afresh_unless_one_is_required(small_run: Path, tmp_path: Path) -> None:
    none = Checkpoints(tmp_path / "none", keep=2)
    assert found(small_run, none, "auto") is None
    assert found(small_run, none, "never") is None
    with pytest.raises(UserError, match="resume: required, but there is no checkpoint"):
        found(small_run, none, "required")


@pytest.mark.parametrize("resume", ["auto", "required"])
def test_when_none_is_whole_a_run_never_begins_anew(
    small_run: Path, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, resume: str
) -> None:
    for path in checkpoints.root.glob("step-*/manifest.json"):
        path.unlink()
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        found(small_run, checkpoints, resume)
    assert caught.value.messages == (
        f"resume: no checkpoint in {checkpoints.root} is whole: remove them to start afresh",
    )
    assert len(caplog.messages) == 2


def test_every_frozen_field_that_changed_is_told_with_both_values(small_run: Path, checkpoints: Checkpoints) -> None:
    changed = FROZEN | {"train.seed": 7, "model.revision": "main"}
    with pytest.raises(UserError) as caught:
        found(small_run, checkpoints, "auto", changed)
    first, second = caught.value.messages
    assert first.startswith("train.seed: checkpoint step-00000002 was made with 0, this run has 7: ")
    assert second.startswith("model.revision: checkpoint step-00000002 was made with None, this run has main: ")


def test_a_field_that_the_checkpoint_does_not_know_is_a_change(small_run: Path, checkpoints: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"model\.dtype"):
        found(small_run, checkpoints, "auto", FROZEN | {"model.dtype": "float32"})


def trained() -> Trained:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    torch.autograd.backward(module(torch.ones(1, 3)).sum())
    optimizer.step()
    return Trained(module, dict(module.named_parameters()), optimizer, ())


def test_what_is_saved_is_restored(tmp_path: Path) -> None:
    one, other = trained(), trained()
    saved = Checkpoints(tmp_path, keep=2)
    trainer._save(saved, one, 5, FROZEN)
    checkpoint = saved.newest_valid()
    assert checkpoint is not None
    trainer._restore(other, checkpoint)
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, other.parameters[name])
        ours, theirs = one.optimizer.state[parameter], other.optimizer.state[other.parameters[name]]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    trainer._save(None, one, 6, FROZEN)  # a rank that does not write
    assert saved.newest_valid() is not None
    assert not list(tmp_path.glob("*6"))


def test_a_full_disk_is_one_line_with_path_and_bytes(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(WorkError) as caught:
        trainer._save(checkpoints, trained(), 3, FROZEN)
    message = str(caught.value)
    # weights (8), two moments of them, and two step counts, 4 bytes each
    assert message.startswith(f"{checkpoints.root}: the checkpoint of step 3 needs 104 bytes")
    assert "No space left on device" in message
    monkeypatch.undo()
    kept = checkpoints.newest_valid()
    assert kept is not None
    assert kept.step == 2


def test_what_dropout_draws_is_a_function_of_seed_step_and_rank() -> None:
    seeds = {trainer._step_seed(*key) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63 - 1, 10**9, 4095)]}
    assert len(seeds) == 5
    assert trainer._step_seed(3, 5, 7) == trainer._step_seed(3, 5, 7)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_the_metrics_of_a_step_can_be_read_back(tmp_path: Path) -> None:
    """JSON has no NaN; a step that is not finite never gets this far."""
    from mixres.data.plan import Lengths, Plan
    from mixres.training.step import StepResult

    plan = Plan(
        [Lengths(1, 2, 1)] * 3, names=["a"] * 3, seed=0, samples_per_step=2, max_tokens=6, layout="packed", world_size=2
    )
    result = StepResult(0.5, 1.5, 6, 6, stopping=False)
    line = trainer._metrics_line(plan.step(1), result, 1e-3, 0.25)
    assert json.loads(json.dumps(line)) == {
        "step": 2, "epoch": 0, "loss": 0.5, "grad_norm": 1.5, "lr": 1e-3, "samples": 1, "tokens": 6,
        "tokens_computed": 6, "microbatches": 2, "seconds": 0.25,
    }  # fmt: skip
