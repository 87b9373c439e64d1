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

from mixres.models.attention import JointRotary
from mixres.models.blocks import recompute_blocks, repeated_blocks
from mixres.training.distributed import shard
from support import mixes
from support.kinds import KINDS


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # as the stock blocks of FLUX.1 do
@pytest.mark.parametrize(("layout", "recomputed"), [("padded", False), ("packed", False), ("packed", True)])
@pytest.mark.parametrize("name", ["qwen", "qwen zero_cond_t", "flux2", "flux", "qwen21", "z_image"])
def test_positions_stay_exact_under_fsdp2_mixed_precision(layout: str, recomputed: bool, name: str) -> None:
    """A batch under the policy is as near to float32 as the stock bfloat16 model on one sample at a time."""
    kind = KINDS[name]
    wide = kind.mix_for_bf16()
    reference, rounded = kind.run(kind.stock(adapters=True), wide, "alone"), wide.to("cpu", torch.bfloat16)
    single = kind.run(kind.stock(adapters=True).to(torch.bfloat16), rounded, "alone")
    model = kind.patched(adapters=True)
    frequencies, weights = set(), set()

    def look(attn: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keys = ("plan", "image_rotary_emb", "rotary_emb", "freqs_cis")
        handed = [kwargs[key] for key in keys if kwargs.get(key) is not None]
        freqs = handed[0].freqs if isinstance(handed[0], JointRotary) else handed[0]
        frequencies.add(freqs.dtype)
        weights.update(p.dtype for p in attn.parameters())

    for block in repeated_blocks(model):
        attention: Any = block.attention if name == "z_image" else block.attn
        attention.register_forward_pre_hook(look, with_kwargs=True)
    if recomputed:
        recompute_blocks(model, every=1)
    shard(model, torch.device("cpu"), size=1, half=True, cpu_offload=False)
    measured = kind.run(model, rounded, layout)
    assert frequencies == {torch.complex64}
    assert weights == {torch.bfloat16}, "the policy is at work"
    gradients = {name: None if g is None else g.full_tensor() for name, g in measured.gradients.items()}
    found = mixes.Result(measured.outputs, gradients)
    assert mixes.forward_error(found, reference) <= 1.5 * mixes.forward_error(single, reference)
    assert mixes.gradient_error(found, reference) <= 1.5 * mixes.gradient_error(single, reference)
