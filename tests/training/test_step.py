"""One step of the tiny pipeline's transformer: however it is split, loss, gradients and update stay the same."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mixres.batch import Batch, FlowSample
from mixres.data.collate import collate
from mixres.data.plan import Layout, Plan
from mixres.diffusion.flow_matching import make_flow_sample
from mixres.diffusion.objective import Objective, sigma_weights
from mixres.errors import WorkError
from mixres.models.lora import trainable_parameters
from mixres.models.qwen.edit import QwenImageEdit
from mixres.training.step import StepResult, run_step
from support.steps import (
    ALONE,
    LAYOUTS,
    SPLITS,
    WHOLE,
    build_objective,
    divisor_of,
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
            batch,
            seed=0,
            step=0,
            timesteps=objective.timesteps,
            constants=objective.shift_constants,
            dtype=torch.float32,
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
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        planned = plan.step(step)
        batches = [microbatch(m.indices, layout) for m in planned.ranks[0]]
        result = run_step(
            accelerator, model, optimizer, objective, batches, count=len(batches), step=step,
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


class Planted(Objective):
    """An objective with a bug: `slots` are the rows of a padded batch that enter the loss, here the right ones."""

    def slots(self, batch: Batch) -> list[Tensor]:
        return [torch.arange(n) for n in batch.target_lengths]

    def flow(self, batch: Batch, step: int) -> FlowSample:
        return make_flow_sample(
            batch, seed=self.seed, step=step, timesteps=self.timesteps, constants=self.shift_constants, dtype=self.dtype
        )

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Each sample's mean error over its slots; the target outside the target tokens is zero. No edit masks."""
        flow = self.flow(batch, step)
        velocity = self.predict_velocity(model, batch, flow.noisy_latents, flow.sigmas)
        wanted = torch.zeros_like(velocity).flatten(0, 1).index_copy(0, batch.target_index, flow.velocity)
        errors = (velocity - wanted.view_as(velocity)).square().mean(dim=-1)
        weights, slots = sigma_weights(flow.sigmas, self.weighting), self.slots(batch)
        return torch.stack([w * row[kept].mean() for w, row, kept in zip(weights, errors, slots, strict=True)]).sum()


class PaddingInTheLoss(Planted):
    def slots(self, batch: Batch) -> list[Tensor]:
        images = [sum(grid.tokens for grid in shapes) for shapes in batch.img_shapes]
        pairs = zip(batch.target_lengths, images, strict=True)
        return [torch.cat([torch.arange(n), torch.arange(image, batch.latents.shape[1])]) for n, image in pairs]


class ControlsInTheLoss(Planted):
    def slots(self, batch: Batch) -> list[Tensor]:
        return [torch.arange(sum(grid.tokens for grid in shapes)) for shapes in batch.img_shapes]


class LocalDivisor(Objective):
    """Each microbatch divides by what it holds itself; the step then averages over microbatches."""

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        return super().loss_sum(model, batch, step) / self.divisor(len(batch.names), sum(batch.target_lengths))


class MasksInTheDivisor(Objective):
    """A weighted mean over tokens, so that a mask's weights are divided out again."""

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        weights = torch.lerp(torch.tensor(self.background), torch.tensor(self.foreground), batch.edit_mask)
        return super().loss_sum(model, batch, step) / weights.mean()


def planted_error(
    accelerator: Accelerator, model: nn.Module, right: Objective, kind: type, split: str, divisor: int | None = None
) -> float:
    """How far the gradients of a step with the bug are from those of the samples one by one."""
    planted = kind(**{field.name: getattr(right, field.name) for field in fields(right)})
    reference = record(accelerator, model, right, microbatches(ALONE, "padded"))
    return gradient_error(
        record(accelerator, model, planted, microbatches(SPLITS[split], "padded"), divisor), reference
    )


@pytest.mark.parametrize(("kind", "seen"), [(Planted, False), (PaddingInTheLoss, True), (ControlsInTheLoss, True)])
def test_padding_or_controls_in_the_loss_would_be_seen(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module], kind: type, seen: bool
) -> None:
    right = replace(build_objective("sample", torch.float32), foreground=1.0, background=1.0)
    for split in ("whole", "pairs"):
        assert (planted_error(accelerator, models[torch.float32], right, kind, split) > 1e-3) is seen


def test_a_wrong_divisor_would_be_seen(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module], normalization: Any
) -> None:
    model, right = models[torch.float32], build_objective(normalization, torch.float32)
    assert planted_error(accelerator, model, right, LocalDivisor, "whole", 1) <= 1e-5, "right in one microbatch"
    assert planted_error(accelerator, model, right, LocalDivisor, "uneven", 3) > 1e-3
    assert planted_error(accelerator, model, right, MasksInTheDivisor, "uneven") > 1e-3


def step_once(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batches: list[Batch]
) -> tuple[StepResult, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    result = run_step(
        accelerator, model, optimizer, objective, batches,
        count=len(batches), step=5, divisor=divisor_of(objective), max_grad_norm=1.0,
    )  # fmt: skip
    return result, optimizer


@pytest.mark.parametrize(("where", "value"), [("target_latents", math.nan), ("prompt_embeds", math.inf)])
def test_a_loss_that_is_not_finite_names_the_samples_and_updates_nothing(
    accelerator: Accelerator, tiny_base: Path, where: str, value: float
) -> None:
    model, objective = make_model(tiny_base, torch.float32), build_objective("sample", torch.float32)
    hurt = replace(make_sample(1), **{where: torch.full_like(getattr(make_sample(1), where), value)})
    bad = collate([make_sample(0), hurt], indices=[0, 1], weights=[1.0, 1.0], layout="packed")
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    result, optimizer = step_once(accelerator, model, objective, [microbatch([2, 3], "packed"), bad])
    assert result.skipped == tuple(make_sample(i).name for i in (0, 1)), "those beside it in the microbatch, no others"
    assert not math.isfinite(result.loss)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainable_parameters(model).items())
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_a_skipped_step(
    accelerator: Accelerator, tiny_base: Path
) -> None:
    model, objective = make_model(tiny_base, torch.float32), build_objective("sample", torch.float32)
    hurt = next(iter(trainable_parameters(model).values()))
    hurt.register_hook(lambda gradient: gradient * math.inf)
    before = hurt.detach().clone()
    result, _ = step_once(accelerator, model, objective, microbatches(SPLITS["uneven"], "packed"))
    assert math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert sorted(result.skipped) == sorted(make_sample(i).name for i in range(6)), "any of them may be to blame"
    assert torch.equal(hurt, before)


class Endless(Objective):
    """Its loss is not finite, its gradients are."""

    def loss_sum(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        return super().loss_sum(model, batch, step) + math.inf


def test_a_loss_that_is_not_finite_over_finite_gradients_is_a_skipped_step(
    accelerator: Accelerator, models: dict[torch.dtype, nn.Module]
) -> None:
    objective = build_objective("sample", torch.float32, Endless)
    result, _ = step_once(accelerator, models[torch.float32], objective, microbatches([[0, 1]], "packed"))
    assert math.isfinite(result.grad_norm)
    assert result.skipped == (make_sample(0).name, make_sample(1).name)


def test_a_device_without_room_names_the_microbatch(accelerator: Accelerator, tiny_base: Path) -> None:
    def no_room(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    objective = replace(build_objective("sample", torch.float32), predict_velocity=no_room)
    with pytest.raises(WorkError) as caught:
        step_once(accelerator, make_model(tiny_base, torch.float32), objective, microbatches([[0, 1]], "packed"))
    message = str(caught.value)
    assert message.startswith("step 6: cpu is out of memory with 123 tokens in one microbatch (in tokens: ")
    assert f"{make_sample(0).name} 6x9 + 4x4; {make_sample(1).name} 8x5)" in message
    assert "batch.max_tokens" in message
