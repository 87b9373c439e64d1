"""Optimizer and learning-rate schedule by the names users know.

Promise: a wrong class or argument is reported before anything is encoded or loaded. The schedule is a function of
(configuration, step), so a resumed run needs no state of it.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mixres.errors import Problems, UserError

KEY = "optimizer.class_path"
_OPTIONAL = ("bitsandbytes", "prodigyopt", "torchao")  # installed under the names that they are imported by
TRIAL_SIZE = 64  # a matrix of 4096 numbers, the fewest of which 8-bit optimizers keep a quantised state


def optimizer_class(class_path: str, init_args: Mapping[str, Any]) -> type[Optimizer]:
    """The class at `class_path`, with `init_args` checked against its signature and tried on one parameter.

    Raises:
        UserError: it cannot be imported, is no optimizer, does not know an argument, or refuses a value.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        package = getattr(error, "name", None)
        fix = f"pip install {package}" if package in _OPTIONAL else "install or correct it"
        raise UserError(f"{KEY}: {class_path} cannot be imported ({error}): {fix}") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise UserError(f"{KEY}: {class_path} is no torch optimizer: name one")
    _, *arguments = inspect.signature(found).parameters.values()  # the first takes the parameters
    known = [a.name for a in arguments if a.kind is not inspect.Parameter.VAR_KEYWORD]
    takes_any = len(known) < len(arguments)
    unknown = [key for key in init_args if key not in known and not takes_any]
    Problems(
        f"optimizer.init_args.{key}: {name} does not take it; it takes: {', '.join(known)}" for key in unknown
    ).raise_if_any()
    try:
        found([torch.nn.Parameter(torch.zeros(1, 1))], **init_args)  # a matrix: some optimizers accept nothing else
    except Exception as error:  # each class has its own for arguments that do not fit
        raise UserError(f"optimizer.init_args: {name} refuses them: {error}; correct them") from error
    return found


def state_of_a_step(
    kind: type[Optimizer], init_args: Mapping[str, Any], *, device: torch.device, size: int = TRIAL_SIZE
) -> dict[str, Any]:
    """What the optimizer keeps of one parameter of `size` x `size` numbers after a step on `device`."""
    matrix = torch.nn.Parameter(torch.ones(size, size, device=device))  # of zeros Prodigy keeps less
    matrix.grad = torch.ones_like(matrix)
    optimizer = kind([matrix], **init_args)
    optimizer.step()
    state: dict[str, Any] = optimizer.state[matrix]
    return state


def check_step(
    kind: type[Optimizer], class_path: str, init_args: Mapping[str, Any], *, device: torch.device, split: bool
) -> None:
    """One step on a small matrix, on the device that is to train: some optimizers need a kernel or a compiler there.

    Raises:
        UserError: it cannot step; or the weights are to be `split` over ranks by rows, and its state cannot be.
    """
    try:
        state = state_of_a_step(kind, init_args, device=device)
    except Exception as error:  # whatever a third-party class, or the compiler it calls, stumbles over
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{KEY}: {class_path} cannot step on {device} ({type(error).__name__}: {reason}): choose another"
        ) from error
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    unsplit = [k for k, v in tensors.items() if v.dim() == 1 or len(state_parts(k, v)) > 1]
    if split and unsplit:
        raise UserError(
            f"{KEY}: {class_path} with train.parallel: fsdp2: its state '{unsplit[0]}' cannot be split over devices by "
            "rows as the weights are: choose train.parallel=ddp, or another optimizer"
        )


def make_optimizer(
    class_path: str, init_args: Mapping[str, Any], parameters: Iterable[torch.nn.Parameter], *, device: torch.device
) -> Optimizer:
    """The optimizer over `parameters` of a model that is trained on `device`.

    On CUDA torch's AdamW and Adam update each tensor in one kernel, unless an argument says otherwise: by default they
    make one more copy there of all that is trained.

    Raises:
        UserError: as `optimizer_class`.
    """
    kind, ways = optimizer_class(class_path, init_args), {"fused", "foreach", "differentiable"}
    fused = device.type == "cuda" and kind in (torch.optim.AdamW, torch.optim.Adam) and not ways & {*init_args}
    return kind(parameters, **{**init_args, **({"fused": True} if fused else {})})


class Schedule:
    """diffusers' learning-rate schedule of that name for an optimizer that starts with the base rate.

    With warm-up the rate of the first step is 0.
    """

    def __init__(self, optimizer: Optimizer, *, scheduler_type: str, warmup_steps: int, max_train_steps: int) -> None:
        scheduler = get_scheduler(
            scheduler_type, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_train_steps
        )
        self._optimizer, self._base_rates, self._factors = optimizer, scheduler.base_lrs, scheduler.lr_lambdas

    def set(self, step: int) -> float:
        """Give the optimizer the rate of optimizer step `step`, and return it."""
        rates = [base * factor(step) for base, factor in zip(self._base_rates, self._factors, strict=True)]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers read theirs on the device
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return float(rates[0])


def optimizer_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """State tensors as `<entry>|<parameter name>`; `names` in the order the optimizer got its parameters.

    A quantised state becomes the plain tensors that it is made of, `<entry>.<part>|<parameter name>`.
    """
    parameters = optimizer.param_groups[0]["params"]
    return {
        f"{part}|{name}": tensor
        for name, parameter in zip(names, parameters, strict=True)
        for entry, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
        for part, tensor in state_parts(entry, value).items()
    }


def state_parts(entry: str, value: Any) -> dict[str, torch.Tensor]:
    """The plain tensors that a quantised state is made of, by `<entry>.<part>`; another state as it is."""
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return {entry: value}
    names, _ = value.__tensor_flatten__()
    return {f"{entry}.{name}": getattr(value, name) for name in names}


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
    """Put saved state back by parameter name; tensors are already where and as large as each parameter needs them.

    May change the parameters' values: restore those afterwards.

    Raises:
        UserError: a quantised state is laid out otherwise, since other arguments were given.
    """
    group = optimizer.param_groups[0]
    parts = {key for key in tensors if "." in key.partition("|")[0]}
    if parts:  # only the optimizer itself can make the quantised tensors that these are copied into
        make_state(optimizer)
    by_name = dict(zip(names, group["params"], strict=True))
    counts_on_device = bool(group.get("fused") or group.get("capturable"))  # else torch keeps step counts on the CPU
    for key, value in [*tensors.items(), *scalars["entries"].items()]:
        entry, _, name = key.partition("|")
        parameter = by_name[name]
        if isinstance(value, torch.Tensor) and not value.dim() and counts_on_device:
            value = value.to(parameter.device)
        if key in parts:
            _fill_part(optimizer.state[parameter], entry, value)
        else:
            optimizer.state[parameter][entry] = value
    group.update(scalars["group"])


def make_state(optimizer: Optimizer) -> None:
    """Make the optimizer's state by a step with gradients of zero at learning rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0 * group["lr"]  # a tensor stays one
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _fill_part(state: Mapping[str, torch.Tensor], entry: str, saved: torch.Tensor) -> None:
    whole, _, name = entry.partition(".")
    part = getattr(state[whole], name)
    if part.shape != saved.shape:
        raise UserError(
            f"optimizer.init_args: the checkpoint's {entry} has the shape {tuple(saved.shape)}, this run's "
            f"{tuple(part.shape)}: give the optimizer the arguments that it had"
        )
    part.copy_(saved)
