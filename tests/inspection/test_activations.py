"""The formula of activations against what autograd really keeps on the tiny model."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from mixres.batch import Batch, Sample
from mixres.config.load import load_config
from mixres.data.plan import Layout, Lengths
from mixres.geometry import token_count
from mixres.inspection.activations import rows_of
from mixres.inspection.memory import MemoryEstimate, optimizer_bytes
from mixres.models.lora import fill_adapters
from mixres.preprocessing.fill import family_of
from mixres.training.optimizer import optimizer_tensors
from mixres.verification.consistency import batches_of
from mixres.verification.setup import Setup, one_process, set_up
from mixres.verification.synthetic import synthetic_samples
from support.family_cases import CASES, FamilyCase

BAR, WIDE = 0.03, 0.07  # the promise is 10 per cent
LAYOUTS: tuple[Layout, ...] = ("packed", "padded")
EXACT = dict.fromkeys(LAYOUTS, 1.0)


class _Held:
    """What autograd keeps in place of a tensor; it lives as long as the node that saved it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """One, or those of the tensors that a quantised weight is made of."""
    if isinstance(tensor, torch.nn.Parameter):
        tensor = tensor.data
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def kept_bytes(setting: Setup, batch: Batch) -> tuple[int, torch.Tensor]:
    """Bytes of all storages, weights left out, that the graph holds when the forward pass is done; and the loss."""
    weights = {s.data_ptr() for p in setting.trained.transformer.parameters() for s in storages(p)}
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    autocast = setting.config.train.mixed_precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor),
        setting.accelerator.autocast() if autocast else nullcontext(),
    ):
        loss = setting.objective.loss_sum(setting.trained.transformer, batch, step=0)
    found = {storage.data_ptr(): storage.nbytes() for held in alive for storage in storages(held.tensor)}
    return sum(size for pointer, size in found.items() if pointer not in weights), loss


def lengths_of(samples: list[Sample]) -> list[Lengths]:
    return [Lengths(len(s.prompt_embeds), token_count(s.img_shapes), len(s.target_latents)) for s in samples]


def ratios(file: Path, words: list[str]) -> dict[str, float]:
    """Estimated over real bytes of one microbatch of three samples, in both layouts."""
    AcceleratorState._reset_state(True)
    config = load_config(file, words)
    family = family_of(config)
    setting = set_up(config, family, one_process(config, "inspect"))
    samples = synthetic_samples(config, family, 3)
    estimate = MemoryEstimate(config, family, ranks=1, cuda=False)
    assert (estimate.trained, estimate.parameters) == setting.trained.counts
    found = {}
    for layout in LAYOUTS:
        real, _ = kept_bytes(setting, batches_of(samples, layout)[0])
        rows, checkpointing = rows_of(lengths_of(samples), layout), config.train.gradient_checkpointing
        found[layout] = estimate.activations_in(layout).held(rows, checkpointing=checkpointing) / real
    return found


BF16 = ["model.dtype=bfloat16", "train.mixed_precision=bf16"]
TRAINED = {
    "attention": [],
    "attention, bf16 base under autocast": BF16,
    "attention, float32 base under autocast": ["train.mixed_precision=bf16"],
    "attention, bf16 base, no autocast": ["model.dtype=bfloat16"],
    "attention, float64": ["model.dtype=float64"],
    "mlp too": ["model.lora.target_modules=attention+mlp"],
    "mlp too, bf16": ["model.lora.target_modules=attention+mlp", *BF16],
    "every layer": ["model.lora.target_modules=all"],
    "dora": ["model.lora.use_dora=true"],
    "dropout": ["model.lora.lora_dropout=0.1"],
    "dropped dora, bf16": ["model.lora.lora_dropout=0.1", "model.lora.use_dora=true", *BF16],
    "over int8": ["model.quantize=int8", "model.lora.target_modules=all"],
    "over fp8, dora, bf16": ["model.quantize=fp8", "model.lora.use_dora=true", *BF16],
    "all weights": ["model.lora=null"],
    "all weights, bf16": ["model.lora=null", *BF16],
}


@pytest.mark.parametrize("words", TRAINED.values(), ids=TRAINED)
def test_the_formula_counts_what_autograd_keeps(small_run: Path, words: list[str]) -> None:
    assert ratios(small_run, ["train.gradient_checkpointing=false", *words]) == pytest.approx(EXACT, abs=BAR)


@pytest.mark.parametrize("words", [[], BF16], ids=["float32", "bf16"])
def test_with_checkpointing_the_inputs_of_blocks_are_kept(small_run: Path, words: list[str]) -> None:
    assert ratios(small_run, ["train.gradient_checkpointing=true", *words]) == pytest.approx(EXACT, abs=BAR)


@pytest.mark.parametrize("words", [[], BF16], ids=["float32", "bf16"])
def test_of_every_second_block_the_inputs_are_kept(small_run: Path, words: list[str]) -> None:
    assert ratios(small_run, ["train.gradient_checkpointing=2", *words]) == pytest.approx(EXACT, abs=BAR)


CHECKPOINTING = ("false", "true", "2")
EVERYWHERE = {  # what lies outside the blocks counts for more where blocks are recomputed
    "dora": ["model.lora.target_modules=all", "model.lora.use_dora=true", *BF16],
    "dropout": ["model.lora.target_modules=all", "model.lora.lora_dropout=0.1", *BF16],
    "all weights": ["model.lora=null", *BF16],
}


@pytest.mark.parametrize("words", EVERYWHERE.values(), ids=EVERYWHERE)
@pytest.mark.parametrize("name", CASES)
def test_every_family_however_blocks_are_recomputed(
    name: str, small_run: Path, base_of: Callable[[FamilyCase], Path], words: list[str]
) -> None:
    case = CASES[name]
    words = [f"model.pretrained_model_name_or_path={base_of(case)}", *case.overrides(), *words]
    for some in CHECKPOINTING:
        found = ratios(small_run, [*words, f"train.gradient_checkpointing={some}"])
        assert found == pytest.approx(EXACT, abs=WIDE), some


PLACES = {
    "queries": "to_q",
    "the end of a block": "txt_mlp.net.2",
    "the last block": "transformer_blocks.1.attn.to_v",
    "before the blocks": "img_in",
    "behind the blocks": "proj_out",
    "the timestep": "timestep_embedder.linear_1",
}


@pytest.mark.parametrize("layers", PLACES.values(), ids=PLACES)
def test_nothing_is_kept_before_what_trains(small_run: Path, layers: str) -> None:
    for some in CHECKPOINTING:
        words = [f"model.lora.target_modules=[{layers}]", f"train.gradient_checkpointing={some}"]
        assert ratios(small_run, words) == pytest.approx(EXACT, abs=WIDE), some


def estimate_of(file: Path, *words: str, ranks: int = 1, cuda: bool = False) -> MemoryEstimate:
    config = load_config(file, list(words))
    return MemoryEstimate(config, family_of(config), ranks=ranks, cuda=cuda)


def test_memory_adds_up(small_run: Path) -> None:
    rows = rows_of([Lengths(10, 100, 50), Lengths(20, 60, 30)], "packed")
    assert rows == (160, 30, 80)
    assert rows_of([Lengths(10, 100, 50), Lengths(20, 60, 30)], "padded") == (200, 40, 80)
    plain = estimate_of(small_run, "train.ema_decay=0.9")
    memory = plain.memory(rows)
    trained = 4 * plain.trained
    assert (memory.trained_weights, memory.gradients, memory.optimizer, memory.ema) == (
        trained,
        trained,
        2 * trained,
        trained,
    )
    assert memory.weights == 4 * (plain.parameters - plain.trained)
    assert memory.activations == memory.activations_without_checkpointing > memory.activations_with_checkpointing
    assert memory.total == memory.weights + 5 * trained + memory.activations
    half = estimate_of(small_run, "train.ema_decay=0.9", "train.parallel=fsdp2", ranks=2).memory(rows)
    assert (2 * half.optimizer, 2 * half.ema) == (memory.optimizer, memory.ema)
    assert memory.weights / 2 < half.weights + half.gathered
    assert half.activations == memory.activations
    assert estimate_of(small_run, ranks=2).memory(rows).weights == memory.weights
    on_cuda = [estimate_of(small_run, *BF16, cuda=cuda).memory(rows).activations for cuda in (False, True)]
    assert on_cuda[0] < on_cuda[1] < 1.2 * on_cuda[0]


OPTIMIZERS = {
    "AdamW": [],
    "SGD": ["optimizer.class_path=torch.optim.SGD"],
    "Adagrad": ["optimizer.class_path=torch.optim.Adagrad"],
    "Prodigy": ["optimizer.class_path=prodigyopt.Prodigy"],
    **{name: [f"optimizer.class_path=torchao.optim.{name}"] for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
}


@pytest.mark.parametrize("words", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizers_state_is_what_a_step_leaves(small_run: Path, words: list[str]) -> None:
    """Of DoRA's matrices, which 8-bit optimizers quantise at this rank, and vectors, which they do not."""
    config = load_config(small_run, [*words, "model.lora.r=64", "model.lora.use_dora=true"])
    AcceleratorState._reset_state(True)
    trained = set_up(config, family_of(config), one_process(config, "inspect")).trained
    fill_adapters(trained.parameters, seed=0)
    for parameter in trained.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        trained.optimizer.step()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in optimizer_tensors(trained.optimizer, trained.parameters).values()
        if tensor.dim()
    }
    numbers = [parameter.numel() for parameter in trained.parameters.values()]
    assert optimizer_bytes(config, numbers) == sum(storages.values())
    assert {True, False} == {count >= 4096 for count in numbers}
