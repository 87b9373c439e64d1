"""Filling a cache: the shares of ranks, dead ranks, two runs at once, full disks; then the real command, killed."""

import gc
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from transformers import Qwen2_5_VLForConditionalGeneration

from mixres import cli, console
from mixres.batch import Sample
from mixres.data.cache import Cache, entry_key
from mixres.data.shards import Shards
from mixres.errors import UserError, WorkError
from mixres.geometry import Grid
from mixres.preprocessing.cache_folder import check_space, make_folder
from mixres.preprocessing.fill import encode_all, fill, spread
from support.caching import Caching
from support.family_cases import with_family
from support.jobs import REPOSITORY, environment, longest_file, torchrun
from support.samples import pickled_mkdir

NUMBERS = {entry_key(i=i): i for i in range(12)}
SIZES = dict.fromkeys(NUMBERS, 10_000)
ALL, FEW = 13, 3
CPU = torch.device("cpu")


def sample(number: int, rows: int = 4) -> Sample:
    latents = torch.full((rows * 4, 16), float(number))
    return Sample(str(number), latents, (latents,), latents[:5], (Grid(1, rows, 4), Grid(1, rows, 4)))


class Encoder:
    """Stands for the family's: counts what is loaded and encoded, in its order."""

    def __init__(self, encode: Callable[[int], Sample] = sample) -> None:
        self.loaded, self.function = 0, encode
        self.encoded: list[int] = []

    def load(self) -> Callable[[str], tuple[Sample, Sequence[str]]]:
        self.loaded += 1
        return self

    def __call__(self, key: str) -> tuple[Sample, Sequence[str]]:
        made = self.function(NUMBERS[key])
        self.encoded.append(NUMBERS[key])
        return made, ()


def entries(root: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in root.glob("??/*.safetensors")}


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Which file each entry is: another one under the same name has been written anew."""
    stats = {path.stem: path.stat() for path in root.glob("??/*.safetensors")}
    return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}


def share(rank: int, world_size: int) -> list[int]:
    return [number for key, number in NUMBERS.items() if int(key, 16) % world_size == rank]


def test_every_missing_entry_is_encoded_once(tmp_path: Path) -> None:
    encoder, again = Encoder(), Encoder()
    assert fill(Cache(tmp_path), SIZES, encoder.load) == 12
    assert (encoder.encoded, encoder.loaded) == ([*range(12)], 1)
    assert entries(tmp_path).keys() == NUMBERS.keys()
    assert fill(Cache(tmp_path), SIZES, again.load) == 0
    assert again.loaded == 0, "encoders are loaded for an entry, not before"


def test_a_rank_encodes_its_share_and_then_what_the_others_have_not(tmp_path: Path) -> None:
    """The others never come: nobody waits for them. Those that help the same one begin at different keys."""
    orders = []
    for rank in range(3):
        encoder, own = Encoder(), share(rank, 3)
        assert fill(Cache(tmp_path / str(rank)), SIZES, encoder.load, rank=rank, world_size=3) == 12
        assert encoder.encoded[: len(own)] == own and len(own) > 1
        assert sorted(encoder.encoded) == [*range(12)]
        orders.append([number for number in encoder.encoded if number in share(2, 3)])
    assert orders[0] != orders[1]


def test_parts_that_know_nothing_of_each_other_make_the_whole(tmp_path: Path) -> None:
    encoded = []
    for rank in (2, 0, 1):
        encoder = Encoder()
        assert fill(Cache(tmp_path), SIZES, encoder.load, rank=rank, world_size=3, alone=True) == len(share(rank, 3))
        encoded += encoder.encoded
    assert sorted(encoded) == [*range(12)]
    assert entries(tmp_path).keys() == NUMBERS.keys()


def test_rank_0_reports_what_all_ranks_have_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0)

    def encode(number: int) -> Sample:
        if number == share(0, 2)[1]:  # the other rank meanwhile
            fill(Cache(tmp_path), SIZES, Encoder().load, rank=1, world_size=2, alone=True)
        return sample(number)

    fill(Cache(tmp_path), SIZES, Encoder(encode).load, rank=0, world_size=2)
    shown = [line for line in capsys.readouterr().out.splitlines() if "of all" in line]
    own, of_all, rates = len(share(0, 2)), len(share(1, 2)) + 2, r"\S+ sample/s, left \d+:\d\d"
    assert re.fullmatch(rf"encode    2/{own}, {rates}; of all {of_all}/12, {rates}", shown[0])


def test_a_rank_that_dies_while_encoding_is_replaced_and_what_it_wrote_stays(tmp_path: Path) -> None:
    def encode(number: int) -> Sample:
        if number == own[2]:
            raise KeyboardInterrupt
        return sample(number)

    own, encoder = share(1, 2), Encoder()
    with pytest.raises(KeyboardInterrupt):
        fill(Cache(tmp_path), SIZES, Encoder(encode).load, rank=1, world_size=2)
    before = files(tmp_path)
    assert fill(Cache(tmp_path), SIZES, encoder.load, rank=0, world_size=2) == 10
    assert sorted(encoder.encoded) == sorted({*range(12)} - {*own[:2]})
    assert before.items() <= files(tmp_path).items()


def test_two_runs_at_once_finish_without_each_other_and_write_the_same_bytes(tmp_path: Path) -> None:
    """The second one runs while the first one encodes entry 3."""

    def encode(number: int) -> Sample:
        if number == 3:
            assert fill(Cache(tmp_path), SIZES, second.load) == 9, "nobody waits for the entry in flight"
            written.update(entries(tmp_path))
        return sample(number)

    first, second, written = Encoder(encode), Encoder(), dict[str, bytes]()
    assert fill(Cache(tmp_path), SIZES, first.load) == 4, "it encodes the entry in flight and no more"
    assert (first.encoded, second.encoded) == ([0, 1, 2, 3], [*range(3, 12)])
    assert entries(tmp_path) == written


def test_a_failed_write_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """The kernel refuses long files: a write that fails in the middle, as on a full disk."""
    encoder = Encoder(lambda number: sample(number, rows=64 if number == 7 else 4))
    with longest_file(8192), pytest.raises(WorkError) as caught:
        fill(Cache(tmp_path), SIZES, encoder.load)
    assert str(caught.value) == (
        f"cache.cache_dir: {tmp_path} cannot be written (File too large): make room, about 0.1 MB for the 5 entries to "
        "come, and run the same command again; those that are there stay"
    )
    before = files(tmp_path)
    assert sorted(NUMBERS[key] for key in before) == [*range(7)]
    assert not list(tmp_path.rglob(".tmp-*")), "no part of the entry is left"
    again = Encoder()
    fill(Cache(tmp_path), SIZES, again.load)
    assert again.encoded == [*range(7, 12)]
    assert before.items() <= files(tmp_path).items()


def test_space_is_compared_with_what_the_disk_has(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(Cache(tmp_path), [free // 4, free // 4])
    with pytest.raises(UserError) as caught:
        check_space(Cache(tmp_path), [2 * free, 10**12, 10**12])
    needed = f"cache.cache_dir: {tmp_path} needs about {(2 * free + 2 * 10**12) / 1e9:.1f} GB for 3 entries, "
    assert caught.value.messages[0].startswith(needed)


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^cache.cache_dir: .*/file/cache cannot be made \(Not a directory\): name "):
        make_folder(tmp_path / "file" / "cache")


def test_ranks_log_what_they_encoded_and_agree(caching: Caching, tmp_path: Path) -> None:
    caching.keep_few()
    caching.cache = tmp_path / "empty"
    alone = encode_all(*with_family(caching.config()), device=CPU, rank=1, world_size=2)
    assert caching.output() == f"cache     rank 1: {FEW} encoded\n", "it does not wait for a rank 0 that has failed"
    assert caching() == (0, FEW)
    other = encode_all(*with_family(caching.config()), device=CPU, rank=1, world_size=2)
    assert caching.output() == "", "one process logs"
    assert [x.key for x in alone.train] == [x.key for x in other.train] == [x.key for x in caching.encoded().train]


def test_the_encoders_are_gone_when_the_pass_returns(caching: Caching) -> None:
    def living() -> set[int]:
        kinds = (AutoencoderKLQwenImage, Qwen2_5_VLForConditionalGeneration)
        return {id(thing) for thing in gc.get_objects() if type(thing) in kinds}

    gc.collect()
    before = living()
    caching.first(suffix=".txt").write_text("make it greener")
    assert caching() == (1, ALL - 1)
    assert living() <= before
    held = with_family(caching.config())[1].load_encoders(dtype=torch.float32, device="cpu")
    assert len(living() - before) == 2, "the check sees encoders that live"
    del held


def test_pickles_in_the_cache_and_the_base_run_nothing(caching: Caching, copy_of_base: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    encoded = caching.encoded()
    planted = [encoded.cache.path(encoded.train[0].key)]
    planted += [caching.cache / name for name in ("index.json", "fingerprints.json", "cache.pt", "index.pkl")]
    planted += [copy_of_base / "vae" / "diffusion_pytorch_model.bin", copy_of_base / "tokenizer" / "tokens.pkl"]
    for path in planted:
        path.write_bytes(pickled_mkdir(witness))
    caching.output()
    assert caching(f"model.pretrained_model_name_or_path={copy_of_base}") == (1, ALL - 1)
    assert caching() == (0, ALL)
    assert not witness.exists()
    pickle.loads(planted[3].read_bytes())
    assert witness.exists(), "the planted ones are not blanks"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_closes_the_open_shard(
    caching: Caching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A scheduler sends one before it takes the machine away."""
    append, words = Shards.append, "cache.shard_gb=1"

    def signalled(shards: Shards, key: str, data: bytes, note: str) -> None:
        append(shards, key, data, note)
        if len(shards.shard_of) == 2:
            signal.raise_signal(number)

    caching.keep_few()
    caching.cache = tmp_path / "empty"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "append", signalled)
        assert cli.main(["cache", "--config", str(caching.file), *caching.words(), words]) == 75
    told = caching.capsys.readouterr().err
    assert told == "mixres: stopped by a signal: what was encoded is in the cache; run the same command to go on\n"
    assert signal.getsignal(number) is before
    assert caching(words) == (FEW - 2, 2)


def test_spread_takes_all_sizes_evenly(caching: Caching) -> None:
    samples = caching.encoded().train
    ordered = spread(samples, 99)
    assert len(ordered) == 10 and ordered == sorted(ordered, key=lambda sample: sample.entry.target_tokens)
    assert spread(reversed(samples), 4) == [ordered[i] for i in (0, 3, 6, 9)]


def command(caching: Caching, ranks: int = 1) -> list[str]:
    launcher = torchrun(2) if ranks == 2 else (sys.executable,)
    return [*launcher, "train.py", "cache", "--config", str(caching.file), *caching.words()]


def assert_undisturbed(root: Path, filled_cache: Path) -> None:
    """It is what one process makes at once."""
    assert entries(root) == entries(filled_cache)
    assert (root / "index.json").read_bytes() == (filled_cache / "index.json").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_ranks_leave_entries_that_the_next_ranks_keep(
    caching: Caching, filled_cache: Path, tmp_path: Path
) -> None:
    """Both ranks are killed each time that some entries are on disk, then two ranks finish."""
    caching.cache = root = tmp_path / "empty"
    seen = dict[str, tuple[int, int]]()
    start = partial(subprocess.Popen, command(caching, ranks=2), cwd=REPOSITORY, env=environment(), text=True)
    for wanted in (1, 6):
        with start(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as job:
            while len(files(root)) < wanted:
                assert job.poll() is None
                time.sleep(0.01)
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()  # the ranks hold the pipe: they are dead when it ends, and write no more
        assert seen.items() <= files(root).items(), "an entry that is there is not encoded again"
        seen = files(root)
        assert wanted <= len(seen) < ALL
    with start(stdout=subprocess.PIPE) as job:
        found = re.search(r", (\d+) found", job.communicate()[0])
        assert found and int(found[1]) >= len(seen), "one rank may find what the other has just written"
    assert job.returncode == 0
    assert seen.items() <= files(root).items()
    assert_undisturbed(root, filled_cache)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_full_cache_on_a_disk_that_cannot_be_written_is_used(caching: Caching, tmp_path: Path) -> None:
    """The disk is mounted where this script alone sees it; without the index and the scan's memo. Then it lacks one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    filled, caching.cache = caching.cache, disk / "cache"
    script = f"""
    mount -t tmpfs none {disk}
    cp -r {filled} {caching.cache}
    rm -rf {caching.cache}/index.json {caching.cache}/scan
    mount -o remount,ro {disk}; {" ".join(command(caching))}
    mount -o remount,rw {disk}; rm $(ls {caching.cache}/??/*.safetensors | head -1)
    mount -o remount,ro {disk}; ! {" ".join(command(caching))}
    """
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc", script]
    done = subprocess.run(unshare, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True)
    assert f"{caching.cache}: 0 encoded, {ALL} found\n" in done.stdout
    assert "the index could not be written (Read-only file system): the next start takes longer" in done.stdout
    [line] = [line for line in done.stderr.splitlines() if line.startswith("mixres: error")]
    assert "cannot be written (Read-only file system): make it writable, with room, about" in line
