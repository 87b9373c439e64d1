"""Shards through the verbs: `cache --compact`, `--verify`, and training, which learns the same from either."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mixres import cli
from mixres.preprocessing.encode import entry_bytes, foreseen_entries
from mixres.preprocessing.fill import keyed_records
from support.caching import Caching
from support.family_cases import EVERY_CASE, with_family
from support.jobs import REPOSITORY, Jobs, environment, metrics
from support.samples import assert_same

ALL = 13
SHARD = "cache.shard_gb=1e-4"


def run(caching: Caching, *options: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = cli.main(["cache", "--config", str(caching.file), *options, *caching.words()])
    return code, *caching.capsys.readouterr()


def shards(caching: Caching) -> list[Path]:
    return sorted((caching.cache / "shards").glob("*.tar"))


def test_a_part_of_the_entries_is_encoded_and_nothing_of_the_others(
    caching: Caching, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = sorted(caching.cache.glob("??/*.safetensors"))[::2]
    for path in removed:
        path.unlink()
    encoded = []
    for part in ("2/2", "1/2"):
        code, out, err = run(caching, "--shard", part)
        last = out.splitlines()[-1]
        assert (code, err) == (0, "") and last.startswith(f"cache     shard {part}: ")
        encoded.append(int(last.split()[3]))
        assert last.endswith(f"{ALL - len(removed) + sum(encoded[:-1])} of all {ALL} entries had been there")
    assert encoded == [sum(int(path.stem, 16) % 2 == rest for path in removed) for rest in (1, 0)]
    assert caching() == (0, ALL)
    for wrong in ("0/2", "3/2", "2", "1/0"):
        code, _, err = run(caching, "--shard", wrong)
        assert code == 2 and f"'{wrong}' is no part: write I/N, I from 1 to N, such as 1/16" in err
    assert run(caching, "--shard", "1/2", "--verify")[0] == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "mixres: error: --shard: is for one process, 2 were started, which share all entries: leave it out\n"
    assert run(caching, "--shard", "1/2") == (2, "", line)


def test_compaction_moves_every_file_and_what_is_damaged_is_encoded_again(caching: Caching) -> None:
    before = caching.samples()
    code, out, err = run(caching, "--compact", SHARD)
    assert (code, err) == (0, "")
    counts = f"{ALL} moved, {ALL} files and shards replaced, 0 damaged"
    assert out.splitlines()[-1].endswith(f"in {caching.cache}: {counts}")
    assert len(shards(caching)) > 1 and not list(caching.cache.glob("??/*.safetensors"))
    assert run(caching, "--verify")[0] == 0
    assert caching() == (0, ALL)
    for one, other in zip(before, caching.samples(), strict=True):
        assert_same(one, other)
    lost = shards(caching)[0]
    lost.write_bytes(lost.read_bytes()[:-1])
    code, out, _ = run(caching, "--verify")
    assert code == 1 and f"{lost}: damaged, its index cannot be read" in out
    encoded, found = caching(SHARD)
    assert encoded > 0 and encoded + found == ALL
    assert run(caching, "--compact", SHARD)[0] == 0 and not lost.exists()
    assert run(caching, "--verify")[0] == 0


def test_what_compaction_needs_is_asked_for_in_a_line(caching: Caching, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "mixres: error: cache.shard_gb: is 0, a file for each entry: set the size of shards, such as 1.0\n"
    assert run(caching, "--compact") == (2, "", line)
    code, _, err = run(caching, "--compact", "--verify", SHARD)
    assert code == 2 and "--verify" in err
    monkeypatch.setattr(caching, "cache", "https://host/cache")
    line = "mixres: error: cache.cache_dir: https:// cannot be written: name a folder, or use s3://, gs:// or hf://\n"
    assert run(caching, "--compact") == run(caching) == (2, "", line)
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "mixres: error: --compact: works on one process, 2 were started: python train.py cache --compact\n"
    assert run(caching, "--compact", SHARD) == (2, "", line)


def test_prompts_and_samples_that_use_them_lie_in_shards(caching: Caching, base_of: Callable[[object], Path]) -> None:
    caching.keep_few()
    case = EVERY_CASE["flux2_klein"]
    words = [f"model.pretrained_model_name_or_path={base_of(case)}", *case.overrides(), "data.caption_dropout=0.5"]
    files = caching.samples(*words, f"cache.cache_dir={caching.cache / 'files'}")
    words += [f"cache.cache_dir={caching.cache / 'shards'}", "cache.shard_gb=1"]
    for one, other in zip(files, caching.samples(*words), strict=True):
        assert_same(one, other)
    assert len(list((caching.cache / "shards" / "shards").glob("*.tar"))) == 2, "one of prompts, one of samples"


def test_text_in_8_bits_has_entries_of_its_own_and_takes_what_is_foreseen(caching: Caching) -> None:
    caching.keep_few()
    exact, rounded = caching.samples(), caching.samples("cache.text=float8")
    for one, other in zip(exact, rounded, strict=True):
        assert_same(replace(one, prompt_embeds=other.prompt_embeds), other)
        assert one.prompt_embeds.dtype == other.prompt_embeds.dtype
        assert 0 < (one.prompt_embeds - other.prompt_embeds).norm() < 0.04 * one.prompt_embeds.norm()
    assert caching() == caching("cache.text=float8") == (0, 3)
    spare = []
    for words in ([], ["cache.text=float8"]):
        config, family = with_family(caching.config(*words))
        found = keyed_records(config, family, is_main=False)
        sizes = entry_bytes(config, family, foreseen_entries(config, family, found.by_key, (), found.shared, {}))
        spare += [min(size - found.cache.path(key).stat().st_size for key, size in sizes.items())]
    assert spare[0] >= spare[1] >= max(0, spare[0] - 250), "names and scales in the header, no more"


@pytest.mark.slow
def test_the_losses_are_the_same_from_files_and_from_shards(caching: Caching, tmp_path: Path) -> None:
    files, folder = caching.cache, tmp_path / "sharded"
    caching.cache = shutil.copytree(files, folder)
    assert run(caching, "--compact", SHARD)[0] == 0
    words = ("data.num_workers=2", "train.max_train_steps=6")
    one, other = Jobs(caching.file, files, tmp_path / "runs"), Jobs(caching.file, folder, tmp_path / "runs")
    from_files, from_shards = one.here("files", *words), other.here("shards", *words)
    one.here("files", *words, "cache.text=float8", code=2)
    assert (
        "cache.text: checkpoint step-00000006 was made with null, this run has float8"
        in caching.capsys.readouterr().err
    )
    assert len(metrics(from_files)) > 5 and metrics(from_files) == metrics(from_shards)
    assert (from_files / "pytorch_lora_weights.safetensors").read_bytes() == (
        from_shards / "pytorch_lora_weights.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shards_on_a_disk_that_cannot_be_written_are_read(caching: Caching, tmp_path: Path) -> None:
    """The disk is mounted where this script alone sees it. Then an entry is damaged."""
    disk = tmp_path / "disk"
    disk.mkdir()
    assert run(caching, "--compact", SHARD)[0] == 0
    filled, caching.cache = caching.cache, disk / "cache"
    verify = [sys.executable, "train.py", "cache", "--verify", "--config", str(caching.file), *caching.words()]
    script = f"""
    mount -t tmpfs none {disk}
    cp -r {filled} {caching.cache}
    mount -o remount,ro {disk}; {" ".join(verify)}
    mount -o remount,rw {disk}; printf X | dd of=$(ls {caching.cache}/shards/*.tar | head -1) bs=1 seek=600 conv=notrunc
    mount -o remount,ro {disk}; ! {" ".join(verify)}
    """
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc", script]
    done = subprocess.run(unshare, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True)
    assert f"{ALL} valid, 0 damaged, 0 missing" in done.stdout
    [line] = [line for line in done.stderr.splitlines() if line.startswith("mixres: error")]
    assert line.endswith(
        f"it cannot be removed (Read-only file system): make {caching.cache} writable and run the same command again"
    )
