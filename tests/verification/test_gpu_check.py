"""`scripts/gpu_check.sh` on a machine without a CUDA device: tiny shapes, the same processes, reports and tables."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.jobs import REPOSITORY, environment
from support.pages import script

GPU_CHECK = script("gpu_check")


def check(docs: Path, *options: str) -> tuple["subprocess.CompletedProcess[str]", dict[str, dict[str, Any]]]:
    """The command on the CPU, and its cases by name."""
    command = ["bash", "scripts/gpu_check.sh", "--docs", str(docs), *options]
    hidden = environment() | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=REPOSITORY, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    result = json.loads((docs / "benchmarks" / "cpu.json").read_text())
    return done, {case["name"]: case for case in result["cases"]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_case_has_an_outcome_and_the_page_its_tables(tmp_path: Path) -> None:
    done, cases = check(tmp_path)
    outcomes = {name: case["outcome"] for name, case in cases.items()}
    measured = dict.fromkeys(("batch_equals_alone", "tiny", "tiny_int8"), "done")
    assert outcomes == {"gpu_tests": "not run", **measured, "too_large": "failed"}
    assert cases["batch_equals_alone"]["report"]["passed"]
    assert "batch.max_tokens" in cases["too_large"]["reason"]
    assert [row["name"] for row in cases["tiny"]["report"]["rows"]] == ["one_by_one", "padded", "packed"]
    peaks = [row["rehearsed_bytes"] for case in ("tiny", "tiny_int8") for row in cases[case]["report"]["rows"]]
    assert peaks[2] > peaks[0] > 10**7 and peaks[3] > 10**7, peaks
    page = (tmp_path / "benchmarks.md").read_text()
    for case, way in (("tiny", "one_by_one"), ("tiny", "padded"), ("tiny", "packed"), ("tiny_int8", "packed")):
        assert f"| {case} | {way} | " in page and f"| {case} | {way} | " in done.stdout
    assert "- `gpu_tests`: not run: there is no CUDA device" in page
    GPU_CHECK.write_page(tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == page, "written again it is the same"


def test_what_the_time_does_not_allow_is_listed(tmp_path: Path) -> None:
    case = GPU_CHECK.CPU_CASES[2]
    assert GPU_CHECK.run(case, 39, tmp_path)["reason"] == "39 s were left"
    stopped = GPU_CHECK.run(case._replace(limit=1), 60, tmp_path)
    assert (stopped["outcome"], stopped["reason"], stopped["report"]) == ("stopped", "it ran past 1 s", None)


def test_every_case_is_a_command_that_the_command_line_takes() -> None:
    from mixres.cli import parsers
    from mixres.config.load import load_config

    for case in GPU_CHECK.GPU_CASES[1:]:
        verb, *words = case.command
        given = parsers()[1][verb].parse_intermixed_args(words)
        assert given.synthetic
        load_config(REPOSITORY / given.config, given.words)
