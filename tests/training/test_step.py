"""One step of the tiny pipeline's transformer: however it is split, loss, gradients and update stay the same."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mixres.batch import Batch
from mixres.data.collate import collate
from mixres.diffusion.objective import Objective
from mixres.errors import WorkError
from mixres.models.lora import trainable_parameters
from mixres.training import trainer
from mixres.training.resume import Skips
from mixres.training.step import StepResult, run_step
from support import steps

BARS = [pytest.param(torch.float32, 1e-5, id="float32"), pytest.param(torch.float64, 1e-10, id="float64")]


@pytest.mark.parametrize(("dtype", "bar"), BARS)
@pytest.mark.parametrize("normalization", steps.NORMALIZATIONS)
def test_loss_and_gradients_do_not_change_with_the_split(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module], normalization: Any, dtype: torch.dtype, bar: float
) -> None:
    objective = steps.build_objective(normalization, dtype)
    alone = steps.microbatches(steps.ALONE, "padded")
    reference = steps.record(accelerator, models[dtype], objective, alone)
    norm = torch.stack([g.norm() for g in reference.gradients.values() if g is not None]).norm()
    assert reference.result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, split in steps.SPLITS.items():
        for layout in steps.LAYOUTS:
            batches = steps.microbatches(split, layout)
            found = steps.record(accelerator, models[dtype], objective, batches)
            assert found.result.loss == pytest.approx(reference.result.loss, rel=bar / 10), (name, layout)
            assert found.result.grad_norm == pytest.approx(reference.result.grad_norm, rel=bar), (name, layout)
            assert steps.gradient_error(found, reference) <= bar, (name, layout)
            assert found.result.tokens == reference.result.tokens
            assert found.result.tokens_computed == sum(batch.tokens_computed for batch in batches)
    half = steps.record(accelerator, models[dtype], objective, alone, clip=float(norm) / 2).gradients
    assert all(torch.allclose(2 * half[name], g, rtol=1e-4) for name, g in reference.gradients.items()), "clipped once"


def step_once(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batches: list[Batch]
) -> tuple[StepResult, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    result = run_step(
        accelerator, model, optimizer, objective, batches,
        count=len(batches), step=5, divisor=steps.divisor_of(objective), max_grad_norm=1.0,
    )  # fmt: skip
    return result, optimizer


@pytest.mark.parametrize(("where", "value"), [("target_latents", math.nan), ("prompt_embeds", math.inf)])
def test_a_loss_that_is_not_finite_names_the_samples_and_updates_nothing(
    accelerator: Accelerator, tiny_base: Path, where: str, value: float
) -> None:
    model, objective = steps.make_model(tiny_base, torch.float32), steps.build_objective("sample", torch.float32)
    hurt = replace(steps.make_sample(1), **{where: torch.full_like(getattr(steps.make_sample(1), where), value)})
    bad = collate([steps.make_sample(0), hurt], indices=[0, 1], weights=[1.0, 1.0], layout="packed")
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    result, optimizer = step_once(accelerator, model, objective, [steps.microbatch([2, 3], "packed"), bad])
    names = tuple(steps.make_sample(i).name for i in (0, 1))
    assert result.skipped == names, "those beside it in the microbatch, no others"
    assert not math.isfinite(result.loss)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainable_parameters(model).items())
    assert not optimizer.state


class Endless(Objective):
    """Its loss is not finite, its gradients are."""

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        return super().loss_sum(model, batch, step) + math.inf


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_a_gradient_alone_that_is_not_finite_is_a_skipped_step(
    accelerator: Accelerator, tiny_base: Path, where: str
) -> None:
    model = steps.make_model(tiny_base, torch.float32)
    objective = steps.build_objective("sample", torch.float32, Endless if where == "loss" else Objective)
    hurt = next(iter(trainable_parameters(model).values()))
    if where == "gradient":
        hurt.register_hook(lambda gradient: gradient * math.inf)
    before = hurt.detach().clone()
    result, _ = step_once(accelerator, model, objective, steps.microbatches(steps.SPLITS["uneven"], "packed"))
    assert (math.isfinite(result.loss), math.isfinite(result.grad_norm)) == (where != "loss", where != "gradient")
    assert sorted(result.skipped) == sorted(steps.make_sample(i).name for i in range(6)), "any of them may be to blame"
    assert torch.equal(hurt, before)


def test_skips_in_a_row_end_the_run_once_they_are_too_many() -> None:
    skipped, skips = StepResult(math.nan, 1.0, 6, 6, stopping=False, skipped=("a.png", "b.png")), Skips(5, 2)
    for skip in (False, True, True):
        skips.count(skip)
        trainer._log_skip(skipped, 8, skips, 2, is_main=True)
    skips.count(True)
    with pytest.raises(WorkError, match=r"step 9: .* 3 steps in a row are more than .*max_skips = 2;.* a.png, b.png"):
        trainer._log_skip(skipped, 9, skips, 2, is_main=True)
    assert skips.total == 8


def test_a_device_without_room_names_the_microbatch(accelerator: Accelerator, tiny_base: Path) -> None:
    def no_room(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    objective = replace(steps.build_objective("sample", torch.float32), predict_velocity=no_room)
    model, batches = steps.make_model(tiny_base, torch.float32), steps.microbatches([[0, 1]], "packed")
    with pytest.raises(WorkError) as caught:
        step_once(accelerator, model, objective, batches)
    message = str(caught.value)
    assert message.startswith("step 6: cpu is out of memory with 123 tokens in one microbatch (in tokens: ")
    assert f"{steps.make_sample(0).name} 6x9 + 4x4; {steps.make_sample(1).name} 8x5)" in message
