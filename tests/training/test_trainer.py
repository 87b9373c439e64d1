"""The small parts of the loop: what it draws, what it records of a step, what it logs of a skipped one."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from mixres import cli
from mixres.data.plan import Lengths, Plan
from mixres.errors import WorkError
from mixres.training import trainer
from mixres.training.resume import Skips
from mixres.training.step import StepResult


def test_what_dropout_draws_is_a_function_of_seed_step_and_rank() -> None:
    seeds = {trainer._step_seed(*key) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63 - 1, 10**9, 4095)]}
    assert len(seeds) == 5
    assert trainer._step_seed(3, 5, 7) == trainer._step_seed(3, 5, 7)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_the_metrics_of_a_step_can_be_read_back() -> None:
    """JSON has no NaN: a step that was left out has null, and the names of its samples."""
    plan = Plan([Lengths(1, 2, 1)] * 3, names=["a"] * 3, seed=0, samples_per_step=2, max_tokens=6, layout="packed")
    left_out = StepResult(math.nan, math.inf, 6, 6, stopping=False, skipped=("a", "b"))
    line = trainer._metrics_line(plan.step(1), left_out, 1e-3, 0.25)
    read = json.loads(json.dumps(line, allow_nan=False))
    assert (read["loss"], read["grad_norm"], read["skipped"]) == (None, None, ["a", "b"])


def test_a_skip_is_logged_until_it_is_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(f"{i}.png" for i in range(22))
    left_out, skips = StepResult(math.nan, 1.0, 6, 6, stopping=False, skipped=names), Skips()
    for step in (7, 8):
        skips.count(True)
        trainer._log_skip(left_out, step, skips, 2, is_main=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("skipped   step 7: loss nan, gradient norm 1.0: not finite: nothing is updated (1 in a row")
    assert "(2 in a row, at most 2)" in second
    assert second.endswith("18.png, 19.png and 2 more")
    skips.count(True)
    with pytest.raises(WorkError, match=r"step 9: .* 3 steps in a row are more than train.max_skips = 2"):
        trainer._log_skip(left_out, 9, skips, 2, is_main=True)


def test_the_end_names_where_everything_is_and_what_to_type_next(
    small_run: Path, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AcceleratorState._reset_state(True)
    run = tmp_path / "run"
    words = [f"cache.cache_dir={small_cache}", f"logging.output_dir={run}", "logging.report_to=tensorboard"]
    words += ["train.max_train_steps=2", "sample.every=2", "train.ema_decay=0.5"]
    assert cli.main(["--config", str(small_run), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    end = {line[:10].strip(): line[10:] for line in lines[-5:]}
    assert list(end) == ["result", "samples", "metrics", "tracker", "next"]
    named = [path for name in end for path in re.findall(rf"{re.escape(str(run))}[\w./-]*", end[name])]
    assert {Path(path).name for path in named} >= {"ema", "samples", "metrics.jsonl", "checkpoints", "mixres"}
    assert all(Path(path).exists() for path in named)
    what = r"mixres sample --lora \S+ --image IMAGE --prompt TEXT --size \d+x\d+ --steps 2 --out FOLDER"
    assert re.fullmatch(what, end["next"]), "as samples are trained, and the run's own are made"
