"""`verify` passes on the real thing, fails on planted bugs, and counts nothing as passed that it could not judge."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import QwenImageTransformer2DModel
from PIL import Image

from mixres import cli
from mixres.batch import Batch
from mixres.config.load import load_config
from mixres.data.cache import CacheEntry
from mixres.data.records import EditRecord
from mixres.diffusion import objective as objective_module
from mixres.errors import UserError
from mixres.geometry import Grid, Size
from mixres.models import modulation, qwen_multi_resolution_patch as patch
from mixres.models.family import ControlSizes, PatchState
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.qwen.rope import MultiResolutionRope
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution, patch_state
from mixres.preprocessing.fill import CachedSample, family_of
from mixres.verification import consistency, verify as verify_module
from mixres.verification.batch_diagram import COLOURS, padded_segments
from mixres.verification.consistency import Outcome, batches_of, errors
from mixres.verification.synthetic import synthetic_samples
from mixres.verification.verify import most_different
from support.jobs import OFFLOADED

Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verify(small_run: Path, small_cache: Path, tmp_path: Path) -> Verify:
    """The verb through the command line; its exit code and its report."""

    def run(*overrides: str) -> tuple[int, dict[str, Any]]:
        AcceleratorState._reset_state(True)
        words = ["verify", "--config", str(small_run), f"cache.cache_dir={small_cache}"]
        code = cli.main([*words, f"logging.output_dir={tmp_path / 'run'}", *overrides])
        report = tmp_path / "run" / "reports" / "verify.json"
        return code, json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}

    return run


def test_the_real_thing_passes_and_only_reports_are_written(
    verify: Verify, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = verify()
    assert (code, report["passed"], report["whole"]) == (0, True, True)
    assert report["patch"] == {"processors": 2, "blocks": 2, "positions": True}
    assert (report["lora"]["r"], report["lora"]["lora_alpha"], report["lora"]["as_configured"]) == (4, 4.0, True)
    for layout, case in zip(("padded", "packed"), report["cases"], strict=True):
        assert (case["layout"], case["dtype"], case["passed"], case["reason"]) == (layout, "float32", True, None)
        assert case["samples"] == len(report["samples"]) >= 3
        assert case["bar"] == {"forward": 1e-6, "gradient": 1e-5}
        assert 0 < case["forward"] <= 1e-6 and 0 < case["gradient"] <= 1e-5
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {"reports/verify.json", "reports/verify.png"}
    assert capsys.readouterr().out.count("  passed") == 2
    with Image.open(tmp_path / "run" / "reports" / "verify.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS.values()} <= colours


PRECISIONS = {
    "autocast": (("train.mixed_precision=bf16", "train.gradient_checkpointing=true"), "float32, autocast bf16"),
    "bfloat16": (("model.dtype=bfloat16", "train.mixed_precision=bf16"), "bfloat16"),
    "offloaded": (("model.dtype=bfloat16", "train.mixed_precision=bf16", *OFFLOADED), "bfloat16"),
    "all_weights": (("model.dtype=bfloat16", "train.mixed_precision=bf16", "model.lora=null"), "bfloat16"),
}


@pytest.mark.parametrize(("overrides", "label"), PRECISIONS.values(), ids=PRECISIONS)
def test_lower_precision_is_held_against_float32(verify: Verify, overrides: tuple[str, ...], label: str) -> None:
    code, report = verify(*overrides)
    assert code == 0
    assert [case["dtype"] for case in report["cases"]] == ["float32"] * 2 + [label] * 2
    for case in report["cases"][2:]:
        assert 1e-4 < case["forward"] <= case["bar"]["forward"] < 0.3
        assert 1e-3 < case["gradient"] <= case["bar"]["gradient"] < 1


def test_float64_has_bars_of_its_own(verify: Verify) -> None:
    code, report = verify("model.dtype=float64", "loss.normalization=token")
    assert (code, [case["dtype"] for case in report["cases"]]) == (0, ["float64"] * 2)
    assert max(case["gradient"] for case in report["cases"]) < 1e-12


def sample_0_text_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = MultiResolutionRope.padded_frequencies

    def shared(self: Any, shapes: Any, *rest: Any) -> Any:
        return stock(self, shapes, *rest)[0], stock(self, [shapes[0]] * len(shapes), *rest)[1]

    monkeypatch.setattr(MultiResolutionRope, "padded_frequencies", shared)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "joint_mask", lambda *arguments: None)


def shifted_modulation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = modulation.expand_rows

    def shifted(rows: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return stock(rows, tuple(((row + 1) % len(rows), n) for row, n in runs))

    monkeypatch.setattr(modulation, "expand_rows", shifted)


def batch_size_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = objective_module.velocity_loss

    def scaled(velocity: torch.Tensor, batch: Batch, *rest: Any, **named: Any) -> Any:
        return stock(velocity, batch, *rest, **named) * (1 + 1e-4 * (len(batch.names) > 1))

    monkeypatch.setattr(objective_module, "velocity_loss", scaled)


BOTH = ("forward", "gradient")
BUGS = (
    (sample_0_text_positions, {"padded"}, BOTH),
    (no_mask, {"padded"}, BOTH),
    (shifted_modulation_rows, {"packed"}, BOTH),
    (batch_size_in_the_loss, {"padded", "packed"}, ("gradient",)),
)


@pytest.mark.parametrize(("plant", "layouts", "measures"), BUGS, ids=[bug.__name__ for bug, *_ in BUGS])
def test_a_planted_bug_fails_after_all_is_written(
    verify: Verify, plant: Any, layouts: set[str], measures: tuple[str, ...], monkeypatch: Any, capsys: Any
) -> None:
    plant(monkeypatch)
    code, report = verify()
    assert (code, report["passed"]) == (1, False)
    assert {case["layout"] for case in report["cases"] if not case["passed"]} == layouts
    for case in report["cases"]:
        over = tuple(name for name in BOTH if case[name] > case["bar"][name])
        assert over == (measures if case["layout"] in layouts else ())
    assert "mixres: error: verify failed: a batch differs from its samples alone: " in capsys.readouterr().err


def test_without_room_for_float32_nothing_passes(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of bfloat16 against the samples alone are measured and not judged."""
    monkeypatch.setattr(verify_module, "free_memory", lambda device: 10**6)
    code, report = verify("model.dtype=bfloat16", "train.mixed_precision=bf16")
    assert (code, [case["passed"] for case in report["cases"]]) == (1, [None] * 4)
    exact, rounded = report["cases"][0], report["cases"][2]
    assert exact["forward"] is None and "float32 needs 0.0 GB more" in exact["reason"]
    assert rounded["bar"] is None and 0 < rounded["forward"] < 0.1 and "no float32 reference" in rounded["reason"]


def test_a_layout_that_runs_out_of_memory_is_not_passed(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(setup: Any, samples: Any, mode: Any, *, autocast: bool) -> Outcome:
        if mode == "packed":
            raise torch.OutOfMemoryError("planted")
        return consistency.run(setup, samples, mode, autocast=autocast)

    monkeypatch.setattr(verify_module, "run", run)
    code, report = verify()
    assert (code, [case["passed"] for case in report["cases"]]) == (1, [True, None])
    assert report["cases"][1]["reason"] == "does not fit: the device ran out of memory with the samples packed"


def test_a_lost_patch_and_a_nan_fail(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QwenImageEdit, "patch_state", lambda self, model: PatchState(2, 2, False))
    code, report = verify()
    assert (code, report["passed"], report["whole"]) == (1, False, False)
    monkeypatch.setattr(consistency, "_relative", lambda *arguments: math.inf)
    code, report = verify()
    (case,) = {(case["passed"], case["forward"], case["reason"]) for case in report["cases"]}
    assert (code, case) == (1, (False, None, "outputs or gradients are not finite"))


def test_the_patch_state_is_read_from_the_model() -> None:
    shape = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 1, "joint_attention_dim": 8}
    stock, patched = (QwenImageTransformer2DModel(**shape, axes_dims_rope=(8, 12, 12)) for _ in range(2))
    patch_qwen_model_for_multi_resolution(patched)
    assert patch_state(stock) == PatchState(0, 2, False)
    assert patch_state(patched) == PatchState(2, 2, True) and patch_state(patched).whole
    patched.transformer_blocks[1].attn.set_processor(stock.transformer_blocks[1].attn.processor)
    assert patch_state(patched) == PatchState(1, 2, True) and not patch_state(patched).whole


def test_the_most_different_samples_are_taken() -> None:
    def item(name: str, text: int, target: tuple[int, int]) -> CachedSample:
        record = EditRecord(name=name, target=Path(name), controls=(), prompt="", mask=None)
        entry = CacheEntry(name, (Grid(1, *target), Grid(1, 2, 2)), text, False)
        return CachedSample(record, Size(16, 16), ControlSizes((), ()), name, entry)

    plain = [item(f"plain{n}", 10, (8, 8)) for n in range(5)]
    special = item("tall", 9, (32, 2)), item("short", 3, (2, 2)), item("long", 12, (20, 20)), item("wordy", 90, (8, 7))

    def chosen(max_tokens: int) -> list[str]:
        return [item.key for item in most_different([*plain, *special], max_tokens)]

    assert chosen(10_000) == ["short", "long", "tall", "wordy"]
    # 2 x (12 + 404) fit, three rows of that do not: the extremes in length come first.
    assert chosen(832) == ["short", "long"] and "long" not in chosen(831)
    with pytest.raises(UserError, match=r"batch\.max_tokens: no two of 9 training samples fit 20 tokens: raise it"):
        chosen(20)


def test_errors_see_nan_missing_gradients_and_the_floor() -> None:
    ones, zeros = torch.ones(4), torch.zeros(4)
    reference = Outcome([ones, ones], {"a": 1e9 * ones, "b": ones, "c": None, "d": zeros})
    assert errors(reference, reference) == consistency.Errors(0.0, 0.0, ())
    off = Outcome([ones, 1.5 * ones], {"a": 1e9 * ones, "b": 2 * ones, "c": None, "d": zeros})
    found = errors(off, reference)
    assert found.forward == pytest.approx(0.5)
    assert found.gradient == pytest.approx(1e-3)  # b's own norm is under the floor, 1e-6 of a's
    missing = Outcome([ones, ones], {"a": None, "b": zeros, "c": ones, "d": zeros})
    assert errors(missing, reference).unequal == ("a", "b", "c")
    for bad in (math.nan, math.inf):
        assert errors(Outcome([bad * ones, ones], reference.gradients), reference).forward == math.inf
        broken = {**reference.gradients, "a": bad * ones}
        assert errors(Outcome([ones, ones], broken), reference).gradient == math.inf


def test_the_diagram_accounts_for_every_token(small_run: Path, tmp_path: Path) -> None:
    config = load_config(small_run, [f"cache.cache_dir={tmp_path}"])
    samples = synthetic_samples(config, family_of(config), 3)
    (padded,) = batches_of(samples, "padded")
    for b, sample in enumerate(samples):
        segments = padded_segments(padded, b)
        assert sum(tokens for _, tokens in segments) == padded.tokens_computed // 3
        valid = len(sample.prompt_embeds) + sum(grid.tokens for grid in sample.img_shapes)
        assert sum(tokens for what, tokens in segments if what != "padding") == valid
