"""Base weights in 8 or 4 bits, through diffusers' own quantisation configurations.

Promise: the weights of the linear layers inside the repeated blocks and nothing else are quantised: biases, norms and
the layers before and behind the blocks keep `model.dtype`, activations too, adapters are float32. What device or
packages cannot do is refused in one line. Cost: one pass over the weights while loading; in each call of a layer its
weights once more in the precision of the call. torchao's int8 and fp8 keep that copy for backward, unless the block is
recomputed there (gradient checkpointing).
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from torch import Tensor, nn

from mixres.errors import UserError
from mixres.models.blocks import repeated_blocks

Method = Literal["int8", "fp8", "nf4", "bnb_int8"]
KEY = "model.quantize"
_PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes", "bnb_int8": "bitsandbytes"}


def stored_bytes(method: Method, outputs: int, inputs: int) -> int:
    """Bytes of a quantised matrix, its float32 scales among them: nf4 has one for 64 values, the others one a row."""
    values = outputs * inputs
    return values // 2 + 4 * (values // 64) if method == "nf4" else values + 4 * outputs


def is_torchao(method: Method | None) -> bool:
    """Whether torchao does it; bitsandbytes' methods need CUDA."""
    return method is not None and _PACKAGES[method] == "torchao"


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """Those that a quantised weight is made of, or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def empty_like(tensor: Any, device: torch.device) -> Any:
    """On `device`; the parts of a quantised tensor too."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return torch.empty_like(tensor, device=device)
    names, context = tensor.__tensor_flatten__()
    parts = {name: empty_like(getattr(tensor, name), device) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def quantize_blocks(
    transformer: nn.Module, method: Method, *, dtype: torch.dtype, before: Callable[[nn.Module], None] | None = None
) -> None:
    """Quantise the blocks where they are by a method of torchao, as loading them does; `before` is called with each."""
    from torchao.quantization import quantize_

    config = quantization_config(method, (), dtype=dtype, device="meta")
    for block in repeated_blocks(transformer):
        if before:
            before(block)
        quantize_(block, config.quant_type)
    transformer.hf_quantizer = SimpleNamespace(quantization_config=config)  # type: ignore[assignment] # peft reads it


def check_method(method: Method, device: torch.device) -> None:
    """That weights can be quantised by `method` on `device`.

    Raises:
        UserError: not on this device, or the package is not installed.
    """
    package = _PACKAGES[method]
    if package == "bitsandbytes" and device.type != "cuda":
        raise UserError(
            f"{KEY}: {method} is bitsandbytes' and needs a CUDA device, this run is on {device.type}: choose int8 or "
            "fp8, which work on every device, or null"
        )
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{KEY}: {method} needs {package}, which is not installed: pip install {package}")


def quantization_config(
    method: Method, exclude: Sequence[str], *, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """What `from_pretrained` takes as `quantization_config`, for all linear layers but those in `exclude`.

    `dtype` is that of the layers' inputs and outputs.

    Raises:
        UserError: as `check_method`.
    """
    check_method(method, torch.device(device))
    if method == "nf4":  # QLoRA, Dettmers et al. 2023 (arXiv 2305.14314)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(exclude),
        )
    if method == "bnb_int8":
        # LLM.int8(), Dettmers et al. 2022 (arXiv 2208.07339), without its outlier columns. Those are chosen over all
        # tokens of a call: at the default threshold of 6 a sample's values would depend on its batch.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=list(exclude))
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[method]
    # The other default of torchao changes settings of the compiler for the whole process.
    return TorchAoConfig(kind(set_inductor_config=False), modules_to_not_convert=list(exclude))
