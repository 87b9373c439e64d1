"""What a checkpoint holds of a run, and whether this run may resume from it.

Promise: a run resumes from the newest valid checkpoint, or the error names the reason. What would make it another run
is refused with both values; what may change is applied and logged. All ranks come to the same answer. Cost: hashing
one checkpoint at a start; reading each rank's own part of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from mixres.config.problems import as_written, dotted, leaves
from mixres.config.schema import Changeable
from mixres.errors import Problems, UserError, WorkError
from mixres.models.lora import Presets, expanded
from mixres.training.checkpoint import Checkpoint, Checkpoints
from mixres.training.distributed import distribute_like, local_shards
from mixres.training.optimizer import optimizer_scalars, optimizer_tensors, restore_optimizer

OPTIMIZER = "optimizer.class_path"
_TARGETS = "model.lora.target_modules"
Parameters = Mapping[str, nn.Parameter]  # by name, in the optimizer's order


@dataclass
class Skips:
    """Steps skipped because their numbers were not finite: all, and those since the last step that was not skipped."""

    total: int = 0
    consecutive: int = 0

    def count(self, skipped: bool) -> None:
        """One more step."""
        self.total += skipped
        self.consecutive = self.consecutive + 1 if skipped else 0


def checkpoint_to_resume(
    checkpoints: Checkpoints, resume: str, frozen: Mapping[str, Any], allowed: Sequence[str], presets: Presets
) -> Checkpoint | None:
    """The checkpoint to resume from, None to start from step 0.

    `frozen` is what a run must have in common with the one it resumes, by key. Changes of the keys in `allowed` are
    accepted. `presets` of layers count as what they stand for: earlier versions saved them as they were written.

    Raises:
        UserError: one is required and there is none, none of those there is valid, or it is of another run.
    """
    root = checkpoints.root
    if resume == "never":
        if checkpoints.any():
            raise UserError(
                f"resume: never, but {root} holds checkpoints: remove them, or choose another logging.output_dir"
            )
        return None
    found = checkpoints.newest_valid()
    if found is None:
        if checkpoints.any():
            raise UserError(f"resume: no checkpoint in {root} is whole: remove them to start afresh")
        if resume == "required":
            raise UserError(
                f"resume: required, but there is no checkpoint in {root}: name the folder of one, or set resume=auto"
            )
        return None
    saved, problems = found.state["frozen"], Problems()
    if targets := saved.get(_TARGETS):
        saved[_TARGETS] = expanded(targets, presets)
    for key in {**saved, **frozen}:
        before, now = saved.get(key), frozen.get(key)
        if key not in allowed and before != now:
            allow = f", or set 'resume_allow_changes=[{key}]'" if key in get_args(Changeable) else ""
            problems.add(
                f"{key}: checkpoint {found.path.name} was made with {as_written(before)}, this run has "
                f"{as_written(now)}: change it back, choose another logging.output_dir{allow}"
            )
    problems.raise_if_any()
    return found


def check_order(found: Checkpoint | None, identity: Mapping[str, Any]) -> None:
    """`identity`: the `frozen` values, and `order`, a hash over what each step holds.

    Raises:
        UserError: the same samples come in another order than in the run that left `found`.
    """
    if found and found.state["frozen"] == identity["frozen"] and found.state["order"] != identity["order"]:
        raise UserError(
            f"{found.path}: was made by a version that orders the samples otherwise: finish it with that one"
        )


def changes(found: Checkpoint | None, identity: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What differs from the checkpoint's run, `key: old -> new`; first the frozen keys whose change was allowed."""
    if found is None:
        return []
    saved: Mapping[str, Any] = found.state
    lines: list[str] = []
    for before, now in ((saved["frozen"], identity["frozen"]), (_flat(saved["config"]), _flat(config))):
        listed = {line.partition(":")[0] for line in lines}
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in listed]
        lines += [f"{key}: {as_written(before.get(key))} -> {as_written(now.get(key))}" for key in keys]
    return lines


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {dotted(path): value for path, value in leaves(dict(config))}


def save_run(
    checkpoints: Checkpoints, parameters: Parameters, optimizer: Optimizer, *, step: int, state: Mapping[str, Any]
) -> None:
    """Save a checkpoint, on all ranks: each writes the rows it holds, the first also the unsplit tensors.

    Raises:
        WorkError: on all ranks; the weights are not finite, or the checkpoint could not be written.
    """
    finite = all(bool(part.detach().isfinite().all()) for group in local_shards(parameters) for part in group.values())
    if not all(checkpoints.gather(finite)):
        raise WorkError(
            f"step {step}: the weights are not finite, so this step is not saved; the last checkpoint is intact: "
            "lower optimizer.init_args.lr and run the same command again"
        )
    groups = {"trainable": parameters, "optimizer": optimizer_tensors(optimizer, parameters)}
    parts = {name: local_shards(tensors) for name, tensors in groups.items()}
    split = any(rows for _, rows in parts.values())
    scalars = optimizer_scalars(optimizer, parameters)
    try:
        checkpoints.save(
            step,
            {name: alike for name, (alike, _) in parts.items()},
            {**state, "optimizer": scalars},
            rows={name: rows for name, (_, rows) in parts.items()} if split else None,
        )
    except OSError as error:
        needed = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        raise WorkError(
            f"{checkpoints.root}: the checkpoint of step {step} needs {needed:,} bytes and could not be written "
            f"({error.strerror or error}); those before it are intact: make room and run the same command again"
        ) from error


def restore_run(checkpoint: Checkpoint, parameters: Parameters, optimizer: Optimizer, *, kind: str) -> None:
    """Weights and optimizer state; only the rows that this rank holds are read. The checkpoint is closed then.

    The state of an optimizer of another class than `kind` is left out: it would mean something else.

    Raises:
        UserError: the checkpoint's weights are of other names or shapes.
    """
    saved = checkpoint.shapes("trainable")
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if differing := [name for name in {**saved, **shapes} if saved.get(name) != shapes.get(name)]:
        name = differing[0]
        raise UserError(
            f"resume: {len(differing)} weights of {checkpoint.path} do not fit this run, the first {name}: "
            f"{saved.get(name)} there, {shapes.get(name)} here: choose another logging.output_dir"
        )
    if checkpoint.state["frozen"].get(OPTIMIZER) == kind:
        tensors = {
            key: _read(checkpoint, "optimizer", key, parameters[key.partition("|")[2]], shape)
            for key, shape in checkpoint.shapes("optimizer").items()
        }
        restore_optimizer(optimizer, parameters, tensors, checkpoint.state["optimizer"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_read(checkpoint, "trainable", name, parameter, saved[name]))
    checkpoint.close()


def _read(checkpoint: Checkpoint, group: str, key: str, parameter: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return distribute_like(parameter, shape, lambda rows: checkpoint.tensor(group, key, rows))
