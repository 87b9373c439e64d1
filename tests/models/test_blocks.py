"""Recomputed blocks: the gradients bit for bit, which blocks, and how many bytes are kept for backward.

Compiled blocks: outputs, gradients and moving averages to rounding, and how many graphs there are. Without the slow
tier's inductor, graphs are traced and differentiated as for it, and run as they are ("aot_eager").
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from mixres.data.plan import Rounding, rounded
from mixres.errors import UserError
from mixres.models.blocks import check_compiler, compile_blocks, most_graphs, recompute_blocks, repeated_blocks
from mixres.models.lora import add_lora, fill_adapters, train_all, trainable_parameters
from mixres.models.qwen.layers import untrained_modules
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from mixres.training.ema import Ema
from support.mixes import (
    ATTENTION_AND_MLP,
    CHANNELS,
    FORWARDS,
    TEXT_WIDTH,
    Mix,
    Result,
    assert_identical,
    backward,
    filled_up,
    forward_error,
    forward_padded,
    gradient_error,
    loss,
    main_mix,
    make_mix,
    padded_call,
    random_mix,
    run,
    valid_slots,
    vanished,
)

BLOCKS, HEADS, HEAD_WIDTH = 5, 2, 32


def small_model(blocks: int = BLOCKS, *, adapters: bool = True) -> QwenImageTransformer2DModel:
    """Adapters on a frozen base, or that base alone."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=CHANNELS, out_channels=4, num_layers=blocks, attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(8, 12, 12),
    ).requires_grad_(False)  # fmt: skip
    if adapters:
        model.add_adapter(LoraConfig(r=4, target_modules=ATTENTION_AND_MLP, init_lora_weights=False))
    return patch_qwen_model_for_multi_resolution(model)


def forward_calls(model: QwenImageTransformer2DModel, layout: str) -> tuple[Result, list[int]]:
    """A microbatch forward and back, and how often each block ran."""
    calls = [0] * len(repeated_blocks(model))

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    handles = [b.register_forward_pre_hook(count(i)) for i, b in enumerate(repeated_blocks(model))]
    result = run(model, random_mix(3), layout)
    for handle in handles:
        handle.remove()
    return result, calls


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("every", "calls"), [(1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1]), (60, [2, 1, 1, 1, 1])]
)
def test_every_nth_block_is_recomputed_and_the_gradients_stay(every: int, calls: list[int], layout: str) -> None:
    model = small_model()
    kept, once = forward_calls(model, layout)
    assert once == [1] * BLOCKS
    recompute_blocks(model, every=every)
    recomputed, found = forward_calls(model, layout)
    assert found == calls
    assert_identical(recomputed, kept)


def kept_bytes(model: QwenImageTransformer2DModel, layout: str = "padded") -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, without those of weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors stay, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    mix = main_mix()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(FORWARDS[layout](model, mix), mix)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_recomputed_block_keeps_its_inputs_alone() -> None:
    """The formula of docs/settings.md: one row of the model's width for each image and text token."""
    call = padded_call(main_mix())
    tokens = call["hidden_states"].shape[:2].numel() + call["encoder_hidden_states"].shape[:2].numel()
    inputs = 4 * tokens * HEADS * HEAD_WIDTH
    kept = {}
    for blocks in (BLOCKS, BLOCKS - 1):
        model = small_model(blocks)
        kept[blocks, 0] = kept_bytes(model)
        for every in (1, 2, 60):
            recompute_blocks(model, every=every)
            kept[blocks, every] = kept_bytes(model)
    assert kept[BLOCKS, 1] - kept[BLOCKS - 1, 1] == inputs
    assert 19 * inputs < kept[BLOCKS, 0] - kept[BLOCKS - 1, 0] < 20 * inputs
    assert kept[BLOCKS, 1] < kept[BLOCKS, 2] < kept[BLOCKS, 60] < kept[BLOCKS, 0]
    assert kept[BLOCKS, 2] - kept[BLOCKS, 1] > 2 * 18 * inputs


@pytest.fixture
def no_graphs() -> Iterator[None]:
    """What is compiled, and how many graphs may be, is kept for the process."""
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def trained_model(trained: str, blocks: int) -> QwenImageTransformer2DModel:
    """As a run sets it up: adapters with B filled, or all weights; nothing trains that reaches no loss."""
    model = small_model(blocks, adapters=False)
    untrained = untrained_modules(model)
    if trained == "all weights":
        train_all(model, untrained=untrained)
    else:
        targets = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION_AND_MLP, "untrained": untrained}
        add_lora(model, **targets, lora_dropout=0, seed=0)  # type: ignore[arg-type]
        fill_adapters(trainable_parameters(model), seed=1)
    return model


def assert_alike(compiled: QwenImageTransformer2DModel, plain: QwenImageTransformer2DModel, mixes: list[Mix]) -> None:
    for mix in mixes:
        ours, theirs = run(compiled, mix, "padded"), run(plain, mix, "padded")
        assert forward_error(ours, theirs) <= 1e-5
        assert gradient_error(ours, theirs) <= 1e-5
        assert vanished(ours.gradients) == vanished(theirs.gradients)


def updated(model: QwenImageTransformer2DModel, mixes: list[Mix]) -> Ema:
    """The average over three updates."""
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    ema = Ema(optimizer, 0.7)
    for mix in (*mixes, *mixes, *mixes)[:3]:
        loss(forward_padded(model, mix), mix).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return ema


def compiled_as_plain(trained: str, backend: str, blocks: int, mixes: list[Mix]) -> None:
    """Outputs and gradients, recomputed too, before and behind updates, and those of the average."""
    plain, compiled = trained_model(trained, blocks), trained_model(trained, blocks)
    compile_blocks(compiled, graphs=most_graphs(rows=3, lengths=len(mixes)), backend=backend)
    for every in (0, 1, 2):
        for model in (plain, compiled):
            if every:
                recompute_blocks(model, every=every)
        assert_alike(compiled, plain, mixes)
    with updated(plain, mixes).averaged(), updated(compiled, mixes).averaged():
        assert_alike(compiled, plain, mixes)
    assert_alike(compiled, plain, mixes)
    kinds = min(blocks, 3 if trained == "lora" else 2)
    assert graphs() == kinds * len(mixes), "each kind of block once for each shape"
    assert sum(counters["graph_break"].values()) == 0


# Of three blocks with adapters, the first's inputs need no gradient, and the last has fewer adapters.
TRAINED = pytest.mark.parametrize(("trained", "blocks"), [("lora", 3), ("all weights", 2)])


@TRAINED
@pytest.mark.usefixtures("no_graphs")
def test_compiled_blocks_give_the_outputs_and_gradients_of_plain_ones(trained: str, blocks: int) -> None:
    compiled_as_plain(trained, "aot_eager", blocks, [main_mix(), random_mix(3)])


@TRAINED
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own import of inductor
@pytest.mark.usefixtures("no_graphs")
def test_inductors_code_gives_the_outputs_and_gradients_of_plain_blocks(trained: str, blocks: int) -> None:
    compiled_as_plain(trained, "inductor", blocks, [main_mix()])


@pytest.mark.usefixtures("no_graphs")
def test_rounded_lengths_bound_the_graphs_and_the_next_epoch_needs_none() -> None:
    """Eight microbatches of other sizes, and two image lengths and one text length after rounding."""
    model, rounding = small_model(3), Rounding(text=16, image=64)
    compile_blocks(model, graphs=most_graphs(rows=2, lengths=2), backend="aot_eager")
    mixes = [make_mix([[(1, 5, 5 + n)], [(1, 8, 4 + n)]], [3 + n, 9], seed=n) for n in range(8)]
    shapes = set()
    for epoch in range(2):
        for mix in mixes:
            images, texts = (max(len(row) for row in rows) for rows in (mix.images, mix.texts))
            more_images, more_texts = rounded(images, rounding.image) - images, rounded(texts, rounding.text) - texts
            shapes.add((images + more_images, texts + more_texts))
            (output,) = model(
                hidden_states=filled_up(mix.images, more_images, 0.0),
                encoder_hidden_states=filled_up(mix.texts, more_texts, 0.0),
                encoder_hidden_states_mask=valid_slots(mix.texts, more_texts),
                timestep=mix.timesteps,
                img_shapes=mix.shapes,
                return_dict=False,
            )
            outputs = [row[: len(image)] for row, image in zip(output, mix.images, strict=True)]
            backward(model, outputs, loss(outputs, mix))
        if epoch == 0:
            assert len(shapes) == 2
            assert graphs() <= 3 * len(shapes)
            first = graphs()
    assert graphs() == first


@pytest.mark.usefixtures("no_graphs")
def test_where_no_gradient_is_asked_for_nothing_is_compiled() -> None:
    plain, compiled = small_model(3), small_model(3)
    compile_blocks(compiled, graphs=1, backend="aot_eager")
    with torch.no_grad():
        for seed in range(3):
            call = padded_call(random_mix(seed))
            assert torch.equal(compiled(**call)[0], plain(**call)[0])
    assert graphs() == 0


def test_a_machine_without_a_compiler_is_told() -> None:
    absent = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with absent, fresh_cache(), pytest.raises(UserError, match=r"train.compile: torch.compile does not work on cpu \("):
        check_compiler(torch.device("cpu"))
