"""Patched transformers inside the offloading of accelerate and diffusers: the stock images and outputs, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline

from mixres.models.attention import JointRotary
from mixres.models.packing import packed_lengths
from mixres.models.qwen.rope import PlannedShapes
from support import mixes
from support.kinds import KINDS

MIX = mixes.make_mix([[(1, 3, 4)], [(1, 2, 2), (1, 3, 3)]], [5, 3])


class Around(DiffusionPipeline):
    """A pipeline of a transformer alone: what offloading does is done to components of pipelines."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


CPU = torch.device("cpu")
OFFLOADING: dict[str, Callable[[Around], None]] = {
    "model": lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu"),
    # What `enable_sequential_cpu_offload` does to each component; its own device, "cpu:0", stops accelerate.
    "sequential": lambda pipeline: cpu_offload(pipeline.transformer, CPU),
    "group, leaves": lambda pipeline: pipeline.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "group, blocks": lambda p: p.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1),
}


@pytest.mark.parametrize("offload", OFFLOADING.values(), ids=OFFLOADING)
@pytest.mark.parametrize("name", ["qwen", "qwen zero_cond_t", "flux2", "flux", "qwen21"])
def test_an_offloaded_model_computes_what_it_computed(name: str, offload: Callable[[Around], None]) -> None:
    kind = KINDS[name]
    mix = kind.fitted(MIX)
    plain, model = kind.patched(adapters=True), kind.patched(adapters=True)
    offload(Around(model))
    with torch.no_grad():
        for layout in ("alone", *mixes.LAYOUTS, "alone"):
            for found, expected in zip(kind.forward(model, mix, layout), kind.forward(plain, mix, layout), strict=True):
                assert torch.equal(found, expected), layout


def test_what_rides_with_a_call_moves_with_its_arguments() -> None:
    lengths = packed_lengths([5], [7], CPU)
    rotary = JointRotary(torch.ones(12, 4, dtype=torch.complex64), torch.ones(1, 1, 1, 12, dtype=torch.bool), lengths)
    moved = PlannedShapes([[(1, 1, 1)]], rotary).to(torch.device("meta"), non_blocking=True)
    assert list(moved) == [[(1, 1, 1)]] and isinstance(moved.rotary, JointRotary)
    assert moved.rotary.packed is not None and moved.rotary.packed.text == lengths.text
    tensors = (moved.rotary.freqs, moved.rotary.mask, moved.rotary.packed.cumulative)
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}
    pair = PlannedShapes([], (torch.ones(3, 4), torch.ones(2, 4))).to(torch.device("meta")).rotary
    assert isinstance(pair, tuple) and {freqs.device.type for freqs in pair} == {"meta"}
    assert JointRotary(None).to(torch.device("meta")) == JointRotary(None)
