"""Entries in shards are those of files, byte for byte; a shard is whole or absent, and damage is never read."""

import errno
import os
import pickle
import random
import signal
import tarfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from threading import RLock

import fsspec
import pytest
from filelock import FileLock
from tqdm import tqdm

from mixres.batch import Sample
from mixres.data import shard_store, shards as shards_module
from mixres.data.cache import INDEX, Cache, DamagedEntry, entry_key
from mixres.data.compact import compact
from mixres.errors import UserError, WorkError
from mixres.preprocessing.fill import fill
from support.jobs import longest_file
from support.object_stores import ACCESS, s3_server
from support.samples import assert_same
from support.shard_caches import (
    LITTLE,
    NUMBERS,
    ONE_GB,
    SIZES,
    assert_filled,
    filled as fill_with_samples,
    opener,
    sample,
)


def filled(root: Path, size: int = ONE_GB, keys: Sequence[str] = tuple(NUMBERS)) -> Cache:
    return fill_with_samples(Cache(root, size), keys)


def tars(root: Path) -> list[Path]:
    return sorted((root / "shards").glob("*.tar"))


def members(root: Path) -> list[str]:
    """Keys of all entries, as `tar` lists them."""
    names = []
    for path in tars(root):
        with tarfile.open(path) as archive:
            names += archive.getnames()
    return sorted(Path(name).stem for name in names if name != "index.json")


def test_shards_hold_the_files_of_the_entries_and_both_are_read(tmp_path: Path) -> None:
    single, cache = filled(tmp_path / "files", 0), filled(tmp_path / "shards", LITTLE)
    assert 3 < len(tars(cache.root)) < 12 and not list(cache.root.glob("??"))
    for path in tars(cache.root):
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "out", filter="data")
    for key in NUMBERS:
        assert single.path(key).read_bytes() == Cache(tmp_path / "out").path(key).read_bytes()
        assert single.lookup(key) == cache.lookup(key) == Cache(cache.root).lookup(key)
    for reader in (cache, Cache(cache.root), pickle.loads(pickle.dumps(cache)), Cache(tmp_path / "out")):
        assert_filled(reader)
    both = filled(tmp_path / "both", 0, list(NUMBERS)[:5])
    assert fill(Cache(both.root, LITTLE), SIZES, lambda: lambda key: (sample(NUMBERS[key]), ())) == 7
    assert len(both.files()) == 5 and both.held() == single.held()
    assert_filled(both)
    assert_filled(Cache(both.root))


def test_an_open_shard_is_its_writers_own_until_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, other = Cache(tmp_path, ONE_GB), Cache(tmp_path)
    key, later, prompt, *of_prompt = list(NUMBERS)[:5]
    writer.write(key, sample(0))
    assert_same(writer.read(key), sample(0))
    assert other.lookup(key) is None and not tars(tmp_path)
    writer.close()
    assert_same(other.read(key), sample(0))
    monkeypatch.setattr(shards_module, "CLOSE_AFTER_S", 0.0)
    writer.write(later, sample(1))
    assert_same(other.read(later), sample(1))
    monkeypatch.undo()
    seen = []

    def encode(key: str) -> tuple[object, Sequence[str]]:
        if key == prompt:
            return sample(2).text, ()
        seen.append(other.lookup(prompt))
        return sample(3), ()

    fill(writer, {prompt: 1} | dict.fromkeys(of_prompt, 1), lambda: encode)  # type: ignore[arg-type,return-value]
    assert seen[1] is not None, "other ranks read prompts while this one encodes its samples"


def test_no_changed_or_missing_byte_of_a_shard_is_used(tmp_path: Path) -> None:
    keys = list(NUMBERS)[:2]
    [path] = tars(filled(tmp_path, keys=keys).root)
    whole = path.read_bytes()
    damages = [whole[:length] for length in range(0, len(whole), 61)] + [whole + b"\0", bytes(len(whole))]
    damages += [whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    found = 0
    for data in damages:
        path.write_bytes(data)
        cache = Cache(tmp_path)
        for key in keys:
            try:
                assert_same(cache.read(key), sample(NUMBERS[key]))
                found += 1
            except FileNotFoundError:
                assert cache.unreadable() == [str(path)], "its index"
            except DamagedEntry:
                assert cache.lookup(key) is None and Cache(tmp_path).lookup(key) is None
                next(path.parent.glob("*.damaged")).unlink()
    assert 500 < found < 2 * len(damages), "damage of one entry leaves the other"


def test_a_damaged_entry_is_encoded_again_and_compaction_leaves_it_out(tmp_path: Path) -> None:
    cache = filled(tmp_path, keys=list(NUMBERS)[:3])
    broken, [path] = list(NUMBERS)[1], tars(tmp_path)
    data, row = path.read_bytes(), cache.shards.find(broken)
    assert row is not None
    last = sum(map(int, row.split()[:2])) - 1
    path.write_bytes(data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])
    with pytest.raises(DamagedEntry, match="the next caching pass makes it again") as caught:
        Cache(tmp_path).read(broken)
    assert caught.value.path == f"{path}/{broken}.safetensors"
    assert [Cache(tmp_path).lookup(key) is None for key in list(NUMBERS)[:3]] == [False, True, False]
    assert fill(Cache(tmp_path, ONE_GB), dict.fromkeys(list(NUMBERS)[:3], 1), lambda: lambda _: (sample(1), ())) == 1
    assert_filled(Cache(tmp_path), list(NUMBERS)[:3])
    assert compact(Cache(tmp_path, ONE_GB)).moved == 3
    assert [path.suffix for path in (tmp_path / "shards").iterdir()] == [".tar"]
    assert members(tmp_path) == sorted(list(NUMBERS)[:3])
    assert_filled(Cache(tmp_path), list(NUMBERS)[:3])


def test_compaction_leaves_each_entry_once_and_readers_find_it(tmp_path: Path) -> None:
    keys = list(NUMBERS)
    filled(tmp_path, LITTLE, keys[:7])
    filled(tmp_path, LITTLE, keys[3:9])  # some twice
    filled(tmp_path, 0, keys[8:])  # one in a file too
    spoiled = tars(filled(tmp_path / "other", keys=keys[:2]).root)[0]
    (tmp_path / "shards" / spoiled.name).write_bytes(spoiled.read_bytes()[:-100])
    reader, held = Cache(tmp_path), Cache(tmp_path).held()
    assert_filled(reader)
    with pytest.raises(UserError, match="another process is compacting"), FileLock(tmp_path / ".compact.lock"):
        compact(Cache(tmp_path, 8 * LITTLE))
    done = compact(Cache(tmp_path, 8 * LITTLE))
    assert (done.moved, done.damaged) == (12, [])
    assert members(tmp_path) == sorted(keys) and not Cache(tmp_path).files()
    for cache in (reader, Cache(tmp_path)):
        assert_filled(cache)
        assert cache.held() == held
    assert compact(Cache(tmp_path, 8 * LITTLE))[:2] == (0, 0), "there is nothing left to do"


def spoil(cache: Cache, key: str) -> None:
    """Change the last byte of an entry where this cache finds it."""
    row = cache.shards.find(key)
    assert row is not None
    path = cache.root / "shards" / cache.shards.shard_of[key]
    data, last = bytearray(path.read_bytes()), sum(map(int, row.split()[:2])) - 1
    data[last] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [0, LITTLE], ids=["in files", "in other shards"])
def test_compaction_keeps_the_good_one_of_two_copies(tmp_path: Path, size: int) -> None:
    """Of each entry one copy is damaged, in turn the one that is found first and the other."""
    first, second = Cache(tmp_path, LITTLE), Cache(tmp_path, size)
    for cache in (first, second):  # neither sees the other's
        for key, number in NUMBERS.items():
            cache.write(key, sample(number))
    for cache in (first, second):
        cache.close()
    for key, number in NUMBERS.items():
        cache = (Cache(tmp_path), first)[number % 2]
        if size or number % 2:
            spoil(cache, key)
    assert compact(Cache(tmp_path, ONE_GB)).damaged
    assert members(tmp_path) == sorted(NUMBERS)
    assert_filled(Cache(tmp_path))


def test_an_entry_written_twice_into_one_shard_is_whole(tmp_path: Path) -> None:
    filled(tmp_path, keys=[*NUMBERS, next(iter(NUMBERS))])
    assert_filled(Cache(tmp_path))


def test_a_shard_that_cannot_be_read_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path)
    [path] = tars(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_read_index", refuse)
        with pytest.raises(WorkError, match=rf"{path}: cannot be read \(Permission denied\): make it readable"):
            Cache(tmp_path, ONE_GB)
    assert path.exists()
    assert_filled(cache)


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.touch()
    with pytest.raises(UserError, match=rf"^{shards}: the cache cannot be listed \(Not a directory\): change"):
        Cache(tmp_path, ONE_GB)
    shards.unlink()
    (tmp_path / INDEX).mkdir()  # of files of their own, which are found without it
    assert Cache(tmp_path, ONE_GB).lookup("0" * 32) is None


def test_a_reader_follows_what_another_machine_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is removed elsewhere stays open here; a network file system calls it stale, and shows folders late."""
    reader = Cache(filled(tmp_path, LITTLE).root)
    assert_filled(reader)
    compact(Cache(tmp_path, ONE_GB))
    reader.shards.store._listed = (tmp_path / "shards").stat().st_mtime_ns, True
    plain, stale = shard_store.os.pread, OSError(errno.ESTALE, "Stale file handle")
    gone = {file.fileno() for file in reader.shards.store._files.values()}

    def pread(number: int, *where: int) -> bytes:
        if number in gone:
            gone.discard(number)
            raise stale
        return plain(number, *where)

    monkeypatch.setattr(shard_store.os, "pread", pread)
    assert_filled(reader)


def test_two_runs_at_once_do_not_wait_and_their_copies_become_one(tmp_path: Path) -> None:
    """The second one runs while the first one encodes entry 3, and sees nothing of its open shard."""

    def second(key: str) -> tuple[Sample, Sequence[str]]:
        return sample(NUMBERS[key]), ()

    def encode(key: str) -> tuple[Sample, Sequence[str]]:
        if NUMBERS[key] == 3:
            assert fill(Cache(tmp_path, ONE_GB), SIZES, lambda: second) == 12
        return second(key)

    first = Cache(tmp_path, ONE_GB)
    assert fill(first, SIZES, lambda: encode) == 4, "it encodes the entry in flight and no more"
    assert len(members(tmp_path)) == 12 + 4
    compact(Cache(tmp_path, ONE_GB))
    assert members(tmp_path) == sorted(NUMBERS)
    assert_filled(first)


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_store, "MAX_OPEN", 2)
    cache = Cache(filled(tmp_path, 1).root)
    for key in [*NUMBERS, *NUMBERS]:
        cache.read(key)
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert sum(link.is_relative_to(tmp_path) for link in links) <= 2
    assert len(tars(tmp_path)) == 12


@pytest.mark.parametrize("limit", [8192, 9100])  # within an entry, and within the index
def test_a_full_disk_is_one_line_and_loses_no_whole_entry(tmp_path: Path, limit: int) -> None:
    """The kernel refuses long files: a write that fails in the middle."""
    encoded = []

    def encode(key: str) -> tuple[Sample, Sequence[str]]:
        encoded.append(key)
        return sample(NUMBERS[key]), ()

    with longest_file(limit), pytest.raises(WorkError, match=r"cannot be written \(File too large\): make room") as e:
        fill(Cache(tmp_path, ONE_GB), SIZES, lambda: encode)
    there = [key for key in NUMBERS if Cache(tmp_path).lookup(key)]
    assert f"for the {12 - len(there)} entries to come" in str(e.value)
    assert len(encoded) - 3 <= len(there) < len(encoded) < 12
    assert [path.suffix for path in (tmp_path / "shards").iterdir()] == [".tar"], "no temporary file is left"
    assert_filled(Cache(tmp_path), there)
    assert fill(Cache(tmp_path, ONE_GB), SIZES, lambda: encode) == 12 - len(there)
    assert_filled(Cache(tmp_path))


def cache_share(opened: Callable[[int], Cache], rank: int, numbers: dict[str, int], seconds: float) -> None:
    """A rank whose encoding takes a moment."""

    def encode(key: str) -> tuple[Sample, Sequence[str]]:
        time.sleep(seconds)
        return sample(numbers[key]), ()

    tqdm.set_lock(RLock())  # its own is shared with its parent: one that is killed within it would stop them all
    cache = opened(4 * LITTLE)
    cache.shards.store.finish()
    fill(cache, dict.fromkeys(numbers, 1), lambda: encode, rank=rank, world_size=4)


def compact_once(opened: Callable[[int], Cache]) -> None:
    tqdm.set_lock(RLock())  # as above
    compact(opened(40 * LITTLE))


def kill_and_compare(
    opened: Callable[[int], Cache], scratch: Path, entries: int, kills: int, pause_s: float, encode_s: float
) -> list[str]:
    """At random instants: one of four processes that cache, then the one that compacts. A new one takes its place.

    Returns the keys.
    """
    fork, draw = get_context("fork"), random.Random(0)
    numbers = {entry_key(killed=i): i for i in range(entries)}
    writers = [fork.Process(target=cache_share, args=(opened, rank, numbers, encode_s)) for rank in range(4)]
    [writer.start() for writer in writers]
    known: set[str] = set()
    for _ in range(kills):
        time.sleep(draw.uniform(pause_s / 8, pause_s))
        rank = draw.randrange(4)
        writers[rank].kill()
        writers[rank].join()
        assert writers[rank].exitcode == -signal.SIGKILL, "it was at work"
        there = set(opened(ONE_GB).held())
        assert known <= there, "what was closed stays"
        known = there
        writers[rank] = fork.Process(target=cache_share, args=(opened, rank, numbers, encode_s))
        writers[rank].start()
    [writer.join(60) for writer in writers]
    assert [writer.exitcode for writer in writers] == [0] * 4
    torn = list(scratch.glob(".tmp-*"))
    assert torn or kills < 30, "few may all come while a process starts"
    assert all(path.stat().st_size <= 5 * LITTLE for path in torn)
    assert opened(ONE_GB).held().keys() == numbers.keys()
    for _ in range(kills):
        job = fork.Process(target=compact_once, args=(opened,))
        job.start()
        job.join(draw.uniform(0.0, 2.5 * pause_s))
        job.kill()
        job.join()
        assert opened(ONE_GB).held().keys() == numbers.keys()
    opened(ONE_GB).shards.store.finish()
    compact_once(opened)
    cache = opened(ONE_GB)
    for key, number in numbers.items():
        assert_same(cache.read(key), sample(number))
    assert cache.sweep(max_age=-1) >= len(torn) and not list(scratch.glob(".tmp-*"))
    return sorted(numbers)


@pytest.mark.slow
def test_thirty_kills_of_four_writers_lose_their_open_shards_alone(tmp_path: Path) -> None:
    keys = kill_and_compare(lambda size: Cache(tmp_path, size), tmp_path / "shards", 600, 30, 0.08, 0.03)
    assert members(tmp_path) == keys


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_of_four_writers_to_a_store_lose_their_open_shards_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MIXRES_KILLS of each kind, as `make chaos` has it."""
    with s3_server() as url:
        for name, value in {**ACCESS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        opened = opener("s3://pairs/cache", tmp_path)
        kills = int(os.environ.get("MIXRES_KILLS", "5"))
        waiting = tmp_path / "a/waiting"
        keys = kill_and_compare(lambda size: opened(size=size), waiting, 150, kills, 0.8, kills / 40)
        fsspec.filesystem("s3").get("s3://pairs/cache/shards/", f"{tmp_path}/shards/", recursive=True)
    assert members(tmp_path) == keys
