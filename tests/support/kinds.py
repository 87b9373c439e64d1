"""The transformers that the tests of the patches go through: how each kind is made, patched and called.

Samples are those of `mixes`. A guidance scale and a pooled embedding, where a kind takes them, are functions of the
sample.
"""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from mixres.geometry import pack_latents, unpack_latents
from mixres.models.flux2_multi_resolution_patch import patch_flux2_model_for_multi_resolution
from mixres.models.flux_multi_resolution_patch import patch_flux_model_for_multi_resolution
from mixres.models.qwen.layers import untrained_modules
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from mixres.models.z_image_multi_resolution_patch import patch_z_image_model_for_multi_resolution
from support import mixes
from support.mixes import CHANNELS, TEXT_WIDTH, Mix, Result


def main_mix_for_bf16() -> Mix:
    """The main mix at sigmas that stay exact in bf16, also times 1000, which some models compute in half precision."""
    return replace(mixes.main_mix(), timesteps=torch.tensor([0.5, 0.125, 0.25]))


def one_by_one(mix: Mix) -> list[Mix]:
    """A mix of each sample."""
    parts = [[[x] for x in part] for part in (mix.shapes, mix.images, mix.texts, mix.velocities)]
    samples = zip(*parts, mix.timesteps.split(1), strict=True)
    return [Mix(shapes, images, texts, sigma, velocities) for shapes, images, texts, velocities, sigma in samples]


class Kind(ABC):
    """A transformer class of diffusers, in one configuration."""

    @abstractmethod
    def stock(self, *, adapters: bool = False) -> Any:
        """A small transformer as diffusers makes it, with adapters on every linear layer or without; all trains."""

    @abstractmethod
    def patch(self, model: Any) -> Any:
        """`model` patched by the public call."""

    @abstractmethod
    def alone_calls(self, mix: Mix) -> list[dict[str, Any]]:
        """The stock call of each sample."""

    @abstractmethod
    def padded_call(self, mix: Mix, *, image: int = 0, text: int = 0, value: float = 0.0) -> dict[str, Any]:
        """With so many more slots than the longest sample needs; `value` fills all padding."""

    @abstractmethod
    def packed_call(self, mix: Mix) -> dict[str, Any]: ...

    def untrained(self, model: Any) -> tuple[str, ...]:
        """The modules that reach no loss."""
        return ()

    def patched(self, *, adapters: bool = False) -> Any:
        return self.patch(self.stock(adapters=adapters))

    def forward(self, model: nn.Module, mix: Mix, layout: str) -> list[Tensor]:
        """The output at each sample's image tokens: `padded`, `packed`, `alone` (stock calls), `one by one` (ours)."""
        if layout == "alone":
            return [model(**call)[0][0] for call in self.alone_calls(mix)]
        if layout == "one by one":
            return [row for sample in one_by_one(mix) for row in self.forward(model, sample, "padded")]
        if layout == "packed":
            output: Tensor = model(**self.packed_call(mix))[0]
            return list(output[:, 0].split([len(image) for image in mix.images]))
        return self.forward_padded(model, mix, **self.padded_call(mix))

    def forward_padded(self, model: nn.Module, mix: Mix, **call: Any) -> list[Tensor]:
        return [row[: len(image)] for row, image in zip(model(**call)[0], mix.images, strict=True)]

    def run(self, model: nn.Module, mix: Mix, layout: str) -> Result:
        """Forward and backward of one microbatch."""
        outputs = self.forward(model, mix, layout)
        return mixes.backward(model, outputs, mixes.loss(outputs, mix))

    def kept(self, model: nn.Module, mix: Mix, layout: str) -> list[Tensor]:
        """What autograd keeps between forward and backward, each storage once, without the parameters'."""
        own = {p.data_ptr() for p in model.parameters()}
        kept: dict[int, Tensor] = {}  # the tensors stay, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mixes.loss(self.forward(model, mix, layout), mix)
        return list(kept.values())

    @functools.cache  # noqa: B019
    def alone(self, name: str) -> Result:
        """One of `mixes.MIXES` on the stock model with adapters, one sample at a time. Read only."""
        return self.run(self.stock(adapters=True), mixes.MIXES[name](), "alone")


@dataclass(frozen=True)
class Qwen(Kind):
    """Qwen-Image, its edit models included."""

    zero_cond_t: bool = False

    def stock(self, *, adapters: bool = False) -> QwenImageTransformer2DModel:
        return mixes.stock_model(self.zero_cond_t, mixes.EVERY_LINEAR if adapters else ())

    def patch(self, model: Any) -> Any:
        return patch_qwen_model_for_multi_resolution(model)

    def untrained(self, model: Any) -> tuple[str, ...]:
        return untrained_modules(model)

    def alone_calls(self, mix: Mix) -> list[dict[str, Any]]:
        samples = zip(mix.images, mix.texts, mix.timesteps.split(1), mix.shapes, strict=True)
        return [
            {"hidden_states": image[None], "encoder_hidden_states": text[None], "timestep": timestep,
             "img_shapes": [shapes], "return_dict": False}
            for image, text, timestep, shapes in samples
        ]  # fmt: skip

    def padded_call(self, mix: Mix, *, image: int = 0, text: int = 0, value: float = 0.0) -> dict[str, Any]:
        return mixes.padded_call(mix, image=image, text=text, value=value)

    def packed_call(self, mix: Mix) -> dict[str, Any]:
        return mixes.packed_call(mix)


Make = Callable[[], Any]


@functools.cache
def _made(make: Make, adapters: bool, **config: Any) -> Any:
    torch.manual_seed(0)
    model = make(**config)
    if adapters:  # B filled: at the usual initialisation it is zero, and so are all gradients of A
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        model.add_adapter(LoraConfig(r=4, target_modules=linear, init_lora_weights=False))
    return model.requires_grad_(True)


@dataclass(frozen=True)
class IdKind(Kind):
    """A transformer whose positions are ids."""

    guidance: bool = True

    @abstractmethod
    def make(self, **config: Any) -> Any:
        """The transformer with new weights."""

    @abstractmethod
    def ids(self, shapes: list[mixes.Shape], text: int) -> tuple[Tensor, Tensor]:
        """What the stock pipeline makes of a sample: `(S, n)` of its images, `(T, n)` of its text."""

    def by_sample(self, mix: Mix) -> dict[str, Any]:
        """The arguments that have one row a sample in every layout."""
        guidance = {"guidance": 8 * mix.timesteps} if self.guidance else {}
        return {"timestep": mix.timesteps, "return_dict": False, **guidance}

    def stock(self, *, adapters: bool = False) -> Any:
        return copy.deepcopy(_made(self.make, adapters, guidance_embeds=self.guidance))

    def alone_calls(self, mix: Mix) -> list[dict[str, Any]]:
        calls = []
        for b, (image, text, shapes) in enumerate(zip(mix.images, mix.texts, mix.shapes, strict=True)):
            own = {name: x[b : b + 1] if isinstance(x, Tensor) else x for name, x in self.by_sample(mix).items()}
            img_ids, txt_ids = self.ids(shapes, len(text))
            tensors = {"hidden_states": image[None], "encoder_hidden_states": text[None]}
            calls.append({**tensors, "img_ids": img_ids, "txt_ids": txt_ids, **own})
        return calls

    def padded_call(self, mix: Mix, *, image: int = 0, text: int = 0, value: float = 0.0) -> dict[str, Any]:
        img_ids, txt_ids = self.ids_of(mix)
        return {
            "hidden_states": mixes.pad_rows(mix.images, image, value),
            "encoder_hidden_states": mixes.pad_rows(mix.texts, text, value),
            "img_ids": mixes.pad_rows(img_ids, image, int(value)),
            "txt_ids": mixes.pad_rows(txt_ids, text, int(value)),
            "joint_attention_kwargs": self.lengths(mix),
            **self.by_sample(mix),
        }

    def packed_call(self, mix: Mix) -> dict[str, Any]:
        img_ids, txt_ids = self.ids_of(mix)
        return {
            "hidden_states": torch.cat(mix.images)[:, None],
            "encoder_hidden_states": torch.cat(mix.texts)[:, None],
            "img_ids": torch.cat(img_ids),
            "txt_ids": torch.cat(txt_ids),
            "joint_attention_kwargs": self.lengths(mix),
            **self.by_sample(mix),
        }

    def ids_of(self, mix: Mix) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [self.ids(shapes, len(text)) for shapes, text in zip(mix.shapes, mix.texts, strict=True)]
        return [image for image, _ in pairs], [text for _, text in pairs]

    def lengths(self, mix: Mix) -> dict[str, list[int]]:
        return {"image_lengths": [len(x) for x in mix.images], "text_lengths": [len(x) for x in mix.texts]}


class Flux2(IdKind):
    def make(self, **config: Any) -> Flux2Transformer2DModel:
        return Flux2Transformer2DModel(
            patch_size=1, in_channels=CHANNELS, num_layers=2, num_single_layers=3, attention_head_dim=32,
            num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, timestep_guidance_channels=32,
            axes_dims_rope=(8, 8, 8, 8), **config,
        )  # fmt: skip

    def patch(self, model: Any) -> Any:
        return patch_flux2_model_for_multi_resolution(model)

    def ids(self, shapes: list[mixes.Shape], text: int) -> tuple[Tensor, Tensor]:
        target, *references = (torch.zeros(1, 1, rows, columns) for _, rows, columns in shapes)
        images = [Flux2Pipeline._prepare_latent_ids(target)[0]]
        if references:
            images.append(Flux2Pipeline._prepare_image_ids(references)[0])
        return torch.cat(images), Flux2Pipeline._prepare_text_ids(torch.zeros(1, text, 1))[0]


class Flux(IdKind):
    """FLUX.1 and Kontext. The pipeline takes one reference; the transformer takes any number."""

    def make(self, **config: Any) -> FluxTransformer2DModel:
        return FluxTransformer2DModel(
            patch_size=1, in_channels=CHANNELS, num_layers=2, num_single_layers=3, attention_head_dim=32,
            num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 12, 12), **config,
        )  # fmt: skip

    def patch(self, model: Any) -> Any:
        return patch_flux_model_for_multi_resolution(model)

    def ids(self, shapes: list[mixes.Shape], text: int) -> tuple[Tensor, Tensor]:
        images = []
        for index, (_, rows, columns) in enumerate(shapes):
            ids = FluxKontextPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32).long()
            ids[:, 0] = index
            images.append(ids)
        return torch.cat(images), torch.zeros(text, 3, dtype=torch.int64)

    def by_sample(self, mix: Mix) -> dict[str, Any]:
        return {**super().by_sample(mix), "pooled_projections": torch.stack([text.mean(0) for text in mix.texts])}


class ZImage(Kind):
    """One image a sample: the target, of which the transformer takes and returns a list."""

    def stock(self, *, adapters: bool = False) -> ZImageTransformer2DModel:
        return copy.deepcopy(_made(self.make, adapters))

    def make(self) -> ZImageTransformer2DModel:
        model = ZImageTransformer2DModel(
            in_channels=CHANNELS // 4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH, axes_dims=[8, 12, 12], axes_lens=[256, 64, 64],
        )  # fmt: skip
        for token in (model.x_pad_token, model.cap_pad_token):  # zeros as they are made
            torch.nn.init.normal_(token)
        return model

    def patch(self, model: Any) -> Any:
        return patch_z_image_model_for_multi_resolution(model)

    def alone_calls(self, mix: Mix) -> list[dict[str, Any]]:
        return [self.padded_call(sample) for sample in one_by_one(mix)]

    def padded_call(self, mix: Mix, *, image: int = 0, text: int = 0, value: float = 0.0) -> dict[str, Any]:
        """The stock call: it pads by itself."""
        targets = zip(mix.images, mix.velocities, mix.shapes, strict=True)
        images = [unpack_latents(image[: len(v)], shapes[0]) for image, v, shapes in targets]
        return {"x": images, "t": mix.timesteps, "cap_feats": mix.texts, "return_dict": False}

    def packed_call(self, mix: Mix) -> dict[str, Any]:
        return {**self.padded_call(mix), "joint_attention_kwargs": {"packed": True}}

    def forward(self, model: nn.Module, mix: Mix, layout: str) -> list[Tensor]:
        calls = {"padded": [self.padded_call(mix)], "packed": [self.packed_call(mix)]}
        chosen = calls.get(layout) or self.alone_calls(mix)
        return [pack_latents(output) for call in chosen for output in model(**call)[0]]


KINDS: dict[str, Kind] = {
    "qwen": Qwen(),
    "qwen zero_cond_t": Qwen(zero_cond_t=True),
    "flux2": Flux2(),
    "flux2 without guidance": Flux2(guidance=False),
    "flux": Flux(),
    "flux without guidance": Flux(guidance=False),
    "z_image": ZImage(),
}
