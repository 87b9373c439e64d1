"""What the head of a cache entry states of it, and the checksums that make it sure."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

FORMAT = 2
MAX_HEADER_BYTES = 2**20


def payload_hash(tensors: Mapping[str, Tensor]) -> str:
    """xxh3_128 over name, dtype, shape and bytes of every tensor, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse_header(data: bytes, size: int, key: str) -> dict[str, Any]:
    """The description in the head of a file of `size` bytes.

    Raises:
        ValueError, LookupError, TypeError: it is not one that `Cache.write` made for `key`.
    """
    if len(data) < 8:
        raise ValueError("it is shorter than a header")
    length = struct.unpack("<Q", data[:8])[0]
    if length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise ValueError("its header is longer than the file")
    header = json.loads(data[8 : 8 + length])
    digest, text = header.pop("__metadata__")["mixres"].split(" ", 1)
    if xxhash.xxh3_64_hexdigest(text.encode()) != digest:
        raise ValueError("the checksum of its header is wrong")
    stated: dict[str, Any] = json.loads(text)
    if stated["format"] not in (1, FORMAT) or stated["key"] != key:
        raise ValueError(f"it is entry {stated['key']} of format {stated['format']}")
    if 8 + length + max(tensor["data_offsets"][1] for tensor in header.values()) != size:
        raise ValueError(f"it is {size} bytes long, not what its header says")
    return stated
