"""ComfyUI's own rules on the exporter's files: base weights and file give the merged weights, for every family.

The tables are facts read in Comfy-Org/ComfyUI, nothing is copied: names of layers and where fused ones have their rows,
`flux_to_diffusers` and `z_image_to_diffusers` in comfy/utils.py at 09708eae709a; the stems of a file's names by which
each model's layers are looked up, comfy/lora.py at 17358c8f73b5; what is added to a weight, in comfy/weight_adapter
lora.py at 6f98b150e065, lokr.py at 2bffe2f4ce57, loha.py and base.py at a125cd84b054 (version 0.3.64).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixres.errors import UserError
from mixres.inference.export import export, make_request
from mixres.models.lora_file import MAGNITUDE, layer_tensors, read_header, weight_change
from support.family_cases import EVERY_CASE, FamilyCase
from support.lora_files import overrides_of, write_lora

NAMES = ("qwen_image_edit", "qwen_image_21", "flux_kontext", "flux2_dev", "z_image")
KINDS = ("lora", "lokr", "lokr, whole", "loha")


class Place(NamedTuple):
    """Where ComfyUI has a layer of diffusers: a module, and which of its parts, one below the other."""

    module: str
    part: int = 0
    swapped: bool = False  # its halves, shift and scale, are in the other order
    looked_up: bool = True  # by the name of diffusers too


Rule = tuple[str, Place]
QKV = tuple(enumerate("qkv"))
_FLUX: list[Rule] = [
    *((rf"transformer_blocks\.(\d+)\.attn\.to_{x}", Place(r"double_blocks.\1.img_attn.qkv", n)) for n, x in QKV),
    *((rf"transformer_blocks\.(\d+)\.attn\.add_{x}_proj", Place(r"double_blocks.\1.txt_attn.qkv", n)) for n, x in QKV),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", Place(r"double_blocks.\1.img_attn.proj")),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", Place(r"double_blocks.\1.txt_attn.proj")),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", Place(r"double_blocks.\1.img_mod.lin")),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", Place(r"double_blocks.\1.txt_mod.lin")),
    (r"transformer_blocks\.(\d+)\.ff\.(?:net\.0\.proj|linear_in)", Place(r"double_blocks.\1.img_mlp.0")),
    (r"transformer_blocks\.(\d+)\.ff\.(?:net\.2|linear_out)", Place(r"double_blocks.\1.img_mlp.2")),
    (r"transformer_blocks\.(\d+)\.ff_context\.(?:net\.0\.proj|linear_in)", Place(r"double_blocks.\1.txt_mlp.0")),
    (r"transformer_blocks\.(\d+)\.ff_context\.(?:net\.2|linear_out)", Place(r"double_blocks.\1.txt_mlp.2")),
    *((rf"single_transformer_blocks\.(\d+)\.attn\.to_{x}", Place(r"single_blocks.\1.linear1", n)) for n, x in QKV),
    (r"single_transformer_blocks\.(\d+)\.proj_mlp", Place(r"single_blocks.\1.linear1", 3)),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", Place(r"single_blocks.\1.linear1")),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", Place(r"single_blocks.\1.modulation.lin")),
    (r"single_transformer_blocks\.(\d+)\.(?:proj_out|attn\.to_out)", Place(r"single_blocks.\1.linear2")),
    (r"x_embedder", Place("img_in")),
    (r"context_embedder", Place("txt_in")),
    (r"proj_out", Place("final_layer.linear")),
    (r"norm_out\.linear", Place("final_layer.adaLN_modulation.1", swapped=True)),
    *(
        (rf"time_text_embed\.{name}_embedder\.linear_{n}", Place(f"{own}_in.{layer}_layer"))
        for name, own in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for n, layer in ((1, "in"), (2, "out"))
    ),
    *(
        (rf"time_guidance_embed\.{name}_embedder\.linear_{n}", Place(f"{own}_in.{layer}_layer", looked_up=False))
        for name, own in (("timestep", "time"), ("guidance", "guidance"))
        for n, layer in ((1, "in"), (2, "out"))
    ),
    (r"((?:double|single)_stream_modulation(?:_img|_txt)?)\.linear", Place(r"\1.lin", looked_up=False)),
]  # fmt: skip
_Z_IMAGE: list[Rule] = [
    *((rf"(.*)\.attention\.to_{x}", Place(r"\1.attention.qkv", n)) for n, x in QKV),
    (r"(.*)\.attention\.to_out\.0", Place(r"\1.attention.out")),
    (r"all_x_embedder\.2-1", Place("x_embedder")),
    (r"all_final_layer\.2-1\.(.*)", Place(r"final_layer.\1")),
    (r"(.*)", Place(r"\1")),
]
_QWEN: list[Rule] = [(r"(.*)", Place(r"\1"))]
# Two layers are fused when ComfyUI loads the model.
_QWEN_21: list[Rule] = [
    (r"(.*)\.img_mlp\.gate_layer", Place(r"\1.img_mlp.gate_up", 0)),
    (r"(.*)\.img_mlp\.proj", Place(r"\1.img_mlp.gate_up", 1)),
    *_QWEN,
]
RULES = dict(zip(NAMES, (_QWEN, _QWEN_21, _FLUX, _FLUX, _Z_IMAGE), strict=True))
# Before a layer's name, and before it with underscores for dots.
BEFORE = {
    "qwen_image_edit": (("", "diffusion_model.", "transformer."), ("lycoris_",)),
    "qwen_image_21": (("", "diffusion_model.", "transformer."), ("lycoris_",)),
    "flux_kontext": (("", "transformer."), ("lycoris_", "lora_transformer_")),
    "flux2_dev": (("", "transformer."), ("lycoris_", "lora_transformer_")),
    "z_image": (("", "diffusion_model.", "transformer."), ("lycoris_",)),
}


def place(name: str, layer: str) -> Place:
    for pattern, found in RULES[name]:
        if match := re.fullmatch(pattern, layer):
            return found._replace(module=match.expand(found.module))
    raise AssertionError(f"ComfyUI has no {layer}")


def stems(name: str, layer: str) -> Iterator[str]:
    """By which ComfyUI looks up a layer in a file."""
    found, (before, flat) = place(name, layer), BEFORE[name]
    if found.looked_up:
        yield from (f"{prefix}{layer}" for prefix in before)
        yield from (f"{prefix}{layer.replace('.', '_')}" for prefix in flat)
    if found.part == 0 and not found.swapped:  # a fused module, or one in another order, has another adapter there
        yield f"lora_unet_{found.module.replace('.', '_')}"


def swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def in_comfyui(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of layers, by its modules."""
    parts: dict[str, dict[int, Tensor]] = {}
    for layer, weight in weights.items():
        at = place(name, layer)
        own = parts.setdefault(at.module, {})
        assert at.part not in own, f"two layers are {at}"
        own[at.part] = swapped(weight) if at.swapped else weight
    return {module: torch.cat([own[n] for n in sorted(own)]) for module, own in parts.items()}


def change(file: Mapping[str, Tensor], stem: str, used: set[str]) -> Tensor | None:
    """What it adds to the weight of the layer that it looks up by `stem`."""

    def take(part: str) -> Tensor | None:
        key = f"{stem}.{part}"
        if key in file:
            used.add(key)
        return file.get(key)

    alpha = take("alpha")
    down, up = take("lora_A.weight"), take("lora_B.weight")
    if down is not None and up is not None:
        return (1.0 if alpha is None else alpha.item() / len(down)) * up @ down
    left, right, other_left, other_right = (take(f"hada_w{n}_{side}") for n in (1, 2) for side in "ab")
    if left is not None and right is not None and other_left is not None and other_right is not None:
        return (1.0 if alpha is None else alpha.item() / len(right)) * (left @ right) * (other_left @ other_right)
    factors, rank = [], None
    for n in (1, 2):
        whole, left, right = take(f"lokr_w{n}"), take(f"lokr_w{n}_a"), take(f"lokr_w{n}_b")
        if whole is None and left is not None and right is not None:
            whole, rank = left @ right, len(right)
        factors.append(whole)
    if factors[0] is None or factors[1] is None:
        return None
    return (1.0 if alpha is None or rank is None else alpha.item() / rank) * torch.kron(factors[0], factors[1])


def patched(name: str, weights: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The modules with the file's adapters, and those of its tensors that nothing looks up."""
    modules, used = in_comfyui(name, weights), set[str]()
    rows: dict[str, int] = {}
    for layer, weight in sorted(weights.items(), key=lambda item: place(name, item[0]).part):
        at = place(name, layer)
        first = rows.setdefault(at.module, 0)
        rows[at.module] += len(weight)
        found = [delta for stem in stems(name, layer) if (delta := change(file, stem, used)) is not None]
        if found:  # of several the last counts
            delta = swapped(found[-1]) if at.swapped else found[-1]
            assert delta.shape == weight.shape, layer
            modules[at.module][first : first + len(weight)] += delta
    return modules, file.keys() - used


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(name: str, base_of: Callable[[FamilyCase], Path]) -> Path:
    return base_of(EVERY_CASE[name])


@pytest.fixture(scope="module")
def weights(name: str, base: Path) -> dict[str, Tensor]:
    """Of the base's linear layers, by the names of diffusers."""
    model: Any = EVERY_CASE[name].at(base).load_transformer(dtype=torch.float32, device="cpu")
    return {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_file_are_the_merged_weights(
    name: str, kind: str, base: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """On every layer, fused ones and those in another order too; no tensor of the file is left out."""
    lora = write_lora(tmp_path, base, "model.lora.target_modules=[all]", *overrides_of(kind))
    header, out = read_header(str(lora)), tmp_path / "comfyui.safetensors"
    changes = {
        layer: weight_change(parts, header.lora_alpha)
        for layer, parts in layer_tensors(header, lora.read_bytes()).items()
    }
    expected = in_comfyui(name, {layer: weights[layer] + changes.get(layer, 0) for layer in weights})
    export(make_request(run=str(lora), format="comfyui", out=str(out)))
    file = load_file(out)
    found, unread = patched(name, weights, file)
    assert apart(found, expected) <= 1e-6 < 1e-3 < apart(in_comfyui(name, weights), expected)
    assert all(not place(name, layer).looked_up for layer in changes if any(layer in key for key in unread))
    if header.stems and name != "flux2_dev":  # of which it does not look up every layer by the name of diffusers
        own, unread = patched(name, weights, load_file(lora))
        assert apart(own, expected) <= 1e-6 and not unread
    if kind != "lokr, whole":
        planted = {key: tensor for key, tensor in file.items() if not key.endswith(".alpha")}
        if len(planted) < len(file):
            assert apart(patched(name, weights, planted)[0], expected) > 1e-3, "alpha is missing"
    if kind == "lokr":
        planted = {
            key: t.T.contiguous() if key.endswith("lokr_w1") and t.shape == t.T.shape else t for key, t in file.items()
        }
        assert apart(patched(name, weights, planted)[0], expected) > 1e-3, "a factor is transposed"


def test_a_dora_would_not_be_as_trained(tiny_base: Path, tmp_path: Path) -> None:
    """ComfyUI divides by the lengths of the base's rows, where training divides by those of the changed rows."""
    lora = write_lora(tmp_path, tiny_base, *overrides_of("dora"))
    header = read_header(str(lora))
    weights = load_file(next((tiny_base / "transformer").glob("*.safetensors")))
    for layer, parts in layer_tensors(header, lora.read_bytes()).items():
        weight = weights[f"{layer}.weight"]
        changed, lengths = weight + weight_change(parts, header.lora_alpha), parts[MAGNITUDE][:, None]
        trained, there = (lengths * changed / of.norm(dim=1, keepdim=True) for of in (changed, weight))
        assert (there - trained).norm() > 1e-3 * trained.norm()
    with pytest.raises(UserError, match=r"^--format: ComfyUI does not apply the DoRA"):
        make_request(run=str(lora), format="comfyui", out=str(tmp_path / "out.safetensors"))
