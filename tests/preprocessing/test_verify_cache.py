"""`cache --verify`: what it finds, says and returns, and that the next caching pass fixes exactly that."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mixres import cli
from mixres.config.load import load_config
from mixres.preprocessing.fill import keyed_records
from support.family_cases import with_family
from support.jobs import Jobs

ALL = 13


class Cache:
    """The commands `cache` and `cache --verify` over one data folder and one cache, as a user gives them."""

    def __init__(self, file: Path, root: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.root, self.data, self.capsys = file, root, data, capsys

    def __call__(self, *options: str) -> tuple[int, str, str]:
        """Exit code, what was said, what was complained of."""
        folders = [f"data.train={self.data / 'train'}", f"data.held_out={self.data / 'held_out'}"]
        folders += [f"cache.cache_dir={self.root}", f"logging.output_dir={self.data / 'run'}"]
        code = cli.main(["cache", "--config", str(self.file), *options, *folders])
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def entries(self) -> list[Path]:
        return sorted(self.root.glob("??/*.safetensors"))

    def contents(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.entries()}


@pytest.fixture
def cache(
    small_run: Path, filled_cache: Path, few_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Cache:
    data = shutil.copytree(few_pairs, tmp_path / "data")
    return Cache(small_run, shutil.copytree(filled_cache, tmp_path / "cache"), data, capsys)


def flip_bit(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])


DAMAGE: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "a bit": (flip_bit, "the checksum of its tensors is wrong"),
    "truncated": (lambda path, whole: path.write_bytes(whole[:-100]), "bytes long, not what its header says"),
    "empty": (lambda path, whole: path.write_bytes(b""), "it is shorter than a header"),
    "foreign": (lambda path, whole: path.write_bytes(b"PK\x03\x04" * 99), "its header is longer than the file"),
}


def test_a_whole_cache(cache: Cache) -> None:
    before = cache.contents()
    code, said, complaints = cache("--verify")
    assert (code, complaints) == (0, "")
    assert said.endswith(f"cache     {ALL} entries in {cache.root}: {ALL} whole, 0 damaged, 0 missing\n")
    assert cache.contents() == before


def test_every_kind_of_damage_is_told_and_made_again(cache: Cache) -> None:
    before = cache.contents()
    damaged = dict(zip(cache.entries(), DAMAGE.values(), strict=False))
    for path, (damage, _) in damaged.items():
        damage(path, before[path])
    gone = cache.entries()[-1]
    gone.unlink()
    code, said, complaints = cache("--verify")
    assert code == 1
    counts = f"{ALL - 5} whole, 4 damaged, 1 missing"
    assert f"cache     {ALL} entries in {cache.root}: {counts}\n" in said
    assert complaints == (
        f"mixres: error: cache.cache_dir: {cache.root}: {counts}: run `cache` without --verify to encode them\n"
    )
    for path, (_, reason) in damaged.items():
        [line] = [line for line in said.splitlines() if str(path) in line]
        assert line.endswith("it has been removed")
        assert ".png: damaged, " in line
        assert reason in line
    assert sum(".png: missing, " in line for line in said.splitlines()) == 1
    assert "5 encoded, 8 found" in cache()[1]
    assert cache.contents() == before
    assert cache("--verify")[0] == 0


def test_without_verify_a_changed_bit_would_not_be_found(cache: Cache) -> None:
    """The lengths come from the index: this is what `--verify` is for."""
    path = cache.entries()[0]
    flip_bit(path, path.read_bytes())
    assert "0 encoded, 13 found" in cache()[1]
    assert cache("--verify")[0] == 1
    assert "1 encoded, 12 found" in cache()[1]


@pytest.mark.slow
def test_training_stops_at_a_damaged_entry_and_the_same_command_makes_it_again(cache: Cache, tmp_path: Path) -> None:
    before, jobs = cache.contents(), Jobs(cache.file, cache.root, tmp_path)
    config = load_config(cache.file, jobs.words("run")[2:])
    key = keyed_records(*with_family(config), is_main=False)[3][0]
    path = cache.root / key[:2] / f"{key}.safetensors"
    flip_bit(path, before[path])
    [line] = [line for line in jobs("run", code=1).stderr.splitlines() if line.startswith("mixres: error: ")]
    assert line == (
        f"mixres: error: {path}: the checksum of its tensors is wrong; the entry has been removed and the next caching "
        "pass makes it again: run the same command again"
    )
    assert "1 encoded, 9 found" in jobs("run").stdout
    assert cache.contents() == before


def test_an_entry_of_files_as_they_were_is_not_one_of_files_as_they_are(cache: Cache) -> None:
    caption = min((cache.data / "train" / "training_images").glob("*.txt"))
    caption.write_text("make it greener", encoding="utf-8")
    code, said, _ = cache("--verify")
    assert code == 1
    assert f"{ALL - 1} whole, 0 damaged, 1 missing" in said
    assert f"{caption.stem}.png: missing, there is no entry of its files" in said
    assert "1 more entries there (0.0 MB) are of other data or configurations" in said
    assert len(cache.entries()) == ALL, "it is kept: another run may use it"


def test_problems_of_data_and_configuration_come_first(cache: Cache) -> None:
    min((cache.data / "train" / "training_images").glob("*.png")).write_bytes(b"")
    code, said, complaints = cache("--verify")
    assert code == 2
    assert "is empty (0 bytes); copy it again" in complaints
    assert said == ""


def test_verify_is_the_work_of_one_process(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cache("--verify") == (
        2,
        "",
        "mixres: error: --verify: works on one process, 2 were started: python train.py cache --verify\n",
    )
