"""The transformers that the tests of the patches go through: how each kind is made, patched and called.

Samples are those of `mixes`. A guidance scale and a pooled embedding, where a kind takes them, are functions of the
sample.
"""

import copy
import functools
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import (
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from mixres.geometry import pack_latents, unpack_latents
from mixres.models.flux2_multi_resolution_patch import patch_flux2_model_for_multi_resolution
from mixres.models.flux_multi_resolution_patch import patch_flux_model_for_multi_resolution
from mixres.models.qwen.layers import untrained_modules
from mixres.models.qwen21_multi_resolution_patch import patch_qwen21_model_for_multi_resolution
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from mixres.models.z_image_multi_resolution_patch import patch_z_image_model_for_multi_resolution
from support import mixes
from support.mixes import CHANNELS, TEXT_WIDTH, Mix, Result


def one_by_one(mix: Mix) -> list[Mix]:
    """A mix of each sample."""
    parts = [[[x] for x in part] for part in (mix.shapes, mix.images, mix.texts, mix.velocities)]
    samples = zip(*parts, mix.timesteps.split(1), strict=True)
    return [Mix(shapes, images, texts, sigma, velocities) for shapes, images, texts, velocities, sigma in samples]


class Kind(ABC):
    """A transformer class of diffusers, in one configuration."""

    float32_parameters: ClassVar[tuple[str, ...]] = ()  # that the stock layers widen or narrow to it

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

    def fitted(self, mix: Mix) -> Mix:
        """The mix, or one like it of grids that the stock model takes."""
        return mix

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
        return self.run(self.stock(adapters=True), self.mix(name), "alone")

    def mix(self, name: str) -> Mix:
        """One of `mixes.MIXES`."""
        return self.fitted(mixes.MIXES[name]())

    def mix_for_bf16(self) -> Mix:
        """The main mix at sigmas that stay exact in bf16, also times 1000: some models compute that in bf16."""
        return replace(self.mix("main"), timesteps=torch.tensor([0.5, 0.125, 0.25]))


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


@dataclass(frozen=True)
class Qwen21(Kind):
    """Text stands before, between and behind the controls; the stock call has them in this order, target last."""

    causal_condition: bool = True
    float32_parameters: ClassVar[tuple[str, ...]] = ("txt_in.text_norm.weight",)

    def make(self, **config: Any) -> QwenImage21Transformer2DModel:
        model = QwenImage21Transformer2DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=32, num_attention_heads=2,
            context_in_dim=TEXT_WIDTH, axes_dims_rope=(8, 12, 12), **config,
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:  # ones or zeros else
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    def stock(self, *, adapters: bool = False) -> QwenImage21Transformer2DModel:
        return copy.deepcopy(_made(self.make, adapters, causal_condition=self.causal_condition))

    def patch(self, model: Any) -> Any:
        return patch_qwen21_model_for_multi_resolution(model)

    def fitted(self, mix: Mix) -> Mix:
        """Even sides: four image tokens are a slot of the text encoder."""
        shapes = [[(1, rows + rows % 2, columns + columns % 2) for _, rows, columns in grids] for grids in mix.shapes]
        return mixes.make_mix(shapes, [len(text) for text in mix.texts], seed=len(shapes))

    def text_runs(self, mix: Mix) -> list[list[int]]:
        """Some of them empty: then two images touch."""
        runs = []
        for text, grids in zip(mix.texts, mix.shapes, strict=True):
            draw = random.Random(len(text))
            cuts = sorted(draw.randint(0, len(text)) for _ in grids[1:])
            runs.append([b - a for a, b in itertools.pairwise([0, *cuts, len(text)])])
        return runs

    def alone_calls(self, mix: Mix) -> list[dict[str, Any]]:
        """What the text encoder has at image slots is large: it reaches nothing."""
        calls = []
        for b, (image, text, grids) in enumerate(zip(mix.images, mix.texts, mix.shapes, strict=True)):
            target, *controls = image.split([rows * columns for _, rows, columns in grids])
            embeds, slots = [], []
            for run, control in itertools.zip_longest(
                text.split(self.text_runs(mix)[b]), controls, fillvalue=image[:0]
            ):
                at_slots = text.new_full((len(control) // 4, TEXT_WIDTH), 1e3)
                embeds += [run, at_slots]
                slots += [torch.zeros(len(run)), torch.ones(len(at_slots))]
            slots.append(torch.ones(len(target) // 4))
            calls.append({
                "hidden_states": torch.cat([*controls, target])[None],
                "encoder_hidden_states": torch.cat(embeds)[None],
                "timestep": mix.timesteps[b : b + 1],
                "img_shapes": [[*grids[1:], grids[0]]],
                "img_mask": torch.cat(slots).bool()[None],
                "return_dict": False,
            })  # fmt: skip
        return calls

    def forward(self, model: nn.Module, mix: Mix, layout: str) -> list[Tensor]:
        if layout != "alone":
            return super().forward(model, mix, layout)
        found = []
        for call, grids in zip(self.alone_calls(mix), mix.shapes, strict=True):
            is_image = call["img_mask"][0].repeat_interleave(1 + 3 * call["img_mask"][0].int())
            images = model(**call)[0][0][is_image].split(
                [rows * columns for _, rows, columns in (*grids[1:], grids[0])]
            )
            found.append(torch.cat([images[-1], *images[:-1]]))
        return found

    def padded_call(self, mix: Mix, *, image: int = 0, text: int = 0, value: float = 0.0) -> dict[str, Any]:
        return {
            "hidden_states": mixes.pad_rows(mix.images, image, value),
            "encoder_hidden_states": mixes.pad_rows(mix.texts, text, value),
            **self.by_sample(mix),
        }

    def packed_call(self, mix: Mix) -> dict[str, Any]:
        return {
            "hidden_states": torch.cat(mix.images)[:, None],
            "encoder_hidden_states": torch.cat(mix.texts)[:, None],
            **self.by_sample(mix),
        }

    def by_sample(self, mix: Mix) -> dict[str, Any]:
        runs = {"text_runs": self.text_runs(mix)}
        return {
            "timestep": mix.timesteps, "img_shapes": mix.shapes, "attention_kwargs": runs, "return_dict": False,
        }  # fmt: skip


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
    "qwen21": Qwen21(),
    "qwen21 without causal_condition": Qwen21(causal_condition=False),
    "z_image": ZImage(),
}
