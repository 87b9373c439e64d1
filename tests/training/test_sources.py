"""The same run from a folder, a tar shard, a parquet file and an S3 store, and from every kind of cache."""

import json
from pathlib import Path

import fsspec
import pytest
from safetensors.torch import load_file

from mixres import cli
from mixres.data import records
from mixres.data.cache import Cache
from mixres.preprocessing.start_memo import FOLDER
from support.jobs import COMMON, LORA, Jobs, metrics
from support.object_stores import ACCESS, members_of, parquet_of, s3_server, tar_of

WORDS = ("train.max_train_steps=3", "logging.report_to=none")


def losses(folder: Path) -> list[str]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.dumps(json.loads(line)["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_the_same_run_from_every_source_has_the_same_losses_bit_for_bit(
    small_run: Path,
    few_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each fills a cache of its own; the keys are the same too. No credential stands in what a run leaves or logs."""
    pairs = few_pairs / "train"
    members = members_of(pairs)
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    parquet_of(pairs, tmp_path / "x.parquet")
    with s3_server() as url:
        for name, value in {**ACCESS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        names = list(members)
        for number, part in enumerate((names[:12], names[12:])):
            store.pipe(f"pairs/{number}.tar", tar_of({name: members[name] for name in part}))
        runs = {}
        store.pipe("pairs/x.parquet", (tmp_path / "x.parquet").read_bytes())
        for name, source, shard_gb in (
            ("folder", pairs, 0),
            ("tar", tmp_path / "x.tar", 1),
            ("parquet", tmp_path / "x.parquet", 0),
            ("s3", "s3://pairs/*.tar", 1),
            ("s3 parquet", "s3://pairs/x.parquet", 0),
        ):
            jobs = Jobs(small_run, tmp_path / name / "cache", tmp_path / name)
            runs[name] = jobs.here("run", f"data.train={source}", f"cache.shard_gb={shard_gb}", *WORDS)
    entries = {name: sorted(Cache(tmp_path / name / "cache").held()) for name in runs}
    for name, run in runs.items():
        assert len(entries[name]) == 10 and entries[name] == entries["folder"]
        assert losses(run) == losses(runs["folder"]) and len(set(losses(run))) == 3
        weights, wanted = load_file(run / LORA), load_file(runs["folder"] / LORA)
        assert all(weights[key].equal(wanted[key]) for key in wanted)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written if ACCESS["AWS_SECRET_ACCESS_KEY"].encode() in file.read_bytes()]
    assert not [text for text in capsys.readouterr() if ACCESS["AWS_SECRET_ACCESS_KEY"] in text]


@pytest.mark.slow
def test_a_run_that_resumes_with_what_a_start_kept_has_the_same_losses_bit_for_bit(
    small_run: Path, few_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "SETTLED_NS", -(10**12))  # the shard is new
    (tmp_path / "x.tar").write_bytes(tar_of(members_of(few_pairs / "train")))
    jobs = Jobs(small_run, tmp_path / "cache", tmp_path)
    words = [*WORDS, f"data.train={tmp_path}/x.tar", "cache.shard_gb=1"]
    straight = jobs.here("straight", *words)
    (memo,) = (tmp_path / "cache" / FOLDER).glob("*.start")
    written = memo.stat().st_ino
    for steps in (1, 3):
        resumed = jobs.here("resumed", *words, f"train.max_train_steps={steps}")
    assert memo.stat().st_ino == written, "it was taken over, not written again"
    assert losses(resumed) == losses(straight) and len(set(losses(resumed))) == 3
    assert (resumed / LORA).read_bytes() == (straight / LORA).read_bytes()
    memo.unlink()
    assert losses(jobs.here("without", *words)) == losses(straight)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_run_from_a_cache_at_a_url_has_the_same_losses_bit_for_bit(
    small_run: Path,
    few_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses, held-out losses and grids, of files and of shards at a URL that another machine has written."""
    common = [*COMMON[1:2], *COMMON[3:], f"data.held_out={few_pairs / 'held_out'}", "evaluate.every=2"]
    shared = ["cache.cache_dir=s3://pairs/cache", "cache.shard_gb=1e-4", "data.num_workers=2"]
    machines = [[*shared, f"cache.local_dir={tmp_path / name}"] for name in "ab"]

    def verb(*words: str) -> tuple[int, str]:
        code = cli.main([*words[:2], *jobs.words("verb")[:2], *words[2:]])
        return code, capsys.readouterr().out

    with s3_server() as url:
        for name, value in {**ACCESS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        jobs = Jobs(small_run, tmp_path / "files", tmp_path / "runs", common)
        files = jobs.here("files", *WORDS)
        code, out = verb("cache", *machines[0])
        assert code == 0 and "13 entries in s3://pairs/cache: 13 encoded, 0 found" in out
        at_url = jobs.here("b", *machines[1], *WORDS)
        assert "13 entries in s3://pairs/cache: 0 encoded, 13 found" in capsys.readouterr().out
        code, out = verb("cache", "--verify", *machines[1])
        assert code == 0 and "13 entries in s3://pairs/cache: 13 valid, 0 damaged, 0 missing" in out
        code, out = verb("cache", "--compact", *machines[1], "cache.shard_gb=0")
        assert code == 0 and "13 entries (" in out and "13 moved" in out
        code, out = verb("cache", "--shard=2/3", *machines[0])
        assert code == 0 and "13 of all 13 entries had been there" in out
        assert verb("inspect", "--ranks=2", *machines[0], f"logging.output_dir={tmp_path / 'runs/i'}")[0] == 0
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        assert [name.rpartition(".")[2] for name in store.ls("pairs/cache/shards", detail=False)] == ["tar"]
    assert len(metrics(files)) > 3 and metrics(files) == metrics(at_url)
    for name in (LORA, "samples/step-00000003.png"):
        assert (files / name).read_bytes() == (at_url / name).read_bytes()
    assert {path.name for path in (tmp_path / "b").rglob("*.json")} == {"fingerprints.json"}
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written if ACCESS["AWS_SECRET_ACCESS_KEY"].encode() in file.read_bytes()]
