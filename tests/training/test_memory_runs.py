"""Whole runs with what saves memory, through `train.py`: resumed, on two ranks, compiled."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from support.jobs import LORA, Jobs, metrics, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# A rank of 32 over a base 128 wide: matrices of 4096 numbers, which are quantised. The update is compiled here.
EIGHT_BITS = (
    *("optimizer.class_path=torchao.optim.AdamW8bit", "model.lora.r=32", "model.lora.lora_alpha=32"),
    "model.lora.target_modules=[to_q, to_k]",  # few shapes: each is compiled
)
PRODIGY = ("optimizer.class_path=prodigyopt.Prodigy", "optimizer.init_args={lr: 1.0, d0: 1e-4}")
RUNS = {
    "int8_adamw8bit_average": ("model.quantize=int8", *EIGHT_BITS, "train.ema_decay=0.9"),
    "fp8_prodigy_dora": (
        *("model.quantize=fp8", "model.dtype=bfloat16", "train.mixed_precision=bf16", "model.lora.use_dora=true"),
        *PRODIGY,
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_is_an_unbroken_one(jobs: Jobs, few_pairs: Path, kind: str) -> None:
    """From the checkpoint of step 2, in processes of their own: the update is compiled."""
    sampled = ("sample.every=9", f"data.held_out={few_pairs / 'held_out'}", "train.gradient_checkpointing=2")
    words = (*RUNS[kind], *sampled, "train.max_train_steps=4")
    jobs.forked(kind, *words)
    unbroken, resumed = jobs.root / kind, jobs.copy_at(2, kind, f"{kind}_resumed")
    results = [LORA, "samples/step-00000004.png", *([f"ema/{LORA}"] if "average" in kind else [])]
    jobs.forked(resumed.name, *words)
    assert metrics(resumed) == metrics(unbroken)
    for name in (*results, "checkpoints/step-00000004/optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (unbroken / name).read_bytes(), name
    with safe_open(unbroken / LORA, "pt") as file:
        assert json.loads(file.metadata()["mixres"])["quantize"] == RUNS[kind][0].partition("=")[2]


def test_two_ranks_train_over_a_quantised_base_as_one(jobs: Jobs) -> None:
    words = ("model.quantize=int8", "train.max_train_steps=3", *PRODIGY)
    one = jobs.here("one", *words)
    two = jobs.forked("two", *words, ranks=2)
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_compiled_run_of_two_ranks_is_a_plain_one_of_one(jobs: Jobs, few_pairs: Path) -> None:
    """By inductor; every second block is recomputed. Each shape is compiled, so all steps have the same three samples.

    Not by AdamW, which takes a gradient of nothing but rounding for as good as any other.
    """
    words = (
        *("batch.layout=padded", "batch.max_tokens=2048", "train.gradient_checkpointing=2", "train.max_train_steps=2"),
        *(f"data.train={few_pairs / 'held_out'}", "batch.samples_per_step=3"),
        *("train.ema_decay=0.5", "optimizer.class_path=torch.optim.SGD", "optimizer.init_args={lr: 10}"),
    )
    plain, compiled = jobs.here("plain", *words), jobs.root / "compiled"
    jobs("compiled", *words, "train.compile=true", launcher=torchrun(2))
    for one, other in zip(metrics(plain), metrics(compiled), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["tokens"] == one["tokens"]
    for name in (LORA, f"ema/{LORA}"):
        ours, theirs = load_file(compiled / name), load_file(plain / name)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] - tensor).norm() <= 1e-5 * tensor.norm() for key, tensor in theirs.items()), name
        assert all(tensor.any() for tensor in theirs.values()), "B too has been trained"
