"""A patched model that trains and samples in turns gives each call what a fresh model gives it, bit for bit."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mixres.batch import TextEmbeds
from mixres.data.collate import collate
from mixres.data.plan import Layout
from mixres.geometry import Grid, Size
from mixres.models.family import Family
from mixres.models.lora import trainable_parameters
from mixres.training.denoising import image_inputs, make_images
from support.family_cases import EVERY_CASE, FamilyCase
from support.samples import make_sample
from support.steps import with_adapters

Values = list[Tensor]
TARGETS, TEXTS = [Grid(1, 6, 9), Grid(1, 8, 5), Grid(1, 10, 6)], [9, 4, 6]
CONTROLS = [Grid(1, 4, 4), Grid(1, 7, 6), Grid(1, 6, 10)]


@dataclass(frozen=True)
class Patched:
    """The stock pipeline around a patched transformer with adapters on every linear layer, set to train."""

    case: FamilyCase
    family: Family
    pipeline: Any


def patched(case: FamilyCase, base: Path) -> Patched:
    family = case.at(base)
    model: Any = family.load_transformer(dtype=torch.float32, device="cpu")
    layers = {"target_modules": ["all"], "presets": family.lora_presets, "untrained": family.untrained_modules(model)}
    model = with_adapters(model, **layers).train()
    return Patched(case, family, family.load_sampling_pipeline(transformer=model, dtype=torch.float32, device="cpu"))


def train(made: Patched, numbers: list[int], layout: Layout, checkpointing: bool = False) -> Values:
    """Velocity and gradients of one microbatch."""
    family, model = made.family, made.pipeline.transformer
    channels, text_width = family.token_widths()
    widths = {"channels": channels, "text_width": text_width, "pooled": family.pooled_width(), "dtype": torch.float32}
    grids = [(TARGETS[n], *CONTROLS[: made.case.controls[n]]) for n in range(3)]
    samples = [make_sample(grids[n], text=TEXTS[n], seed=n, **widths) for n in numbers]
    batch = collate(samples, indices=numbers, weights=[1.0] * len(numbers), layout=layout)
    if checkpointing:
        model.enable_gradient_checkpointing()
    sigmas = torch.tensor([0.2, 0.9, 0.7])[numbers]
    guidance = 1 + sigmas if family.embedded_guidance() else None
    velocity = family.predict_velocity(model, batch, batch.latents, sigmas, guidance)
    velocity.flatten(0, 1)[batch.target_index].square().mean().backward()
    model.disable_gradient_checkpointing()
    gradients = [p.grad.clone() for p in trainable_parameters(model).values() if p.grad is not None]
    assert gradients and all(gradient.any() for gradient in gradients)
    model.zero_grad(set_to_none=True)
    return [velocity.detach(), *gradients]


def sample(made: Patched, size: Size) -> Values:
    """What the transformer predicts in each denoising step, and the image."""
    seen: Values = []

    def keep(module: nn.Module, args: object, output: Sequence[Any]) -> None:
        assert not module.training, "dropout is off"
        seen.append(torch.cat([part.flatten() for part in output[0]]))  # a tensor, or a list of images

    handle = made.pipeline.transformer.register_forward_hook(keep)
    draw = torch.Generator().manual_seed(7)
    controls = [
        Image.fromarray((torch.rand(96, 64, 3, generator=draw) * 255).byte().numpy())
        for _ in range(max(made.case.controls))
    ]
    width = made.family.pooled_width()
    pooled = torch.randn(width, generator=draw) if width else None
    text = TextEmbeds(torch.randn(11, made.family.token_widths()[1], generator=draw), pooled)
    sizes = made.case.sizes(size, controls)
    given = image_inputs(made.family, made.pipeline, controls=controls, text=text, size=size, sizes=sizes, seed=1)
    (image,) = make_images(made.family, made.pipeline, [given], steps=2)
    handle.remove()
    assert len(seen) == 2 and made.pipeline.transformer.training
    return [*seen, torch.from_numpy(np.array(image))]


CALLS: dict[str, Callable[[Patched], Values]] = {
    "padded": lambda made: train(made, [0, 1, 2], "padded"),
    "padded, checkpointed": lambda made: train(made, [2, 0], "padded", checkpointing=True),
    "packed": lambda made: train(made, [0, 1, 2], "packed"),
    "packed, checkpointed": lambda made: train(made, [1, 2], "packed", checkpointing=True),
    "single": lambda made: train(made, [1], "padded"),
    "single, packed": lambda made: train(made, [1], "packed"),
    "sampling, wide": lambda made: sample(made, Size(112, 48)),
    "sampling, tall": lambda made: sample(made, Size(48, 80)),
}


@pytest.mark.parametrize(
    "name",
    ["qwen_image_edit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux2_dev", "flux_kontext", "z_image"))],
)
def test_training_and_sampling_in_any_order_give_the_values_of_a_fresh_model(
    name: str, base_of: Callable[[FamilyCase], Path]
) -> None:
    case, base = EVERY_CASE[name], base_of(EVERY_CASE[name])
    fresh = {call: act(patched(case, base)) for call, act in CALLS.items()}  # on a model that has done nothing else
    for seed in range(2):
        made, order = patched(case, base), [*CALLS, *CALLS]
        random.Random(seed).shuffle(order)
        for call in order:
            found = CALLS[call](made)
            for place, (here, there) in enumerate(zip(found, fresh[call], strict=True)):
                assert torch.equal(here, there), (order, call, place)
