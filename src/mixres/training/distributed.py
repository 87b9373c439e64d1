"""Processes and devices: which backend, and how a model is spread over the ranks.

Promise: the same code on one process, on gloo and on NCCL. The configuration decides about precision and sharding,
not the launcher's own file. Cost: none on one process.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def make_accelerator(*, mixed_precision: str, report_to: str, folder: Path) -> Accelerator:
    """The accelerator of this process. Without an accelerator device several processes talk over gloo."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it accelerate takes two CPU ranks for two single runs
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(folder),
    )


def spread_over_ranks(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """`model` itself on one process; on several, wrapped so that gradients are summed over them.

    Summed, not averaged: loss sums are divided by the step's global divisor before backward. A factor of the world
    size there, to undo the average, would change roundings with the number of ranks wherever a layer computes in
    float32 inside (3.6e-8 in the parameters after 4 steps on 3 ranks in float64, 1e-14 without it).
    """
    if accelerator.num_processes == 1:
        return model
    device = accelerator.device
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,  # there are none
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(state: None, bucket: Any) -> Any:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
