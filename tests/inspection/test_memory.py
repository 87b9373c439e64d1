"""Memory counted on fake tensors against what a step on the CPU takes from the allocator."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from mixres.batch import Batch
from mixres.config.load import load_config
from mixres.geometry import Grid
from mixres.inspection import memory
from mixres.inspection.memory import MemoryEstimate
from mixres.inspection.rehearsal import FakeRun, optimizer_bytes
from mixres.inspection.storages import LiveStorages, bytes_of
from mixres.inspection.text_memory import text_memory
from mixres.models.blocks import repeated_blocks
from mixres.models.lora import fill_adapters
from mixres.models.registry import load_family
from mixres.preprocessing.fill import family_of
from mixres.training.optimizer import optimizer_tensors
from mixres.training.setup import TrainState
from mixres.verification.consistency import batches_of
from mixres.verification.setup import one_process, set_up
from mixres.verification.synthetic import synthetic_samples
from support.counting import allocated_at_peak
from support.family_cases import EVERY_CASE, FamilyCase, with_family

BF16 = ["model.dtype=bfloat16", "train.mixed_precision=bf16"]
DORA = "model.lora.use_dora=true"
EVERY_LAYER = "model.lora.target_modules=all"


def estimate_of(file: Path, *words: str, ranks: int = 1) -> MemoryEstimate:
    config = load_config(file, list(words))
    return MemoryEstimate(config, family_of(config), ranks=ranks)


def activations_at_peak(setting: TrainState, batch: Batch) -> int:
    """Bytes that forward and backward take beside weights and gradients, by the allocator's own record."""

    def step() -> None:
        with setting.accelerator.autocast():
            loss = setting.objective.loss_sum(setting.transformer, batch, step=0)
        torch.autograd.backward(loss)

    step()  # gradients and position tables are there from now on
    held = bytes_of(value for value in vars(batch).values() if isinstance(value, torch.Tensor))
    return held + allocated_at_peak(step)


def check_estimate(file: Path, words: Sequence[str]) -> None:
    AcceleratorState._reset_state(True)
    config = load_config(file, list(words))
    family = family_of(config)
    setting = set_up(config, family, one_process(config, "inspect"))
    samples = synthetic_samples(config, family, 3)
    estimate = MemoryEstimate(config, family, ranks=1)
    assert (estimate.trained, estimate.parameters) == setting.counts
    batch = estimate.batch([(sample.img_shapes, len(sample.prompt_embeds)) for sample in samples])
    counted = max(estimate.count(batch, config.train.gradient_checkpointing)[1:])
    real = activations_at_peak(setting, batches_of(samples, config.batch.layout)[0])
    assert counted == pytest.approx(real, rel=0.1)


STEPS = {  # others, of the same model on fake tensors, are in test_rehearsal.py
    "every second block recomputed": ["train.gradient_checkpointing=2", EVERY_LAYER],
    "loha, recomputed": ["model.adapter=loha", *BF16],
    "float64, dropout": ["model.dtype=float64", "train.gradient_checkpointing=false", "model.lora.lora_dropout=0.1"],
    "dora, every layer, recomputed": [DORA, EVERY_LAYER, *BF16],
    "over fp8, recomputed": ["model.quantize=fp8", *BF16],
}


@pytest.mark.parametrize(
    "words", [pytest.param(w, marks=[pytest.mark.slow] * (i > 0)) for i, w in enumerate(STEPS.values())], ids=STEPS
)
def test_the_peak_is_that_of_a_real_step(small_run: Path, words: list[str]) -> None:
    larger = ["data.resize.target.max_pixels=65536", "data.resize.control.area=65536"]
    check_estimate(small_run, ["train.gradient_checkpointing=true", *larger, *words])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY_CASE if name != "qwen_image_edit"])
def test_every_family(name: str, small_run: Path, base_of: Callable[[FamilyCase], Path]) -> None:
    case = EVERY_CASE[name]
    base = f"model.pretrained_model_name_or_path={base_of(case)}"
    larger = ["data.resize.target.max_pixels=65536", "batch.layout=padded"]
    check_estimate(small_run, [base, *case.overrides(), *larger, EVERY_LAYER, *BF16])


STOCK = "Qwen/Qwen-Image-Edit"
SETTINGS: dict[str, tuple[str, list[str], bool | int]] = {
    "no block recomputed": (STOCK, [], False),
    "every second recomputed": (STOCK, [], 2),
    "one block trains": (STOCK, ["model.lora.target_modules=[transformer_blocks.4.attn.to_q]"], False),
    "all weights": (STOCK, ["model.lora=null"], True),
    "FLUX.2": ("black-forest-labs/FLUX.2-klein-base-4B", [], False),
    "FLUX.1": ("black-forest-labs/FLUX.1-Kontext-dev", [], True),
}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "words", "checkpointing"), SETTINGS.values(), ids=SETTINGS)
def test_equal_blocks_stand_for_each_other(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, base: str, words: list[str], checkpointing: bool | int
) -> None:
    """The stock widths with 6 blocks of a kind: the few that are run say of the others what running them says."""
    config = load_config(small_run, [f"model.pretrained_model_name_or_path={base}", *BF16, *words])
    family = load_family(None, base, synthetic=True)
    skeleton = family.transformer_skeleton()
    blocks = set(repeated_blocks(skeleton))
    for stack in skeleton.modules():
        if isinstance(stack, torch.nn.ModuleList) and not blocks.isdisjoint(stack):
            del stack[5:-1]
    monkeypatch.setattr(family, "transformer_skeleton", lambda *args, **named: skeleton)
    estimate = MemoryEstimate(config, family, ranks=1)
    batch = estimate.batch([((Grid(1, 32, 32), Grid(1, 20, 24)), 300)])
    extended = estimate.count(batch, checkpointing)
    monkeypatch.setattr(memory, "_KEPT_BLOCKS", 6)
    assert extended == estimate.count(batch, checkpointing)


def test_memory_adds_up(small_run: Path) -> None:
    microbatch = [((Grid(1, 5, 10), Grid(1, 5, 10)), 10), ((Grid(1, 5, 6), Grid(1, 5, 6)), 20)]
    estimate = estimate_of(small_run, "train.ema_decay=0.9")
    plain, trained = estimate.memory(microbatch), 4 * estimate.trained
    parts = [plain[name] for name in ("trained_weights", "gradients", "optimizer", "ema")]
    assert parts == [trained, trained, 2 * trained, trained]
    assert plain["weights"] == 4 * (estimate.parameters - estimate.trained)
    assert plain["activations"] == plain["activations_without_checkpointing"] > plain["activations_with_checkpointing"]
    assert plain["total"] == plain["weights"] + 5 * trained + plain["activations"]
    half = estimate_of(small_run, "train.ema_decay=0.9", "train.parallel=fsdp2", ranks=2).memory(microbatch)
    assert (2 * half["optimizer"], 2 * half["ema"]) == (plain["optimizer"], plain["ema"])
    assert plain["weights"] / 2 < half["weights"] + half["gathered"]
    assert half["activations"] == plain["activations"]
    assert min(estimate.token_bytes()) > 20 * 4 * 32


@pytest.mark.slow
def test_groups_of_ranks_hold_whole_models(small_run: Path) -> None:
    microbatch = [((Grid(1, 5, 10), Grid(1, 5, 10)), 10)]
    half = estimate_of(small_run, "train.ema_decay=0.9", "train.parallel=fsdp2", ranks=2).memory(microbatch)
    groups = ("train.ema_decay=0.9", "train.parallel=fsdp2", "train.shard_size=2")
    assert estimate_of(small_run, *groups, ranks=6).memory(microbatch) == half
    on_host = estimate_of(small_run, *groups, "train.cpu_offload=true", ranks=6).memory(microbatch)
    assert on_host["total"] == half["gathered"] + half["activations"]
    plain = [estimate_of(small_run, ranks=ranks).memory(microbatch)["weights"] for ranks in (1, 2)]
    assert plain[0] == plain[1]


@pytest.mark.slow
def test_what_waits_in_host_memory_is_not_on_the_device(small_run: Path) -> None:
    """Of two equal blocks one is left; what is kept of a forward pass is what is not moved."""
    microbatch = [((Grid(1, 20, 30), Grid(1, 20, 30)), 100)]
    words, offload = ("train.gradient_checkpointing=true", *BF16), "train.offload={blocks: 1, activations: true}"
    plain, offloaded = estimate_of(small_run, *words), estimate_of(small_run, *words, offload)
    before, after = plain.figures(microbatch), offloaded.figures(microbatch)
    counts = [estimate.count(estimate.batch(microbatch), True) for estimate in (plain, offloaded)]
    block = repeated_blocks(offloaded._model)[0]
    waiting = after["host_bytes"] - counts[1].host
    assert waiting == 2 * 2 * sum(p.numel() for p in block.parameters() if p.dim() == 2 and not p.requires_grad)
    assert 2 * (before["bytes"]["weights"] - after["bytes"]["weights"]) == waiting
    assert before["bytes"]["gradients"] == after["bytes"]["gradients"]
    assert before["bytes"]["total"] - after["bytes"]["total"] > waiting / 2
    assert counts[1].kept + counts[1].host == pytest.approx(counts[0].kept, rel=0.02)
    assert counts[1].kept < counts[0].kept / 2
    assert before["host_bytes"] == 0


OPTIMIZERS = {
    "AdamW": [],
    "SGD": ["optimizer.class_path=torch.optim.SGD"],
    "Adagrad": ["optimizer.class_path=torch.optim.Adagrad"],
    "Prodigy": ["optimizer.class_path=prodigyopt.Prodigy"],
    **{name: [f"optimizer.class_path=torchao.optim.{name}"] for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
}
FEW = ("AdamW", "Prodigy", "AdamW8bit")


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=name, marks=[pytest.mark.slow] * (name not in FEW)) for name, words in OPTIMIZERS.items()],
)
def test_the_optimizers_state_is_what_a_step_leaves(small_run: Path, words: list[str]) -> None:
    """Of DoRA's matrices, which 8-bit optimizers quantise at this rank, and vectors, which they do not."""
    config = load_config(small_run, [*words, "model.lora.r=64", DORA])
    AcceleratorState._reset_state(True)
    trained = set_up(config, family_of(config), one_process(config, "inspect"))
    fill_adapters(trained.parameters, seed=0)
    for parameter in trained.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        trained.optimizer.step()
    state = optimizer_tensors(trained.optimizer, trained.parameters).values()
    numbers = [parameter.numel() for parameter in trained.parameters.values()]
    held = bytes_of(tensor for tensor in state if tensor.dim())
    assert optimizer_bytes(config, numbers) == held  # for classes that are not faked
    assert FakeRun(config, family_of(config)).resident["optimizer"] == held
    assert {True, False} == {count >= 4096 for count in numbers}


@pytest.mark.parametrize("name", ["qwen_image_edit", "flux", pytest.param("flux2_klein", marks=pytest.mark.slow)])
def test_a_text_encoder_that_stays_is_counted_as_it_runs(
    name: str, small_run: Path, base_of: Callable[[FamilyCase], Path]
) -> None:
    words = [f"model.pretrained_model_name_or_path={base_of(EVERY_CASE[name])}", *EVERY_CASE[name].overrides()]
    config, family = with_family(
        load_config(small_run, [*words, "cache.text=recompute", "logging.output_dir=/nowhere"])
    )
    encoders, peaks, weights = family.load_encoders(dtype=torch.float32, device="cpu"), [], 0
    found = text_memory(config, family, [((), 100), ((), 300)])
    for part in (own for title, own in encoders.components.items() if title.startswith("text_encoder")):
        ids = torch.zeros(1, min(300, getattr(part.config, "max_position_embeddings", 300)), dtype=torch.long)
        with torch.no_grad(), LiveStorages([*part.parameters(), *part.buffers()]) as storages:
            part(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        peaks.append(storages.peak)
        weights += bytes_of(part.parameters())
    assert found and (found.shared, found.weights) == (True, weights)
    assert 0 <= found.activations - max(peaks) <= 4 * 300**2, "at most a mask that ones make needless"
    for device, shared, on_host in (("cuda:1", False, False), ("cpu", False, True), ("cuda:0", True, False)):
        away = config.model_copy(update={"cache": config.cache.model_copy(update={"text_device": device})})
        there = text_memory(away, family, [((), 16)])
        assert there and (there.device, there.shared, there.host_bytes > 0) == (device, shared, on_host)
