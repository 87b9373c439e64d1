"""LoKr and LoHa in files of LyCORIS: lycoris-lora reads ours, and we read its, as the same change of the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixres.errors import UserError
from mixres.models.lora import add_lora, check_pretrained, trainable_parameters
from mixres.models.lora_file import layer_tensors, lora_file, read_header, weight_change
from support.lora_files import KINDS, add_noise

ALPHA, RANK, PRESET = 6.0, 4, {"enable_conv": False, "target_module": ["Linear"]}
LYCORIS = {name: kind for name, kind in KINDS.items() if kind.get("adapter") in ("lokr", "loha")}
COMMON: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["*"], "untrained": ()}


class Model(PeftAdapterMixin, nn.Module):
    """Layers that are wide, tall and of one output, with names that underscores could confuse."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(128, 128)
        self.img_mlp = nn.ModuleDict({"net_0": nn.ModuleList([nn.Linear(128, 512), nn.Linear(512, 128)])})
        self.narrow = nn.Linear(96, 40)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name.replace(".base_layer", ""): m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def changes_of_lycoris(network: LycorisNetwork, model: nn.Module) -> dict[str, Tensor]:
    """By the name of the layer: what its layers compute, in place of those of `model`.

    Not its `get_diff_weight`, by which it merges: in 4.1.3 that multiplies by alpha / r twice.
    """
    network.apply_to()
    for layer in layers(model).values():
        layer.weight.zero_()
        layer.bias.zero_()
    return {name: layer(torch.eye(layer.in_features)).T for name, layer in layers(model).items()}


@torch.no_grad()
def changes_of_ours(model: nn.Module) -> dict[str, Tensor]:
    """What the layers compute with their adapters in training; peft's sum for the weight is the same."""
    found, state = {}, torch.get_rng_state()
    for name, base in layers(model).items():
        layer, one = model.train().get_submodule(name), torch.eye(base.in_features)
        base.weight.zero_()
        base.bias.zero_()
        found[name] = layer(one).T
        torch.testing.assert_close(found[name], layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), state), "nothing is left to chance"
    return found


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys() and expected
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.fixture(params=LYCORIS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LYCORIS[request.param]


@pytest.fixture
def ours(model: Model, kind: dict[str, Any], tmp_path: Path) -> Path:
    """A file of ours, whose adapters `model` has."""
    add_lora(model, **(COMMON | kind), lora_dropout=0, seed=0)
    add_noise(trainable_parameters(model))
    path = tmp_path / "ours.safetensors"
    path.write_bytes(lora_file(trainable_parameters(model), model, {"base": "somewhere"}))
    return path


def test_lycoris_reads_our_file_as_it_was_trained(model: Model, ours: Path) -> None:
    expected, stock = changes_of_ours(model), Model()
    network, _ = create_lycoris_from_weights(1.0, str(ours), stock)
    assert apart(changes_of_lycoris(network, stock), expected) <= 1e-6
    header = read_header(str(ours))
    found = {
        name: weight_change(parts, header.lora_alpha)
        for name, parts in layer_tensors(header, ours.read_bytes()).items()
    }
    assert apart(found, expected) <= 1e-6


def planted_no_alpha(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As large as the rank."""
    return {name: torch.tensor(float(RANK)) if name.endswith(".alpha") else t for name, t in tensors.items()}


def planted_transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The square small factor, or the products of LoHa with each other's right side."""
    other = {"hada_w1_b": "hada_w2_b", "hada_w2_b": "hada_w1_b"}

    def changed(name: str, tensor: Tensor) -> Tensor:
        stem, _, part = name.rpartition(".")
        if part in other:
            return tensors[f"{stem}.{other[part]}"]
        return tensor.T.contiguous() if part in ("lokr_w1", "lokr_w1_b") and len(set(tensor.shape)) == 1 else tensor

    return {name: changed(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("planted", [planted_no_alpha, planted_transposed])
def test_the_measure_sees_planted_problems(model: Model, ours: Path, planted: Any, kind: dict[str, Any]) -> None:
    if planted is planted_no_alpha and kind.get("r"):
        assert all(t == kind["r"] for name, t in load_file(ours).items() if name.endswith(".alpha")), "scaled by 1"
        return
    save_file(planted(load_file(ours)), ours)
    stock = Model()
    network, _ = create_lycoris_from_weights(1.0, str(ours), stock)
    assert apart(changes_of_lycoris(network, stock), changes_of_ours(model)) > 1e-2


@pytest.fixture
def theirs(kind: dict[str, Any], tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file of lycoris-lora, without our metadata, and its changes."""
    base, given = Model(), {name: value for name, value in kind.items() if name != "adapter"}
    LycorisNetwork.apply_preset(PRESET)
    rank = given.pop("r", RANK)
    network = create_lycoris(base, 1.0, linear_dim=rank, linear_alpha=ALPHA, algo=kind["adapter"], **given)
    changes_of_lycoris(network, base)  # it registers its layers where it puts them in place
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "theirs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path, {name: layer(torch.eye(layer.in_features)).detach().T for name, layer in layers(base).items()}


def test_training_continues_from_a_file_of_lycoris(
    model: Model, kind: dict[str, Any], theirs: tuple[Path, dict[str, Tensor]]
) -> None:
    path, expected = theirs
    check_pretrained(model, str(path), **(COMMON | kind), use_dora=False)
    add_lora(model, **(COMMON | kind), lora_dropout=0, seed=0, pretrained_weight=str(path))
    assert apart(changes_of_ours(model), expected) <= 1e-6


def test_what_lycoris_has_besides_is_refused(model: Model, ours: Path, kind: dict[str, Any]) -> None:
    """Lengths of rows, convolutions, and two ranks in one file."""
    tensors = load_file(ours)
    stem = "lycoris_to_q"
    lengths = {f"{stem}.dora_scale": torch.ones(128, 1)}
    for more, where in ((lengths, stem), ({"lycoris_conv.hada_t1": torch.ones(2, 2, 3, 3)}, "lycoris_conv")):
        save_file(tensors | more, ours)
        reason = f"is no LoKr or LoHa of linear layers alone, see {where}; name another"
        with pytest.raises(UserError, match=f"^model.lora.pretrained_weight: .* {reason}"):
            read_header(str(ours))
    if "r" not in kind:
        save_file(tensors | {f"{stem}.alpha": torch.tensor(1.0)}, ours)
        with pytest.raises(UserError, match="has adapters of several kinds, ranks or alphas; name another"):
            read_header(str(ours))
