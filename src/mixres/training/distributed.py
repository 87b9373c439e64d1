"""Processes and devices: which backend, and how a model is spread over the ranks.

Promise: the same code on one process, on gloo and on NCCL. The configuration decides about precision and sharding,
not the launcher's own file. Cost: none on one process.

Gradients are summed over ranks, not averaged: loss sums are divided by the step's global divisor before backward. A
factor of the world size there, to undo an average, would change roundings with the number of ranks wherever a layer
computes in float32 inside (3.6e-8 in the parameters after 4 float64 steps on 3 ranks, 4e-15 without it).
"""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mixres.errors import UserError

Parallel = Literal["ddp", "fsdp2"]


def make_accelerator(*, mixed_precision: str, report_to: str, folder: Path) -> Accelerator:
    """The accelerator of this process. Without an accelerator device several processes talk over gloo.

    Raises:
        UserError: the tracker `report_to` is not installed; accelerate would leave it out without a word.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"logging.report_to: {report_to} is not installed: pip install {report_to}, or set it to none")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it accelerate takes two CPU ranks for two single runs
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(folder),
    )


class Launched(NamedTuple):
    """Which of how many processes a launcher made this one."""

    rank: int
    world_size: int
    device: torch.device


def launched() -> Launched:
    """What torchrun and accelerate tell their processes; no connection between them is opened."""
    said = os.environ.get
    device = torch.device("cuda", int(said("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    return Launched(int(said("RANK", 0)), int(said("WORLD_SIZE", 1)), device)


def require_agreement(accelerator: Accelerator, digest: str) -> None:
    """All ranks stop, together and before the first step, where they would not follow one plan.

    Raises:
        UserError: `digest` is not the same on all ranks.
    """
    digests = gather_object([digest]) if accelerator.num_processes > 1 else [digest]
    if differing := [rank for rank, other in enumerate(digests) if other != digests[0]]:
        raise UserError(
            f"ranks {differing} read other data or another configuration than rank 0: give all of them the same files"
        )


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """FSDP2: split the weights of each repeated block, and of the rest, over all ranks, in place.

    Before the optimizer is made: the parameters become sharded tensors of the same names. On one process there is
    nothing to split.
    """
    if accelerator.num_processes == 1:
        return
    # The model's output is a view; it is read, never changed in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    repeated: set[str] = set(model._no_split_modules)  # type: ignore[arg-type]
    blocks = [module for module in model.modules() if type(module).__name__ in repeated]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else the factor becomes an operation gloo does not have


def replicate(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """DDP: the model wrapped so that gradients are summed over ranks; itself on one process or where it is sharded."""
    if accelerator.num_processes == 1 or isinstance(model, FSDPModule):
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


def gradient_sync(model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of a microbatch: gradients go over the wire with the step's last one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with sharded ones put together, on every rank: all ranks must call it, in the same order."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, cut as `parameter` is; as it is where the parameter is whole."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def _sum_gradients(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed
