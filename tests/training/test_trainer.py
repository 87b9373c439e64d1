"""The small parts of the loop: what it draws, and what it logs of a skipped step."""

import math

import pytest
import torch

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


def test_a_skip_is_logged_until_it_is_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(f"{i}.png" for i in range(22))
    left_out, skips = StepResult(math.nan, 1.0, 6, 6, stopping=False, skipped=names), Skips(total=5, consecutive=2)
    skips.count(False)
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
    assert skips.total == 8
