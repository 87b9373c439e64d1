"""A run saved anywhere is resumed to the same bits, with any number of loader processes: state, result and metrics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.jobs import COMMON, LORA, OFFLOADED, Jobs, metrics, newest

LAST = 7  # three steps an epoch, the third one short
SAVED = {"in the middle of an epoch": 2, "at its end": 3, "after it": 4, "at the last step": LAST}
DROPOUT = ("model.lora.lora_dropout=0.2",)
DOUBLE = ("model.dtype=float64",)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def matrix(small_run: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    words = (*COMMON, f"train.max_train_steps={LAST}", "checkpoint.every=1", "checkpoint.keep=99")
    return Jobs(small_run, small_cache, tmp_path_factory.mktemp("matrix"), words)


def bits(folder: Path) -> dict[str, Any]:
    """Everything a run leaves, but for what names its folder, its number of workers and what it offloads."""
    checkpoint = newest(folder)
    assert checkpoint.step == LAST
    files = [folder / LORA, *checkpoint.path.glob("*.safetensors")]
    return {
        **{path.name: path.read_bytes() for path in files},
        "state": {key: value for key, value in checkpoint.state.items() if key != "config"},
        "metrics": metrics(folder),
    }


@pytest.mark.parametrize("parallel", ["1 rank", "2 ranks", "2 ranks, sharded"])
def test_the_same_bits_wherever_it_was_saved_and_with_any_workers(matrix: Jobs, parallel: str) -> None:
    ranks = 1 if parallel == "1 rank" else 2
    words = (*DROPOUT, *(("train.parallel=fsdp2",) if "sharded" in parallel else ()))
    reference = f"reference {parallel}"
    matrix.many([(reference, (*words, "data.num_workers=0"))], ranks)
    cases = [(f"{reference} {where} {workers}", step, workers) for where, step in SAVED.items() for workers in (0, 2)]
    if ranks == 2:  # as often with either number
        cases = [cases[number] for number in (0, 3, 4, 7)]
    for run, step, _ in cases:
        matrix.copy_at(step, reference, run)
    more = {0: (), 2: () if "sharded" in parallel else OFFLOADED}
    matrix.many([(run, (*words, f"data.num_workers={n}", *more[n])) for run, _, n in cases], ranks)
    whole = bits(matrix.root / reference)
    assert len([name for name in whole if name.startswith("trainable")]) == (2 if "sharded" in parallel else 1)
    for run, _, _ in cases:
        assert bits(matrix.root / run) == whole, run


def state_of(folder: Path) -> torch.Tensor:
    checkpoint = newest(folder)
    groups = [checkpoint.tensors(group) for group in ("trainable", "optimizer")]
    return torch.cat([group[name].flatten().double() for group in groups for name in sorted(group)])


@pytest.mark.parametrize("words", [(), ("train.parallel=fsdp2", "model.lora=null")], ids=["lora", "all, sharded"])
def test_another_number_of_ranks_comes_to_the_same_numbers(
    matrix: Jobs, words: tuple[str, ...], tmp_path: Path
) -> None:
    kind = "all" if words else "lora"
    for ranks in (1, 2):
        matrix.many([(f"{kind} on {ranks}", (*DOUBLE, *words))], ranks)
    for saved_by, read_by in ((1, 2), (2, 1)):
        run = f"{kind} {saved_by} to {read_by}"
        matrix.copy_at(4, f"{kind} on {saved_by}", run)
        matrix.many([(run, (*DOUBLE, *words))], read_by)
        ours, theirs = state_of(matrix.root / run), state_of(matrix.root / f"{kind} on {saved_by}")
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-10
