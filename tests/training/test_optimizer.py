"""Optimizers, the average of what they train, and schedules: state through real checkpoints, and what is refused."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mixres.config.schema import SchedulerConfig
from mixres.errors import UserError, WorkError
from mixres.training.checkpoint import Checkpoints
from mixres.training.ema import Ema
from mixres.training.optimizer import (
    Schedule,
    check_step,
    make_optimizer,
    optimizer_class,
    optimizer_scalars,
    optimizer_tensors,
)
from mixres.training.resume import restore_run, save_run
from support.counting import peak_of
from support.jobs import longest_file, names

THIS = "this_module"  # under which optimizer_class finds the classes below
SCHEDULERS = get_args(SchedulerConfig.model_fields["scheduler_type"].annotation)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.AdamW": {"lr": 1e-2, "betas": [0.8, 0.9], "amsgrad": True},
    "torch.optim.SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "torch.optim.Adafactor": {"lr": 1e-2},
    "torch.optim.ASGD": {"lr": 1e-2},  # learning rate and average as tensors in the state
    "torch.optim.Muon": {"lr": 1e-2},  # matrices only
}
MEMORY_SAVING: dict[str, dict[str, Any]] = {
    "prodigyopt.Prodigy": {"lr": 1.0, "d0": 1e-6, "use_bias_correction": True},
    "torchao.optim.AdamW8bit": {"lr": 1e-2},
    "torchao.optim.AdamW4bit": {"lr": 1e-2},
    "torchao.optim.AdamWFp8": {"lr": 1e-2},
}
ON_CUDA = pytest.param("bitsandbytes.optim.AdamW8bit", marks=pytest.mark.gpu)
WIDTH = 64  # a matrix of 4096 numbers, the fewest that are quantised
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Open(torch.optim.SGD):
    """As some third-party optimizers are written."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, lr=options["speed"])


class Stuck(torch.optim.SGD):
    """An optimizer whose kernel is not there."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("no kernel\nfor this device")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchao compiles its update, which takes a minute: here it runs as it is written. The slow tier compiles it."""
    monkeypatch.setitem(sys.modules, THIS, sys.modules[__name__])
    with torch.compiler.set_stance("force_eager"):
        yield


class Run:
    """A small model whose first matrix is quantised, and whose second, all zeros at first, is not."""

    def __init__(self, class_path: str, *, decay: float | None = None, **arguments: Any) -> None:
        torch.manual_seed(0)
        bias = not class_path.endswith("Muon")
        layers = nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 3, bias=bias)
        self.device = "cuda" if class_path.startswith("bitsandbytes") else "cpu"
        self.model = nn.Sequential(*layers).to(self.device)
        nn.init.zeros_(self.model[2].weight)  # as B of an adapter
        self.kind = class_path
        arguments = (OPTIMIZERS | MEMORY_SAVING).get(class_path, {"lr": 1e-2}) | arguments
        self.optimizer = optimizer_class(class_path, arguments)(self.model.parameters(), **arguments)
        self.ema = None if decay is None else Ema(self.optimizer, decay)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            data = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step))
            torch.autograd.backward((self.model(data.to(self.device)) - 1).square().sum())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        state = {"frozen": {"optimizer.class_path": self.kind}}
        save_run(checkpoints, self.parameters, self.optimizer, step=step, state=state)

    def restore(self, checkpoints: Checkpoints) -> None:
        restore_run(checkpoints.newest_valid(), self.parameters, self.optimizer, kind=self.kind)

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters.values()]

    @property
    def average(self) -> list[Tensor]:
        with self.ema.averaged():
            return self.weights

    def everything(self) -> dict[str, Any]:
        """Weights and the optimizer's state, of which their average is a part."""
        tensors = self.parameters | optimizer_tensors(self.optimizer, self.parameters)
        values = {name: tensor.detach().float().tolist() for name, tensor in tensors.items()}
        return values | optimizer_scalars(self.optimizer, self.parameters)


@pytest.mark.parametrize("decay", [None, 0.7], ids=["plain", "average"])
@pytest.mark.parametrize("class_path", [*OPTIMIZERS, *MEMORY_SAVING, ON_CUDA])
def test_a_restored_optimizer_continues_bit_for_bit(class_path: str, decay: float | None, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    unbroken, first, second = (Run(class_path, decay=decay) for _ in range(3))
    unbroken.steps(0, 7)
    first.steps(0, 4)
    first.save(checkpoints, 4)
    assert {file.suffix for file in (tmp_path / "step-00000004").iterdir()} == {".safetensors", ".json"}
    with torch.no_grad():
        for parameter in second.parameters.values():
            parameter.add_(1)  # nothing of the new run's own start may stay
    second.restore(checkpoints)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "a file in use keeps its space when it is deleted"
    assert second.everything() == first.everything()
    second.steps(4, 7)
    assert second.everything() == unbroken.everything()
    assert not any(torch.equal(a, b) for a, b in zip(unbroken.weights, first.weights, strict=True))


def test_what_arguments_set_is_the_new_configurations(tmp_path: Path) -> None:
    """Prodigy's distance d is in the group, beside the arguments."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    first = Run("prodigyopt.Prodigy")
    first.steps(0, 15)
    first.save(checkpoints, 15)
    second = Run("prodigyopt.Prodigy", d_coef=0.5, lr=0.2)
    second.restore(checkpoints)
    before, after = first.optimizer.param_groups[0], second.optimizer.param_groups[0]
    assert all(after[name] == before[name] for name in ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k"))
    assert before["d"] > before["d0"] == 1e-6, "it has grown"
    assert (after["d_coef"], after["lr"]) == (0.5, 0.2)


def test_the_state_of_another_class_of_optimizer_is_left_out_and_other_weights_are_refused(tmp_path: Path) -> None:
    checkpoints, one, other = Checkpoints(tmp_path, keep=2), Run("torch.optim.AdamW"), Run("torch.optim.SGD")
    one.steps(0, 2)
    one.save(checkpoints, 2)
    other.restore(checkpoints)
    assert all(map(torch.equal, one.weights, other.weights))
    assert not other.optimizer.state
    with pytest.raises(UserError, match=r"1 weights of .* do not fit .* 2.bias: \(3,\) there, None here"):
        Run("torch.optim.Muon").restore(checkpoints)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    checkpoints, run = Checkpoints(tmp_path, keep=2), Run("torch.optim.AdamW")
    run.save(checkpoints, 5)
    with torch.no_grad():
        run.parameters["2.bias"][1] = float("nan")
    with pytest.raises(WorkError, match=r"step 6: the weights are not finite"):
        run.save(checkpoints, 6)
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_a_file_that_the_system_refuses_is_one_line_with_path_and_bytes(tmp_path: Path) -> None:
    checkpoints, run = Checkpoints(tmp_path, keep=2), Run("torch.optim.AdamW")
    run.save(checkpoints, 2)
    with longest_file(10_000), pytest.raises(WorkError) as caught:
        run.save(checkpoints, 3)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}: the checkpoint of step 3 needs 17,164 bytes and could not be written (")
    assert "File too large" in line
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_other_block_sizes_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    first = Run("torchao.optim.AdamW8bit")
    first.steps(0, 1)
    first.save(checkpoints, 1)
    with pytest.raises(UserError, match=r"optimizer.init_args: the checkpoint's exp_avg.scale has the shape \(16,\)"):
        Run("torchao.optim.AdamW8bit", block_size=128).restore(checkpoints)


@pytest.mark.parametrize("class_path", ["torch.optim.AdamW", "torch.optim.SGD"])
def test_the_average_is_diffusers_own_and_the_weights_come_back(class_path: str) -> None:
    run = Run(class_path, decay=0.7)
    theirs = EMAModel(run.model.parameters(), decay=0.7)
    assert all(map(torch.equal, run.average, run.weights)), "before the first update there is nothing to average"
    for step in range(6):
        run.steps(step, step + 1)
        theirs.step(run.model.parameters())
        for ours, other in zip(run.average, theirs.shadow_params, strict=True):
            assert torch.allclose(ours, other, rtol=1e-6, atol=1e-7)  # theirs rounds once more in the first update
    assert not any(map(torch.equal, run.average, run.weights))
    before = run.weights
    with pytest.raises(ZeroDivisionError), run.ema.averaged():  # type: ignore[union-attr]
        raise ZeroDivisionError
    assert all(map(torch.equal, run.weights, before))


@pytest.mark.parametrize("class_path", ["torch.optim.SGD", "torchao.optim.AdamW8bit"])  # its rate is a tensor
@pytest.mark.parametrize("scheduler_type", SCHEDULERS)
def test_the_rate_of_a_step_is_the_one_that_stepping_gives(scheduler_type: str, class_path: str) -> None:
    warmup = 0 if scheduler_type == "constant" else 3
    stepping, ours = Run(class_path, lr=0.3).optimizer, Run(class_path, lr=0.3).optimizer
    theirs = get_scheduler(scheduler_type, stepping, num_warmup_steps=warmup, num_training_steps=12)
    schedule = Schedule(ours, scheduler_type=scheduler_type, warmup_steps=warmup, max_train_steps=12)
    rates = []
    for _ in range(12):
        rates.append(float(stepping.param_groups[0]["lr"]))
        stepping.step()
        theirs.step()
    assert warmup == 0 or rates[0] == 0
    for step in (7, 0, 11, *range(12)):  # in any order: a resume begins in the middle
        assert schedule.set(step) == float(ours.param_groups[0]["lr"]) == rates[step]
        assert isinstance(ours.param_groups[0]["lr"], Tensor) is ("torchao" in class_path)


@pytest.mark.parametrize(
    ("class_path", "init_args", "messages"),
    [
        ("torch.optim.AdamV", {}, ["class_path: torch.optim.AdamV cannot be imported"]),
        ("bitsandbytes.optim.AdamW8bit", {}, ["class_path: .*: pip install bitsandbytes$"]),  # is for CUDA
        ("torch.nn.Linear", {}, ["class_path: torch.nn.Linear is no torch optimizer"]),
        ("torch.optim.Optimizer", {}, ["init_args: Optimizer refuses them"]),
        (
            "torch.optim.AdamW",
            {"learning_rate": 1.0, "lr": 1e-3, "beta": 2},
            ["init_args.learning_rate: AdamW does not take it; it takes: lr, betas", "init_args.beta: AdamW"],
        ),
        ("torch.optim.AdamW", {"lr": 1e-3, "betas": [0.9, 1.5]}, ["init_args: AdamW refuses them: Invalid beta"]),
        ("torch.optim.AdamW", {"betas": [0.9]}, ["init_args: AdamW refuses them: list index out of range; correct"]),
        ("torch.optim.AdamW", {"fused": True, "foreach": True}, ["init_args: AdamW refuses them: `fused` and"]),
        (f"{THIS}.Open", {"speed": -1.0}, ["init_args: Open refuses them: Invalid learning rate"]),  # takes any name
    ],
)
def test_a_wrong_class_or_argument_is_one_line_each(
    class_path: str, init_args: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        optimizer_class(class_path, init_args)
    assert len(caught.value.messages) == len(messages)
    for line, message in zip(caught.value.messages, messages, strict=True):
        assert re.match(f"optimizer.{message}", line), line


def test_what_cannot_step_or_be_split_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match=r"^optimizer.class_path: Stuck cannot step on cpu \(RuntimeError: no kernel\)"):
        check_step(Stuck, "Stuck", {"lr": 1.0}, device=CPU, split=False)
    for class_path, arguments in MEMORY_SAVING.items():
        kind = optimizer_class(class_path, arguments)
        check_step(kind, class_path, arguments, device=CPU, split=False)
        with pytest.raises(UserError, match=rf"{class_path} with train.parallel: fsdp2: its state '\w+' cannot be"):
            check_step(kind, class_path, arguments, device=CPU, split=True)
    for name in ("AdamW", "SGD", "Adafactor"):
        check_step(getattr(torch.optim, name), name, {"lr": 1.0}, device=CPU, split=True)


def test_adam_updates_in_one_kernel_on_cuda_and_takes_no_copy_of_what_trains() -> None:
    """Counted with the CPU's kernel of the same name. On a CPU torch's default is left, which copies three tensors."""
    parameters = [nn.Parameter(torch.ones(8, 8)) for _ in range(10)]
    taken = {}
    for device, arguments in ((CUDA, {}), (CUDA, {"foreach": True}), (CPU, {})):
        optimizer = make_optimizer("torch.optim.AdamW", arguments, parameters, device=device)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # its state is there from now on
        group = optimizer.param_groups[0]
        peak = peak_of(optimizer.step) // parameters[0].nbytes
        taken[device.type, bool(group["fused"]), bool(group["foreach"])] = peak
    assert taken == {("cuda", True, False): 0, ("cuda", False, True): 10, ("cpu", False, False): 3}
    assert not make_optimizer("torch.optim.SGD", {"lr": 1.0}, parameters, device=CUDA).param_groups[0]["fused"]
