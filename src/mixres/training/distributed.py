"""Processes and devices: which backend, and how a model is spread over the ranks.

Promise: the same code on one process, on gloo and on NCCL. The configuration decides about precision and sharding,
not the launcher's own file.

Gradients are summed over ranks, not averaged: loss sums are divided by the step's global divisor before backward. A
factor of the world size there, to undo an average, would change roundings with the number of ranks wherever a layer
computes in float32 inside (3.6e-8 in the parameters after 4 float64 steps on 3 ranks, 4e-15 without it).
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from mixres.errors import Problems, UserError

# What a launcher's own configuration file can ask for, by the variable in which accelerate hands it on.
_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


_PATIENCE = timedelta(days=1)  # a process that hangs is the only one to take as long


class DistEnv(NamedTuple):
    """Which of how many processes a launcher made this one."""

    rank: int
    world_size: int
    device: torch.device


def dist_env() -> DistEnv:
    """What torchrun and accelerate set in the environment; no connection between processes is opened."""
    value = os.environ.get
    device = torch.device("cuda", int(value("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    return DistEnv(int(value("RANK", 0)), int(value("WORLD_SIZE", 1)), device)


def make_accelerator(
    *, mixed_precision: str, report_to: str, folder: Path, timeout_minutes: float = 30, deterministic: bool = False
) -> Accelerator:
    """The accelerator of this process. Without a CUDA device several processes talk over gloo.

    Collectives between devices end the run after `timeout_minutes`. `deterministic`: torch takes only kernels that
    repeat their results, in the whole process.

    Raises:
        UserError: the launcher asks for a plugin that would not be used, or the tracker `report_to` is not installed
            (accelerate would ignore it silently).
    """
    problems = Problems(
        f"accelerate launch: its configuration turns on {name}, which mixres does not use: turn it off there (or take "
        "one of configs/accelerate/), and choose train.parallel=ddp or fsdp2 here"
        for variable, name in _PLUGINS.items()
        if os.environ.get(variable, "false").lower() == "true"
    )
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        problems.add(f"logging.report_to: {report_to} is not installed: pip install {report_to}, or set it to none")
    problems.raise_if_any()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results with this alone
    torch.use_deterministic_algorithms(deterministic)
    return Accelerator(
        # As `dist_env` has it: CUDA or the CPU. Without it accelerate would take Apple's MPS, which has no float64, and
        # two CPU ranks for two single runs.
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))],
    )


def control_group() -> dist.ProcessGroup:
    """All ranks over gloo, beside the group of the devices. All must call it the first time."""
    return _control_group(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _control_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank. All must call it; it waits for the last of them.

    It waits on the CPU, as long as a rank takes for its own work: encoding, a sample grid, writing a result. In a
    collective of the devices the others would end the run after `train.timeout_minutes`. One that dies ends the wait.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on one rank at least. All must call it; it waits for the last of them."""
    return any(gather(flag))


def assert_same_on_all_ranks(digest: str) -> None:
    """All ranks stop, together and before the first step, where they would not follow one plan.

    Raises:
        UserError: `digest` is not the same on all ranks.
    """
    digests = gather(digest)
    if differing := [rank for rank, other in enumerate(digests) if other != digests[0]]:
        raise UserError(
            f"ranks {differing} read other data or another configuration than rank 0: give all of them the same files"
        )


def parallelize(model: nn.Module, accelerator: Accelerator, parallel: Literal["ddp", "fsdp2"]) -> nn.Module:
    """The module that a step calls: on several ranks `model` sharded in place, or wrapped; else `model` itself.

    To be called before the optimizer is made: sharded parameters are other tensors of the same names.
    """
    if accelerator.num_processes == 1:
        return model
    if parallel == "ddp":
        return _replicate(model, accelerator)
    _shard(model, accelerator)
    return model


def _shard(model: nn.Module, accelerator: Accelerator) -> None:
    """FSDP2: split the weights of each repeated block, and of the rest, over all ranks, in place."""
    # The model's output is a view; it is read, never changed in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    repeated: set[str] = set(model._no_split_modules)  # type: ignore[arg-type]
    blocks = [module for module in model.modules() if type(module).__name__ in repeated]
    for module in (*blocks, model):
        # The rest too: what a forward without backward leaves whole would outlast the next change of the weights.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else the factor becomes an operation gloo does not have


def _replicate(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """DDP: the model wrapped so that gradients are summed over ranks."""
    device = accelerator.device
    # Weights quantised by torchao or in host memory cannot be sent; each rank has read and rounded the same ones.
    unsent = [
        name for name, p in model.named_parameters() if hasattr(p, "__tensor_flatten__") or p.device.type != device.type
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, unsent)  # type: ignore[no-untyped-call]
    gather(None)  # of a slow disk one rank may read far longer than the others
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


def full_tensors(
    tensors: Mapping[str, Tensor], *, keep: bool = True, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors with sharded ones put together: all ranks must call it, in the same order.

    One that is not to `keep` them only sends its part and gets none, so that one copy is made and not one a rank.
    """
    found = {}
    for name, tensor in tensors.items():
        cast = tensor if dtype is None else tensor.to(dtype)
        full = cast.full_tensor() if isinstance(cast, DTensor) else cast
        if keep:
            found[name] = full.cpu() if isinstance(cast, DTensor) else full
    return found


def local_shards(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors that are the same on all ranks, and this rank's rows of those that are split over them by rows."""
    alike, rows = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and tensor.placements == (Shard(0),):
            rows[name] = tensor.to_local()
        else:
            alike[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return alike, rows


def distribute_like(parameter: Tensor, shape: Sequence[int], read: Callable[[range | None], Tensor]) -> Tensor:
    """A tensor of `shape` on the device of `parameter` and split as it is; `read` gives the rows asked for, or all.

    A number, of no shape, stays on the CPU. Always a copy: what was read may be a view of a file.
    """
    if not shape:
        return read(None).clone()
    if not isinstance(parameter, DTensor):
        return read(None).to(parameter.device, copy=True)
    assert parameter.placements == (Shard(0),), parameter.placements
    mesh = parameter.device_mesh
    chunk = -(-shape[0] // mesh.size())  # as torch.chunk splits
    first = min(mesh.get_local_rank() * chunk, shape[0])
    local = read(range(first, min(first + chunk, shape[0]))).to(parameter.device, copy=True)
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, mesh, parameter.placements, shape=torch.Size(shape), stride=stride)


def _sum_gradients(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed
