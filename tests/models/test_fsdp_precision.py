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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mixres.models.attention import JointRotary
from mixres.models.blocks import repeated_blocks
from support import mixes
from support.kinds import KINDS

LAYOUTS = ("padded", "packed")
NAMES = ("qwen", "qwen zero_cond_t", "flux2", "flux")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_positions_stay_exact_under_fsdp2_mixed_precision() -> None:
    here, paths = Path(__file__), os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}  # for `support`
    done = subprocess.run([sys.executable, here], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    assert [case["case"] for case in cases] == [[layout, kind] for layout in LAYOUTS for kind in NAMES]
    for case in cases:
        assert case["frequencies"] == ["torch.complex64"], case
        assert case["weights"] == ["torch.bfloat16"], case  # the policy is at work
        assert case["forward"] <= 1.5 * case["forward alone"], case
        assert case["gradient"] <= 1.5 * case["gradient alone"], case


def compare(layout: str, name: str) -> dict[str, Any]:
    """Errors against float32 of a batch under the policy, and of the stock bfloat16 model on one sample at a time."""
    kind, wide = KINDS[name], mixes.main_mix_for_bf16()
    reference, rounded = kind.run(kind.stock(adapters=True), wide, "alone"), wide.to("cpu", torch.bfloat16)
    alone = kind.run(kind.stock(adapters=True).to(torch.bfloat16), rounded, "alone")
    model = kind.patched(adapters=True)
    seen: dict[str, set[str]] = {"frequencies": set(), "weights": set()}

    def look(attn: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan = kwargs.get("plan", kwargs["image_rotary_emb"])
        assert isinstance(plan, JointRotary) and plan.freqs is not None
        seen["frequencies"].add(str(plan.freqs.dtype))
        seen["weights"].update(str(p.dtype) for p in attn.parameters())

    for block in repeated_blocks(model):
        block.attn.register_forward_pre_hook(look, with_kwargs=True)
    measured = kind.run(sharded(model), rounded, layout)
    gradients = {name: None if g is None else g.full_tensor() for name, g in measured.gradients.items()}
    found, single = (
        result.to("cpu", torch.float32) for result in (mixes.Result(measured.outputs, gradients), alone)
    )  # fmt: skip
    return {
        "case": [layout, name],
        **{what: sorted(dtypes) for what, dtypes in seen.items()},
        "forward": mixes.forward_error(found, reference),
        "forward alone": mixes.forward_error(single, reference),
        "gradient": mixes.gradient_error(found, reference),
        "gradient alone": mixes.gradient_error(single, reference),
    }


def sharded(model: Any) -> Any:
    """Its float32 weights computed with in bfloat16, as users of FSDP2 set it up."""
    policy, mesh = MixedPrecisionPolicy(param_dtype=torch.bfloat16), init_device_mesh("cpu", (1,))
    for module in (*repeated_blocks(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        results = [compare(layout, name) for layout in LAYOUTS for name in NAMES]
        dist.destroy_process_group()
    sys.stdout.write(json.dumps(results) + "\n")
