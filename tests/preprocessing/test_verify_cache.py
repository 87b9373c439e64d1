"""`cache --verify`: what it finds, logs and returns, and that the next caching pass fixes exactly that."""

from pathlib import Path

import pytest

from mixres import cli
from support.caching import Caching

ALL = 13


def verify(caching: Caching, *options: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = cli.main(["cache", "--verify", "--config", str(caching.file), *options, *caching.words()])
    return code, *caching.capsys.readouterr()


def contents(caching: Caching) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(caching.cache.glob("??/*.safetensors"))}


def flip_bit(path: Path, data: bytes) -> None:
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def test_damaged_and_missing_entries_are_named_and_made_again(caching: Caching) -> None:
    before = contents(caching)
    damaged, gone = list(before)[:2]
    flip_bit(damaged, before[damaged])
    gone.unlink()
    code, out, err = verify(caching)
    counts, fix = f"{ALL - 2} valid, 1 damaged, 1 missing", "run `cache` without --verify to encode them"
    assert (code, err) == (1, f"mixres: error: cache.cache_dir: {caching.cache}: {counts}: {fix}\n")
    [line] = [line for line in out.splitlines() if ".png: damaged, " in line]
    assert line.endswith(f"{damaged}: the checksum of its tensors is wrong; it has been removed")
    assert sum(".png: missing, " in line for line in out.splitlines()) == 1
    assert caching() == (2, ALL - 2)
    code, out, err = verify(caching)
    assert (code, err) == (0, "")
    assert out.endswith(f"cache     {ALL} entries in {caching.cache}: {ALL} valid, 0 damaged, 0 missing\n")
    assert contents(caching) == before


def test_an_entry_of_files_as_they_were_is_not_one_of_files_as_they_are(caching: Caching) -> None:
    caption = caching.first(suffix=".txt")
    caption.write_text("make it greener", encoding="utf-8")
    code, out, _ = verify(caching)
    assert code == 1 and f"{ALL - 1} valid, 0 damaged, 1 missing" in out
    assert f"{caption.stem}.png: missing, there is no entry of its files" in out
    assert "1 more entries there (0.0 MB) are of other data or configurations" in out
    assert len(contents(caching)) == ALL, "it is kept: another run may use it"


def test_verify_is_the_work_of_one_process(caching: Caching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = verify(caching)
    assert (code, out) == (2, "")
    assert err == "mixres: error: --verify: works on one process, 2 were started: python train.py cache --verify\n"
