"""8-bit optimizers and Prodigy through real checkpoints: what their state takes, and that a resumed run is the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixres.errors import UserError
from mixres.training.checkpoint import Checkpoints
from mixres.training.ema import Ema
from mixres.training.optimizer import check_step, optimizer_class, optimizer_tensors
from mixres.training.resume import restore_run, save_run

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "prodigyopt.Prodigy": {"lr": 1.0, "d0": 1e-6, "use_bias_correction": True},
    "torchao.optim.AdamW8bit": {"lr": 1e-2},
    "torchao.optim.AdamW4bit": {"lr": 1e-2},
    "torchao.optim.AdamWFp8": {"lr": 1e-2},
}
WIDTH = 64  # a matrix of 4096 numbers, the fewest that are quantised
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """torchao compiles its update, which takes a minute: here it runs as it is written. The slow tier compiles it."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Run:
    """A small model whose first matrix is quantised, and whose second, with half of it zeros, is not."""

    def __init__(
        self, class_path: str, checkpoints: Checkpoints, *, ema: bool, device: str = "cpu", **arguments: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 3))
        nn.init.zeros_(self.model[2].weight)  # as B of an adapter
        self.device = device
        self.model.to(device)
        arguments = OPTIMIZERS.get(class_path, {"lr": 1e-2}) | arguments
        self.kind, self.checkpoints = class_path, checkpoints
        self.optimizer = optimizer_class(class_path, arguments)(self.model.parameters(), **arguments)
        self.ema = Ema(self.optimizer, 0.7) if ema else None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            data = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step))
            torch.autograd.backward((self.model(data.to(self.device)) - 1).square().sum())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, step: int) -> None:
        state = {"frozen": {"optimizer.class_path": self.kind}}
        save_run(self.checkpoints, self.parameters, self.optimizer, step=step, state=state)

    def restore(self) -> None:
        checkpoint = self.checkpoints.newest_valid()
        assert checkpoint is not None
        restore_run(checkpoint, self.parameters, self.optimizer, kind=self.kind)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters.values()]

    def everything(self) -> dict[str, torch.Tensor]:
        """Weights, their average and the optimizer's state."""
        found = dict(optimizer_tensors(self.optimizer, self.parameters))
        found |= {f"weight {number}": tensor for number, tensor in enumerate(self.weights())}
        if self.ema is not None:
            with self.ema.averaged():
                found |= {f"average {number}": tensor for number, tensor in enumerate(self.weights())}
        return found


def differing(one: Run, other: Run) -> list[str]:
    ours, theirs = one.everything(), other.everything()
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("class_path", OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(class_path: str, ema: bool, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    unbroken, first, second = (Run(class_path, checkpoints, ema=ema) for _ in range(3))
    unbroken.steps(0, 7)
    first.steps(0, 4)
    first.save(4)
    assert {file.suffix for file in (tmp_path / "checkpoints" / "step-00000004").iterdir()} == {".safetensors", ".json"}
    with torch.no_grad():
        for parameter in second.parameters.values():
            parameter.add_(1)  # nothing of the new run's own beginning may stay
    second.restore()
    assert differing(second, first) == []
    second.steps(4, 7)
    assert differing(second, unbroken) == []
    assert not any(torch.equal(a, b) for a, b in zip(unbroken.weights(), first.weights(), strict=True))


def test_prodigy_goes_on_with_its_estimate(tmp_path: Path) -> None:
    """Its distance d lives in the group, beside what arguments set; those are the new configuration's."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    first = Run("prodigyopt.Prodigy", checkpoints, ema=False)
    first.steps(0, 15)
    first.save(15)
    second = Run("prodigyopt.Prodigy", checkpoints, ema=False, d_coef=0.5)
    second.restore()
    before, after = first.optimizer.param_groups[0], second.optimizer.param_groups[0]
    names = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert before["d"] > before["d0"] == 1e-6, "it has grown"
    assert (before["k"], after["d_coef"]) == (15, 0.5)


def test_bytes_of_the_state(tmp_path: Path) -> None:
    """The table of docs/settings.md, for the matrix of 4096 numbers."""
    found = {}
    for class_path, arguments in {**OPTIMIZERS, "torch.optim.AdamW": {"lr": 1e-2}}.items():
        matrix = nn.Parameter(torch.ones(WIDTH, WIDTH))
        optimizer = optimizer_class(class_path, arguments)([matrix], **arguments)
        matrix.grad = torch.ones_like(matrix)
        optimizer.step()
        found[class_path.rpartition(".")[2]] = sum(
            t.nbytes for t in optimizer_tensors(optimizer, ["m"]).values() if t.dim()
        )
    numbers, maps = WIDTH * WIDTH, 256 * 4
    assert found == {
        "AdamW": numbers * 8,
        "Prodigy": numbers * 16,
        "AdamW8bit": 2 * (numbers + numbers // 256 * 4 + maps),
        "AdamWFp8": 2 * (numbers + numbers // 256 * 4),
        "AdamW4bit": 2 * (numbers // 2 + numbers // 128 * 4 + 16 * 4),
    }


def test_other_block_sizes_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    first = Run("torchao.optim.AdamW8bit", checkpoints, ema=False)
    first.steps(0, 1)
    first.save(1)
    with pytest.raises(UserError, match=r"optimizer.init_args: the checkpoint's exp_avg.scale has the shape \(16,\)"):
        Run("torchao.optim.AdamW8bit", checkpoints, ema=False, block_size=128).restore()


class Stuck(torch.optim.SGD):
    """An optimizer whose kernel is not there."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("no kernel\nfor this device")


def test_what_cannot_step_or_be_split_is_refused_at_the_start() -> None:
    with pytest.raises(
        UserError, match=r"optimizer.class_path: x.Stuck cannot step on cpu \(RuntimeError: no kernel\)"
    ):
        check_step(Stuck, "x.Stuck", {"lr": 1.0}, device=CPU, split=False)
    with pytest.raises(UserError, match=r"torch.optim.LBFGS cannot step on cpu"):
        check_step(torch.optim.LBFGS, "torch.optim.LBFGS", {}, device=CPU, split=False)
    for class_path, arguments in OPTIMIZERS.items():
        kind = optimizer_class(class_path, arguments)
        check_step(kind, class_path, arguments, device=CPU, split=False)
        with pytest.raises(
            UserError, match=rf"{class_path} with train.parallel: fsdp2: its state '\w+' cannot be split"
        ):
            check_step(kind, class_path, arguments, device=CPU, split=True)
    for name in ("AdamW", "SGD", "Adafactor"):
        check_step(getattr(torch.optim, name), name, {"lr": 1.0}, device=CPU, split=True)


def test_a_package_that_is_not_installed_is_named_with_its_command() -> None:
    """bitsandbytes is not among the packages of the tests: it is for CUDA."""
    with pytest.raises(UserError) as caught:
        optimizer_class("bitsandbytes.optim.AdamW8bit", {})
    (line,) = caught.value.messages
    assert line.startswith("optimizer.class_path: bitsandbytes.optim.AdamW8bit cannot be imported")
    assert line.endswith(": pip install bitsandbytes")


@pytest.mark.gpu
def test_bitsandbytes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    class_path = "bitsandbytes.optim.AdamW8bit"
    unbroken, first, second = (Run(class_path, checkpoints, ema=True, device="cuda") for _ in range(3))
    unbroken.steps(0, 7)
    first.steps(0, 4)
    first.save(4)
    second.restore()
    second.steps(4, 7)
    assert differing(second, unbroken) == []
