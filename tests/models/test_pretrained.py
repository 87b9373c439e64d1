"""Weights read into a transformer by ourselves are those of `from_pretrained`; files that do not fit are one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from mixres.errors import UserError
from mixres.models import tensor_files
from mixres.models.pretrained import load_pretrained, stored_dtype, without_values
from mixres.models.tensor_files import INDEX, write_model
from support import mixes
from support.kinds import KINDS

KIND: Any = QwenImageTransformer2DModel
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bfloat16 transformer in several files, as a result is written."""
    model = torch.nn.Module.to(mixes.stock_model(False), torch.bfloat16)
    monkeypatch.setattr(tensor_files, "_LARGEST_FILE", "200KB")
    model.save_config(tmp_path)
    weights = model.state_dict()
    write_model(tmp_path, {n: w.to("meta") for n, w in weights.items()}, weights.__getitem__)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / INDEX).is_file()
    read = KIND.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in weights.items()), "it is the stock layout"
    return tmp_path


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_that_of_the_stock_loader(folder: Path, dtype: torch.dtype, mixed: bool) -> None:
    if mixed:
        file = sorted(folder.glob("*.safetensors"))[0]
        save_file({name: tensor.float() + 1e-3 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert stored_dtype(folder) == (None if mixed else torch.bfloat16)
    ours = load_pretrained(KIND, folder, dtype=dtype, device="cpu")
    stock = KIND.from_pretrained(folder, dtype=dtype)
    assert not (ours.training or stock.training)
    assert dict(ours.config).items() >= {k: v for k, v in stock.config.items() if k != "_name_or_path"}.items()
    for (name, weight), (other, expected) in zip(ours.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == other and weight.dtype == expected.dtype and torch.equal(weight, expected)


def test_weights_that_do_not_fit_are_one_line(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"]["img_in.weight"]
    tensors = load_file(file)
    save_file(tensors | {"img_in.weight": tensors["img_in.weight"][:, :-1].clone()}, file)
    with pytest.raises(UserError, match=r"img_in.weight is \(\d+, \d+\) there and \(\d+, \d+\) by its configuration"):
        load_pretrained(KIND, folder, dtype=torch.float32, device="cpu")
    del tensors["img_in.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="does not fit the files beside it"):
        load_pretrained(KIND, folder, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_constructor_computes_is_there(tmp_path: Path, dtype: torch.dtype) -> None:
    """No file has it, and memory that weights are read into has anything: Qwen-Image-2.1 embeds timesteps by one."""
    model = KINDS["qwen21"].stock()
    model.save_pretrained(tmp_path)
    stock = dict(type(model).from_pretrained(tmp_path, dtype=dtype).named_buffers())
    with torch.device("meta"):
        skeleton = type(model).from_config(model.config)
    for ours in (load_pretrained(type(model), tmp_path, dtype=dtype, device="cpu"), without_values(skeleton, dtype)):
        found = dict(ours.named_buffers())
        assert found and found.keys() == stock.keys()
        assert all(found[name].dtype == own.dtype and torch.equal(found[name], own) for name, own in stock.items())
