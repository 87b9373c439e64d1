"""Adapters: what they attach to, how they start, and the file the stock pipeline loads."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixres.errors import UserError
from mixres.models.lora import (
    add_lora,
    check_pretrained,
    check_targets,
    expanded,
    promote,
    train_all,
    trainable_parameters,
)
from mixres.models.lora_file import FILE_NAME, lora_file, read_header
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.qwen.layers import ATTENTION, LORA_PRESETS, untrained_modules
from support import mixes
from support.lora_files import KINDS, add_noise
from support.steps import with_adapters

RECIPE = {"base": "somewhere", "control_area": 4096, "prompt": "交换"}
LAST = "transformer_blocks.1."
SOME = ("lora", "dora", "lokr, whole", "loha")


def with_table(base: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    transformer = QwenImageEdit(str(base)).load_transformer(dtype=dtype, device="cpu")
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": ATTENTION, "seed": 0}
    options["presets"] = LORA_PRESETS
    return transformer, add_lora(transformer, **(options | changes), untrained=untrained_modules(transformer))


@pytest.fixture(scope="module")
def skeleton(tiny_base: Path) -> QwenImageTransformer2DModel:
    return QwenImageEdit(str(tiny_base)).transformer_skeleton()


@pytest.mark.parametrize("changes", [KINDS[kind] for kind in SOME], ids=SOME)
def test_autocast_casts_the_inputs_of_adapters_and_nobody_before_it(changes: dict[str, Any]) -> None:
    """The same bits as with peft's casts to float32, and fewer copies; DoRA and calls without autocast keep them."""
    model = with_adapters(mixes.patched_model().to(torch.bfloat16), **changes)
    mix = mixes.random_mix(3).to("cpu", torch.bfloat16)

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor | None], int]:
        with torch.autocast("cpu", torch.bfloat16), CountedCasts() as casts:
            outputs = mixes.forward_packed(model, mix)
        sum(output.float().square().sum() for output in outputs).backward()
        gradients = [parameter.grad for parameter in trainable_parameters(model).values()]
        model.zero_grad(set_to_none=True)
        return outputs, gradients, casts.count

    own = run()
    assert torch.isfinite(model(**mixes.padded_call(mix))[0]).all(), "without autocast"
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = True
    cast = run()
    for one, other in zip((*own[0], *own[1]), (*cast[0], *cast[1]), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    # A product, LoHa's among them, is in the precision of autocast already.
    assert (own[2] < cast[2]) == (changes.get("adapter", "lora") in ("lora", "lokr"))


class CountedCasts(TorchDispatchMode):
    """Counts casts to float32."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = (kwargs or {}).get("dtype") == torch.float32
        self.count += func is torch.ops.aten._to_copy.default and wide
        return func(*args, **(kwargs or {}))


HINTS = {
    "to_kk": "did you mean 'to_k'?",
    "attn.to_vv": "did you mean 'attn.to_v'?",
    "add_q_prj": "did you mean 'add_q_proj'?",
    "atention": "did you mean 'attention'?",
    "ALL": "did you mean 'all'?",
    "attention,mlp": "did you mean 'attention+mlp'?",
    **dict.fromkeys(
        ("mlp", "all-linear", "zzz"), "write one of attention, attention+mlp, all, or the ending of a layer's name"
    ),
}


def test_all_patterns_that_match_nothing_are_named_at_once_with_the_nearest(skeleton: nn.Module) -> None:
    check_targets(skeleton, [*ATTENTION, "attn.to_out.0", "transformer_blocks.0.img_mlp.net.2", "proj_out"])
    with pytest.raises(UserError) as caught:
        check_targets(skeleton, ["to_q", *HINTS], presets=LORA_PRESETS)
    for line, (pattern, hint) in zip(caught.value.messages, HINTS.items(), strict=True):
        start = f"model.lora.target_modules: '{pattern}' matches no linear layer of the transformer; "
        assert line.removeprefix(start) == hint


def test_a_preset_stands_for_its_layers(skeleton: nn.Module) -> None:
    assert expanded(["attention"], LORA_PRESETS) == list(ATTENTION)
    several = expanded(["to_q", "attention+mlp", "x"], LORA_PRESETS)
    assert several[0] == "to_q" and len(several) == len(set(LORA_PRESETS["attention+mlp"])) + 1
    every = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    matched = {
        preset: {name for name in every if any(f".{name}".endswith(f".{ending}") for ending in endings)}
        for preset, endings in LORA_PRESETS.items()
    }
    assert matched["attention"] < matched["attention+mlp"] < matched["all"] == every
    check_targets(skeleton, list(LORA_PRESETS), presets=LORA_PRESETS)


def test_patterns_that_match_only_what_cannot_learn_are_named(skeleton: QwenImageTransformer2DModel) -> None:
    untrained = untrained_modules(skeleton)
    check_targets(skeleton, ["to_add_out", "txt_mlp.net.2"], untrained=untrained)
    with pytest.raises(UserError) as caught:
        check_targets(skeleton, [f"{LAST}attn.to_add_out", "to_q", f"{LAST}txt_mlp.net.2"], untrained=untrained)
    found = [line.split("'")[1] for line in caught.value.messages]
    assert found == [f"{LAST}attn.to_add_out", f"{LAST}txt_mlp.net.2"]
    assert all("reaches no loss" in line for line in caught.value.messages)


def test_what_reaches_no_loss_gets_no_adapter_and_the_table_counts_the_others(tiny_base: Path) -> None:
    targets = [*ATTENTION, "img_mlp.net.2", "txt_mlp.net.2"]
    transformer, table = with_table(tiny_base, target_modules=targets)
    in_last = {"add_q_proj": 1, "to_add_out": 1, "txt_mlp.net.2": 1}
    assert {row.pattern: row.modules for row in table} == dict.fromkeys(targets, 2) | in_last
    trained = trainable_parameters(transformer)
    assert not [name for name in trained if name.startswith(untrained_modules(transformer))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_adapters_are_float32_or_better(
    tiny_base: Path, base_dtype: torch.dtype, dtype: torch.dtype, kind: str
) -> None:
    """On every layer; DoRA's lengths too. As many as the table counts, and at first they change nothing."""
    transformer, table = with_table(tiny_base, base_dtype, target_modules=["all"], **KINDS[kind])
    trained = trainable_parameters(transformer)
    assert {p.dtype for p in trained.values()} == {dtype}
    assert {p.dtype for name, p in transformer.named_parameters() if name not in trained} == {base_dtype}
    layers = sum(row.modules for row in table)
    assert len({name.rpartition(".lo")[0] or name.rpartition(".hada")[0] for name in trained}) == layers
    for layer in transformer.modules():
        if isinstance(layer, (LoKrLayer, LoHaLayer)):
            assert not layer.get_delta_weight("default").any()
    assert sum(row.parameters for row in table) == sum(p.numel() for p in trained.values())


def test_a_is_a_function_of_the_seed_alone(tiny_base: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trainable_parameters(with_table(tiny_base, seed=7)[0])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is untouched"
    torch.manual_seed(2)
    again = trainable_parameters(with_table(tiny_base, seed=7)[0])
    other = trainable_parameters(with_table(tiny_base, seed=8)[0])
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if ".lora_A." in name:
            assert not torch.equal(parameter, other[name])
        else:
            assert not parameter.any()


def test_all_weights_are_float32_and_what_reaches_no_loss_stays_frozen(tiny_base: Path) -> None:
    """One precision throughout: mixed ones cannot be multiplied where there is no autocast, in sampling for one."""
    transformer = QwenImageEdit(str(tiny_base)).load_transformer(dtype=torch.bfloat16, device="cpu")
    untrained = untrained_modules(transformer)
    assert train_all(transformer, untrained=untrained) == []
    promote(transformer, torch.bfloat16)
    assert {p.dtype for p in transformer.parameters()} == {torch.float32}
    frozen = {name for name, p in transformer.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in transformer.state_dict() if name.startswith(tuple(f"{m}." for m in untrained))}
    assert frozen


@pytest.fixture(scope="module", params=KINDS)
def filled(tiny_base: Path, request: pytest.FixtureRequest) -> QwenImageTransformer2DModel:
    """Adapters that change the output, and lengths that are not the base's."""
    transformer = with_table(tiny_base, **KINDS[request.param])[0]
    transformer.kind = KINDS[request.param]
    add_noise(trainable_parameters(transformer))
    return transformer


@pytest.fixture(scope="module")
def file(filled: QwenImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / FILE_NAME
    path.write_bytes(lora_file(trainable_parameters(filled), filled, RECIPE))
    return path


def test_equal_adapters_make_equal_bytes(file: Path, filled: QwenImageTransformer2DModel) -> None:
    """Many times over: safetensors' own order of the metadata is one of chance."""
    recipe, parameters = dict(reversed(RECIPE.items())), trainable_parameters(filled)
    assert {lora_file(parameters, filled, recipe) for _ in range(8)} == {file.read_bytes()}


def settings(transformer: QwenImageTransformer2DModel) -> dict[str, Any]:
    common = {"r": 4, "lora_alpha": 8.0, "use_dora": False, "target_modules": ["attention"], "presets": LORA_PRESETS}
    return common | transformer.kind


@pytest.mark.parametrize("from_folder", [False, True])
def test_training_continues_from_a_file(
    tiny_base: Path, skeleton: nn.Module, filled: QwenImageTransformer2DModel, file: Path, from_folder: bool
) -> None:
    given = str(file.parent if from_folder else file)
    check_pretrained(skeleton, given, **settings(filled), untrained=untrained_modules(skeleton))
    continued = with_table(tiny_base, seed=5, pretrained_weight=given, **settings(filled))[0]
    own, theirs = trainable_parameters(continued), trainable_parameters(filled)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_every_setting_that_does_not_fit_a_file_is_named_with_the_one_that_does(
    skeleton: nn.Module, filled: QwenImageTransformer2DModel, file: Path
) -> None:
    dora, r = settings(filled)["use_dora"], settings(filled)["r"]
    wrong = {"r": 8, "lora_alpha": 4.0, "use_dora": not dora, "target_modules": ["to_q", "img_mlp.net.2"]}
    wrong = settings(filled) | wrong | {"presets": {}}
    with pytest.raises(UserError) as caught:
        check_pretrained(skeleton, str(file), **wrong, untrained=untrained_modules(skeleton))
    lines = [message.replace(str(file), "FILE") for message in caught.value.messages]
    ranked = [
        f"model.lora.r: 8 does not fit FILE, which has {r}: write {r}",
        "model.lora.lora_alpha: 4.0 does not fit FILE, which has 8.0: write 8.0",
    ]
    assert lines[:-1] == [
        *(ranked if r == 4 else []),  # whole factors have no rank
        f"model.lora.use_dora: {json.dumps(not dora)} does not fit FILE, which has {json.dumps(dora)}: write "
        f"{json.dumps(dora)}",
    ]
    assert lines[-1].startswith("model.lora.target_modules: the adapters of FILE are for others: ")
    assert "it has none for transformer_blocks.0.img_mlp.net.2 and 1 more" in lines[-1]
    assert "it has one for transformer_blocks.0.attn.add_k_proj and 11 more" in lines[-1]


def test_a_file_of_another_kind_or_split_is_refused(
    skeleton: nn.Module, filled: QwenImageTransformer2DModel, file: Path
) -> None:
    def refused(**changes: Any) -> str:
        given = settings(filled) | {"untrained": untrained_modules(skeleton)} | changes
        with pytest.raises(UserError) as caught:
            check_pretrained(skeleton, str(file), **given)
        (line,) = caught.value.messages
        return line.replace(str(file), "FILE")

    kind = read_header(str(file)).adapter
    other = "loha" if kind == "lokr" else "lokr"
    expected = f"model.adapter: {other} does not fit FILE, which has {kind}: write that"
    assert refused(adapter=other, use_dora=False) == expected
    if kind == "lokr":
        line = refused(factor=2)
        assert line.startswith("model.lora.factor: 2 splits transformer_blocks.0.attn.") and "lokr_w1 2 x 2" in line
        assert line.endswith(": write the factor and decompose_both it was made with")


def test_a_lora_of_a_base_of_another_size_is_refused(filled: QwenImageTransformer2DModel, file: Path) -> None:
    other = mixes.stock_model()
    reason = r"is for another base: its transformer_blocks\.0\.attn\.add_k_proj is 64 x 64, .*; name one"
    with pytest.raises(UserError, match=reason):
        check_pretrained(other, str(file), **settings(filled), untrained=untrained_modules(other))


def test_what_is_no_lora_is_refused(tmp_path: Path, file: Path, tiny_base: Path) -> None:
    truncated, mark = tmp_path / "half.safetensors", tmp_path / "opened"
    truncated.write_bytes(file.read_bytes()[:-8])
    planted = [
        tmp_path / "pytorch_lora_weights.bin",
        tmp_path / "pickled" / FILE_NAME,
    ]  # named itself, and in the place of the weights
    payload = f"cos\nmkdir\n(V{mark}\ntR.".encode()  # it makes the folder `mark` where it is unpickled
    planted[1].parent.mkdir()
    for pickled in planted:
        pickled.write_bytes(payload)
    weights = tiny_base / "transformer" / "diffusion_pytorch_model.safetensors"
    for path, reason in (
        (tmp_path / "none", "there is no file"),
        (tmp_path, "there is no file"),
        (planted[0], "is not a .safetensors file"),
        (planted[1], "cannot be read"),
        (truncated, "cannot be read"),
        (weights, "is no LoRA of one rank in diffusers' format for a transformer"),
    ):
        with pytest.raises(UserError, match=r"^model\.lora\.pretrained_weight: ") as caught:
            read_header(str(path))
        assert reason in caught.value.messages[0]
    assert not mark.exists()
    pickle.loads(payload)  # it would have left its mark
    assert mark.exists()
