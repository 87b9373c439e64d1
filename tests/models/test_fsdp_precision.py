"""Under FSDP2's mixed precision, which casts what it finds in a module's inputs, positions stay exact.

The cast turns every float32 tensor in the inputs of a wrapped block into bfloat16, also inside tuples and dataclasses.
bfloat16 cannot tell the positions 1000 and 1001 apart, so frequencies must not be among them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mixres.models.attention import JointRotary
from support import mixes

LAYOUTS = ("padded", "packed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_positions_stay_exact_under_fsdp2_mixed_precision() -> None:
    here, paths = Path(__file__), os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}  # for `support`
    done = subprocess.run([sys.executable, here], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    assert [case["case"] for case in cases] == [[layout, z] for layout in LAYOUTS for z in (False, True)]
    for case in cases:
        assert case["frequencies"] == ["torch.complex64"], case
        assert case["weights"] == ["torch.bfloat16"], case  # the policy is at work
        assert case["forward"] <= 1.5 * case["forward alone"], case
        assert case["gradient"] <= 1.5 * case["gradient alone"], case


def compare(layout: str, zero_cond_t: bool) -> dict[str, Any]:
    """Errors against float32 of a batch under the policy, and of the stock bfloat16 model on one sample at a time."""
    reference = mixes.run(mixes.stock_model(zero_cond_t, mixes.EVERY_LINEAR), mixes.main_mix(), "alone")
    rounded = mixes.main_mix().to("cpu", torch.bfloat16)
    alone = mixes.run(mixes.stock_model(zero_cond_t, mixes.EVERY_LINEAR).to(torch.bfloat16), rounded, "alone")
    model = mixes.patched_model(zero_cond_t, mixes.EVERY_LINEAR)
    seen: dict[str, set[str]] = {"frequencies": set(), "weights": set()}

    def look(attn: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rotary = kwargs["image_rotary_emb"]
        assert isinstance(rotary, JointRotary)
        seen["frequencies"].add(str(rotary.freqs.dtype))
        seen["weights"].update(str(p.dtype) for p in attn.parameters())

    for block in model.transformer_blocks:
        block.attn.register_forward_pre_hook(look, with_kwargs=True)
    measured = mixes.run(sharded(model), rounded, layout)
    gradients = {name: None if g is None else g.full_tensor() for name, g in measured.gradients.items()}
    found, single = (
        result.to("cpu", torch.float32) for result in (mixes.Result(measured.outputs, gradients), alone)
    )  # fmt: skip
    return {
        "case": [layout, zero_cond_t],
        **{name: sorted(dtypes) for name, dtypes in seen.items()},
        "forward": mixes.forward_error(found, reference),
        "forward alone": mixes.forward_error(single, reference),
        "gradient": mixes.gradient_error(found, reference),
        "gradient alone": mixes.gradient_error(single, reference),
    }


def sharded(model: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """Its float32 weights computed with in bfloat16, as users of FSDP2 set it up."""
    policy, mesh = MixedPrecisionPolicy(param_dtype=torch.bfloat16), init_device_mesh("cpu", (1,))
    for module in (*model.transformer_blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        results = [compare(layout, zero_cond_t) for layout in LAYOUTS for zero_cond_t in (False, True)]
        dist.destroy_process_group()
    sys.stdout.write(json.dumps(results) + "\n")
