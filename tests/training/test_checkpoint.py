"""Checkpoints: whole or not counted, the newest valid one wins, nothing is ever unpickled."""

import json
import logging
import os
import pickle
import shutil
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash

from mixres.training.checkpoint import MANIFEST, STATE, Checkpoints
from support.jobs import names

STATE_VALUES = {"frozen": {"train.seed": 0}, "optimizer": {"entries": {}, "group": {"k": 1}}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, generator=generator)
    return {
        "trainable": {"a.weight": weight.requires_grad_(), "b": weight.detach().T},  # not contiguous
        "optimizer": {"exp_avg|a.weight": torch.randn(4, 3, generator=generator).bfloat16(), "step|b": torch.tensor(7)},
    }


@pytest.fixture
def three(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 10, 20 and 30."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, tensors(step), STATE_VALUES)
    return checkpoints


def test_what_is_read_is_what_was_saved(three: Checkpoints) -> None:
    assert (three.root / "latest").readlink() == Path("step-00000030")
    found = three.newest_valid()
    assert found.step == 30
    assert found.state == {**STATE_VALUES, "step": 30}
    for name, group in tensors(30).items():
        read = found.tensors(name)
        assert read.keys() == group.keys()
        assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in group.items())


def test_tensors_that_share_their_memory_are_saved_each(tmp_path: Path) -> None:
    """Some optimizers put one table into the state of every parameter."""
    table = torch.arange(4.0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"optimizer": {"map|a": table, "map|b": table, "part|c": table[2:]}}, {})
    found = checkpoints.newest_valid()
    assert {name: t.tolist() for name, t in found.tensors("optimizer").items()} == {
        "map|a": [0, 1, 2, 3], "map|b": [0, 1, 2, 3], "part|c": [2, 3],
    }  # fmt: skip


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # more than a line end


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", STATE, MANIFEST])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(
    three: Checkpoints, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], file: str
) -> None:
    damage(three.root / "step-00000030" / file)
    with caplog.at_level(logging.WARNING):
        assert three.newest_valid().step == 20
    assert len(caplog.messages) == 1
    assert "step-00000030 is damaged" in caplog.messages[0]
    damage(three.root / "step-00000020" / file)
    assert three.newest_valid().step == 10


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"state.json": 1}', '{"state.json": [1, "0", 2]}', "{", '"a"'])
def test_a_manifest_of_another_form_is_damage(three: Checkpoints, text: str) -> None:
    (three.root / "step-00000030" / MANIFEST).write_text(text)
    assert three.newest_valid().step == 20


def test_unfinished_and_foreign_names_do_not_count_and_numbers_order(three: Checkpoints) -> None:
    source = three.root / "step-00000030"
    for name in (".tmp-step-00000040", ".tmp-old-step-00000040", "step-00000040.bak", "step-40", "a-step-00000040"):
        shutil.copytree(source, three.root / name)
    (three.root / "step-00000050").write_text("a file")
    assert three.newest_valid().step == 30
    for step in (99_999_999, 100_000_000):
        three.save(step, tensors(1), STATE_VALUES)
    assert three.newest_valid().step == 100_000_000, "by number, not by name"


def test_the_oldest_and_what_killed_runs_left_go_with_the_next_save(three: Checkpoints) -> None:
    shutil.copytree(three.root / "step-00000030", three.root / ".tmp-step-00000035")
    shutil.copytree(three.root / "step-00000030", three.root / ".tmp-old-step-00000005")
    (three.root / ".tmp-latest").symlink_to("step-00000030")
    three.save(40, tensors(40), STATE_VALUES)
    assert names(three.root) == ["latest", "step-00000020", "step-00000030", "step-00000040"]


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_leaves_the_older_ones_and_no_part_of_the_new(
    three: Checkpoints, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The system call itself fails: at the first, second, ... file of the checkpoint."""
    before = {path: path.read_bytes() for path in three.root.rglob("*") if path.is_file()}
    syncs, fsync = iter(range(100)), os.fsync

    def failing(descriptor: int) -> None:
        if next(syncs) == 2 * at:  # a file and its directory each
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        three.save(40, tensors(40), STATE_VALUES)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in three.root.rglob("*") if path.is_file()} == before
    assert three.newest_valid().step == 30
    three.save(40, tensors(40), STATE_VALUES)
    assert three.newest_valid().step == 40


def test_planted_pickles_are_not_opened(three: Checkpoints, tmp_path: Path) -> None:
    """Beside the files of a checkpoint, and in the place of one, under a wrong hash and under the right one."""
    mark, path = tmp_path / "opened", three.root / "step-00000030"

    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(mark),)

    pickled = pickle.dumps(Payload())
    for name in ("optimizer.pt", ".metadata", "random_states_0.pkl"):
        (path / name).write_bytes(pickled)
    assert three.newest_valid().tensors("trainable")
    (path / "trainable.safetensors").write_bytes(pickled)
    assert three.newest_valid().step == 20
    name_in_manifest(path, "trainable.safetensors", pickled)
    assert three.newest_valid().step == 20
    assert not mark.exists()


def name_in_manifest(path: Path, name: str, data: bytes) -> None:
    """As whoever wrote `data` himself could."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest[name] = [len(data), xxhash.xxh3_128_hexdigest(data)]
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_saving_syncs_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the rename every file is on disk, and so is the manifest, which was written last."""
    order: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        sync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            order.append("sync")

    def renamed(self: Path, target: Path) -> Path:
        order.append(f"{sorted(file.name for file in self.iterdir())} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    Checkpoints(tmp_path, keep=2).save(1, tensors(1), STATE_VALUES)
    files = ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]
    assert order == [*["sync"] * 4, f"{files} -> step-00000001"]


def test_without_room_nothing_is_begun(three: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=150))
    with pytest.raises(OSError, match="150 bytes are free, 153 are asked for"):  # 1.2 x 128
        three.save(40, tensors(40), STATE_VALUES)
    assert three.newest_valid().step == 30
    assert not list(three.root.glob(".tmp*"))


ROTATIONS = {  # after 10, 20 and a damaged 30: what is saved, and what is kept then
    "of a later step": ([25], [20, 25]),
    "before the newest": ([40, 50], [40, 50]),
    "between": ([40], [20, 40]),
    "saved again": ([30, 40], [30, 40]),
}


@pytest.mark.parametrize(("saved", "kept"), ROTATIONS.values(), ids=ROTATIONS)
def test_damaged_ones_do_not_push_out_valid_ones(three: Checkpoints, saved: list[int], kept: list[int]) -> None:
    empty(three.root / "step-00000030" / STATE)
    three.keep = 2
    assert three.newest_valid().step == 20
    for step in saved:
        three.save(step, tensors(step), STATE_VALUES)
    assert names(three.root) == ["latest", *(f"step-{step:08d}" for step in kept)]
    assert torch.equal(three.newest_valid().tensors("trainable")["b"], tensors(saved[-1])["trainable"]["b"])


def test_a_file_that_the_manifest_does_not_name_is_not_read(three: Checkpoints, tmp_path: Path) -> None:
    path = three.root / "step-00000030"
    shutil.copyfile(path / "trainable.safetensors", path / "trainable-00002-of-00002.safetensors")
    assert three.newest_valid().shapes("trainable") == {"a.weight": (4, 3), "b": (3, 4)}


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_that_leads_out_of_its_folder_is_damage(three: Checkpoints, absolute: bool) -> None:
    path, other = three.root / "step-00000030", three.root / "step-00000020" / "trainable.safetensors"
    name_in_manifest(path, str(other) if absolute else f"../{other.parent.name}/{other.name}", other.read_bytes())
    assert three.newest_valid().step == 20


class Ranks:
    """So many threads that gather from each other, as ranks do."""

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count = root, count
        self.barrier, self.values = threading.Barrier(count), [None] * count

    def checkpoints(self, rank: int) -> Checkpoints:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return Checkpoints(self.root, keep=2, rank=rank, ranks=self.count, gather=gather)

    def __call__(self, act: Callable[[int, Checkpoints], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.count) as pool:
            return [f.result() for f in [pool.submit(act, r, self.checkpoints(r)) for r in range(self.count)]]


WHOLE = {"norm": torch.tensor(3.0), "scale": torch.arange(5.0)}
SPLIT = {"w": torch.arange(21.0).reshape(7, 3), "short": torch.arange(2).reshape(2, 1), "none": torch.zeros(0, 4)}


def rows_for(rank: int, count: int) -> dict[str, torch.Tensor]:
    """As FSDP2 splits: `torch.chunk` over the first dimension, later ranks may get fewer rows or none."""
    chunks = {name: [*tensor.chunk(count), *[tensor[:0]] * count] for name, tensor in SPLIT.items()}
    return {name: parts[rank] for name, parts in chunks.items()}


def save_split(ranks: Ranks, step: int = 1) -> None:
    ranks(
        lambda rank, checkpoints: checkpoints.save(
            step, {"trainable": WHOLE}, STATE_VALUES, rows={"trainable": rows_for(rank, ranks.count)}
        )
    )


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_rows_written_by_some_ranks_are_read_by_others(tmp_path: Path, saved_by: int, read_by: int) -> None:
    save_split(Ranks(tmp_path, saved_by))
    files = {path.name for path in (tmp_path / "step-00000001").glob("*.safetensors")}
    assert files == {f"trainable-{rank + 1:05d}-of-{saved_by:05d}.safetensors" for rank in range(saved_by)}
    readers = Ranks(tmp_path, read_by)
    for rank, found in enumerate(readers(lambda _, checkpoints: checkpoints.newest_valid())):
        whole = SPLIT | WHOLE
        assert found.shapes("trainable") == {name: tuple(tensor.shape) for name, tensor in whole.items()}
        assert all(torch.equal(tensor, whole[name]) for name, tensor in found.tensors("trainable").items())
        first = 0
        for name, tensor in SPLIT.items():
            first = min(rank * -(-len(tensor) // read_by), len(tensor))
            last = min((rank + 1) * -(-len(tensor) // read_by), len(tensor))
            assert torch.equal(found.tensor("trainable", name, range(first, last)), tensor[first:last])


def test_all_ranks_take_the_same_one_though_one_of_them_sees_the_damage(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    for step in (1, 2):
        save_split(ranks, step)
    file = tmp_path / "step-00000002" / "trainable-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")  # a value, not the header, which all ranks read
    assert [found.step for found in ranks(lambda _, checkpoints: checkpoints.newest_valid())] == [1, 1]


def test_one_ranks_full_disk_is_told_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    save_split(ranks)

    def fails(rank: int, checkpoints: Checkpoints) -> str:
        rows = {"w": SPLIT["w"], "x": torch.zeros(1)} if rank else {"w": SPLIT["w"]}
        group = "no/such/folder" if rank else "trainable"  # where rank 1 cannot write
        with pytest.raises(OSError, match="No such file") as caught:
            checkpoints.save(2, {group: WHOLE}, STATE_VALUES, rows={group: rows})
        return str(caught.value)

    one, other = ranks(fails)
    assert one == other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
