"""The weight that a layer and its adapter compute with, and what a base's folder holds."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mixres.errors import UserError
from mixres.inference.merge import INDEX, Adapter, MergedTensors, read_model_files


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_merged_weight_is_what_layer_and_adapter_compute_with(dora: bool, dtype: torch.dtype, bar: float) -> None:
    """peft's own layer, neither square nor of alpha = r, and its bias untouched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 11)).to(dtype)
    weight = model[0].weight.detach().clone()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_dora=dora), model)
    layer = model[0]
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.rand_like(parameter) * parameter.requires_grad
    magnitude = layer.lora_magnitude_vector["default"].weight if dora else None
    adapter = Adapter(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 7.0, magnitude)
    x = torch.randn(4, 5, dtype=dtype)
    with torch.no_grad():
        ours = nn.functional.linear(x, adapter.merged(weight), layer.base_layer.bias)
        theirs, before = model(x), layer.base_layer(x)
    assert ours.dtype == dtype
    assert (theirs - before).norm() > 0.1 * before.norm()
    assert (ours - theirs).norm() <= bar * theirs.norm()


def test_a_narrow_weight_is_merged_in_float32() -> None:
    weight, down, up = torch.randn(8, 6).bfloat16(), torch.randn(2, 6), torch.randn(8, 2)
    merged = Adapter(down, up, 2.0).merged(weight)
    assert merged.dtype == torch.float32
    exact = weight.double() + up.double() @ down.double()
    assert (merged - exact).norm() <= 1e-6 * exact.norm()


@pytest.fixture
def split(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny transformer in several files."""
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer")
    transformer.save_pretrained(tmp_path / "split", max_shard_size="1MB")
    return tmp_path / "split"


def test_files_and_tensors_are_those_that_from_pretrained_loads(split: Path) -> None:
    (split / "left_over.safetensors").write_bytes(b"never opened")
    model = read_model_files(split)
    assert len(model.files) > 2 and "left_over.safetensors" not in model.files
    loaded = QwenImageTransformer2DModel.from_pretrained(split).state_dict()
    assert {name: entry.shape for name, entry in model.entries.items()} == {
        n: tuple(t.shape) for n, t in loaded.items()
    }
    assert model.nbytes == sum(tensor.nbytes for tensor in loaded.values())
    merged = MergedTensors(model, {})
    assert all(torch.equal(merged.tensor(name), tensor) for name, tensor in loaded.items())
    assert merged.rounding() == 0


def test_a_folder_that_is_not_whole_is_told(split: Path) -> None:
    index = json.loads((split / INDEX).read_text())
    part = split / index["weight_map"]["img_in.weight"]
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"split cannot be read: "):
        read_model_files(split)
    part.unlink()
    with pytest.raises(UserError, match=rf"split cannot be read: .*{part.name}"):
        read_model_files(split)
    part.write_bytes(data)
    del index["weight_map"]["img_in.bias"]
    (split / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json does not fit the files beside it: fetch the base again"):
        read_model_files(split)
    (split / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        read_model_files(split)
