"""`verify` passes on the real thing, fails on planted bugs, and counts nothing as passed that it could not judge."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import QwenImageTransformer2DModel
from PIL import Image, ImageColor

from mixres import cli
from mixres.batch import Batch
from mixres.config.load import load_config
from mixres.data.plan import Lengths
from mixres.diffusion import objective as objective_module
from mixres.errors import UserError
from mixres.geometry import Grid, token_count
from mixres.models import modulation, qwen_multi_resolution_patch as patch
from mixres.models.family import PatchState
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.qwen.rope import MultiResolutionRope
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution, patch_state
from mixres.preprocessing.fill import family_of
from mixres.verification import consistency, verify as verify_module
from mixres.verification.batch_diagram import COLOURS, padded_segments, sequence_segments, token_layout
from mixres.verification.consistency import Outcome, batches_of, errors
from mixres.verification.setup import Source
from mixres.verification.synthetic import synthetic_samples
from mixres.verification.verify import most_different
from support import mixes
from support.jobs import OFFLOADED
from support.kinds import KINDS

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
        assert (case["reference"], case["blocks"]) == ("float64", 2)
        assert 0 < case["forward"] <= case["bar"]["forward"] < 3e-6
        assert 0 < case["gradient"] <= case["bar"]["gradient"] < 3e-5
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {"reports/verify.json", "reports/verify.png"}
    assert capsys.readouterr().out.count("  passed") == 2
    with Image.open(tmp_path / "run" / "reports" / "verify.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS.values()} <= colours


def test_random_weights_and_samples_need_no_file(verify: Verify, copy_of_base: Path) -> None:
    for weights in copy_of_base.rglob("*.safetensors"):
        weights.unlink()
    base = f"model.pretrained_model_name_or_path={copy_of_base}"
    code, report = verify("--synthetic", base, "data.train=/nowhere", "batch.max_tokens=1024")
    assert (code, report["passed"], report["synthetic"], len(report["cases"])) == (0, True, True, 2)
    assert all(sample["name"].startswith("synthetic-") for sample in report["samples"])


PRECISIONS = {
    "autocast": (("train.mixed_precision=bf16", "train.gradient_checkpointing=true"), "float32, autocast bf16"),
    "bfloat16": (("model.dtype=bfloat16", "train.mixed_precision=bf16"), "bfloat16"),
    "offloaded": (("model.dtype=bfloat16", "train.mixed_precision=bf16", *OFFLOADED), "bfloat16"),
    "all_weights": (("model.dtype=bfloat16", "train.mixed_precision=bf16", "model.lora=null"), "bfloat16"),
}


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        pytest.param(*way, id=name, marks=[pytest.mark.slow] * (name in ("offloaded", "all_weights")))
        for name, way in PRECISIONS.items()
    ],
)
def test_lower_precision_is_held_against_float64(verify: Verify, overrides: tuple[str, ...], label: str) -> None:
    code, report = verify(*overrides)
    assert code == 0
    assert [case["dtype"] for case in report["cases"]] == ["float32"] * 2 + [label] * 2
    for case in report["cases"][2:]:
        assert 1e-4 < case["forward"] <= case["bar"]["forward"] < 0.3
        assert 1e-3 < case["gradient"] <= case["bar"]["gradient"] < 1


def test_float64_is_held_against_the_samples_alone(verify: Verify) -> None:
    code, report = verify("model.dtype=float64", "loss.normalization=token")
    assert (code, [(case["dtype"], case["reference"]) for case in report["cases"]]) == (0, [("float64", None)] * 2)
    assert max(case["gradient"] for case in report["cases"]) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_tensor_whose_gradient_nearly_cancels_has_its_own_bar(verify: Verify, seed: int) -> None:
    """At rank 2 a batch was 1.1e-5 off in float32, and 5e-14 in float64: rounding, of the samples alone as well."""
    code, report = verify("model.lora.r=2", "model.lora.lora_alpha=2", f"train.seed={seed}")
    assert (code, report["passed"]) == (0, True)


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


@pytest.mark.parametrize("bug", [None, no_mask, shifted_modulation_rows, batch_size_in_the_loss])
def test_without_room_for_float64_bfloat16_is_held_against_the_samples_alone(
    verify: Verify, bug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar is how far these are from themselves reordered. In bfloat16 a loss that is 1e-4 off does not show."""
    monkeypatch.setattr(verify_module, "free_memory", lambda device: 10**6)
    if bug:
        bug(monkeypatch)
    code, report = verify("model.dtype=bfloat16", "train.mixed_precision=bf16")
    failed = {case["layout"] for case in report["cases"] if not case["passed"]}
    assert (code, failed) == {
        None: (0, set()),
        no_mask: (1, {"padded"}),
        shifted_modulation_rows: (1, {"packed"}),
        batch_size_in_the_loss: (0, set()),
    }[bug]
    assert [(case["dtype"], case["reference"], case["blocks"]) for case in report["cases"]] == [
        ("bfloat16", None, 2), ("bfloat16", None, 2),
    ]  # fmt: skip


TINY = Path(verify_module.__file__).parents[1] / "assets" / "tiny_base"


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, no_mask, batch_size_in_the_loss])
def test_what_does_not_fit_whole_is_held_against_float64_over_fewer_blocks(
    verify: Verify, bug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five blocks, then the whole in its own precision."""
    monkeypatch.setattr(verify_module, "free_memory", lambda device: 30 * 10**6)
    if bug:
        bug(monkeypatch)
    code, report = verify(
        f"model.pretrained_model_name_or_path={TINY}", "model.dtype=bfloat16", "train.mixed_precision=bf16"
    )
    kinds = [(case["dtype"], case["reference"], case["blocks"]) for case in report["cases"][::2]]
    assert kinds == [("float32", "float64", 3), ("bfloat16", "float64", 3), ("bfloat16", None, 5)]
    passed = [case["passed"] for case in report["cases"]]
    assert (code, passed[:2]) == {None: (0, [True] * 2), no_mask: (1, [False, True])}.get(bug, (1, [False] * 2))
    assert all(passed) == (bug is None)


def test_a_quantised_base_is_held_against_its_samples_alone(verify: Verify) -> None:
    code, report = verify("model.quantize=int8")
    assert (code, [(case["dtype"], case["reference"]) for case in report["cases"]]) == (0, [("float32", None)] * 2)
    assert all(0 < case["forward"] < 1e-5 for case in report["cases"])


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


@pytest.mark.parametrize("name", ["qwen", "qwen21"])  # a sample alone without a mask, and with one
@pytest.mark.parametrize("recomputed", [False, True])
def test_reordered_sums_are_the_same_sums_and_round_otherwise(recomputed: bool, name: str) -> None:
    kind = KINDS[name]
    model, mix = kind.patched(adapters=True), kind.mix("random 3")
    if recomputed:
        model.enable_gradient_checkpointing()
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        model, mix = model.to(dtype), mix.to("cpu", dtype)
        usual = kind.run(model, mix, "one by one")
        with consistency.reordered_sums():
            reordered = kind.run(model, mix, "one by one")
        for result in (usual, reordered):
            result.gradients.update(dict.fromkeys(kind.float32_parameters))
        found = mixes.forward_error(reordered, usual), mixes.gradient_error(reordered, usual)
        assert min(found) > 0 and max(found) < bound
        assert mixes.forward_error(kind.run(model, mix, "one by one"), usual) == 0, "outside it they are as they were"


def test_the_patch_state_is_read_from_the_model() -> None:
    shape = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 1, "joint_attention_dim": 8}
    stock, patched = (QwenImageTransformer2DModel(**shape, axes_dims_rope=(8, 12, 12)) for _ in range(2))
    patch_qwen_model_for_multi_resolution(patched)
    assert patch_state(stock) == PatchState(0, 2, False)
    assert patch_state(patched) == PatchState(2, 2, True) and patch_state(patched).whole
    patched.transformer_blocks[1].attn.set_processor(stock.transformer_blocks[1].attn.processor)
    assert patch_state(patched) == PatchState(1, 2, True) and not patch_state(patched).whole


def test_the_most_different_samples_are_taken() -> None:
    plain = {f"plain{n}": (10, (8, 8)) for n in range(5)}
    special = {"tall": (9, (32, 2)), "short": (3, (2, 2)), "long": (12, (20, 20)), "wordy": (90, (8, 7))}
    names, sizes = list(plain | special), (plain | special).values()
    shapes = [(Grid(1, *target), Grid(1, 2, 2)) for _, target in sizes]
    lengths = [Lengths(text, token_count(own), own[0].tokens) for (text, _), own in zip(sizes, shapes, strict=True)]
    source = Source(lengths, names, shapes, read=None)  # type: ignore[arg-type] # nothing is read

    def chosen(max_tokens: int) -> list[str]:
        return [names[index] for index in most_different(source, max_tokens)]

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
    inside = [replace(sample, text_before=(2, 0)[: len(sample.control_latents)]) for sample in samples]
    (packed,) = batches_of(inside, "packed")
    for b, sample in enumerate(inside):
        target, *controls = (grid.tokens for grid in sample.img_shapes)
        expected = [("text", 2), *(("control", tokens) for tokens in controls)]
        expected += [("text", len(sample.prompt_embeds) - 2), ("target", target)]
        assert sequence_segments(packed, b) == expected, "text between two controls is empty"
    plain, causal = (np.asarray(token_layout(padded, packed, causal=way)) for way in (False, True))
    seen, hidden = (np.array(ImageColor.getrgb(COLOURS[f"{name} key"])) for name in ("attended", "masked"))
    fewer = (plain == seen).all(-1) & (causal == hidden).all(-1)
    assert fewer.sum() > ((plain == hidden).all(-1) & (causal == seen).all(-1)).sum() == 0
