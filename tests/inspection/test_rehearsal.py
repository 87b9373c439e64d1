"""A rehearsal on fake tensors against real steps: loading, a step, ranks that split weights, every family."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from mixres import cli
from mixres.config.load import load_config
from mixres.inspection import fitting
from mixres.inspection.fitting import rehearse_quickly, with_more_blocks
from mixres.inspection.rehearsal import rehearse
from mixres.models.registry import load_family
from mixres.preprocessing.fill import family_of
from mixres.verification.synthetic import largest_microbatch
from support.family_cases import EVERY_CASE, FamilyCase
from support.jobs import REPOSITORY
from support.rehearsed_step import real_grid_peak, real_peak, sizes
from training.test_split_loading import on_two_ranks, write_large

BF16 = ["model.dtype=bfloat16", "train.mixed_precision=bf16"]
LARGER = ["data.resize.target.max_pixels=147456", "data.resize.control.area=147456"]
EVERY_LAYER, ALL = "model.lora.target_modules=all", "model.lora=null"
SGD = ["optimizer.class_path=torch.optim.SGD"]


def step_peak(found: dict[str, Any]) -> int:
    return max(found["phases"][name]["bytes"] for name in ("forward", "backward", "optimizer"))


def check(file: Path, words: Sequence[str], *, count: int = 2) -> None:
    AcceleratorState._reset_state(True)
    config = load_config(file, ["sample.every=0", *words])
    family = family_of(config)
    rehearsed = rehearse(config, family, sizes(config, family, count))
    assert step_peak(rehearsed) == pytest.approx(real_peak(config, family, count), rel=0.1)


STEPS = {
    "adapters": [],
    "padded, recomputed": ["batch.layout=padded", "train.gradient_checkpointing=true", *BF16],
    "dora": ["model.lora.use_dora=true", *BF16],
    "lokr": ["model.adapter=lokr", *BF16],
    "all weights, average": [ALL, "train.ema_decay=0.9"],
    "all weights, bf16": [ALL, *BF16],
    "over int8": ["model.quantize=int8", "train.gradient_checkpointing=true", *BF16],
}


@pytest.mark.parametrize(
    "words", [pytest.param(w, marks=[pytest.mark.slow] * (i > 0)) for i, w in enumerate(STEPS.values())], ids=STEPS
)
def test_the_peak_is_that_of_a_real_step(small_run: Path, tmp_path: Path, words: list[str]) -> None:
    check(small_run, [f"logging.output_dir={tmp_path}", *LARGER, *words])


@pytest.mark.slow
def test_a_text_encoder_that_stays_is_in_every_phase_and_has_one_of_its_own(small_run: Path, tmp_path: Path) -> None:
    found = []
    for words in ([], ["cache.text=recompute"]):
        config = load_config(small_run, [f"logging.output_dir={tmp_path}", *words])
        family = family_of(config)
        found.append(rehearse(config, family, largest_microbatch(config, family)))
    (plain, beside), encoder = found, found[1]["text_encoder"]
    own = beside["phases"].pop("text encoder")
    assert own["activations"] == encoder["activations"] > 0 and own["text_encoder"] == encoder["weights"] > 0
    for name, phase in beside["phases"].items():
        assert phase["bytes"] == plain["phases"][name]["bytes"] + encoder["weights"], name


@pytest.mark.slow
def test_the_peak_of_a_grid_is_that_of_a_real_image(small_run: Path, tmp_path: Path) -> None:
    """The VAE decodes at the peak here: its blocks are wider than the transformer's."""
    AcceleratorState._reset_state(True)
    config = load_config(small_run, [f"logging.output_dir={tmp_path}", LARGER[0]])
    family = family_of(config)
    rehearsed = rehearse(config, family, sizes(config, family, 1))["phases"]
    assert rehearsed["sample grid"]["bytes"] == pytest.approx(real_grid_peak(config, family), rel=0.1)
    quiet = config.model_copy(update={"sample": config.sample.model_copy(update={"every": 0})})
    without = rehearse(quiet, family, sizes(config, family, 1))["phases"]
    assert without["sample grid"]["bytes"] < 0.9 * rehearsed["sample grid"]["bytes"]
    assert without["save"]["bytes"] == rehearsed["save"]["bytes"] - rehearsed["save"]["vae"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY_CASE if name != "qwen_image_edit"])
def test_every_family(name: str, small_run: Path, tmp_path: Path, base_of: Callable[[FamilyCase], Path]) -> None:
    case = EVERY_CASE[name]
    base = f"model.pretrained_model_name_or_path={base_of(case)}"
    words = [base, f"logging.output_dir={tmp_path}", *case.overrides(), LARGER[0], EVERY_LAYER, *BF16]
    check(small_run, words)


FIVE_BLOCKS = f"model.pretrained_model_name_or_path={REPOSITORY / 'src/mixres/assets/tiny_base'}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_few_blocks_stand_for_all(small_run: Path) -> None:
    """Also where every second block is recomputed, and where one waits in host memory."""
    half, swapped = "train.gradient_checkpointing=2", ["train.gradient_checkpointing=true", "train.offload.blocks=4"]
    for words in ([], [half], swapped):
        config = load_config(small_run, [FIVE_BLOCKS, *BF16, *words])
        family = family_of(config)
        microbatch = largest_microbatch(config, family)
        whole = rehearse(config, family, microbatch)
        quick = rehearse_quickly(config, family, microbatch)
        assert quick == {**whole, "phases": quick["phases"]}
        for name, phase in whole["phases"].items():
            # What a save holds at its peak is one tensor of the largest, wherever in the order it comes.
            near = 1e-2 if name == "save" else 1e-3
            assert quick["phases"][name]["bytes"] == pytest.approx(phase["bytes"], rel=near), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_share_what_is_split_and_send_the_rest(small_run: Path) -> None:
    def of(ranks: int, *words: str) -> dict[str, Any]:
        config = load_config(small_run, [*BF16, "train.ema_decay=0.9", *words])
        family = family_of(config)
        return rehearse(config, family, largest_microbatch(config, family), ranks=ranks)

    one, split = of(1, ALL), of(4, ALL, "train.parallel=fsdp2")
    group = of(4, ALL, "train.parallel=fsdp2", "train.shard_size=2")
    for kind in ("trained_weights", "optimizer", "ema"):
        whole, half, quarter = (found["phases"]["save"][kind] for found in (one, group, split))
        assert half == pytest.approx(whole / 2, rel=0.02) and quarter == pytest.approx(whole / 4, rel=0.05)
    weights = one["phases"]["save"]["trained_weights"]
    # Weights in bfloat16 for forward and for backward, and gradients in float32, but the own quarter of each.
    assert split["wire_bytes"] == pytest.approx(0.75 * (2 * weights / 2 + weights), rel=0.1)
    replicas = of(4)
    assert replicas["wire_bytes"] == 2 * replicas["phases"]["backward"]["gradients"] * 3 // 4
    assert one["wire_bytes"] == 0
    assert one["flops"] == split["flops"]
    offloaded = of(4, ALL, "train.parallel=fsdp2", "train.cpu_offload=true")
    assert offloaded["host_bytes"] > split["phases"]["save"]["optimizer"]
    assert offloaded["peak_bytes"] < split["peak_bytes"]


@pytest.mark.slow
def test_blocks_in_host_memory_leave_the_device(small_run: Path) -> None:
    def of(*words: str) -> dict[str, Any]:
        words = ("train.gradient_checkpointing=true", "sample.every=0", *words)
        config = load_config(small_run, [FIVE_BLOCKS, *BF16, *words])
        family = family_of(config)
        return rehearse(config, family, largest_microbatch(config, family))

    plain, swapped = of(), of("train.offload={blocks: 2, activations: true}")
    gone = plain["phases"]["save"]["weights"] - swapped["phases"]["save"]["weights"]
    assert gone == (plain["blocks"] - 2) * plain["block_bytes"]
    assert swapped["host_bytes"] > plain["blocks"] * plain["block_bytes"]
    assert plain["peak_bytes"] - swapped["peak_bytes"] > gone
    roomy = swapped["peak_bytes"] + plain["block_bytes"]
    assert with_more_blocks(swapped, roomy) == (3, roomy)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_verb_needs_neither_data_nor_weights_and_says_what_helps(
    small_run: Path, copy_of_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for weights in copy_of_base.rglob("*.safetensors"):
        weights.unlink()
    words = [
        f"model.pretrained_model_name_or_path={copy_of_base}", f"data.train={tmp_path / 'none'}", "data.held_out=null",
        f"logging.output_dir={tmp_path}", *BF16,
    ]  # fmt: skip
    command = ["inspect", "--config", str(small_run), "--rehearse", *words]
    assert cli.main([*command, "--device-memory", "24GB"]) == 0
    found = json.loads((tmp_path / "reports" / "inspect.json").read_text())["rehearsal"]
    assert found["fits"] and found["changes"] == [] and found["device_memory_bytes"] == 24 * 10**9
    bytes_below = found["peak_bytes"] // 2
    assert cli.main([*command, "--ranks", "2", "--device-memory", f"{bytes_below / 1e9}GB"]) == 0
    found = json.loads((tmp_path / "reports" / "inspect.json").read_text())["rehearsal"]
    assert not found["fits"]
    assert found["changes"][0]["set"] == "train.gradient_checkpointing=true"
    peaks = [change["bytes"] for change in found["changes"]]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] < found["peak_bytes"]
    assert "train.gradient_checkpointing=true" in capsys.readouterr().out


def test_options_are_refused_in_one_line(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        "--device-memory: is for --rehearse": ["--device-memory", "24GB"],
        "'24' is no size": ["--rehearse", "--device-memory", "24"],
        "'-1GB' is no size": ["--rehearse", "--device-memory=-1GB"],
        "'0GB' is no size": ["--rehearse", "--device-memory", "0GB"],
    }
    for message, words in asked.items():
        assert cli.main(["inspect", "--config", str(small_run), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    groups = ["--rehearse", "--ranks", "4", "train.parallel=fsdp2", "train.shard_size=3", "data.train=/none"]
    assert cli.main(["inspect", "--config", str(small_run), *groups]) == 2
    assert "train.shard_size: 4 processes are no groups of 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_where_weights_are_most_of_it_on_one_and_two_ranks(small_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Blocks of half the stock width; adapters on one rank, all weights on two."""
    large_base = tmp_path / "base"
    assert write_large(tiny_base, large_base, num_layers=3, num_attention_heads=12) > 2e8
    small = ["data.resize.target.max_pixels=4096", "data.resize.control.area=4096"]  # a core computes them in seconds
    base = [f"model.pretrained_model_name_or_path={large_base}", f"logging.output_dir={tmp_path}", *BF16, *small]
    base.append("train.gradient_checkpointing=true")
    check(small_run, base, count=1)
    split = [*base, "train.parallel=fsdp2", ALL, *SGD]
    found = on_two_ranks("rehearsed_step.py", small_run, [("all weights", split)])
    config = load_config(small_run, split)
    family = family_of(config)
    rehearsed = step_peak(rehearse(config, family, sizes(config, family, 1), ranks=2))
    for rank in found:
        assert rehearsed == pytest.approx(rank["all weights"], rel=0.1)


@pytest.mark.slow
def test_few_blocks_of_the_stock_shape(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext's two lists of blocks at the stock width, cut to 5 and 6 blocks."""
    words = ["model.pretrained_model_name_or_path=black-forest-labs/FLUX.1-Kontext-dev", *BF16]
    config = load_config(small_run, words)
    family: Any = load_family(None, "black-forest-labs/FLUX.1-Kontext-dev", synthetic=True)
    microbatch = largest_microbatch(config, family)
    shorter: Any = fitting._Shorter(family, (5, 6))
    assert rehearse_quickly(config, shorter, microbatch) == rehearse(config, shorter, microbatch)


@pytest.mark.slow
def test_few_blocks_of_a_split_full_training(small_run: Path) -> None:
    """Qwen-Image's width, where gradients on their way are more than activations; from three blocks 1 GB too much."""
    words = ["model.pretrained_model_name_or_path=Qwen/Qwen-Image-Edit", "model.lora=null", "train.parallel=fsdp2"]
    config = load_config(small_run, [*BF16, *words, "train.gradient_checkpointing=true"])
    family: Any = load_family(None, "Qwen/Qwen-Image-Edit", synthetic=True)
    microbatch, shorter = largest_microbatch(config, family)[:1], fitting._Shorter(family, (6,))
    how: dict[str, Any] = {"ranks": 8, "microbatches": 2}
    quick, whole = (of(config, shorter, microbatch, **how) for of in (rehearse_quickly, rehearse))  # type: ignore[operator]
    assert quick == {**whole, "phases": quick["phases"]}
    for name, phase in whole["phases"].items():
        assert quick["phases"][name]["bytes"] == pytest.approx(phase["bytes"], rel=1e-2 if name == "save" else 1e-3), (
            name
        )
