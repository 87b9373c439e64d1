"""A quantised base: which layers, how many bytes, and that a batch still trains as its samples alone.

"Alone" is the stock model, quantised the same way and unpatched, on one sample. bitsandbytes needs a CUDA device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixres.errors import UserError
from mixres.models import quantize
from mixres.models.block_swap import BlockSwap
from mixres.models.blocks import recompute_blocks
from mixres.models.lora import trainable_parameters
from mixres.models.pretrained import load_pretrained
from mixres.models.quantize import Method, check_method, quantization_config
from mixres.models.qwen.layers import QUANTIZE_EXCLUSIONS
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from support import mixes
from support.lora_files import KINDS
from support.steps import with_adapters

Load = Callable[..., QwenImageTransformer2DModel]
ANYWHERE = ("int8", "fp8")
ON_CUDA = [pytest.param(method, "cuda", marks=pytest.mark.gpu) for method in ("nf4", "bnb_int8")]
METHODS = pytest.mark.parametrize(("method", "device"), [*((method, "cpu") for method in ANYWHERE), *ON_CUDA])

ADAPTERS = [
    *((method, "cpu", kind) for method in ANYWHERE for kind in ("lora", "dora")),
    ("int8", "cpu", "lokr"),
    ("fp8", "cpu", "loha"),
    *(pytest.param(*each.values, kind, marks=each.marks) for each in ON_CUDA for kind in ("lora", "dora")),
]


def load_quantised(folder: Path, method: Method, device: str) -> Any:
    config = quantization_config(method, QUANTIZE_EXCLUSIONS, dtype=torch.float32, device=device)
    kind = QwenImageTransformer2DModel
    return load_pretrained(kind, folder, dtype=torch.float32, device=device, quantization=config)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The small stock model from disk, its weights quantised, with adapters, B filled."""
    folders = {zero: tmp_path_factory.mktemp("stock") for zero in (False, True)}
    for zero, folder in folders.items():
        mixes.stock_model(zero).save_pretrained(folder)

    def loaded(method: Method, device: str, *, zero_cond_t: bool = False, **changes: Any) -> Any:
        model = load_quantised(folders[zero_cond_t], method, device)
        return with_adapters(model, **changes)

    return loaded


@pytest.mark.parametrize(("method", "device", "adapter"), ADAPTERS)
def test_a_quantised_batch_trains_as_quantised_samples_alone(
    method: Method, device: str, adapter: str, load: Load
) -> None:
    for zero_cond_t, mix in ((False, mixes.random_mix(3)), (True, mixes.random_mix(4))):
        mix = mix.to(device, torch.float32)
        kind = {"zero_cond_t": zero_cond_t, **KINDS[adapter]}
        alone = mixes.run(load(method, device, **kind), mix, "alone")
        patched = patch_qwen_model_for_multi_resolution(load(method, device, **kind))
        for change in ("none", "recomputed", *(["swapped"] if method in ANYWHERE else [])):
            if change == "recomputed":
                recompute_blocks(patched, every=1)
            elif change == "swapped":
                BlockSwap(patched, keep=1, device=torch.device(device))
            for layout in mixes.LAYOUTS:
                mixes.assert_same(mixes.run(patched, mix, layout), alone, forward=1e-5)
        assert any(gradient is not None for gradient in alone.gradients.values())


class WhereRounded(TorchDispatchMode):
    """The kinds of device that matrices are rounded on."""

    devices: ClassVar[set[str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.round.default, torch.ops.aten.clamp.default) and args[0].dim() == 2:
            self.devices.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


def test_weights_are_rounded_on_the_device_that_they_are_for(tmp_path: Path) -> None:
    """For which the meta device stands."""
    mixes.stock_model(False).save_pretrained(tmp_path)
    with WhereRounded() as look:
        model = load_quantised(tmp_path, "int8", "meta")
    assert look.devices == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@METHODS
def test_the_linear_layers_of_the_blocks_and_nothing_else_are_quantised(
    method: Method, device: str, load: Load
) -> None:
    """1 byte a weight (nf4: half of one) and 4 a row."""
    model = load(method, device)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            plain = type(module.weight) is nn.Parameter and module.weight.dtype == torch.float32
            assert plain is not name.startswith("transformer_blocks."), name
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if not n.endswith("weight"))
    assert all(p.dtype == torch.float32 and type(p.data) is Tensor for p in trainable_parameters(model).values())
    if method in ANYWHERE:
        weight: Any = model.transformer_blocks[0].img_mlp.net[2].base_layer.weight
        assert weight.qdata.nbytes == weight.numel()
        assert weight.scale.nbytes == 4 * weight.shape[0]


def test_no_token_of_another_sample_chooses_the_columns_of_bnb_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM.int8() takes outlier columns from all tokens of a call; a threshold of 0 has none."""
    monkeypatch.setattr(quantize, "check_method", lambda *arguments: None)
    config = quantization_config("bnb_int8", QUANTIZE_EXCLUSIONS, dtype=torch.bfloat16, device="cuda")
    assert (config.load_in_8bit, config.llm_int8_threshold) == (True, 0.0)


@pytest.mark.parametrize("method", ["nf4", "bnb_int8"])
def test_bitsandbytes_is_refused_without_a_cuda_device_or_its_package(method: Method) -> None:
    """It is not among the packages of the tests."""
    with pytest.raises(UserError, match=rf"model.quantize: {method} is bitsandbytes' and needs a CUDA device"):
        check_method(method, torch.device("cpu"))
    with pytest.raises(UserError, match=rf"model.quantize: {method} needs bitsandbytes, .*: pip install bitsandbytes"):
        check_method(method, torch.device("cuda"))
