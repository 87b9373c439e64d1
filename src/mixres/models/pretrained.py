"""The weights of a base into a transformer: mapped, read by rows into memory that is there, or quantised on the device.

Promise: the values are those of `from_pretrained`, bit for bit. No process holds weights that it does not keep: files
of the wanted precision are mapped, whose pages the processes of a machine share; others are cast tensor by tensor on
their way to where they stay; of a tensor that is split over processes each reads its own rows. Cost: each byte of the
files once a process, of a split transformer each process only its rows.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from mixres.errors import UserError
from mixres.models import hub
from mixres.models.lora_file import ADAPTER_PARTS
from mixres.models.tensor_files import read_model_files

_READERS = 4  # threads; on a network disk each waits for its own pages


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The precision of all weights in `folder`; None where they are of several."""
    found = {tensor.dtype for tensor in read_model_files(folder, hub.KEY).tensors.values()}
    return found.pop() if len(found) == 1 else None


def load_pretrained(
    kind: Any, folder: Path, *, dtype: torch.dtype, device: torch.device | str, quantization: Any = None
) -> Any:
    """The transformer in `folder`, of the class `kind` of diffusers, in `dtype` on `device`.

    With the configuration `quantization` each weight is sent to the device and rounded there.

    Raises:
        UserError: the files cannot be loaded.
    """
    with reading(folder):
        if quantization is not None:
            # Named as the place of all weights, the CPU would mean to diffusers that they are offloaded, not quantised.
            place = None if torch.device(device).type == "cpu" else {"": device}
            return kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, quantization_config=quantization, device_map=place
            )
        if stored_dtype(folder) == dtype:
            return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
        with torch.device("meta"):
            transformer = kind.from_config(kind.load_config(folder))
    nn.Module.to(transformer, dtype)  # not diffusers' own, which warns about casts of pretrained weights
    transformer.to_empty(device=device)
    read_weights(transformer, folder)
    return with_buffers(transformer, device).eval()


def with_buffers(transformer: Any, device: torch.device | str) -> Any:
    """The transformer, with the values on `device` that its constructors compute and no file has.

    On the meta device they are lost, and a cast of all weights would round them.
    """
    if next(transformer.buffers(), None) is not None:
        with init_empty_weights(include_buffers=False):
            fresh = type(transformer).from_config(transformer.config)
        for name, buffer in fresh.named_buffers():
            owner, _, own = name.rpartition(".")
            setattr(transformer.get_submodule(owner), own, buffer.to(device))
    return transformer


def read_weights(transformer: nn.Module, folder: Path) -> None:
    """Copy the weights in `folder` into those of `transformer`, cast to their precision; adapters stay as they are.

    Of a parameter that is split over processes only the rows that this one holds are read.

    Raises:
        UserError: a file is damaged, or has not the names and shapes of the transformer.
    """
    own = {
        n.replace(".base_layer.", "."): p
        for n, p in transformer.named_parameters()
        if not any(part in n for part in ADAPTER_PARTS)
    }
    model = read_model_files(folder, hub.KEY)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}
    differing = [name for name, parameter in own.items() if shapes.get(name) != tuple(parameter.shape)]
    if differing:
        name = differing[0]
        reason = f"{name} is {shapes.get(name)} there and {tuple(own[name].shape)} by its configuration"
        raise UserError(f"{hub.KEY}: {folder} cannot be loaded: {reason}; download it again")

    def read(file: Any, name: str) -> None:
        rows, whole = own_rows(own[name]), own[name].detach()  # not under `no_grad`, which is the caller's thread's
        local = whole.to_local() if isinstance(whole, DTensor) else whole
        local.copy_(file.get_tensor(name) if rows is None else file.get_slice(name)[rows.start : rows.stop])

    with reading(folder), ThreadPoolExecutor(_READERS) as pool:
        for name, part in model.files.items():
            with safe_open(folder / name, "pt") as file:
                for done in [pool.submit(read, file, name) for name in part if name in own]:
                    done.result()


def own_rows(tensor: Tensor, length: int | None = None) -> range | None:
    """Which rows of a tensor that is split as this one this process holds; None: all. It has `length` rows, or as many.

    As `torch.chunk` splits: later processes may hold fewer rows, or none.
    """
    if not isinstance(tensor, DTensor):
        return None
    *copies, last = tensor.placements
    assert last == Shard(0) and all(placement == Replicate() for placement in copies), tensor.placements
    mesh, length = tensor.device_mesh, len(tensor) if length is None else length
    chunk = -(-length // mesh.size(-1))
    first = min(mesh.get_local_rank(-1) * chunk, length)
    return range(first, min(first + chunk, length))


# A transformer without values, to be read by rows once it is split. Adapters on the meta device would lose their draw,
# so the base first gets tensors on the CPU that take no memory.


def without_values(skeleton: Any, dtype: torch.dtype) -> Any:
    """The skeleton on the CPU in `dtype`, each weight one zero that is repeated."""
    return with_buffers(skeleton._apply(lambda tensor: torch.zeros((), dtype=dtype).expand(tensor.shape)), "cpu")


def to_meta(transformer: Any) -> None:
    """Put the weights of `without_values` on the meta device; what has been added since stays where it is."""
    transformer._apply(lambda tensor: tensor if any(tensor.stride()) else tensor.to("meta"))


def materialize(transformer: Any, device: torch.device) -> None:
    """Give all that is on the meta device memory on `device`, without values."""
    transformer._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Names the base that could not be read, in one line, where a library fails on its files."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{hub.KEY}: {folder} cannot be loaded: {reason}; download it again") from error
