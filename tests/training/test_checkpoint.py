"""Checkpoints: whole or not counted, the newest valid one wins, nothing is ever unpickled."""

import json
import os
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

from mixres.errors import WorkError
from mixres.training.checkpoint import MANIFEST, STATE, Checkpoints
from support.jobs import names
from support.samples import pickled_mkdir

STATE_VALUES = {"frozen": {"train.seed": 0}, "optimizer": {"entries": {}, "group": {"k": 1}}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    table = weight[1].bfloat16()  # one for all parameters, as some optimizers have it
    return {
        "trainable": {"a.weight": weight.requires_grad_(), "b": weight.detach().T},  # not contiguous
        "optimizer": {"map|a.weight": table, "map|b": table, "part|b": table[2:], "step|b": torch.tensor(7)},
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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # more than a line end


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", STATE, MANIFEST])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(
    three: Checkpoints, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], file: str
) -> None:
    damage(three.root / "step-00000030" / file)
    assert three.newest_valid().step == 20
    (warning,) = caplog.messages
    assert "step-00000030 is damaged" in warning
    damage(three.root / "step-00000020" / file)
    assert three.newest_valid().step == 10


def test_a_file_that_cannot_be_read_is_no_damage(three: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    """A disk or network that fails for a moment: the run ends, and no later save deletes the checkpoint."""
    file = three.root / "step-00000030" / "optimizer.safetensors"
    own = file.rename(file.with_suffix(".away"))
    file.symlink_to(file.name)  # the system refuses to open it: too many levels of links
    with pytest.raises(WorkError, match=r"optimizer\.safetensors cannot be read .*: run the same command again"):
        three.newest_valid()
    own.rename(file)
    assert three.newest_valid().step == 30 and not caplog.messages
    three.save(40, tensors(40), STATE_VALUES)
    assert "step-00000030" in names(three.root)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"state.json": 1}', '{"state.json": [1, "0", 2]}', '"a"'])
def test_a_manifest_of_another_form_is_damage(three: Checkpoints, text: str) -> None:
    (three.root / "step-00000030" / MANIFEST).write_text(text)
    assert three.newest_valid().step == 20


def test_unfinished_and_foreign_names_do_not_count(three: Checkpoints) -> None:
    source = three.root / "step-00000030"
    for name in (".tmp-step-00000040", ".tmp-old-step-00000040", "step-00000040.bak", "step-40", "a-step-00000040"):
        shutil.copytree(source, three.root / name)
    (three.root / "step-00000050").write_text("a file")
    assert three.newest_valid().step == 30


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
    pickled = pickled_mkdir(mark)
    for name in ("optimizer.pt", ".metadata", "random_states_0.pkl", "trainable-00002-of-00002.safetensors"):
        (path / name).write_bytes(pickled)
    assert three.newest_valid().tensors("trainable").keys() == {"a.weight", "b"}
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
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=140))
    with pytest.raises(OSError, match="140 bytes are free, 141 are asked for"):  # 1.2 x 118
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
    truncate(three.root / "step-00000030" / STATE)
    three.keep = 2
    assert three.newest_valid().step == 20
    for step in saved:
        three.save(step, tensors(step), STATE_VALUES)
    assert names(three.root) == ["latest", *(f"step-{step:08d}" for step in kept)]
    assert torch.equal(three.newest_valid().tensors("trainable")["b"], tensors(saved[-1])["trainable"]["b"])


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_that_leads_out_of_its_folder_is_damage(three: Checkpoints, absolute: bool) -> None:
    path, other = three.root / "step-00000030", three.root / "step-00000020" / "trainable.safetensors"
    name_in_manifest(path, str(other) if absolute else f"../{other.parent.name}/{other.name}", other.read_bytes())
    assert three.newest_valid().step == 20


def on_ranks(root: Path, count: int, act: Callable[[int, Checkpoints], Any]) -> list[Any]:
    """What `act` gives in so many threads that gather from each other, as ranks do."""
    barrier, values = threading.Barrier(count), [None] * count

    def acting(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        return act(rank, Checkpoints(root, keep=2, rank=rank, ranks=count, gather=gather))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(acting, range(count)))


WHOLE = {"norm": torch.tensor(3.0), "scale": torch.arange(5.0)}
SPLIT = {"w": torch.arange(21.0).reshape(7, 3), "short": torch.arange(2).reshape(2, 1), "none": torch.zeros(0, 4)}


def rows_for(rank: int, count: int) -> dict[str, torch.Tensor]:
    """As FSDP2 splits: `torch.chunk` over the first dimension, later ranks may get fewer rows or none."""
    return {name: [*tensor.chunk(count), *[tensor[:0]] * count][rank] for name, tensor in SPLIT.items()}


def save_split(root: Path, count: int, step: int = 1) -> None:
    def save(rank: int, checkpoints: Checkpoints) -> None:
        checkpoints.save(step, {"trainable": WHOLE}, STATE_VALUES, rows={"trainable": rows_for(rank, count)})

    on_ranks(root, count, save)


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_rows_written_by_some_ranks_are_read_by_others(tmp_path: Path, saved_by: int, read_by: int) -> None:
    save_split(tmp_path, saved_by)
    files = {path.name for path in (tmp_path / "step-00000001").glob("*.safetensors")}
    assert files == {f"trainable-{rank + 1:05d}-of-{saved_by:05d}.safetensors" for rank in range(saved_by)}
    whole = SPLIT | WHOLE
    for rank, found in enumerate(on_ranks(tmp_path, read_by, lambda _, checkpoints: checkpoints.newest_valid())):
        assert found.shapes("trainable") == {name: tuple(tensor.shape) for name, tensor in whole.items()}
        assert all(torch.equal(tensor, whole[name]) for name, tensor in found.tensors("trainable").items())
        for name, tensor in SPLIT.items():
            first, last = (min(edge * -(-len(tensor) // read_by), len(tensor)) for edge in (rank, rank + 1))
            assert torch.equal(found.tensor("trainable", name, range(first, last)), tensor[first:last])


def test_all_ranks_take_the_same_one_though_one_of_them_sees_the_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        save_split(tmp_path, 2, step)
    file = tmp_path / "step-00000002" / "trainable-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")  # a value, not the header, which all ranks read
    assert [found.step for found in on_ranks(tmp_path, 2, lambda _, checkpoints: checkpoints.newest_valid())] == [1, 1]


def test_one_ranks_full_disk_is_told_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    save_split(tmp_path, 2)

    def fails(rank: int, checkpoints: Checkpoints) -> str:
        rows = {"w": SPLIT["w"], "x": torch.zeros(1)} if rank else {"w": SPLIT["w"]}
        group = "no/such/folder" if rank else "trainable"  # where rank 1 cannot write
        with pytest.raises(OSError, match="No such file") as caught:
            checkpoints.save(2, {group: WHOLE}, STATE_VALUES, rows={group: rows})
        return str(caught.value)

    one, other = on_ranks(tmp_path, 2, fails)
    assert one == other
    assert names(tmp_path) == ["latest", "step-00000001"]
