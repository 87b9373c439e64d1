"""One step of the tiny pipeline's transformer: however it is split, loss, gradients and update stay the same."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mixres.batch import Batch, FlowSample
from mixres.data.collate import collate
from mixres.data.plan import Layout, Plan
from mixres.diffusion.flow_matching import make_flow_sample
from mixres.diffusion.loss import velocity_loss
from mixres.errors import WorkError
from mixres.models.lora import trainable_parameters
from mixres.models.qwen.edit import QwenImageEdit
from mixres.training.step import Objective, run_step
from support.steps import (
    ALONE,
    LAYOUTS,
    SPLITS,
    WHOLE,
    build_objective,
    gradient_error,
    lengths_of,
    make_model,
    make_sample,
    microbatch,
    microbatches,
    record,
)

BARS = [pytest.param(torch.float32, 1e-5, id="float32"), pytest.param(torch.float64, 1e-10, id="float64")]


@pytest.mark.parametrize(("dtype", "bar"), BARS)
def test_loss_and_gradients_do_not_change_with_the_split(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module], normalization: Any, dtype: torch.dtype, bar: float
) -> None:
    objective = build_objective(normalization, dtype)
    reference = record(accelerator, models[dtype], objective, microbatches(ALONE, "padded"))
    norm = torch.stack([g.norm() for g in reference.gradients.values() if g is not None]).norm()
    assert reference.result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, split in SPLITS.items():
        for layout in LAYOUTS:
            batches = microbatches(split, layout)
            found = record(accelerator, models[dtype], objective, batches)
            assert found.result.loss == pytest.approx(reference.result.loss, rel=bar / 10), (name, layout)
            assert found.result.grad_norm == pytest.approx(reference.result.grad_norm, rel=bar), (name, layout)
            assert gradient_error(found, reference) <= bar, (name, layout)
            assert found.result.tokens == reference.result.tokens
            assert found.result.tokens_computed == sum(batch.tokens_computed for batch in batches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_gives_each_sample_the_velocity_and_the_loss_it_has_alone(
    models: dict[torch.dtype, nn.Module], normalization: Any, layout: Layout
) -> None:
    objective, model = build_objective(normalization, torch.float32), models[torch.float32]

    def velocities(batch: Batch) -> tuple[Tensor, ...]:
        flow = make_flow_sample(
            batch, seed=0, step=0, levels=objective.levels, constants=objective.shift_constants, dtype=torch.float32
        )
        velocity = QwenImageEdit("").predict_velocity(model, batch, flow.noisy_latents, flow.sigmas)
        return velocity.flatten(0, 1)[batch.target_index].split(list(batch.target_lengths))

    with torch.no_grad():
        batched = velocities(microbatch(WHOLE[0], layout))
        for together, i in zip(batched, WHOLE[0], strict=True):
            (alone,) = velocities(microbatch([i], layout))
            assert float((together - alone).norm() / alone.norm()) <= 1e-6
        losses = torch.stack([objective.loss_sum(model, microbatch([i], layout), 3) for i in WHOLE[0]])
        total = objective.loss_sum(model, microbatch(WHOLE[0], layout), 3)
    assert float(total) == pytest.approx(float(losses.sum()), rel=1e-6)
    assert losses.min() > 0.1  # every sample has its part in the sum


def trained(accelerator: Accelerator, base: Path, normalization: Any, max_tokens: int, layout: Layout) -> list[Tensor]:
    """Parameters after 4 clipped AdamW steps over planned microbatches: one epoch and a half, a short step between."""
    model, objective = make_model(base, torch.float64), build_objective(normalization, torch.float64)
    plan = Plan(
        [lengths_of(i) for i in range(6)], names=list("abcdef"), seed=2, samples_per_step=4,
        max_tokens=max_tokens, layout=layout,
    )  # fmt: skip
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        planned = plan.step(step)
        batches = [microbatch(m.indices, layout) for m in planned.ranks[0]]
        result = run_step(
            accelerator, model, optimizer, scheduler, objective, batches, count=len(batches), step=step,
            divisor=objective.divisor(planned.samples, planned.target_tokens), max_grad_norm=0.05,
        )  # fmt: skip
        assert result.grad_norm > 0.05
        assert all(parameter.grad is None for parameter in parameters)
    return [parameter.detach() for parameter in parameters]


def test_updates_do_not_change_with_budget_and_layout(
    accelerator: Accelerator, tiny_base: Path, normalization: Any
) -> None:
    longest = max(lengths_of(i).total for i in range(6))
    one, *others = (
        torch.cat([p.flatten() for p in trained(accelerator, tiny_base, normalization, max_tokens, layout)])
        for max_tokens, layout in ((10**6, "padded"), (longest, "padded"), (10**6, "packed"), (200, "packed"))
    )
    start = torch.cat(
        [p.detach().flatten() for p in trainable_parameters(make_model(tiny_base, torch.float64)).values()]
    )
    assert float((one - start).norm() / start.norm()) > 1e-2
    assert max(float((other - one).norm() / one.norm()) for other in others) <= 1e-10


def mean_over(velocity: Tensor, batch: Batch, flow: FlowSample, slots: list[Tensor]) -> Tensor:
    """Each sample's mean error over `slots` of its row in a padded batch; the velocity outside the target is zero."""
    wanted = torch.zeros_like(velocity).flatten(0, 1).index_copy(0, batch.target_index, flow.velocity)
    errors = (velocity - wanted.view_as(velocity)).square().mean(dim=-1)
    return torch.stack([w * row[kept].mean() for w, row, kept in zip(flow.weights, errors, slots, strict=True)]).sum()


class Plain(Objective):
    """The loss without masks, so that it is written in a line; the planted problems below differ in the slots alone."""

    def slots(self, batch: Batch) -> list[Tensor]:
        return [torch.arange(n) for n in batch.target_lengths]

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        flow = make_flow_sample(
            batch, seed=self.seed, step=step, levels=self.levels, constants=self.shift_constants, dtype=self.dtype
        )
        velocity = self.predict_velocity(model, batch, flow.noisy_latents, flow.sigmas)
        return mean_over(velocity, batch, flow, self.slots(batch))


class PaddingInTheLoss(Plain):
    def slots(self, batch: Batch) -> list[Tensor]:
        images = [sum(grid.tokens for grid in shapes) for shapes in batch.img_shapes]
        pairs = zip(batch.target_lengths, images, strict=True)
        return [torch.cat([torch.arange(n), torch.arange(image, batch.latents.shape[1])]) for n, image in pairs]


class ControlsInTheLoss(Plain):
    def slots(self, batch: Batch) -> list[Tensor]:
        return [torch.arange(sum(grid.tokens for grid in shapes)) for shapes in batch.img_shapes]


class LocalCount(Objective):
    """Each microbatch divides by what it holds itself; the step then averages over microbatches."""

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        flow = make_flow_sample(
            batch, seed=self.seed, step=step, levels=self.levels, constants=self.shift_constants, dtype=self.dtype
        )
        velocity = self.predict_velocity(model, batch, flow.noisy_latents, flow.sigmas)
        loss = velocity_loss(
            velocity, batch, flow, normalization=self.normalization, foreground=3.0, background=0.5
        )  # fmt: skip
        return loss.total / loss.count


@pytest.mark.parametrize("problem", [None, PaddingInTheLoss, ControlsInTheLoss])
def test_padding_or_controls_in_the_loss_would_be_seen(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module], problem: type[Plain] | None
) -> None:
    model = models[torch.float32]
    right = replace(build_objective("sample", torch.float32), foreground=1.0, background=1.0)
    reference = record(accelerator, model, right, microbatches(ALONE, "padded"))
    planted = build_objective("sample", torch.float32, problem or Plain)
    for name in ("whole", "pairs"):
        found = record(accelerator, model, planted, microbatches(SPLITS[name], "padded"))
        assert (gradient_error(found, reference) > 1e-3) == (problem is not None)
        assert (abs(found.result.loss - reference.result.loss) > 1e-3) == (problem is not None)


def test_division_by_the_local_count_would_be_seen(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module], normalization: Any
) -> None:
    model = models[torch.float32]
    reference = record(accelerator, model, build_objective(normalization, torch.float32), microbatches(WHOLE, "packed"))
    planted = build_objective(normalization, torch.float32, LocalCount)
    whole = record(accelerator, model, planted, microbatches(WHOLE, "packed"), divisor=1)
    assert gradient_error(whole, reference) <= 1e-5  # in one microbatch it is right
    uneven = record(accelerator, model, planted, microbatches(SPLITS["uneven"], "packed"), divisor=3)
    assert gradient_error(uneven, reference) > 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["target_latents", "prompt_embeds"])
def test_a_loss_that_is_not_finite_names_the_samples_and_updates_nothing(
    accelerator: Accelerator, tiny_base: Path, where: str, value: float
) -> None:
    model, objective = make_model(tiny_base, torch.float32), build_objective("sample", torch.float32)
    hurt = replace(make_sample(1), **{where: torch.full_like(getattr(make_sample(1), where), value)})
    bad = collate([make_sample(0), hurt], indices=[0, 1], weights=[1.0, 1.0], layout="packed")
    batches = [microbatch([2, 3], "packed"), bad]
    parameters = trainable_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    result = run_step(
        accelerator, model, optimizer, scheduler, objective, batches, count=2, step=5, divisor=4, max_grad_norm=1.0
    )
    assert result.skipped == tuple(make_sample(i).name for i in (0, 1)), "those beside it in the microbatch, no others"
    assert not math.isfinite(result.loss)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert not optimizer.state
    assert scheduler.get_last_lr() == [5e-3], "the schedule is a function of the step"


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_a_step_left_out(
    accelerator: Accelerator, tiny_base: Path
) -> None:
    model, objective = make_model(tiny_base, torch.float32), build_objective("sample", torch.float32)
    parameters = trainable_parameters(model)
    hurt = next(iter(parameters.values()))
    hurt.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    before = hurt.detach().clone()
    result = run_step(
        accelerator, model, optimizer, LambdaLR(optimizer, lambda step: 1.0), objective,
        microbatches(SPLITS["uneven"], "packed"), count=3, step=5, divisor=6, max_grad_norm=1.0,
    )  # fmt: skip
    assert math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert sorted(result.skipped) == sorted(make_sample(i).name for i in range(6)), "any of them may be to blame"
    assert torch.equal(hurt, before)


def test_a_device_without_room_names_the_microbatch(accelerator: Accelerator, tiny_base: Path) -> None:
    def no_room(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = make_model(tiny_base, torch.float32)
    objective = replace(build_objective("sample", torch.float32), predict_velocity=no_room)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    with pytest.raises(WorkError) as caught:
        run_step(
            accelerator, model, optimizer, LambdaLR(optimizer, lambda step: 1.0), objective,
            microbatches([[0, 1]], "packed"), count=1, step=5, divisor=6, max_grad_norm=1.0,
        )  # fmt: skip
    message = str(caught.value)
    assert message.startswith("step 6: cpu is out of memory with 123 tokens in one microbatch (in tokens: ")
    assert f"{make_sample(0).name} 6x9 + 4x4; {make_sample(1).name} 8x5)" in message
    assert "batch.max_tokens" in message


class Endless(Objective):
    """Its loss is not finite, its gradients are."""

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        return super().loss_sum(model, batch, step) + math.inf


def test_a_loss_that_is_not_finite_over_finite_gradients_is_a_step_left_out(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module]
) -> None:
    objective = build_objective("sample", torch.float32, Endless)
    optimizer = torch.optim.SGD(trainable_parameters(models[torch.float32]).values(), lr=0.0)
    result = run_step(
        accelerator, models[torch.float32], optimizer, LambdaLR(optimizer, lambda step: 1.0), objective,
        microbatches([[0, 1]], "packed"), count=1, step=5, divisor=2, max_grad_norm=1.0,
    )  # fmt: skip
    assert math.isfinite(result.grad_norm)
    assert result.skipped == (make_sample(0).name, make_sample(1).name)
