"""What a start finds: which checkpoint it resumes from, when it must not, and what has changed since."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mixres.errors import UserError
from mixres.training.checkpoint import Checkpoint, Checkpoints
from mixres.training.resume import changes, check_order, checkpoint_to_resume

FROZEN: dict[str, Any] = {"train.seed": 0, "model.lora.r": 4, "model.revision": None}
IDENTITY: dict[str, Any] = {"frozen": FROZEN, "order": "abc"}
CONFIG: dict[str, Any] = {"train": {"seed": 0, "max_train_steps": 5}, "optimizer": {"init_args": {"lr": 1e-3}}}
STATE: dict[str, Any] = {**IDENTITY, "config": CONFIG, "skips": {"total": 0, "consecutive": 0}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        made.save(step, {"trainable": {"a": torch.full((2,), step)}}, STATE)
    return made


def found(
    checkpoints: Checkpoints, resume: str, changed: Any = (), *, order: str = "abc", allowed: Sequence[str] = ()
) -> Checkpoint | None:
    identity = {"frozen": FROZEN | dict(changed), "order": order}
    checkpoint = checkpoint_to_resume(checkpoints, resume, identity["frozen"], allowed, {})
    check_order(checkpoint, identity)
    return checkpoint


def test_a_start_resumes_from_the_newest(checkpoints: Checkpoints) -> None:
    assert found(checkpoints, "auto").step == 2
    assert found(checkpoints, "required").step == 2
    with pytest.raises(UserError, match=r"resume: never, but .* holds checkpoints"):
        found(checkpoints, "never")
    with pytest.raises(UserError, match="orders the samples otherwise"):
        found(checkpoints, "auto", order="other")


def test_a_run_starts_at_step_0_where_there_are_none_but_not_where_none_is_whole(checkpoints: Checkpoints) -> None:
    none = Checkpoints(checkpoints.root / "none", keep=2)
    assert found(none, "auto") is None
    assert found(none, "never") is None
    with pytest.raises(UserError, match="resume: required, but there is no checkpoint"):
        found(none, "required")
    for path in checkpoints.root.glob("step-*/manifest.json"):
        path.unlink()
    for resume in ("auto", "required"):
        with pytest.raises(UserError, match=r"resume: no checkpoint in .* is whole: remove them to start afresh"):
            found(checkpoints, resume)


def test_every_frozen_key_that_changed_is_named_with_both_values_and_accepted_by_name(checkpoints: Checkpoints) -> None:
    """A key that the checkpoint does not know is a change too."""
    changed = {"train.seed": 7, "model.revision": "main", "model.dtype": "float32"}
    with pytest.raises(UserError) as caught:
        found(checkpoints, "auto", changed, order="other")
    first, second, _ = caught.value.messages
    assert first.startswith("train.seed: checkpoint step-00000002 was made with 0, this run has 7: ")
    assert "resume_allow_changes" in first
    assert "was made with null, this run has main: " in second
    with pytest.raises(UserError, match=r"^model.dtype: "):
        found(checkpoints, "auto", changed, order="other", allowed=("train.seed", "model.revision"))
    assert found(checkpoints, "auto", changed, order="other", allowed=tuple(changed)).step == 2


def test_what_changed_is_listed_once_frozen_keys_first(checkpoints: Checkpoints) -> None:
    now = {"train": {"seed": 7, "max_train_steps": 9}, "optimizer": {"init_args": {"lr": 1e-3, "eps": 1e-6}}}
    identity = {**IDENTITY, "frozen": FROZEN | {"train.seed": 7}}
    assert changes(checkpoints.newest_valid(), identity, now) == [
        "train.seed: 0 -> 7",
        "train.max_train_steps: 5 -> 9",
        "optimizer.init_args.eps: null -> 1e-06",
    ]
    assert changes(checkpoints.newest_valid(), IDENTITY, CONFIG) == []
    assert changes(None, IDENTITY, now) == []


def test_a_preset_of_layers_is_what_it_stands_for(checkpoints: Checkpoints) -> None:
    """Earlier versions saved the words of the configuration; the layers are saved now."""
    key, presets = "model.lora.target_modules", {"attention": ("to_q", "to_k")}
    checkpoints.save(3, {"trainable": {}}, STATE | {"frozen": FROZEN | {key: ["attention"]}})
    frozen = FROZEN | {key: ["to_q", "to_k"]}
    checkpoint = checkpoint_to_resume(checkpoints, "auto", frozen, (), presets)
    assert checkpoint is not None and changes(checkpoint, IDENTITY | {"frozen": frozen}, CONFIG) == []
    with pytest.raises(UserError, match=r"was made with \['to_q', 'to_k'\], this run has \['to_q'\]"):
        checkpoint_to_resume(checkpoints, "auto", frozen | {key: ["to_q"]}, (), presets)
