"""Batches of the loader from real cache entries: the step number is the whole position, workers change nothing."""

import multiprocessing
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixres.batch import Batch, Sample
from mixres.data import loader as loader_module
from mixres.data.cache import Cache, entry_key
from mixres.data.collate import collate
from mixres.data.loader import MicrobatchDataset, microbatch_loader
from mixres.data.plan import Layout, Lengths, Plan
from mixres.errors import WorkError
from mixres.geometry import Grid
from support.samples import make_sample

COUNT, STEPS = 7, 6
NAMES = [f"training_images/{i}.png" for i in range(COUNT)]
KEYS = [entry_key(sample=i) for i in range(COUNT)]


def sample_of(i: int) -> Sample:
    shapes = (Grid(1, 2 + i % 3, 3), Grid(1, 2, 1 + i % 2))[: 1 + i % 2]
    return make_sample(shapes, name=NAMES[i], text=2 + i, empty=1 + i % 2, mask=i % 3 == 0, seed=i, pooled=3)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path)
    for i, key in enumerate(KEYS):
        cache.write(key, sample_of(i))
    return cache


def make_plan(layout: Layout = "padded", world_size: int = 1, caption_dropout: float = 0.0) -> Plan:
    lengths = []
    for sample in map(sample_of, range(COUNT)):
        assert sample.empty_embeds is not None
        image = sum(grid.tokens for grid in sample.img_shapes)
        lengths.append(Lengths(len(sample.prompt_embeds), image, len(sample.target_latents), len(sample.empty_embeds)))
    return Plan(
        lengths, names=NAMES, seed=3, samples_per_step=4, max_tokens=40, layout=layout, world_size=world_size,
        caption_dropout=caption_dropout,
    )  # fmt: skip


def loader(
    cache: Cache, *, layout: Layout = "padded", rank: int = 0, world_size: int = 1, first: int = 0, workers: int = 0
) -> Iterator[Batch]:
    dataset = MicrobatchDataset(cache, KEYS, NAMES, layout)
    plan = make_plan(layout, world_size)
    return microbatch_loader(dataset, plan, rank=rank, first=first, last=STEPS, workers=workers)


def assert_equal(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for field in fields(Batch):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batches_are_the_plans_microbatches_of_the_samples_written(
    cache: Cache, layout: Layout, dropout: float
) -> None:
    """A dropped caption is the sample's own empty prompt."""
    plan, dropped, kept = make_plan(layout, world_size=2, caption_dropout=dropout), 0, 0
    dataset = MicrobatchDataset(cache, KEYS, NAMES, layout)
    for rank in range(2):
        wanted = []
        for m in (m for step in range(STEPS) for m in plan.step(step).ranks[rank]):
            samples = [sample_of(i) for i in m.indices]
            empty = [replace(s, prompt_embeds=s.empty_embeds, pooled_embeds=s.empty_pooled_embeds) for s in samples]
            samples = [e if i in m.dropped else s for i, e, s in zip(m.indices, empty, samples, strict=True)]
            wanted.append(collate(samples, indices=m.indices, weights=m.weights, layout=layout))
            dropped += len(m.dropped)
            kept += len(m.indices) - len(m.dropped)
        batches = list(microbatch_loader(dataset, plan, rank=rank, first=0, last=STEPS, workers=0))
        assert_equal(batches, wanted)
        assert all(batch.tokens_computed <= plan.max_tokens for batch in batches)
    assert kept > 3 and (dropped > 3) == (dropout > 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_gives_the_tail_with_any_workers_and_leaves_the_global_generators(cache: Cache, workers: int) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]

    before, whole = states(), list(loader(cache))
    for first in (0, 1, STEPS - 1, STEPS):
        skipped = sum(len(make_plan().step(step).ranks[0]) for step in range(first))
        assert_equal(list(loader(cache, first=first, workers=workers)), whole[skipped:])
    assert states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batch_takes_shared_memory(cache: Cache, workers: int) -> None:
    """Torch waits without end for a batch that did not fit there; a container has 64 MB of it."""
    for batch in loader(cache, workers=workers):
        values = [getattr(batch, field.name) for field in fields(Batch)]
        assert not any(value.is_shared() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_lie_in_page_locked_memory(cache: Cache, workers: int) -> None:
    for batch in loader(cache, workers=workers):
        assert batch.latents.is_pinned() and batch.prompt_embeds.is_pinned()


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [corrupt, Path.unlink], ids=["bit_flip", "deleted"])
def test_a_damaged_entry_ends_in_one_line_that_says_run_again(cache: Cache, damage: Any, workers: int) -> None:
    hurt = make_plan().step(1).indices[0]
    path, whole = cache.path(KEYS[hurt]), len(make_plan().step(0).ranks[0])
    damage(path)
    batches = loader(Cache(cache.root), workers=workers)
    for _ in range(whole):
        assert hurt not in next(batches).indices
    with pytest.raises(WorkError) as caught:
        list(batches)
    assert not multiprocessing.active_children()  # though the traceback is still held
    message = str(caught.value)
    assert str(path) in message and message.endswith("run the same command again") and len(message) < 400
    assert not path.exists()  # so that the next caching pass makes it again


PROGRAM = """
import os, signal, sys, multiprocessing
sys.path[:0] = [{folder!r}, {folder!r} + '/..']
from test_loader import Cache, Path, loader
batches = loader(Cache(Path({root!r})), workers=2)
next(batches), next(batches)  # one of each worker: both are up
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
print(2 + len(list(batches)) if {last} else "raising")
if not {last}:
    raise KeyError("a traceback keeps the workers alive until the process ends")
"""


@pytest.mark.parametrize(
    "last",
    [pytest.param(True, id="to_the_end", marks=pytest.mark.slow), pytest.param(False, id="left_by_an_exception")],
)
def test_workers_outlive_signals_to_all_processes_but_not_the_run(cache: Cache, last: bool) -> None:
    program = PROGRAM.format(folder=str(Path(__file__).parent), root=str(cache.root), last=last)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == (f"{len(list(loader(cache)))}\n" if last else "raising\n")
    assert done.returncode == (0 if last else 1)
    assert ("KeyError" in done.stderr) != last and "DataLoader" not in done.stderr


def test_a_worker_that_dies_as_it_hands_over_a_batch_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection ends before the signal of its death comes, which is waited for: from that torch raises."""

    def results() -> Iterator[Batch]:
        raise EOFError
        yield

    waits: list[float] = []
    monkeypatch.setattr(loader_module.time, "sleep", waits.append)
    with pytest.raises(WorkError, match=r"data\.num_workers: a process of the loader ended as it handed over a batch"):
        next(loader_module._finished(results(), pytest.fail, SimpleNamespace(value=0)))
    assert waits == [5.0]
