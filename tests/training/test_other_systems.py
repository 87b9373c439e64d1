"""Runs without what POSIX alone has, and with worker processes that are spawned: as Windows and macOS run them."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.jobs import LORA, REPOSITORY, Jobs, environment, metrics, names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
OTHER = "tests/support/other_system.py"


def test_a_run_without_posix_is_the_same_run(jobs: Jobs, tmp_path: Path) -> None:
    """With a cache in shards, and a resume."""
    words = ("train.max_train_steps=4", "data.num_workers=2", f"cache.cache_dir={tmp_path}/cache", "cache.shard_gb=1")
    plain = jobs.here("plain", words[0])
    done = jobs("other", *words, program=OTHER)
    assert " 0 found" in done.stdout and list(tmp_path.glob("cache/shards/*.tar"))
    assert metrics(jobs.root / "other") == metrics(plain)
    assert (jobs.root / "other" / LORA).read_bytes() == (plain / LORA).read_bytes()
    assert "latest" not in names(jobs.root / "other" / "checkpoints"), "it makes no links"
    assert "4 steps were done before" in jobs("other", *words, program=OTHER).stdout


@pytest.mark.parametrize("planted", ["import fcntl", "import os; os.pread", "from signal import SIGUSR1"])
def test_what_is_absent_there_fails(planted: str) -> None:
    code = f"exec({planted!r}, {{'__name__': 'mixres.planted', '__builtins__': __builtins__}})"
    run = f"import runpy; runpy.run_path({OTHER!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and planted.split()[-1].split(".")[-1] in done.stderr.splitlines()[-1]
