"""Recomputed blocks: the gradients bit for bit, which blocks, and how many bytes are kept for backward.

Compiled blocks: outputs, gradients and moving averages to rounding, and how many graphs there are; by inductor, and
traced and differentiated as for it, but run as they are ("aot_eager").
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from mixres.data.plan import Rounding, rounded
from mixres.errors import UserError
from mixres.models.blocks import check_compiler, compile_blocks, most_graphs, recompute_blocks, repeated_blocks
from mixres.models.lora import train_all, trainable_parameters
from mixres.models.qwen.layers import untrained_modules
from support import mixes
from support.steps import moved_average, with_adapters

BLOCKS, WIDTH = 5, 64


def small_model(blocks: int = BLOCKS, adapters: Sequence[str] = mixes.ATTENTION_AND_MLP) -> QwenImageTransformer2DModel:
    """Adapters on a frozen base, or that base alone."""
    model = mixes.patched_model(adapters=adapters, blocks=blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


def forward_calls(model: QwenImageTransformer2DModel, layout: str) -> tuple[mixes.Result, list[int]]:
    """A microbatch forward and back, and how often each block ran."""
    ran: list[Any] = []
    blocks = repeated_blocks(model)
    handles = [block.register_forward_pre_hook(lambda block, args: ran.append(block)) for block in blocks]
    result = mixes.run(model, mixes.random_mix(3), layout)
    for handle in handles:
        handle.remove()
    return result, [sum(other is block for other in ran) for block in blocks]


@pytest.mark.parametrize("layout", mixes.LAYOUTS)
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
    mixes.assert_identical(recomputed, kept)


def test_a_recomputed_block_keeps_its_inputs_alone() -> None:
    """One row of the model's width for each image and text token."""
    mix = mixes.random_mix(3)
    call = mixes.padded_call(mix)
    inputs = 4 * WIDTH * sum(call[name].shape[:2].numel() for name in ("hidden_states", "encoder_hidden_states"))
    kept = {}
    for blocks in (BLOCKS, BLOCKS - 1):
        model = small_model(blocks)
        recompute_blocks(model, every=1)
        kept[blocks] = mixes.kept_bytes(model, mix, "padded")
    assert kept[BLOCKS] - kept[BLOCKS - 1] == inputs


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
    model = small_model(blocks, ())
    if trained == "all weights":
        train_all(model, untrained=untrained_modules(model))
    else:
        with_adapters(model)
    return model


def assert_alike(compiled: QwenImageTransformer2DModel, plain: QwenImageTransformer2DModel, mix: mixes.Mix) -> None:
    mixes.assert_same(mixes.run(compiled, mix, "padded"), mixes.run(plain, mix, "padded"), forward=1e-5)


# Of three blocks with adapters, the first's inputs need no gradient, and the last has fewer adapters.
@pytest.mark.parametrize(
    ("trained", "blocks", "backend"),
    [
        ("all weights", 2, "aot_eager"),
        ("lora", 3, "aot_eager"),
        ("lora", 3, "inductor"),
    ],
)
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own import of inductor
@pytest.mark.usefixtures("no_graphs")
def test_compiled_blocks_give_the_outputs_and_gradients_of_plain_ones(trained: str, blocks: int, backend: str) -> None:
    """Recomputed too, before and behind updates, and with the average of the weights in their place."""
    mix, plain, compiled = mixes.random_mix(3), trained_model(trained, blocks), trained_model(trained, blocks)
    compile_blocks(compiled, graphs=most_graphs(rows=3, lengths=1), backend=backend)
    for every in (0, 1, 2):
        for model in (plain, compiled):
            if every:
                recompute_blocks(model, every=every)
        assert_alike(compiled, plain, mix)
    averages = [moved_average([*trainable_parameters(model).values()], 0.02) for model in (plain, compiled)]
    with averages[0].averaged(), averages[1].averaged():
        assert_alike(compiled, plain, mix)
    assert_alike(compiled, plain, mix)
    assert graphs() == blocks, "each kind of block once"
    assert sum(counters["graph_break"].values()) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_graphs")
def test_rounded_lengths_bound_the_graphs_and_the_next_epoch_needs_none() -> None:
    """Eight microbatches of other sizes make two image lengths and one text length after rounding."""
    model, rounding = small_model(1), Rounding(text=16, image=64)
    compile_blocks(model, graphs=most_graphs(rows=2, lengths=2), backend="aot_eager")
    microbatches = [mixes.make_mix([[(1, 5, 5 + n)], [(1, 8, 4 + n)]], [3 + n, 9], seed=n) for n in range(8)]
    shapes = set()
    for mix in (*microbatches, *microbatches):
        images, texts = (max(len(row) for row in rows) for rows in (mix.images, mix.texts))
        call = mixes.padded_call(
            mix, image=rounded(images, rounding.image) - images, text=rounded(texts, rounding.text) - texts
        )
        shapes.add((call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]))
        outputs = mixes.forward_padded(model, mix, **call)
        mixes.backward(model, outputs, mixes.loss(outputs, mix))
    assert graphs() == len(shapes) == 2


@pytest.mark.usefixtures("no_graphs")
def test_where_no_gradient_is_asked_for_nothing_is_compiled() -> None:
    plain, compiled = small_model(1), small_model(1)
    compile_blocks(compiled, graphs=1, backend="aot_eager")
    with torch.no_grad():
        for seed in range(3):
            call = mixes.padded_call(mixes.random_mix(seed))
            assert torch.equal(compiled(**call)[0], plain(**call)[0])
    assert graphs() == 0


def test_a_machine_without_a_compiler_is_told() -> None:
    absent = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with absent, fresh_cache(), pytest.raises(UserError, match=r"train.compile: torch.compile does not work on cpu \("):
        check_compiler(torch.device("cpu"))
