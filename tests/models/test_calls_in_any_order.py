"""A patched model that trains and samples in turns gives each call what a fresh model gives it, bit for bit."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image
from torch import Tensor, nn

from mixres.batch import TextEmbeds
from mixres.data.plan import Layout
from mixres.geometry import Size
from mixres.models.lora import trainable_parameters
from mixres.models.qwen.edit import QwenImageEdit
from mixres.training.denoising import image_inputs, make_images
from support.steps import microbatch, with_adapters

Values = list[Tensor]


def make_pipeline(base: Path) -> QwenImageEditPipeline:
    """The stock pipeline around a patched transformer with adapters on attention and modulation, set to train."""
    model = QwenImageEdit(str(base)).load_transformer(dtype=torch.float32, device="cpu")
    targets = ["to_q", "to_v", "img_mod.1", "norm_out.linear", "proj_out"]
    model = with_adapters(model, target_modules=targets, untrained=()).train()
    return QwenImageEdit(str(base)).load_sampling_pipeline(transformer=model, dtype=torch.float32, device="cpu")


def train(pipeline: QwenImageEditPipeline, numbers: list[int], layout: Layout, checkpointing: bool = False) -> Values:
    """Velocity and gradients of one microbatch."""
    model: nn.Module = pipeline.transformer
    batch = microbatch(numbers, layout)
    if checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    sigmas = torch.tensor([0.2, 0.9, 0.5, 0.7])[numbers]
    velocity = QwenImageEdit("").predict_velocity(model, batch, batch.latents, sigmas)
    velocity.flatten(0, 1)[batch.target_index].square().mean().backward()
    pipeline.transformer.disable_gradient_checkpointing()
    gradients = [p.grad.clone() for p in trainable_parameters(model).values() if p.grad is not None]
    assert gradients and all(gradient.any() for gradient in gradients)
    model.zero_grad(set_to_none=True)
    return [velocity.detach(), *gradients]


def sample(pipeline: QwenImageEditPipeline, size: Size) -> Values:
    """What the transformer predicts in each denoising step, and the image."""
    seen: Values = []

    def keep(module: nn.Module, args: object, output: tuple[Tensor]) -> None:
        assert not module.training, "dropout is off"
        seen.append(output[0].clone())

    handle = pipeline.transformer.register_forward_hook(keep)
    draw = torch.Generator().manual_seed(7)
    control = Image.fromarray((torch.rand(40, 60, 3, generator=draw) * 255).byte().numpy())
    family, text = (
        QwenImageEdit("Qwen/Qwen-Image-Edit", synthetic=True),
        TextEmbeds(torch.randn(11, 64, generator=draw)),
    )
    sizes = family.control_sizes(size, [Size(*control.size)], {"control_area": 64 * 64})
    given = image_inputs(family, pipeline, controls=[control], text=text, size=size, sizes=sizes, seed=1)
    (image,) = make_images(family, pipeline, [given], steps=2)
    handle.remove()
    assert len(seen) == 2 and pipeline.transformer.training
    return [*seen, torch.from_numpy(np.array(image))]


CALLS: dict[str, Callable[[QwenImageEditPipeline], Values]] = {
    "padded": lambda p: train(p, [0, 1, 3], "padded"),
    "padded, checkpointed": lambda p: train(p, [3, 0], "padded", checkpointing=True),
    "packed": lambda p: train(p, [0, 1, 3], "packed"),
    "packed, checkpointed": lambda p: train(p, [1, 3], "packed", checkpointing=True),
    "single": lambda p: train(p, [1], "padded"),
    "single, packed": lambda p: train(p, [1], "packed"),
    "sampling, wide": lambda p: sample(p, Size(112, 48)),
    "sampling, tall": lambda p: sample(p, Size(48, 80)),
}


@pytest.fixture(scope="module")
def fresh(tiny_base: Path) -> dict[str, Values]:
    """Each call on a model that has done nothing else."""
    return {name: call(make_pipeline(tiny_base)) for name, call in CALLS.items()}


@pytest.mark.parametrize("seed", range(3))
def test_training_and_sampling_in_any_order_give_the_values_of_a_fresh_model(
    tiny_base: Path, fresh: dict[str, Values], seed: int
) -> None:
    pipeline = make_pipeline(tiny_base)
    order = [*CALLS, *CALLS]
    random.Random(seed).shuffle(order)
    for name in order:
        found = CALLS[name](pipeline)
        for place, (here, there) in enumerate(zip(found, fresh[name], strict=True)):
            assert torch.equal(here, there), (order, name, place)
