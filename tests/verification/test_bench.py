"""`bench` measures the same samples in every way, changes no weight, and counts the FLOPs that are needed."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.models.blocks import compile_blocks, recompute_blocks
from mixres.models.quantize import Method, plain_tensors
from mixres.models.registry import load_family
from mixres.preprocessing.fill import family_of
from mixres.training import setup as training_setup
from mixres.verification import bench as bench_module
from mixres.verification.bench import WAYS, bench, known_peak, make_work
from mixres.verification.consistency import BatchMode, batches_of
from mixres.verification.flops import FlopCounter
from mixres.verification.setup import one_process, peak_memory, set_up, source_of, step_seconds
from mixres.verification.synthetic import synthetic_samples
from support.family_cases import EVERY_CASE, FamilyCase


@pytest.fixture
def config(small_run: Path, small_cache: Path, tmp_path: Path) -> Config:
    AcceleratorState._reset_state(True)
    return load_config(small_run, [f"cache.cache_dir={small_cache}", f"logging.output_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize("synthetic", [pytest.param(True, id="synthetic"), pytest.param(False, id="cached")])
@pytest.mark.slow
def test_a_report_agrees_with_itself(
    config: Config, synthetic: bool, small_run: Path, copy_of_base: Path, tmp_path: Path
) -> None:
    """Synthetic samples need no weights, data or cache; to those of the cache prompts are embedded as they are read.

    Rounds are few: nothing here asks for stable times.
    """
    words = [f"logging.output_dir={tmp_path / 'run'}"]
    config = load_config(small_run, [*words, f"cache.cache_dir={config.cache.cache_dir}", "cache.text=recompute"])
    if synthetic:
        for weights in copy_of_base.rglob("*.safetensors"):
            weights.unlink()
        words += [f"model.pretrained_model_name_or_path={copy_of_base}"]
        config = load_config(small_run, [*words, "data.train=/nowhere", f"cache.cache_dir={tmp_path / 'cache'}"])
    bench(config, synthetic=synthetic, max_rounds=2)
    assert not (tmp_path / "cache").exists()
    (path,) = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
    report = json.loads(path.read_text(encoding="utf-8"))
    found = report["synthetic"], report["steps"], report["rounds"], report["precision"]
    assert found == (synthetic, 4 if synthetic else 3, 2, "float32")
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["one_by_one", "padded", "packed"]
    for row in rows.values():
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["useful_tokens_per_s"] == pytest.approx((1 - row["padding"]) * row["tokens_per_s"])
        assert row["mfu"] is None  # a CPU's peak is not known
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    base, padded, packed = rows.values()
    assert (base["ratio"], base["low"], base["high"], base["padding"]) == (1, 1, 1, 0)
    assert packed["padding"] == 0 < padded["padding"] < 1
    assert packed["flops"] == pytest.approx(base["flops"]) and base["flops"] < padded["flops"]
    assert base["microbatches"] > padded["microbatches"] >= packed["microbatches"]
    assert 0 < report["trainer_step"]["low"] <= report["trainer_step"]["ratio"] <= report["trainer_step"]["high"]
    sampling = report["sampling"]
    assert (sampling is None) == synthetic
    if sampling:
        assert (sampling["images"], sampling["steps"]) == (6, 4)
        assert 0 < sampling["low"] <= sampling["ratio"] <= sampling["high"]
        assert min(sampling["images_per_s"], sampling["one_by_one_images_per_s"]) > 0


SETTINGS = {
    "rounded": (["model.quantize=int8", "model.dtype=bfloat16"], {}, ["one_by_one", "padded", "packed"]),
    "packed alone": ([], {"way": ["packed"]}, ["packed"]),
    "compiled": (["train.compile=true", "batch.layout=padded"], {"way": ["padded", "packed"]}, ["padded"]),
}


@pytest.mark.parametrize(
    ("overrides", "options", "ways"),
    [
        pytest.param(*way, id=name, marks=[pytest.mark.slow] * (name != "packed alone"))
        for name, way in SETTINGS.items()
    ],
)
def test_the_ways_asked_for_are_timed_in_the_seconds_given(
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    options: dict[str, Any],
    ways: list[str],
) -> None:
    """MFU is of the FLOPs of the samples alone, however they were batched, and whether blocks were compiled."""
    monkeypatch.setattr(training_setup, "compile_blocks", partial(compile_blocks, backend="aot_eager"))  # in seconds
    AcceleratorState._reset_state(True)
    config = load_config(small_run, [f"logging.output_dir={tmp_path / 'run'}", *overrides])
    bench(config, synthetic=True, steps=1, seconds=1e-3, peak_tflops=0.5, **options)
    report = json.loads((tmp_path / "run" / "reports" / "bench.json").read_text(encoding="utf-8"))
    assert (report["steps"], report["rounds"], [row["name"] for row in report["rows"]]) == (1, 1, ways)
    assert (report["compile"], report["quantize"]) == (config.train.compile, config.model.quantize)
    assert (report["trainer_step"] is None) == (config.batch.layout not in ways)
    for row in report["rows"]:
        assert row["mfu"] * row["seconds"] == pytest.approx(report["rows"][0]["mfu"] * report["rows"][0]["seconds"])
        assert row["mfu"] * row["seconds"] * 0.5e12 <= row["flops"]
    assert report["rows"][0]["ratio"] == 1


def test_a_report_outlives_what_fails_in_sampling(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(setup: Any, encoded: Any, rounds: int) -> None:
        raise RuntimeError(f"after {rounds} rounds")

    monkeypatch.setattr(bench_module, "_sampling", fail)
    with pytest.raises(RuntimeError, match=f"after {bench_module.MIN_ROUNDS} rounds"):
        bench(config, way=["one_by_one", "packed"], steps=1, max_rounds=4)
    report = json.loads((tmp_path / "run" / "reports" / "bench.json").read_text(encoding="utf-8"))
    assert (report["rounds"], len(report["rows"]), report["sampling"]) == (4, 2, None)


def test_a_device_is_known_by_the_longest_part_of_its_name() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "Tesla V100")
    assert [known_peak(name) for name in names] == [989, 756, 312, 362, None]


def test_a_timed_step_changes_no_weight(config: Config) -> None:
    setup = set_up(config, family_of(config), one_process(config, "bench"))
    before = {name: tensor.clone() for name, tensor in setup.transformer.state_dict().items()}
    (batch,) = batches_of(synthetic_samples(config, family_of(config), 2), "packed")
    assert step_seconds(setup, [batch], count=1, step=0, divisor=2) > 0
    assert setup.optimizer.state  # it did step
    assert all(torch.equal(before[name], tensor) for name, tensor in setup.transformer.state_dict().items())


def test_the_stock_shape_needs_no_file() -> None:
    family = load_family(None, "Qwen/Qwen-Image-Edit", synthetic=True)
    assert sum(p.numel() for p in family.transformer_skeleton().parameters()) == 20_430_401_088
    assert (family.pixels_per_token(), family.flow_shift()["max_shift"]) == (16, 0.9)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_random_weights_are_those_of_the_base_in_shape(config: Config, quantize: Method | None) -> None:
    path = config.model.pretrained_model_name_or_path
    synthetic, real = load_family(None, path, synthetic=True), family_of(config)
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "quantize": quantize}
    made, base = synthetic.load_transformer(**kind), real.load_transformer(**kind)
    described = [
        {name: [(t.shape, t.dtype) for t in plain_tensors(p.data)] for name, p in model.named_parameters()}
        for model in (made, base)
    ]
    assert described[0] == described[1]
    position = torch.tensor([[1, 2, 3]]), torch.device("cpu")
    assert torch.equal(made.pos_embed.frequencies(*position), base.pos_embed.frequencies(*position))


def test_synthetic_samples_keep_the_configurations_limits(config: Config) -> None:
    family = family_of(config)
    samples, again = (synthetic_samples(config, family, 40) for _ in range(2))
    assert all(torch.equal(a.target_latents, b.target_latents) for a, b in zip(samples, again, strict=True))
    most = config.data.resize.target.max_pixels // family.pixels_per_token() ** 2
    assert max(sample.img_shapes[0].tokens for sample in samples) <= most
    assert len({sample.img_shapes[0] for sample in samples}) > 15
    assert len({sample.img_shapes[1] for sample in samples}) > 3
    for sample in samples:
        assert [len(sample.target_latents), len(sample.control_latents[0])] == [g.tokens for g in sample.img_shapes]
        assert (sample.target_latents.shape[1], sample.prompt_embeds.shape[1]) == family.token_widths()


@pytest.mark.parametrize("caption_dropout", [0.0, 0.5])
def test_every_way_holds_the_plans_samples_within_the_budget(config: Config, caption_dropout: float) -> None:
    config = config.model_copy(update={"data": config.data.model_copy(update={"caption_dropout": caption_dropout})})
    source = source_of(synthetic_samples(config, family_of(config), 14))
    work = make_work(config, source)
    assert list(work) == list(WAYS)
    for steps in work.values():
        assert [step.plan.indices for step in steps] == [step.plan.indices for step in work["padded"]]
        assert [step.plan.samples for step in steps] == [4, 4, 4, 2]
        for step in steps:
            assert sorted(i for batch in step.batches for i in batch.indices) == sorted(step.plan.indices)
            assert max(batch.tokens_computed for batch in step.batches) <= config.batch.max_tokens
            for batch in step.batches:
                for i, tokens in zip(batch.indices, batch.text_lengths, strict=True):
                    own = source.lengths[i]
                    assert tokens == (own.empty_text if i in step.plan.dropped else own.text)
    assert {len(batch.names) for step in work["one_by_one"] for batch in step.batches} == {1}


TRAINED = {"lora": [], "all_weights": ["model.lora=null"], "over_int8": ["model.quantize=int8", "model.dtype=bfloat16"]}


KINDS = [*(("qwen_image_edit", words) for words in TRAINED.values()), ("flux_kontext", [])]
KINDS += [pytest.param("flux2_dev", [], marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "overrides"), KINDS, ids=[*TRAINED, "flux_kontext", "flux2_dev"])
def test_needed_flops_are_those_of_the_samples_alone_computed_once(
    name: str, overrides: list[str], small_run: Path, base_of: Callable[[FamilyCase], Path]
) -> None:
    AcceleratorState._reset_state(True)
    case = EVERY_CASE[name]
    base = f"model.pretrained_model_name_or_path={base_of(case)}"
    config = load_config(small_run, [base, *case.overrides(), *overrides])
    setting = set_up(config, family_of(config), one_process(config, "bench"))
    samples = synthetic_samples(config, setting.family, 4)

    def counted(mode: BatchMode) -> tuple[int, int]:
        with FlopCounter() as counter:
            for batch in batches_of(samples, mode):
                torch.autograd.backward(setting.objective.loss_sum(setting.transformer, batch, step=0))
        return counter.needed, counter.computed

    needed, computed = counted("packed")
    assert counted("alone") == (needed, computed) and needed < computed < counted("padded")[1]
    recompute_blocks(setting.transformer, every=1)
    again = counted("packed")
    assert again[0] == needed and computed < again[1] < 1.5 * computed


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
