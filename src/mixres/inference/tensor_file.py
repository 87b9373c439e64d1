"""safetensors files written tensor by tensor, so that a file of any size takes the memory of one tensor.

Promise: the library reads what was written, and `differences` says where a file is not as it was; equal tensors and
metadata make equal bytes. Cost: one pass to write, one to read back.

Source: the format as the README of huggingface/safetensors describes it: the length of a header, the header as JSON,
the tensors' bytes without gaps.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in _DTYPES.items()}
FLOATS = tuple(_ITEM_BYTES)  # what can be written, as the format names it


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as its header has it."""

    dtype: str  # one of FLOATS
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def entry_of(tensor: Tensor) -> Entry:
    """How `tensor` stands in a header."""
    return Entry(_DTYPES[tensor.dtype], tuple(tensor.shape))


class TensorFile:
    """A file's header; tensors are read one at a time and by no memory map, which the whole file would have to fit.

    A tensor whose type is not in FLOATS stands in `entries` as the file names it.

    Raises:
        OSError, SafetensorError: it cannot be read, or the library finds that it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "np") as file:  # a map for reading only; that for "pt" asks for the memory
            self.metadata: dict[str, str] = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            self.entries = {n: Entry(part.get_dtype(), tuple(part.get_shape())) for n, part in slices.items()}
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        self._at = {name: 8 + length + header[name]["data_offsets"][0] for name in self.entries}

    def raw(self, name: str) -> bytearray:
        """The bytes of one tensor."""
        data = bytearray(self.entries[name].nbytes)
        with self.path.open("rb") as file:
            file.seek(self._at[name])
            if file.readinto(data) != len(data):
                raise OSError(f"{self.path} has become shorter")
        return data

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        entry, data = self.entries[name], self.raw(name)
        dtype = next(dtype for dtype, known in _DTYPES.items() if known == entry.dtype)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(entry.shape)


def in_order(entries: Mapping[str, Entry]) -> list[str]:
    """The names in the order of the file: wide types first, so that every tensor begins at a multiple of its items."""
    return sorted(entries, key=lambda name: (-_ITEM_BYTES[entries[name].dtype], name))


def write_tensors(
    path: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write a file of these `entries` and put it on disk; the `tensors` come one by one, as `in_order` has them.

    Returns the digest of each, for `differences`.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in in_order(entries):
        begin, end = end, end + entries[name].nbytes
        header[name] = {"dtype": entries[name].dtype, "shape": entries[name].shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digests = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, tensor in tensors:
            assert entry_of(tensor) == entries[name], name
            raw = _raw(tensor)
            file.write(raw)
            digests[name] = xxhash.xxh3_64_hexdigest(raw)
            del tensor, raw  # before the next is made
        file.flush()
        os.fsync(file.fileno())
    assert list(digests) == in_order(entries)
    return digests


def differences(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], digests: Mapping[str, str]
) -> Iterator[str | None]:
    """Read the file back: for each tensor, in the order of the file, what is not as it was written, or None."""
    try:
        file = TensorFile(path)
        if file.entries != dict(entries) or file.metadata != dict(metadata):
            yield "its header is another"
            return
        for name in in_order(entries):
            yield None if xxhash.xxh3_64_hexdigest(file.raw(name)) == digests[name] else f"{name} is another"
    except (OSError, SafetensorError) as error:
        yield str(error)


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it lies in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
