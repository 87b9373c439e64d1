"""Optimizer state by parameter name, schedules as functions of the step, and what a wrong name is answered."""

import sys
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import SchedulerType
from torch import nn

from mixres.config.schema import SchedulerConfig
from mixres.errors import UserError
from mixres.training.optimizer import optimizer_class, optimizer_scalars, optimizer_tensors, restore_optimizer, schedule

SCHEDULERS = get_args(SchedulerConfig.model_fields["scheduler_type"].annotation)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.AdamW": {"lr": 1e-2, "betas": [0.8, 0.9], "amsgrad": True},
    "torch.optim.SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "torch.optim.Adafactor": {"lr": 1e-2},
    "torch.optim.ASGD": {"lr": 1e-2},  # learning rate and average as tensors in the state
    "torch.optim.Muon": {"lr": 1e-2},  # matrices only
}


def model_of(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    data = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
    torch.autograd.backward(model(data).square().sum())
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("class_path", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_bit_for_bit(class_path: str) -> None:
    kind = optimizer_class(class_path, OPTIMIZERS[class_path])
    model = model_of(0)
    optimizer = kind(model.parameters(), **OPTIMIZERS[class_path])
    names = [name for name, _ in model.named_parameters()]
    for step in range(3):
        take_step(model, optimizer, step)
    tensors = {key: value.clone() for key, value in optimizer_tensors(optimizer, names).items()}
    scalars = optimizer_scalars(optimizer, names)
    assert {key.partition("|")[2] for key in tensors} == set(names)

    other = model_of(1)
    other.load_state_dict(model.state_dict())
    resumed = kind(other.parameters(), **OPTIMIZERS[class_path])
    restore_optimizer(resumed, names, tensors, scalars)
    for step in range(3, 6):
        take_step(model, optimizer, step)
        take_step(other, resumed, step)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


class Counting(torch.optim.SGD):
    """As Prodigy does: numbers that no argument sets, in the group and beside a parameter."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        group = self.param_groups[0]
        group["k"] = group.get("k", 0) + 1
        for parameter in group["params"]:
            self.state[parameter]["count"] = group["k"] * 0.5


def test_numbers_that_are_no_tensors_come_back_too() -> None:
    model = model_of(0)
    names = [name for name, _ in model.named_parameters()]
    optimizer = Counting(model.parameters(), lr=0.1, momentum=0.5)
    take_step(model, optimizer, 0)
    take_step(model, optimizer, 1)
    scalars = optimizer_scalars(optimizer, names)
    resumed = Counting(model.parameters(), lr=0.2, momentum=0.5)
    restore_optimizer(resumed, names, optimizer_tensors(optimizer, names), scalars)
    group = resumed.param_groups[0]
    assert group["k"] == 2
    assert [resumed.state[p]["count"] for p in group["params"]] == [1.0, 1.0]
    assert group["lr"] == 0.2, "what arguments set is the new configuration's"


def test_state_is_found_by_name_not_by_position() -> None:
    model = model_of(0)
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer, 0)
    saved = optimizer_tensors(optimizer, names)
    resumed = torch.optim.AdamW(reversed(list(model.parameters())))
    restore_optimizer(resumed, names[::-1], dict(reversed(saved.items())), optimizer_scalars(optimizer, names))
    for parameter in model.parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], resumed.state[parameter]["exp_avg"])


def test_every_schedule_of_diffusers_is_offered_or_left_out_on_purpose() -> None:
    assert {kind.value for kind in SchedulerType} == {*SCHEDULERS, "piecewise_constant"}  # which takes rules, not steps


@pytest.mark.parametrize("scheduler_type", SCHEDULERS)
def test_the_schedule_at_step_k_is_the_one_stepped_there(scheduler_type: str) -> None:
    options: dict[str, Any] = {
        "scheduler_type": scheduler_type,
        "warmup_steps": 0 if scheduler_type == "constant" else 3,
        "max_train_steps": 12,
    }
    stepping = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    stepped = schedule(stepping, **options, step=0)
    for step in range(12):
        at_once = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = schedule(at_once, **options, step=step)
        assert at_once.param_groups[0]["lr"] == stepping.param_groups[0]["lr"]
        assert scheduler.get_last_lr() == stepped.get_last_lr()
        at_once.step()
        stepping.step()
        scheduler.step()
        stepped.step()
        assert at_once.param_groups[0]["lr"] == stepping.param_groups[0]["lr"]


def test_a_resumed_schedule_follows_the_configuration() -> None:
    """The learning rate is a free field: a changed one holds from the step on at which the run goes on."""
    model = model_of(0)
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule(optimizer, scheduler_type="linear", warmup_steps=0, max_train_steps=10, step=0)
    take_step(model, optimizer, 0)
    scalars = optimizer_scalars(optimizer, names)
    assert "initial_lr" not in scalars["group"]
    resumed = torch.optim.AdamW(model.parameters(), lr=4e-3)
    restore_optimizer(resumed, names, optimizer_tensors(optimizer, names), scalars)
    schedule(resumed, scheduler_type="linear", warmup_steps=0, max_train_steps=10, step=5)
    assert resumed.param_groups[0]["lr"] == 2e-3


@pytest.mark.parametrize(
    ("class_path", "init_args", "messages"),
    [
        ("torch.optim.AdamV", {}, ["class_path: torch.optim.AdamV cannot be imported"]),
        ("no_such_package.Adam", {}, ["class_path: no_such_package.Adam cannot be imported"]),
        ("torch.nn.Linear", {}, ["class_path: torch.nn.Linear is no torch optimizer"]),
        ("torch.optim.lr_scheduler", {}, ["class_path: torch.optim.lr_scheduler is no torch optimizer"]),
        ("torch.optim.Optimizer", {}, ["init_args: Optimizer refuses them"]),
        (
            "torch.optim.AdamW",
            {"learning_rate": 1.0, "lr": 1e-3, "beta": 2},
            ["init_args.learning_rate: AdamW does not take it; it takes: lr, betas", "init_args.beta: AdamW"],
        ),
        ("torch.optim.AdamW", {"lr": 1e-3, "betas": [0.9, 1.5]}, ["init_args: AdamW refuses them: Invalid beta"]),
        ("torch.optim.SGD", {"lr": 1e-3, "nesterov": True}, ["init_args: SGD refuses them: Nesterov"]),
    ],
)
def test_a_wrong_class_or_argument_is_one_line_each(
    class_path: str, init_args: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        optimizer_class(class_path, init_args)
    assert len(caught.value.messages) == len(messages)
    for line, message in zip(caught.value.messages, messages, strict=True):
        assert line.startswith(f"optimizer.{message}"), line


class Open(torch.optim.SGD):
    """As some third-party optimizers are written."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, lr=options["speed"])


def test_a_class_with_open_arguments_takes_what_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_optimizer", sys.modules[__name__])
    assert optimizer_class("open_optimizer.Open", {"speed": 0.1}) is Open
