"""`bench` measures the same samples in every way, changes no weight, and counts FLOPs as torch does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils import flop_counter

from mixres import cli
from mixres.batch import Batch
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.plan import Lengths, computed_tokens
from mixres.geometry import token_count
from mixres.models.blocks import recompute_blocks
from mixres.models.registry import load_family
from mixres.preprocessing.fill import family_of
from mixres.verification import bench as bench_module
from mixres.verification.batching import Source, make_work, unsorted
from mixres.verification.consistency import batches_of
from mixres.verification.flops import FlopCounter
from mixres.verification.setup import Workbench, one_process, peak_memory, set_up
from mixres.verification.synthetic_samples import synthetic_samples

WAYS = ["one_by_one", "padded", "padded_random", "packed"]
Bench = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def setups(monkeypatch: pytest.MonkeyPatch) -> list[Workbench]:
    """What `bench` set up; rounds are few, nothing here asks for stable times."""
    found: list[Workbench] = []

    def recorded(*arguments: Any) -> Workbench:
        found.append(set_up(*arguments))
        return found[-1]

    monkeypatch.setattr(bench_module, "set_up", recorded)
    monkeypatch.setattr(bench_module, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(bench_module, "_MAX_ROUNDS", 2)
    monkeypatch.setattr(bench_module, "_STEPS", 2)
    return found


@pytest.fixture
def bench(small_run: Path, setups: list[Workbench], tmp_path: Path) -> Bench:
    """The verb through the command line; its exit code and its report."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        AcceleratorState._reset_state(True)
        code = cli.main(["bench", "--config", str(small_run), f"logging.output_dir={tmp_path / 'run'}", *words])
        return code, json.loads((tmp_path / "run" / "reports" / "bench.json").read_text(encoding="utf-8"))

    return run


def check_rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == WAYS
    keys = {
        "name",
        "ratio",
        "low",
        "high",
        "tokens_per_s",
        "useful_tokens_per_s",
        "padding",
        "flops",
        "mfu",
        "peak_bytes",
    }
    for row in rows.values():
        assert keys <= set(row)
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["useful_tokens_per_s"] == pytest.approx((1 - row["padding"]) * row["tokens_per_s"])
        assert row["mfu"] is None  # a CPU's peak is not known
    base = rows["one_by_one"]
    assert (base["ratio"], base["low"], base["high"], base["padding"]) == (1, 1, 1, 0)
    assert rows["packed"]["padding"] == 0
    assert rows["packed"]["flops"] == pytest.approx(base["flops"])
    assert 0 < rows["padded"]["padding"] <= rows["padded_random"]["padding"] < 1
    assert base["flops"] < rows["padded"]["flops"] <= rows["padded_random"]["flops"]
    assert base["microbatches"] > rows["padded"]["microbatches"] >= rows["packed"]["microbatches"]
    return rows


def test_the_report(bench: Bench, small_cache: Path, setups: list[Workbench], tmp_path: Path) -> None:
    code, report = bench(f"cache.cache_dir={small_cache}")
    assert code == 0
    check_rows(report)
    assert {"mixres", "torch", "diffusers", "transformers", "accelerate", "peft"} == set(report["versions"])
    assert report["machine"]["device"] == "cpu" and report["machine"]["cores"] > 0
    assert (report["synthetic"], report["steps"], report["samples_per_step"]) == (False, 2, 4)
    assert 0 < report["trainer_step"]["low"] <= report["trainer_step"]["ratio"] <= report["trainer_step"]["high"]
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["bench.json"]
    (setting,) = setups
    untouched = {name: p for name, p in setting.trained.parameters.items() if ".lora_B." in name}
    assert untouched and not any(p.any() for p in untouched.values())


def test_synthetic_reads_no_weights_no_data_and_no_cache(bench: Bench, copy_of_base: Path, tmp_path: Path) -> None:
    for weights in copy_of_base.rglob("*.safetensors"):
        weights.unlink()
    code, report = bench(
        "--synthetic",
        f"model.pretrained_model_name_or_path={copy_of_base}",
        "data.train=/nowhere",
        f"cache.cache_dir={tmp_path / 'cache'}",
        "batch.samples_per_step=3",
    )
    assert code == 0
    check_rows(report)
    assert (report["synthetic"], report["steps"], report["precision"]) == (True, 2, "float32")
    assert not (tmp_path / "cache").exists()


def test_the_stock_shape_needs_no_file() -> None:
    family = load_family(None, "Qwen/Qwen-Image-Edit", synthetic=True)
    skeleton = family.transformer_skeleton()
    assert sum(p.numel() for p in skeleton.parameters()) == 20_430_401_088
    assert all(p.is_meta for p in skeleton.parameters())
    assert family.pixels_per_token() == 16
    assert family.flow_shift()["max_shift"] == 0.9
    assert family.untrained_modules(skeleton)[0] == "transformer_blocks.59.attn.add_q_proj"


@pytest.fixture
def config(small_run: Path, small_cache: Path) -> Config:
    return load_config(small_run, [f"cache.cache_dir={small_cache}", "logging.output_dir=/nowhere"])


def test_random_weights_are_those_of_the_base_in_shape(config: Config) -> None:
    path = config.model.pretrained_model_name_or_path
    synthetic, real = load_family(None, path, synthetic=True), family_of(config)
    kind = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    made, base = synthetic.load_transformer(**kind), real.load_transformer(**kind)
    described = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (made, base)]
    assert described[0] == described[1]
    assert torch.equal(made.pos_embed.frequencies(torch.tensor([[1, 2, 3]]), torch.device("cpu")),
                       base.pos_embed.frequencies(torch.tensor([[1, 2, 3]]), torch.device("cpu")))  # fmt: skip


def test_synthetic_samples_keep_the_configurations_limits(config: Config) -> None:
    def made() -> list[Any]:
        return synthetic_samples(config, 40, channels=8, text_width=6, pixels_per_token=16)

    samples = made()
    assert all(torch.equal(a.target_latents, b.target_latents) for a, b in zip(samples, made(), strict=True))
    targets = [sample.img_shapes[0] for sample in samples]
    assert max(grid.tokens for grid in targets) <= config.data.resize.target.max_pixels // 256
    assert len(set(targets)) > 15
    assert len({sample.img_shapes[1] for sample in samples}) > 3
    for sample in samples:
        assert [len(sample.target_latents), len(sample.control_latents[0])] == [g.tokens for g in sample.img_shapes]
        assert sample.prompt_embeds.shape[1] == 6


def source_of(samples: list[Any]) -> Source:
    empty = [0 if s.empty_embeds is None else len(s.empty_embeds) for s in samples]
    pairs = zip(samples, empty, strict=True)
    lengths = [Lengths(len(s.prompt_embeds), token_count(s.img_shapes), len(s.target_latents), n) for s, n in pairs]
    return Source(lengths, [s.name for s in samples], samples.__getitem__)


@pytest.mark.parametrize("caption_dropout", [0.0, 0.5])
def test_every_way_holds_the_plans_samples_within_the_budget(config: Config, caption_dropout: float) -> None:
    data = config.data.model_copy(update={"caption_dropout": caption_dropout})
    config = config.model_copy(update={"data": data})
    source = source_of(synthetic_samples(config, 14, channels=8, text_width=6, pixels_per_token=16))
    work = make_work(config, source, 9)
    assert [step.samples for step in work.steps] == [4, 4, 4, 2]
    for name in WAYS:
        for step, batches in zip(work.steps, work.batches[name], strict=True):
            assert sorted(i for batch in batches for i in batch.indices) == sorted(step.indices)
            assert max(batch.tokens_computed for batch in batches) <= config.batch.max_tokens
            texts = {i: n for batch in batches for i, n in zip(batch.indices, batch.text_lengths, strict=True)}
            lengths = {i: source.lengths[i] for i in step.indices}
            assert texts == {i: n.empty_text if i in step.dropped else n.text for i, n in lengths.items()}
    order = [i for batch in work.batches["padded_random"][0] for i in batch.indices]
    assert order == list(work.steps[0].indices)


def test_unsorted_microbatches_are_filled_in_order() -> None:
    lengths = dict(enumerate(Lengths(2, n, n) for n in (8, 8, 18, 3, 3, 3)))
    groups = unsorted([0, 1, 2, 3, 4, 5], lengths, 20)
    assert groups == [(0, 1), (2,), (3, 4, 5)]
    assert all(computed_tokens([lengths[i] for i in group], "padded") <= 20 for group in groups)


# torch's own counter has no formula for the CPU's attention kernel: give it the one it has for the GPU's.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *rest, **named: flop_counter.sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **named: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
    ),
}

TRAINED = {
    "lora": [],
    "all_weights": ["model.lora=null"],
    "over_int8": ["model.quantize=int8", "model.dtype=bfloat16"],
}


@pytest.mark.parametrize("overrides", TRAINED.values(), ids=TRAINED)
def test_flops_are_those_that_torch_counts(small_run: Path, overrides: list[str]) -> None:
    AcceleratorState._reset_state(True)
    config = load_config(small_run, overrides)
    setting = set_up(config, family_of(config), one_process(config, "bench"))
    model = setting.trained.transformer
    samples = synthetic_samples(config, 4, channels=64, text_width=64, pixels_per_token=16)

    def counted(batch: Batch, counter: Any) -> Any:
        with counter:
            torch.autograd.backward(setting.objective.loss_sum(model, batch, step=0))
        return counter

    packed, padded, *alone = [
        batch
        for mode in ("packed", "padded", "alone")
        for batch in batches_of(samples, mode)  # type: ignore[arg-type]
    ]
    if config.model.quantize is None:  # torch's counter would take quantised weights apart
        for batch in (packed, padded):
            own = flop_counter.FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            assert counted(batch, FlopCounter()).computed == counted(batch, own).get_total_flops()
    plain, singles = counted(packed, FlopCounter()), [counted(batch, FlopCounter()) for batch in alone]
    assert plain.needed == sum(single.needed for single in singles) < plain.computed
    recompute_blocks(model, every=1)
    recomputed = counted(packed, FlopCounter())
    assert recomputed.needed == plain.needed
    assert plain.computed < recomputed.computed < 1.5 * plain.computed


def test_flops_by_hand() -> None:
    """A layer, attention over 5 tokens with 2 heads of 8, and a loss: products only, each with its two gradients."""
    layer, x = torch.nn.Linear(16, 16), torch.ones(5, 16)
    with FlopCounter() as counter:
        heads = layer(x).view(1, 5, 2, 8).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()
    linear, product = 2 * 5 * 16 * 16, 2 * 2 * 5 * 5 * 8
    assert counter.computed == 2 * linear + 7 * product  # its input trains nothing; the scores are computed again
    assert counter.needed == 2 * linear + 6 * product


def test_peak_memory_sees_what_is_freed_again() -> None:
    peak = peak_memory(torch.device("cpu"), lambda: torch.ones(16 << 20).sum())
    assert peak is None or 60e6 < peak < 200e6  # 64 MiB; None where the system does not tell
