"""Filling a cache: shares, help for those that died, full disks. The encoder is a stand-in, all else is real."""

import contextlib
import io
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from mixres.batch import Sample
from mixres.data.cache import Cache, entry_key
from mixres.errors import UserError, WorkError
from mixres.geometry import Grid
from mixres.preprocessing.fill import check_space, fill, make_folder

ITEMS = {entry_key(i=i): i for i in range(12)}
SIZES = dict.fromkeys(ITEMS, 10_000)
Holder = Callable[[Path, str], "AbstractContextManager[subprocess.Popen[str]]"]


def sample(number: int, rows: int = 4) -> Sample:
    latents = torch.full((rows * 4, 16), float(number))
    return Sample(str(number), latents, (latents,), latents[:5], (Grid(1, rows, 4), Grid(1, rows, 4)))


class Encoder:
    """Counts what is loaded and encoded, in its order."""

    def __init__(self, encode: Callable[[int], Sample] = sample) -> None:
        self.loaded, self.function = 0, encode
        self.encoded: list[int] = []

    def load(self) -> Callable[[int], Sample]:
        self.loaded += 1
        return self

    def __call__(self, number: int) -> Sample:
        made = self.function(number)
        self.encoded.append(number)
        return made


def entries(root: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in root.glob("??/*.safetensors")}


def test_every_missing_entry_is_encoded_once(tmp_path: Path) -> None:
    encoder = Encoder()
    assert fill(Cache(tmp_path), ITEMS, SIZES, encoder.load) == 12
    assert encoder.encoded == list(range(12))
    assert encoder.loaded == 1
    assert entries(tmp_path).keys() == ITEMS.keys()
    again = Encoder()
    assert fill(Cache(tmp_path), ITEMS, SIZES, again.load) == 0
    assert again.loaded == 0, "encoders are loaded for an entry, not before"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_begins_with_its_share_and_ends_with_everything(tmp_path: Path, rank: int) -> None:
    """The others never come: nobody waits for them."""
    encoder = Encoder()
    assert fill(Cache(tmp_path), ITEMS, SIZES, encoder.load, rank=rank, world_size=3) == 12
    share = [number for key, number in ITEMS.items() if int(key, 16) % 3 == rank]
    assert 0 < len(share) < 12
    assert encoder.encoded[: len(share)] == share
    assert sorted(encoder.encoded) == list(range(12))


def test_what_another_process_wrote_meanwhile_is_not_encoded_again(tmp_path: Path) -> None:
    """Rank 1 has finished before rank 0 comes to its share."""
    first, second = Encoder(), Encoder()
    share = {key: number for key, number in ITEMS.items() if int(key, 16) % 2 == 1}
    fill(Cache(tmp_path), share, SIZES, first.load, rank=1, world_size=2)
    assert fill(Cache(tmp_path), ITEMS, SIZES, second.load, rank=0, world_size=2) == 12 - len(share)
    assert sorted(first.encoded + second.encoded) == list(range(12))


def test_the_entry_of_a_process_that_is_killed_while_encoding_is_taken_over(
    tmp_path: Path, claim_holder: Holder
) -> None:
    encoder = Encoder()
    with claim_holder(tmp_path, list(ITEMS)[3]) as holder, contextlib.redirect_stdout(io.StringIO()) as out:

        def kill_when_it_is_waited_for() -> None:
            while "waits for 1 entries that other processes are encoding" not in out.getvalue():
                time.sleep(0.01)
            holder.kill()

        threading.Thread(target=kill_when_it_is_waited_for, daemon=True).start()
        assert fill(Cache(tmp_path), ITEMS, SIZES, encoder.load) == 12
    assert encoder.encoded == [0, 1, 2, *range(4, 12), 3]


def test_an_example_that_cannot_be_encoded_stops_the_pass_and_keeps_the_rest(tmp_path: Path) -> None:
    def failing(number: int) -> Sample:
        if number == 5:
            raise WorkError("5 has changed since the scan")
        return sample(number)

    for found in (0, 5):  # its claim is free again, and it fails again
        encoder = Encoder(failing)
        with pytest.raises(WorkError, match="5 has changed"):
            fill(Cache(tmp_path), ITEMS, SIZES, encoder.load)
        assert encoder.encoded == list(range(found, 5))
    assert fill(Cache(tmp_path), ITEMS, SIZES, Encoder().load) == 7


# --- Full disks


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The kernel refuses longer files: a write that fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    encoder = Encoder(lambda number: sample(number, rows=64 if number == 7 else 4))
    with files_at_most(8192), pytest.raises(WorkError) as caught:
        fill(Cache(tmp_path), ITEMS, SIZES, encoder.load)
    assert str(caught.value) == (
        f"cache.cache_dir: {tmp_path} cannot be written (File too large): make room, about 0.1 MB for the 5 entries to "
        "come, and run the same command again; those that are there stay"
    )
    before = entries(tmp_path)
    assert sorted(ITEMS[key] for key in before) == list(range(7))
    assert not list(tmp_path.rglob(".tmp-*")), "no part of the entry is left"
    again = Encoder()
    fill(Cache(tmp_path), ITEMS, SIZES, again.load)
    assert again.encoded == list(range(7, 12)), "the next pass goes on"
    assert before.items() <= entries(tmp_path).items()


def test_space_is_compared_with_what_the_disk_has(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path, [free // 4, free // 4])
    with pytest.raises(UserError) as caught:
        check_space(tmp_path, [2 * free, 10**12, 10**12])
    assert len(caught.value.messages) == 1
    message = caught.value.messages[0]
    assert message.startswith(f"cache.cache_dir: {tmp_path} needs about {(2 * free + 2 * 10**12) / 1e9:.1f} GB for 3 ")
    assert message.endswith(" GB are free: make room, or name a folder on a larger disk")


def test_a_folder_that_cannot_be_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "cache", "Not a directory")):
        with pytest.raises(UserError) as caught:
            make_folder(path)
        assert caught.value.messages == (f"cache.cache_dir: {path} cannot be made ({reason}): name another folder",)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
