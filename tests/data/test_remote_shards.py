"""A cache at a URL gives what was written, from the store or a local copy; faults of store and disk are one line."""

import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mixres.batch import Sample
from mixres.data import objects
from mixres.data.cache import Cache, DamagedEntry
from mixres.data.compact import compact
from mixres.data.loader import MicrobatchDataset, microbatch_loader
from mixres.data.plan import Plan
from mixres.errors import Stopped, UserError, WorkError
from mixres.preprocessing.fill import fill
from mixres.preprocessing.samples import lengths_of
from support.jobs import longest_file
from support.object_stores import ACCESS, FaultyServer, faulty_server, s3_server
from support.samples import assert_same
from support.shard_caches import LITTLE, NUMBERS, ONE_GB, SIZES, Open, assert_filled, filled, opener, sample

FEW = list(NUMBERS)[:3]


@pytest.fixture
def at_url(tmp_path: Path, numbers: Iterator[int] = itertools.count()) -> Open:  # noqa: B008 - one for all
    return opener(f"memory://cache/{next(numbers)}", tmp_path)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def faulty(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    with faulty_server(s3) as server:
        for name, value in {**ACCESS, "AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "2"}.items():
            monkeypatch.setenv(name, value)
        yield server
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def at_s3(faulty: FaultyServer, tmp_path: Path, numbers: Iterator[int] = itertools.count()) -> Open:  # noqa: B008
    return opener(f"s3://pairs/cache/{next(numbers)}", tmp_path)


def encode(key: str) -> tuple[Sample, Sequence[str]]:
    return sample(NUMBERS[key]), ()


def objects_of(cache: Cache) -> dict[str, bytes]:
    assert cache.remote
    store: Any = fsspec.filesystem(cache.remote.url.partition("://")[0])
    store.invalidate_cache()
    return {path.rpartition("/")[2]: store.cat_file(path) for path in store.ls(cache.remote.url, detail=False)}


def copies(machine: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in machine.glob("copies/*/*/*")}


def test_entries_at_a_url_are_those_of_a_folder_and_every_machine_reads_them(at_url: Open, tmp_path: Path) -> None:
    local, cache, other = filled(Cache(tmp_path / "local", LITTLE)), at_url(), at_url("b")
    assert cache.lookup(FEW[0]) is None and other.held() == {}
    cache.write(FEW[0], sample(0))
    assert_same(cache.read(FEW[0]), sample(0))
    assert other.lookup(FEW[0]) is None
    filled(cache)
    assert [path.name for path in (cache.root / "waiting").iterdir()] == [], "what was uploaded takes no room"
    for reader in (cache, other, at_url("b"), pickle.loads(pickle.dumps(other))):
        assert_filled(reader)
        assert reader.held() == local.held()
    assert [other.lookup(key) for key in NUMBERS] == [local.lookup(key) for key in NUMBERS]
    done = compact(at_url("c", 100 * LITTLE))
    assert done.moved == 12 and len(objects_of(cache)) == 1
    for reader in (cache, other, at_url("d")):
        assert_filled(reader)
    assert fill(at_url("d"), SIZES, lambda: encode) == 0


def test_who_finds_nothing_left_to_upload_sees_what_others_have_uploaded(at_url: Open) -> None:
    late = at_url()
    assert late.remote
    late.remote._next_look = float("inf")  # it has just listed the folder, which took long
    filled(at_url())
    assert late.lookup(FEW[0]) is None
    late.shards.store.finish()
    assert_filled(late)


def test_what_was_read_comes_from_the_local_disk_within_its_bound(at_url: Open) -> None:
    cache = filled(at_url())
    whole = objects_of(cache)
    store: Any = fsspec.filesystem("memory")
    assert_filled(cache)
    assert cache.remote
    for name in whole:
        store.pipe_file(f"{cache.remote.url}/{name}", b"")
    assert_filled(cache)
    for name, data in whole.items():
        store.pipe_file(f"{cache.remote.url}/{name}", data)
    size, bound = cache.held()[FEW[0]], 4 * LITTLE
    little, other = at_url("b", limit=bound), at_url("b", limit=bound)
    for key in NUMBERS:
        little.read(key)
        other.read(FEW[0])  # is used again and again, and stays
        assert 0 < sum(copies(little.root).values()) <= bound
    assert [path for path, count in copies(little.root).items() if count == size]
    assert_filled(none := at_url("c", limit=0))
    assert not copies(none.root)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"", lambda data: bytes(len(data))])
def test_a_damaged_copy_is_fetched_again_and_nothing_is_lost(at_url: Open, change: Callable[[bytes], bytes]) -> None:
    filled(cache := at_url())
    assert_filled(at_url("b"))
    found = copies(at_url("b").root)
    assert len(found) > 12, "indexes too"
    for path in found:
        path.write_bytes(change(path.read_bytes()))
    assert_filled(at_url("b"))
    assert not [name for name in objects_of(cache) if name.endswith(".damaged")]


def test_an_entry_damaged_in_the_store_is_removed_for_all_and_encoded_again(at_url: Open) -> None:
    cache = filled(at_url(size=ONE_GB), FEW)
    [(name, data)] = objects_of(cache).items()
    row = cache.shards.find(FEW[1])
    assert row and cache.remote
    last = sum(map(int, row.split()[:2])) - 1
    store: Any = fsspec.filesystem("memory")
    store.pipe_file(f"{cache.remote.url}/{name}", data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])
    with pytest.raises(DamagedEntry, match="the next caching pass makes it again") as caught:
        at_url("b").read(FEW[1])
    assert caught.value.path == f"{cache.remote.url}/{name}/{FEW[1]}.safetensors"
    assert [at_url("c").lookup(key) is None for key in FEW] == [False, True, False]
    assert fill(at_url("c"), dict.fromkeys(FEW, 1), lambda: encode) == 1
    store.pipe_file(f"{cache.remote.url}/torn.tar", data[:-1])
    assert at_url("d").unreadable() == [f"{cache.remote.url}/torn.tar"]
    assert compact(at_url("d", ONE_GB)).moved == 3
    assert [name.rpartition(".")[2] for name in objects_of(cache)] == ["tar"]
    assert_filled(at_url("e"), FEW)


def batches(cache: Cache, workers: int) -> list[tuple[object, ...]]:
    entries = [cache.lookup(key) for key in NUMBERS]
    plan = Plan(
        [lengths_of(entry) for entry in entries if entry], names=list(NUMBERS), samples_per_step=4, max_tokens=500,
        layout="packed", world_size=1, seed=0,
    )  # fmt: skip
    dataset = MicrobatchDataset(cache, list(NUMBERS), list(NUMBERS), "packed")
    loader = microbatch_loader(dataset, plan, rank=0, first=0, last=6, workers=workers)
    return [(batch.names, batch.latents.tolist(), batch.prompt_embeds.tolist()) for batch in loader]


def test_workers_read_from_a_store_that_their_parent_has_used(at_s3: Open, tmp_path: Path) -> None:
    wanted = batches(filled(Cache(tmp_path / "local", LITTLE)), 0)
    cache = filled(at_s3())
    assert_filled(cache)
    assert batches(cache, 0) == batches(at_s3("b"), 2) == wanted
    assert batches(cache, 2) == wanted


def in_a_process(work: Callable[[], object]) -> None:
    """Locks and connections of other tests are not its own."""
    process = get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
def test_a_store_that_fails_for_a_while_is_asked_again(at_s3: Open, faulty: FaultyServer) -> None:
    faulty.faults = [503, None, "reset", None, "slow", 503]
    filled(at_s3())
    for faults in ([503, "reset"], ["reset", None, 500, None, "slow"]):
        faulty.faults = list(faults)
        assert_filled(at_s3("b", limit=0))
        assert not faulty.faults


def test_what_a_store_refuses_is_a_line_and_nothing_is_lost(
    at_s3: Open, faulty: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(at_s3(), FEW)
    assert cache.remote
    url = cache.remote.url
    faulty.refused = {"GET"}
    with pytest.raises(UserError, match=rf"{url}: may not be read: access is refused, or .*AWS_PROFILE") as refused:
        at_s3("b")
    with pytest.raises(WorkError, match=rf"{url}/.*\.tar: may not be read: access is refused.*; renew the credentials"):
        cache.read(FEW[0])
    faulty.refused = {"PUT"}
    line = rf"{url}/.*\.tar: may not be written: access is refused.*; nothing is lost: .*waiting/.*tar waits for it$"
    with pytest.raises(UserError, match=line) as error:
        fill(at_s3(size=ONE_GB), SIZES, lambda: encode)
    messages = str(refused.value) + str(error.value)
    assert not [secret for secret in ACCESS.values() if secret in messages and secret != "us-east-1"]
    [waiting] = (tmp_path / "a/waiting").glob("*.tar")
    with pytest.raises(UserError, match=r"waits for it$"):
        at_s3().shards.store.finish()
    faulty.refused = set()
    again = at_s3()
    again.shards.store.finish()
    assert not waiting.exists() and fill(at_s3(), SIZES, lambda: encode) == 0
    assert_filled(again)
    gone = filled(at_s3("c"))
    for name in objects_of(gone):
        fsspec.filesystem("s3").rm_file(f"{url}/{name}")
    with pytest.raises(FileNotFoundError, match=rf"{url.removesuffix('/shards')}/.*{FEW[1]}"):
        gone.read(FEW[1])
    assert fill(gone, SIZES, lambda: encode) == 12
    with pytest.raises(UserError, match=r"^s3://none: there is no such bucket; create it, or correct its name$"):
        opener("s3://none/x", tmp_path)()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    in_a_process(lambda: _cannot_be_reached(at_s3))


def _cannot_be_reached(at_s3: Open) -> None:
    with pytest.raises(WorkError, match=r"cannot be read: .*; look at the network and the store, and run the same"):
        at_s3("d")


def test_a_signal_is_no_failure_of_a_store() -> None:
    """It comes wherever the process is, and most of the time that is in a request."""
    tried = []

    def request(_: Any) -> None:
        tried.append(1)
        raise Stopped("by a signal")

    with pytest.raises(Stopped, match="by a signal"):
        objects.asked("https://localhost/object", request)
    assert len(tried) == 1


def test_an_entry_damaged_in_a_store_that_cannot_be_written_is_named(at_s3: Open, faulty: FaultyServer) -> None:
    cache = filled(at_s3(size=ONE_GB), FEW)
    [(name, data)] = objects_of(cache).items()
    assert cache.remote
    fsspec.filesystem("s3").pipe_file(f"{cache.remote.url}/{name}", b"X" * 2000 + data[2000:])
    faulty.refused = {"PUT"}
    with pytest.raises(WorkError, match=r"and it cannot be removed \(.*may not be written.*\): make s3://pairs/cache/"):
        at_s3("b").read(FEW[0])


def test_a_full_local_disk_costs_copies_and_is_named_where_a_shard_is_written(at_url: Open, tmp_path: Path) -> None:
    filled(at_url())
    with longest_file(100):
        assert_filled(at_url("b"))
        with pytest.raises(
            WorkError, match=rf"^cache.local_dir: {tmp_path}/c cannot be written \(File too large\): ma"
        ):
            fill(at_url("c"), {"0" * 32: 10_000}, lambda: lambda _: (sample(1), ()))
    assert {size for size in copies(tmp_path / "b").values() if size != 32} == set(), "the ends of shards are short"
    assert not list((tmp_path / "c/waiting").iterdir())
    (tmp_path / "d").mkdir()
    (tmp_path / "d/copies").write_text("a file where a folder should be")
    assert_filled(at_url("d"))


def test_a_missing_package_and_a_store_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    assert objects.EXTRAS["gs"] == ("gcsfs", "gcs")
    with pytest.raises(UserError, match=r"^gs://b/x/shards: 'gcsfs' is not installed, which reads gs://: pip install"):
        opener("gs://b/x", tmp_path)()
