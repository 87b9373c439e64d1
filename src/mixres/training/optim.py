"""Optimizer and learning-rate schedule by the names users know.

Promise: a wrong class or argument is told before anything is encoded or loaded. The schedule is a function of
(configuration, step), so a resumed run needs no state of it. Cost: none per step.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixres.errors import UserError


def optimizer_class(class_path: str, init_args: Mapping[str, Any]) -> type[Optimizer]:
    """The class at `class_path`, with `init_args` checked against its signature and tried on one parameter.

    Raises:
        UserError: it cannot be imported, is no optimizer, does not know an argument, or refuses a value.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"optimizer.class_path: {class_path} cannot be imported ({error}): install or correct it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise UserError(f"optimizer.class_path: {class_path} is no torch optimizer: name one")
    _, *arguments = inspect.signature(found).parameters.values()  # the first takes the parameters
    known = [a.name for a in arguments if a.kind is not inspect.Parameter.VAR_KEYWORD]
    takes_any = len(known) < len(arguments)
    faults = [
        f"optimizer.init_args.{key}: {name} does not take it; it takes: {', '.join(known)}"
        for key in init_args
        if key not in known and not takes_any
    ]
    if faults:
        raise UserError(faults)
    try:
        found([torch.nn.Parameter(torch.zeros(1, 1))], **init_args)  # a matrix: some optimizers take nothing else
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.init_args: {name} refuses them: {error}; correct them") from error
    return found


def schedule(
    optimizer: Optimizer, *, scheduler_type: str, warmup_steps: int, max_train_steps: int, step: int
) -> LambdaLR:
    """diffusers' schedule of that name, standing at optimizer step `step`."""
    scheduler: LambdaLR = get_scheduler(
        scheduler_type, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_train_steps
    )
    scheduler.last_epoch = step
    rates = [base * at(step) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    return scheduler


def optimizer_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """State tensors as `<entry>|<parameter name>`; `names` in the order the optimizer got its parameters."""
    parameters = optimizer.param_groups[0]["params"]
    return {
        f"{entry}|{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for entry, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }


def optimizer_scalars(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Any]:
    """What is no tensor: entries by parameter, and the group's values that no argument sets (Prodigy keeps some)."""
    group = optimizer.param_groups[0]
    arguments = inspect.signature(type(optimizer)).parameters
    entries = {
        f"{entry}|{name}": value
        for name, parameter in zip(names, group["params"], strict=True)
        for entry, value in optimizer.state[parameter].items()
        if isinstance(value, bool | int | float)
    }
    kept = {k: v for k, v in group.items() if k not in arguments and isinstance(v, bool | int | float)}
    return {"entries": entries, "group": {k: v for k, v in kept.items() if k != "initial_lr"}}


def restore_optimizer(
    optimizer: Optimizer, names: Iterable[str], tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]
) -> None:
    """Put saved state back by parameter name; tensors are already where and as large as each parameter needs them."""
    group = optimizer.param_groups[0]
    by_name = dict(zip(names, group["params"], strict=True))
    counts_on_device = bool(group.get("fused") or group.get("capturable"))  # else torch keeps step counts on the CPU
    for key, value in [*tensors.items(), *scalars["entries"].items()]:
        entry, _, name = key.partition("|")
        parameter = by_name[name]
        if isinstance(value, torch.Tensor) and not value.dim() and counts_on_device:
            value = value.to(parameter.device)
        optimizer.state[parameter][entry] = value
    group.update(scalars["group"])
