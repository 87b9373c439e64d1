"""Mixed batches, the ways to run them, and the measure of how far a batch is from its samples alone.

"Alone" is the stock, unpatched model on one sample. The loss of a sample is its mean over target tokens only.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel as Transformer
from peft import LoraConfig
from torch import Tensor

from mixres.models.qwen.layers import LORA_PRESETS
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution

Shape = tuple[int, int, int]
CHANNELS, TEXT_WIDTH = 16, 24

LAYOUTS = ("padded", "packed")
ATTENTION_AND_MLP = LORA_PRESETS["attention+mlp"]
EVERY_LINEAR = (*ATTENTION_AND_MLP, "img_mod.1", "txt_mod.1", "norm_out.linear", "proj_out", "img_in", "txt_in")


@dataclass(frozen=True)
class Mix:
    """Samples of different sizes: unpadded tensors on the CPU."""

    shapes: list[list[Shape]]
    images: list[Tensor]  # (S, CHANNELS) target | controls
    texts: list[Tensor]  # (T, TEXT_WIDTH)
    timesteps: Tensor  # (B,)
    velocities: list[Tensor]  # (S_target, CHANNELS)

    def to(self, device: str, dtype: torch.dtype) -> "Mix":
        lists = (self.images, self.texts, self.velocities)
        images, texts, velocities = ([x.to(device, dtype) for x in xs] for xs in lists)
        return Mix(self.shapes, images, texts, self.timesteps.to(device, dtype), velocities)


@dataclass(frozen=True)
class Result:
    """Outputs at each sample's valid image tokens, and the gradients of all parameters; on the CPU."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def make_mix(shapes: list[list[Shape]], text_lengths: list[int], seed: int = 0) -> Mix:
    noise = torch.Generator().manual_seed(seed)
    targets = [f * h * w for (f, h, w), *_ in shapes]
    tokens = [sum(f * h * w for f, h, w in sample) for sample in shapes]
    return Mix(
        shapes=shapes,
        images=[torch.randn(n, CHANNELS, generator=noise) for n in tokens],
        texts=[torch.randn(n, TEXT_WIDTH, generator=noise) for n in text_lengths],
        timesteps=torch.rand(len(shapes), generator=noise),
        velocities=[torch.randn(n, CHANNELS, generator=noise) for n in targets],
    )


def main_mix() -> Mix:
    """Grids 16x32, 24x24, 20x28; the second sample has two controls of other sizes."""
    return make_mix([[(1, 16, 32)], [(1, 24, 24), (1, 10, 14), (1, 6, 9)], [(1, 20, 28)]], [19, 7, 40])


def random_mix(seed: int) -> Mix:
    draw = random.Random(seed)
    samples = draw.randint(1, 5)
    shapes = [
        [(1, draw.randint(1, 14), draw.randint(1, 14)) for _ in range(draw.choice([1, 1, 2, 2, 3, 4]))]
        for _ in range(samples)
    ]
    return make_mix(shapes, [draw.randint(1, 48) for _ in range(samples)], seed)


def stock_model(zero_cond_t: bool = False, adapters: Sequence[str] = (), *, blocks: int = 2) -> Transformer:
    """A small transformer as diffusers makes it; base weights and adapters train."""
    torch.manual_seed(0)
    model = Transformer(
        patch_size=2, in_channels=CHANNELS, out_channels=4, num_layers=blocks, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(8, 12, 12), zero_cond_t=zero_cond_t,
    )  # fmt: skip
    if adapters:  # B filled: at the usual initialisation it is zero, and so are all gradients of A
        model.add_adapter(LoraConfig(r=4, target_modules=list(adapters), init_lora_weights=False))
    return model.requires_grad_(True)


def patched_model(zero_cond_t: bool = False, adapters: Sequence[str] = (), *, blocks: int = 2) -> Transformer:
    return patch_qwen_model_for_multi_resolution(stock_model(zero_cond_t, adapters, blocks=blocks))


def forward_alone(model: Transformer, mix: Mix) -> list[Tensor]:
    calls = zip(mix.images, mix.texts, mix.timesteps.split(1), mix.shapes, strict=True)
    return [
        model(
            hidden_states=image[None], encoder_hidden_states=text[None], timestep=timestep, img_shapes=[shapes],
            return_dict=False,
        )[0][0]
        for image, text, timestep, shapes in calls
    ]  # fmt: skip


def pad_rows(rows: list[Tensor], extra: int = 0, value: float = 0.0) -> Tensor:
    """`(B, longest + extra, width)`."""
    length = max(len(x) for x in rows) + extra
    return torch.stack([torch.nn.functional.pad(x, (0, 0, 0, length - len(x)), value=value) for x in rows])


def valid_slots(rows: list[Tensor], extra: int = 0) -> Tensor:
    """`(B, longest + extra)` bool."""
    return pad_rows([x.new_ones(len(x), 1) for x in rows], extra)[..., 0].bool()


def padded_call(mix: Mix, *, image: int = 0, text: int = 0, value: float = 0.0) -> dict[str, Any]:
    """Arguments of call form (b), with so many more slots than the longest sample needs; `value` fills all padding."""
    return {
        "hidden_states": pad_rows(mix.images, image, value),
        "encoder_hidden_states": pad_rows(mix.texts, text, value),
        "encoder_hidden_states_mask": valid_slots(mix.texts, text),
        "timestep": mix.timesteps,
        "img_shapes": mix.shapes,
        "return_dict": False,
    }


def packed_call(mix: Mix) -> dict[str, Any]:
    """Arguments of call form (d)."""
    return {
        "hidden_states": torch.cat(mix.images)[:, None],
        "encoder_hidden_states": torch.cat(mix.texts)[:, None],
        "timestep": mix.timesteps,
        "img_shapes": mix.shapes,
        "attention_kwargs": {"txt_seq_lens": [len(text) for text in mix.texts]},
        "return_dict": False,
    }


def precomputed_call(mix: Mix) -> dict[str, Any]:
    """Arguments of call form (c), positions and mask made by the stock model's own position module."""
    stock = stock_model().pos_embed
    longest = max(len(text) for text in mix.texts)
    pairs = [stock([shapes], max_txt_seq_len=longest, device=torch.device("cpu")) for shapes in mix.shapes]
    image = pad_rows([image for image, _ in pairs])
    mask = torch.cat([valid_slots(mix.texts), valid_slots(mix.images)], dim=1)
    call = padded_call(mix)
    del call["encoder_hidden_states_mask"], call["img_shapes"]
    call["image_rotary_emb"] = (image, torch.stack([text for _, text in pairs]))
    call["attention_kwargs"] = {"attention_mask": mask}
    return call


def forward_padded(model: Transformer, mix: Mix, **call: Any) -> list[Tensor]:
    """`call`: keyword arguments instead of `padded_call(mix)`."""
    output = model(**(call or padded_call(mix)))[0]
    return [row[: len(image)] for row, image in zip(output, mix.images, strict=True)]


def forward_packed(model: Transformer, mix: Mix) -> list[Tensor]:
    output: Tensor = model(**packed_call(mix))[0]
    return list(output[:, 0].split([len(image) for image in mix.images]))


FORWARDS = {"alone": forward_alone, "padded": forward_padded, "packed": forward_packed}


def loss(outputs: list[Tensor], mix: Mix) -> Tensor:
    pairs = zip(outputs, mix.velocities, strict=True)
    return torch.stack([(output[: len(v)] - v).square().mean() for output, v in pairs]).sum()


def backward(model: torch.nn.Module, outputs: list[Tensor], value: Tensor) -> Result:
    model.zero_grad(set_to_none=True)
    value.backward()
    gradients = {name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return Result([output.detach().cpu() for output in outputs], gradients)


def run(model: Transformer, mix: Mix, layout: str) -> Result:
    """Forward and backward of one microbatch in the layout `alone`, `padded` or `packed`."""
    outputs = FORWARDS[layout](model, mix)
    return backward(model, outputs, loss(outputs, mix))


def kept_bytes(model: Transformer, mix: Mix, layout: str) -> int:
    """Of what autograd keeps between forward and backward, each storage once, without the parameters'."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors stay, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(FORWARDS[layout](model, mix), mix)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def forward_error(measured: Result, reference: Result) -> float:
    """Largest relative error of a sample's output, ||d|| / ||reference||."""
    pairs = zip(measured.outputs, reference.outputs, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def gradient_error(measured: Result, reference: Result) -> float:
    """Largest ||d|| / max(||g||, 1e-6 ||g_all||) of a parameter; None counts as zero here, see `vanished`."""
    whole = torch.stack([g.norm() for g in reference.gradients.values() if g is not None]).norm()
    pairs = [(measured.gradients[name], gradient) for name, gradient in reference.gradients.items()]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return max((float((a - b).norm() / torch.maximum(b.norm(), 1e-6 * whole)) for a, b in both), default=0.0)


def vanished(gradients: Mapping[str, Tensor | None]) -> dict[str, str]:
    """The parameters without a gradient, and those whose gradient is exactly zero."""
    found = {name: "none" if g is None else "zero" for name, g in gradients.items() if g is None or not g.any()}
    return dict(sorted(found.items()))


def assert_same(measured: Result, reference: Result, *, forward: float = 1e-6) -> None:
    """The bars of single precision: 1e-6 forward, 1e-5 for every gradient."""
    assert forward_error(measured, reference) <= forward
    assert gradient_error(measured, reference) <= 1e-5
    assert vanished(measured.gradients) == vanished(reference.gradients)


def assert_identical(measured: Result, reference: Result) -> None:
    assert all(torch.equal(a, b) for a, b in zip(measured.outputs, reference.outputs, strict=True))
    assert vanished(measured.gradients) == vanished(reference.gradients)
    for name, gradient in reference.gradients.items():
        other = measured.gradients[name]
        assert gradient is None or (other is not None and torch.equal(other, gradient)), name


MIXES: dict[str, Callable[[], Mix]] = {
    "main": main_mix,
    **{f"random {seed}": functools.partial(random_mix, seed) for seed in range(12)},
}


@functools.cache
def alone(name: str, zero_cond_t: bool) -> Result:
    """One of `MIXES` on the stock model with adapters on every linear layer, one sample at a time. Read only."""
    return run(stock_model(zero_cond_t, EVERY_LINEAR), MIXES[name](), "alone")
