"""Runs whose blocks and activations wait in host memory: the same files, and no empty tensor anywhere."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mixres.config.schema import Config
from mixres.models.lora import fill_adapters
from mixres.preprocessing.fill import CachedData
from mixres.training.sample_sheets import HeldOutSampler
from mixres.training.setup import load_trained
from support import steps
from support.family_cases import with_family
from support.jobs import LORA, OFFLOADED, Jobs, metrics

DORA = ("model.lora.use_dora=true", "model.lora.target_modules=all")
INT8 = ("model.quantize=int8",)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_waits_in_host_memory_leaves_the_same_files(jobs: Jobs, few_pairs: Path) -> None:
    """Grids and evaluation too, from the start, and where it resumes a run that had all on the device."""
    bf16 = ("model.dtype=bfloat16", "train.mixed_precision=bf16", "batch.layout=padded", "model.lora.lora_dropout=0.1")
    average = ("train.ema_decay=0.5", "sample.use_ema=true", "evaluate.every=2", "evaluate.sigmas=[0.5]")
    data = (f"data.held_out={few_pairs / 'held_out'}", "sample.every=2", "train.max_train_steps=4")
    words = (*DORA, *INT8, *bf16, *average, *data)
    plain, swapped = jobs.here("plain", *words), jobs.here("swapped", *words, *OFFLOADED)
    resumed = jobs.here(jobs.copy_at(2, "plain", "resumed").name, *words, *OFFLOADED)
    for folder in (swapped, resumed):
        assert metrics(folder) == metrics(plain)
        for file in (LORA, f"ema/{LORA}", "samples/step-00000002.png", "samples/step-00000004.png"):
            assert (folder / file).read_bytes() == (plain / file).read_bytes(), (folder.name, file)


@pytest.mark.parametrize("words", [(), DORA, INT8], ids=["lora", "dora", "int8"])
def test_nothing_sees_an_empty_tensor(
    setup: Callable[..., Config], encoded: CachedData, tmp_path: Path, words: Sequence[str]
) -> None:
    """Counts, the stock pipeline, the state dict, a merge and the merged model: as without, before and after a step."""
    configs = [setup(*words, *more) for more in ((), OFFLOADED)]
    plain, swapped = both = [load_trained(*with_family(config), steps.new_accelerator(tmp_path)) for config in configs]
    assert (swapped.counts, swapped.lines()) == (plain.counts, plain.lines())
    for trained in both:
        fill_adapters(trained.parameters, seed=0)
    batches = steps.microbatches(steps.SPLITS["pairs"], "packed")
    one, other = (steps.record(t.accelerator, t.transformer, t.objective, batches) for t in both)
    assert one.result == other.result
    assert steps.gradient_error(other, one) == 0
    one, other = (HeldOutSampler(t.config, t.family, t.transformer, encoded).predict(encoded.held_out[0]) for t in both)
    assert one.tobytes() == other.tobytes()
    for merged in (False, True):
        if merged:
            plain.transformer.fuse_lora(), swapped.transformer.fuse_lora()
        one, other = (t.transformer.state_dict() for t in both)
        assert list(one) == list(other)
        for name in one:
            ours, theirs = (t.dequantize() if hasattr(t, "dequantize") else t for t in (one[name], other[name]))
            assert torch.equal(ours, theirs), name
        with torch.no_grad():
            one, other = (float(t.objective.loss_sum(t.transformer, batches[0], 0)) for t in both)
        assert one == other
