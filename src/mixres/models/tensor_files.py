"""Weights of a transformer as safetensors files in diffusers' layout: headers read, files written tensor by tensor.

Promise: what is read here is what `from_pretrained` loads from a folder; equal tensors make equal files; a file is
whole or absent. Cost: headers only, to read; one tensor in memory, to write.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from mixres import atomic
from mixres.console import counted
from mixres.errors import UserError

CONFIG = "config.json"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SINGLE = "diffusion_pytorch_model.safetensors"
_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_LARGEST_FILE = "10GB"  # as diffusers' `save_pretrained` has it
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FORMAT = {"format": "pt"}
Read = Callable[[str], Tensor]  # a tensor by its name


@dataclass(frozen=True)
class ModelFiles:
    """A transformer in diffusers' layout: its configuration, and the tensors of each file on the meta device."""

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Tensor]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of all files."""
        return {name: tensor for part in self.files.values() for name, tensor in part.items()}


def read_model_files(folder: Path, key: str, types: Collection[str] = DTYPES) -> ModelFiles:
    """What `from_pretrained` would load from `folder`, from JSON and headers alone; `key` names it in messages.

    Raises:
        UserError: files are missing, damaged or do not fit their index, or hold other `types` of numbers.
    """
    index = folder / INDEX
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        files = {name: _read_shapes(folder / name, types) for name in sorted(set(where.values())) or [_SINGLE]}
        if where and where != {name: file for file, part in files.items() for name in part}:
            raise ValueError(f"{INDEX} does not fit the files beside it")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{key}: {folder} cannot be read: {error}; download it again, or name another") from error
    return ModelFiles(folder, config, files)


def _read_shapes(file: Path, types: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a file on the meta device."""
    shapes = {}
    with safe_open(file, "np") as opened:  # "pt" would map the file writably, for which there must be memory
        for name in opened.keys():  # noqa: SIM118 - no dict
            part = opened.get_slice(name)
            if part.get_dtype() not in types:
                raise ValueError(f"{name} is in {part.get_dtype()}, which is none of {', '.join(types)}")
            shapes[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    return shapes


def write_tensors(
    path: Path,
    shapes: Mapping[str, Tensor],
    tensor: Read,
    metadata: Mapping[str, str] | None = None,
    *,
    shown: bool = False,
) -> None:
    """Write a safetensors file; the tensors of `shapes` may be on the meta device. `shown` logs the progress.

    `tensor` is called for one name after another, in the order of `write_order`, so that one is in memory: the
    library's `save_file` takes all at once, 40 GB for ComfyUI's one file of a 20 B transformer. Equal tensors and
    metadata make equal bytes.

    Source: the format as the README of huggingface/safetensors describes it: the length of a header, the header as
    JSON, the tensors' bytes without gaps.
    """
    names = write_order(shapes)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end, shape = end, end + shapes[name].nbytes, list(shapes[name].shape)
        header[name] = {"dtype": _DTYPE_NAMES[shapes[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with atomic.replace(path) as partial, partial.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in counted(names, "write", "tensor", enabled=shown):
            made = tensor(name).detach().cpu()
            assert (made.shape, made.dtype) == (shapes[name].shape, shapes[name].dtype), name
            file.write(made.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del made  # before the next is read


def write_order(shapes: Mapping[str, Tensor]) -> list[str]:
    """Wide types first, as the library has them: every tensor begins at a multiple of its items."""
    return sorted(shapes, key=lambda name: (-shapes[name].itemsize, name))


def write_model(folder: Path | None, shapes: Mapping[str, Tensor], tensor: Read) -> None:
    """Write the weights of a transformer into `folder`, in as many files as diffusers would, with their index.

    `tensor` is called for one name after another, as in `write_tensors`. With no folder it is called all the same: a
    rank that does not write takes part in putting sharded tensors together.
    """
    plan = split_torch_state_dict_into_shards(dict(shapes), filename_pattern=_PATTERN, max_shard_size=_LARGEST_FILE)
    for file, names in plan.filename_to_tensors.items():
        part = {name: shapes[name] for name in names}
        if folder is not None:
            write_tensors(folder / file, part, tensor, _FORMAT)
            continue
        for name in write_order(part):
            tensor(name)
    if folder is not None and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        atomic.write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
