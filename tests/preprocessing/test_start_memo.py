"""What a start keeps for the next one: nothing that has changed is taken from it, and all else is as without it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from PIL import ImageFile

from mixres import cli
from mixres.config.schema import Config
from mixres.data import records as records_module
from mixres.data.cache import Cache
from mixres.data.decode import Share
from mixres.data.scan import ALONE
from mixres.errors import UserError, WorkError
from mixres.preprocessing import start_memo
from mixres.preprocessing.fill import CachedData, KeyedRecords, encode, encode_all, family_of, keyed_records
from mixres.preprocessing.samples import LazySamples, keys_of, names_of, table_of
from mixres.preprocessing.start_memo import FOLDER, MOST
from mixres.training.setup import build_loader, build_plan
from support.caching import Caching
from support.object_stores import members_of, parquet_of, tar_of

SHARDS = "cache.shard_gb=1e-4"
OTHER = "data.resize.target.max_pixels=9216"


class Starts:
    """Starts over two tar shards and a held-out one, whose entries are in shards of a cache."""

    def __init__(self, caching: Caching) -> None:
        self.caching, self.root = caching, caching.data / "tars"
        self.root.mkdir()
        members = members_of(caching.data / "train")
        names = list(members)
        for number, part in enumerate((names[:15], names[15:])):
            (self.root / f"{number}.tar").write_bytes(tar_of({name: members[name] for name in part}))
        (self.root / "held_out").mkdir()
        self.held_out = self.root / "held_out" / "x.tar"
        self.held_out.write_bytes(tar_of(members_of(caching.data / "held_out")))
        self.base = caching.data / "base"
        shutil.copytree(caching.config().model.pretrained_model_name_or_path, self.base)

    def words(self, *words: str) -> list[str]:
        own = [f"data.train={self.root}/*.tar", f"data.held_out={self.held_out}", SHARDS]
        return [*own, f"model.pretrained_model_name_or_path={self.base}", *words]

    def config(self, *words: str) -> Config:
        return self.caching.config(*self.words(*words))

    def __call__(self, *words: str) -> CachedData:
        config = self.config(*words)
        return encode_all(config, family_of(config), device=torch.device("cpu"))

    def known(self, *words: str, share: Share = ALONE) -> KeyedRecords:
        config = self.config(*words)
        return keyed_records(config, family_of(config), is_main=False, share=share, known=True)

    @property
    def memos(self) -> list[Path]:
        return sorted((self.caching.cache / FOLDER).glob("*.start"))


@pytest.fixture
def starts(caching: Caching, monkeypatch: pytest.MonkeyPatch) -> Starts:
    monkeypatch.setattr(records_module, "SETTLED_NS", -(10**12))  # the files are new
    caching.capsys.readouterr()
    assert cli.main(["cache", "--compact", "--config", str(caching.file), *caching.words(), SHARDS]) == 0
    return Starts(caching)


def lines(starts: Starts) -> list[str]:
    """What the start has logged, but for how many images it looked at."""
    return [line for line in starts.caching.output().splitlines() if not line.startswith(("scan ", "index"))]


def bad_items(starts: Starts) -> list[str]:
    file = starts.caching.run / "bad_items.jsonl"
    return file.read_text().splitlines() if file.exists() else []


KINDS = {
    "tar": [],
    "parts": ["data.caption_dropout=0.5", "cache.text=recompute", "data.on_bad_item=skip"],
    "regularization": ["data.held_out=0.4", "loss.prior_loss_weight=0.5", "data.regularization={held_out}"],
    "parquet": ["data.train={root}/x.parquet"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_with_a_memo_is_the_start_without_it(starts: Starts, kind: str) -> None:
    if kind == "parquet":
        parquet_of(starts.caching.data / "train", starts.root / "x.parquet")
    if kind == "parts":  # a mask, and a record that is left out
        first, *others = [*members_of(starts.caching.data / "train").items()][:6]
        members = {**dict(others), first[0]: first[1], first[0].replace("target", "mask"): first[1]}
        (starts.root / "2.tar").write_bytes(tar_of({**members, others[-1][0]: b"\xff"}))
    words = [word.format(root=starts.root, held_out=starts.held_out) for word in KINDS[kind]]
    config = starts.config(*words)
    starts(*words)  # encodes
    for memo in starts.memos:
        memo.unlink()
    starts.caching.output()
    first, logged, listed = starts(*words), lines(starts), bad_items(starts)
    second = starts(*words)
    assert lines(starts) == logged and bad_items(starts) == listed and len(starts.memos) == 1
    assert len(listed) == (kind == "parts") and any(sample.record.mask for sample in first.train) == (kind == "parts")
    assert not isinstance(first.train, LazySamples) and isinstance(second.train, LazySamples)
    assert second.train[-2:] == first.train[-2:]
    assert [*keys_of(second.train)] == keys_of(first.train)
    assert (table_of(second.train) == table_of(first.train)).all()
    spawned = pickle.loads(pickle.dumps(second))  # as a process of the loader may get it
    for train in (second.train, spawned.train):
        assert [*train] == [*first.train] and [*names_of(train)] == names_of(first.train)
    assert second.held_out == first.held_out and len(first.held_out) > 1
    plans = [build_plan(config, encoded, world_size=2) for encoded in (first, second)]
    assert plans[0].plan_hash(keys_of(first.train)) == plans[1].plan_hash(keys_of(second.train))
    pairs = zip((first, second), plans, strict=True)
    loaders = (build_loader(config, encoded, plan, rank=0, first=0, workers=0) for encoded, plan in pairs)
    for one, other in zip(*loaders, strict=True):
        assert one.names == other.names and one.latents.equal(other.latents)
        assert one.prompt_embeds.equal(other.prompt_embeds) and one.sample_weights == other.sample_weights
    unchanged = starts.known(*words)
    config, family = starts.config(*words), family_of(starts.config(*words))
    scanned = keyed_records(config, family, is_main=False)
    assert unchanged.kept and [*unchanged.train] == scanned.train and unchanged.keys == scanned.keys
    assert unchanged.summary == scanned.summary and unchanged.with_empty == scanned.with_empty
    for which in (False, True):
        assert unchanged.train_keys(regularization=which) == scanned.train_keys(regularization=which)


def _touched(starts: Starts) -> None:
    shard = starts.root / "0.tar"
    os.utime(shard, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns + 1))


def _same_size_and_time(starts: Starts) -> None:
    shard = starts.root / "0.tar"
    before, data = shard.stat(), shard.read_bytes()
    shard.write_bytes(data)  # its inode's time of change is another
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def _caption(starts: Starts) -> None:
    members = members_of(starts.caching.data / "train")
    name = next(name for name in members if name.endswith(".txt"))
    (starts.root / "0.tar").write_bytes(tar_of({**dict([*members.items()][:15]), name: b"another caption"}))


def _more(starts: Starts) -> None:
    shutil.copyfile(starts.root / "1.tar", starts.root / "2.tar")


def _encoder(starts: Starts) -> None:
    file = starts.base / "vae" / "config.json"
    file.write_text(file.read_text() + "\n")


def _transformer(starts: Starts) -> None:
    file = starts.base / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "another": 1}))


def _damage(starts: Starts) -> None:
    cache = Cache(starts.caching.cache)
    cache.shards.drop(next(iter(cache.shards.shard_of)))


def _lost(starts: Starts) -> None:
    min((starts.caching.cache / "shards").glob("*.tar")).unlink()


def _cut(starts: Starts) -> None:
    shard = min((starts.caching.cache / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])


CHANGES: list[Callable[[Starts], None]] = [
    _touched, _same_size_and_time, _caption, _more, _encoder, _transformer, _damage, _lost, _cut,
]  # fmt: skip


@pytest.mark.slow
def test_every_change_is_noticed(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    starts()
    for change in CHANGES:
        assert starts.known().kept, change.__name__
        change(starts)
        assert not starts.known().kept, change.__name__
        encoded = starts()
        config = starts.config()
        wanted = keyed_records(config, family_of(config), is_main=False).keys
        assert [sample.key for sample in (*encoded.train, *encoded.held_out)] == wanted
    for word in (OTHER, "train.seed=1", "data.caption_dropout=0.5", "cache.text=float8", "data.on_bad_item=skip"):
        assert not starts.known(word).kept, word
    assert starts.known("logging.output_dir=" + str(starts.root / "run"), "train.max_train_steps=9").kept
    kept = starts()
    little = "batch.max_tokens=16"
    with pytest.raises(UserError, match="tokens alone are over") as refused:
        starts(little)
    monkeypatch.setattr(start_memo, "__version__", "another")
    assert not starts.known().kept
    with pytest.raises(UserError) as first:
        starts(little)
    assert refused.value.messages == first.value.messages and len(first.value.messages) == len(kept.train)
    kept.cache.shards.drop(keys_of(kept.train)[1])
    with pytest.raises(WorkError, match="its cache entry is not there any more: run the same command again"):
        kept.train[1]


def test_machines_with_and_without_a_memo_find_the_same_and_each_keeps_its_own(starts: Starts, tmp_path: Path) -> None:
    """The cache is at a URL. Who is first keeps what was found; another process of the machine does not do so again."""
    url = f"memory://{tmp_path}"
    fsspec.filesystem("memory").put(f"{starts.caching.cache}/shards/", f"{url}/shards/", recursive=True)
    here, there = ([f"cache.cache_dir={url}", f"cache.local_dir={tmp_path / name}"] for name in "ab")
    starts(*here)
    assert ": 0 encoded, " in starts.caching.output()
    known, scanned, late = starts.known(*here), *(starts.known(*there, share=Share(1, 2)) for _ in range(2))
    assert known.kept and not scanned.kept and not late.kept and known.keys == scanned.keys
    how: dict[str, Any] = {"device": torch.device("cpu"), "world_size": 2}
    one = encode(known.config, known.family, known, rank=0, **how)
    two = encode(scanned.config, scanned.family, scanned, rank=1, **how)
    three = encode(late.config, late.family, late, rank=1, keep=True, **how)
    assert [*one.train] == [*two.train] == [*three.train] and one.held_out == two.held_out == three.held_out
    (memo,) = (tmp_path / "b").rglob("*.start")
    written = memo.stat().st_ino
    encode(scanned.config, scanned.family, scanned, rank=1, keep=True, **how)
    assert memo.stat().st_ino == written and starts.known(*there).kept


def test_what_did_not_decode_for_want_of_memory_is_read_by_the_next_start(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = ImageFile.ImageFile.load, iter([None, MemoryError])

    def once(image: ImageFile.ImageFile) -> Any:
        if error := next(calls, None):
            raise error
        return load(image)

    word = "data.on_bad_item=skip"
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", once)
        first = starts(word)
    assert "there was no memory to decode it" in bad_items(starts)[0] and not starts.memos
    second = starts(word)
    assert len(second.train) == len(first.train) + 1 and len(starts.memos) == 1


def test_a_damaged_memo_counts_as_none(starts: Starts) -> None:
    starts()
    (memo,) = starts.memos
    whole = memo.read_bytes()
    places = [*range(0, len(whole), len(whole) // 40), len(whole) - 1]
    wrong = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for data in (b"", b"\0" * len(whole), whole[:-1], whole[: len(whole) // 2], whole + b"\0", *wrong):
        memo.write_bytes(data)
        assert not starts.known().kept
    starts()
    assert memo.read_bytes() == whole and starts.known().kept


def test_two_configurations_over_one_cache_each_have_one(starts: Starts) -> None:
    starts()
    starts(OTHER)  # which adds to the cache
    assert starts.known(OTHER).kept and not starts.known().kept
    starts()
    assert starts.known(OTHER).kept and starts.known().kept and len(starts.memos) == 2
    for seed in range(1, MOST + 1):
        starts(f"train.seed={seed}")
    assert len(starts.memos) == MOST and starts.known(f"train.seed={MOST}").kept and not starts.known(OTHER).kept


def test_nothing_is_kept_of_what_has_no_one_state(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    starts(f"data.train=['{starts.root}/*.tar', '{starts.caching.data / 'train'}']")  # a folder beside them
    starts("cache.shard_gb=0", OTHER)  # entries in files
    monkeypatch.setattr(records_module, "SETTLED_NS", 10**12)
    starts()  # files that were just written
    monkeypatch.setattr(records_module, "SETTLED_NS", -(10**12))
    assert not starts.memos
    starts()
    assert len(starts.memos) == 1
    (starts.caching.cache / FOLDER).chmod(0o500)
    starts("train.seed=5")
