"""What ComfyUI reads of a LoRA; its names and shapes are held by tests/test_export.py."""

import pytest
import torch

from mixres.inference.comfyui import lora_tensors
from mixres.inference.merge import Adapter


@pytest.mark.parametrize(("alpha", "dtype"), [(16, torch.float32), (4.75, torch.float32), (0.1, torch.float64)])
def test_the_scale_is_exactly_the_one_that_was_trained(alpha: float, dtype: torch.dtype) -> None:
    """ComfyUI reads `alpha` as a Python number and divides it by the rows of A, as peft divides lora_alpha by r."""
    down, up = torch.randn(3, 5), torch.randn(7, 3)
    tensors = lora_tensors({"block.to_q": Adapter(down, up, alpha)})
    assert list(tensors) == [
        f"diffusion_model.block.to_q.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha")
    ]
    a, b, stated = tensors.values()
    assert a is down and b is up
    assert (stated.item() / len(down), stated.dtype, stated.shape) == (alpha / 3, dtype, ())
