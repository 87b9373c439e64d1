"""Under FSDP2's mixed precision, which casts what it finds in a module's inputs, positions stay exact.

The cast turns every float32 tensor in the inputs of a wrapped block into bfloat16, also inside tuples and dataclasses.
bfloat16 cannot tell the positions 1000 and 1001 apart, so frequencies must not be among them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from support import mixes


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("layout", mixes.LAYOUTS)
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_positions_stay_exact_under_fsdp2_mixed_precision(layout: str, zero_cond_t: bool) -> None:
    """A batch under the policy is as near to float32 as the stock bfloat16 model on one sample at a time."""
    reference, rounded = mixes.alone("main", zero_cond_t), mixes.main_mix().to("cpu", torch.bfloat16)
    single = mixes.run(mixes.stock_model(zero_cond_t, mixes.EVERY_LINEAR).to(torch.bfloat16), rounded, "alone")
    model = mixes.patched_model(zero_cond_t, mixes.EVERY_LINEAR)
    frequencies, weights = set(), set()

    def look(attn: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frequencies.add(kwargs["image_rotary_emb"].freqs.dtype)
        weights.update(p.dtype for p in attn.parameters())

    for block in model.transformer_blocks:
        block.attn.register_forward_pre_hook(look, with_kwargs=True)
    policy, mesh = MixedPrecisionPolicy(param_dtype=torch.bfloat16), init_device_mesh("cpu", (1,))
    for module in (*model.transformer_blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    measured = mixes.run(model, rounded, layout)
    assert frequencies == {torch.complex64}
    assert weights == {torch.bfloat16}, "the policy is at work"
    gradients = {name: None if g is None else g.full_tensor() for name, g in measured.gradients.items()}
    found = mixes.Result(measured.outputs, gradients)
    assert mixes.forward_error(found, reference) <= 1.5 * mixes.forward_error(single, reference)
    assert mixes.gradient_error(found, reference) <= 1.5 * mixes.gradient_error(single, reference)
