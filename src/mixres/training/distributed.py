"""Processes and devices: which backend, and how a model is spread over the ranks.

Promise: the same code on one process, on gloo and on NCCL. The configuration decides about precision and sharding,
not the launcher's own file.

Gradients are summed over ranks, not averaged: loss sums are divided by the step's global divisor before backward. A
factor of the world size there, to undo an average, would change roundings with the number of ranks wherever a layer
computes in float32 inside (3.6e-8 in the parameters after 4 float64 steps on 3 ranks, 4e-15 without it).
"""

import functools
import itertools
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
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from mixres.errors import Problems, UserError
from mixres.models.pretrained import own_rows

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


def device_named(name: str | None) -> torch.device:
    """The device that the option `--device` names, or this process's own.

    Raises:
        UserError: it cannot be used.
    """
    try:
        device = dist_env().device if name is None else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device: {name} cannot be used: {reason}; choose another") from error
    return device


def make_accelerator(
    *,
    mixed_precision: str,
    report_to: str,
    folder: Path,
    cpu_offload: bool = False,
    timeout_minutes: float = 30,
    deterministic: bool = False,
) -> Accelerator:
    """The accelerator of this process. Without a CUDA device several processes talk over gloo.

    Collectives between devices end the run after `timeout_minutes`. `deterministic`: torch takes only kernels that
    repeat their results, in the whole process.

    `cpu_offload`: they do so beside their devices' own way too, about what is in host memory.

    Raises:
        UserError: the launcher asks for a plugin that would not be used.
    """
    problems = Problems(
        f"accelerate launch: its configuration turns on {name}, which mixres does not use: turn it off there (or take "
        "one of configs/accelerate/), and choose train.parallel=ddp or fsdp2 here"
        for variable, name in _PLUGINS.items()
        if os.environ.get(variable, "false").lower() == "true"
    )
    problems.raise_if_any()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results with this alone
    torch.use_deterministic_algorithms(deterministic)
    backend = "cuda:nccl,cpu:gloo" if cpu_offload and torch.cuda.is_available() else None
    handlers: list[KwargsHandler] = [
        InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=timeout_minutes)),
        # The cache would keep a bfloat16 copy of all float32 weights until the forward's end; each is used once.
        AutocastKwargs(cache_enabled=False),
    ]
    return Accelerator(
        # As `dist_env` has it: CUDA or the CPU. Without it accelerate would take Apple's MPS, which has no float64, and
        # two CPU ranks for two single runs.
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(folder),
        kwargs_handlers=handlers,
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


def is_split(parallel: Literal["ddp", "fsdp2"]) -> bool:
    """Whether weights are split over the processes that a launcher has started."""
    return parallel == "fsdp2" and dist_env().world_size > 1


def shard(model: nn.Module, device: torch.device, *, size: int, half: bool, cpu_offload: bool) -> None:
    """FSDP2: split the weights of each repeated block, and of the rest, over `size` ranks in a row, in place.

    With fewer than all ranks, as those of one node, their groups hold copies of each other (HSDP). The model may be in
    host memory, as files are mapped into it: one block after the other is copied to the device and split there.

    `half`: weights are gathered, and forward and backward computed, in bfloat16; gradients are reduced in float32, and
    the weights that stay are as they were. With `cpu_offload` these, their gradients and the optimizer's state are in
    host memory, where the optimizer works.

    To be called before the optimizer is made: sharded parameters are other tensors of the same names.
    """
    # The model's output is a view; it is read, never changed in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = shard_mesh(dist.group.WORLD, device.type, size)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy()
    repeated: set[str] = set(model._no_split_modules)  # type: ignore[arg-type]
    blocks: list[Any] = [module for module in model.modules() if type(module).__name__ in repeated]
    for module in (*blocks, model):
        # The rest too: what a forward without backward leaves whole would outlast the next change of the weights.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offload)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else the factor becomes an operation gloo does not have
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])  # in backward FSDP2 does so by itself


@functools.lru_cache(maxsize=1)
def shard_mesh(world: dist.ProcessGroup, device_type: str, size: int) -> DeviceMesh:
    """All ranks, in rows of `size` that split weights. All must call it the first time."""
    ranks = world.size()
    copies = () if size == ranks else (ranks // size,)
    return init_device_mesh(device_type, (*copies, size), mesh_dim_names=(*("replicate" for _ in copies), "shard"))


def replicate(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """On several ranks DDP: the model wrapped so that gradients are summed over ranks; on one the model itself."""
    if accelerator.num_processes == 1:
        return model
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
    """Around forward and backward of a microbatch: gradients go over the wire with the step's last one only.

    Those of a sharded model stay whole until then, so where they are more than a gathered block, each microbatch's are
    reduced at once, within the group that splits the weights.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not _small_gradients(model))
        model.set_requires_all_reduce(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def _small_gradients(model: nn.Module) -> bool:
    """Whether the gradients of all that trains, in float32, are no more than the weights of a block, in bfloat16."""
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) <= largest


def device_of(parameter: Tensor) -> torch.device:
    """Where it is computed with; a sharded one may stay in host memory."""
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, or a sharded one put together on its device; then all ranks must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shards(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors that are the same on all ranks, and this rank's rows of those that are split over them by rows.

    Where groups of ranks hold copies of each other, only those of the first have rows.
    """
    alike, rows = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor) or tensor.placements[-1] != Shard(0):
            alike[name] = full_tensor(tensor)
        elif not any(tensor.device_mesh.get_coordinate()[:-1]):  # type: ignore[index]
            rows[name] = tensor.to_local()
    return alike, rows


def distribute_like(parameter: Tensor, shape: Sequence[int], read: Callable[[range | None], Tensor]) -> Tensor:
    """A tensor of `shape` on the device of `parameter` and split as it is; `read` gives the rows asked for, or all.

    A number, of no shape, stays on the CPU. Always a copy: what was read may be a view of a file.
    """
    if not shape:
        return read(None).clone()
    if not isinstance(parameter, DTensor):
        return read(None).to(parameter.device, copy=True)
    rows = read(own_rows(parameter, shape[0]))
    if tuple(shape) == tuple(parameter.shape):  # so it stays in host memory where the parameter is there
        found: Any = torch.empty_like(parameter.detach(), dtype=rows.dtype)
        found.to_local().copy_(rows)
        return found  # type: ignore[no-any-return]
    stride, size = torch.empty(tuple(shape), device="meta").stride(), torch.Size(shape)
    local = rows.to(parameter.device, copy=True)
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=size, stride=stride)


def _sum_gradients(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed
