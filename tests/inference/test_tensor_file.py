"""Files written tensor by tensor: the library reads them, damage is seen, and no tensor outlives its turn."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixres.inference.tensor_file import TensorFile, differences, entry_of, in_order, write_tensors

METADATA = {"format": "pt", "mixres": '{"prompt": "交换"}'}
TENSORS = {
    "b.odd": torch.randn(3, 7).bfloat16(),
    "a.half": torch.randn(5).half(),
    "c.wide": torch.randn(2, 3, 4).double(),
    "z.single": torch.randn(4, 4)[:, ::2],
    "number": torch.tensor(1.5),
    "empty": torch.empty(0),
}
ENTRIES = {name: entry_of(tensor) for name, tensor in TENSORS.items()}


def write(path: Path) -> dict[str, str]:
    tensors = ((name, TENSORS[name]) for name in in_order(ENTRIES))
    return write_tensors(path, ENTRIES, tensors, METADATA)


def problems(path: Path, digests: dict[str, str]) -> list[str]:
    return [problem for problem in differences(path, ENTRIES, METADATA, digests) if problem]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    digests = write(tmp_path / "a")
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == METADATA
    file = TensorFile(tmp_path / "a")
    assert (file.entries, file.metadata) == (ENTRIES, METADATA)
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in TENSORS.items())
    assert list(differences(tmp_path / "a", ENTRIES, METADATA, digests)) == [None] * len(TENSORS)


def test_equal_tensors_make_equal_bytes_as_large_as_those_of_the_library(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", METADATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert abs((tmp_path / "a").stat().st_size - (tmp_path / "theirs").stat().st_size) <= 8


def test_a_tensor_is_gone_before_the_next_is_made(tmp_path: Path) -> None:
    """So a model of any size takes the memory of its largest tensor, in writing and in reading back."""
    alive: list[weakref.ref[Tensor]] = []

    def made() -> Iterator[tuple[str, Tensor]]:
        for name in in_order(ENTRIES):
            assert [ref() for ref in alive] == [None] * len(alive)
            tensor = TENSORS[name].clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    digests = write_tensors(tmp_path / "a", ENTRIES, made(), METADATA)
    assert len(alive) == len(TENSORS)
    assert problems(tmp_path / "a", digests) == []


DAMAGE = {
    "a bit": (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], ["b.odd is another"]),
    "its end": (lambda data: data[:-1], None),
    "a name": (lambda data: data.replace(b'"a.half"', b'"a.hall"'), ["its header is another"]),
    "a type": (lambda data: data.replace(b'"F16"', b'"I16"'), ["its header is another"]),
    "a shape": (lambda data: data.replace(b"[3,7]", b"[7,3]"), ["its header is another"]),
    "its metadata": (lambda data: data.replace(b"prompt", b"prompu"), ["its header is another"]),
    "all": (lambda data: b"", None),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_as_it_was_written_is_seen(tmp_path: Path, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    digests = write(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(damage(data))
    assert (tmp_path / "a").read_bytes() != data
    found = problems(tmp_path / "a", digests)
    assert found == expected if expected else len(found) == 1
