"""Swapped blocks: the same bits, how many are on the device and how often one is copied, nothing ever empty."""

import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mixres.models.block_swap import BlockSwap, frozen_matrices
from mixres.models.blocks import recompute_blocks, repeated_blocks
from support import mixes
from support.kinds import KINDS
from support.steps import LAYOUTS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCKS = 5
MIX = mixes.make_mix([[(1, 3, 4)], [(1, 2, 2), (1, 3, 3)]], [5, 3])
CPU = torch.device("cpu")


def adapted(name: str) -> Any:
    """Of five blocks, with adapters on every linear layer and a frozen base; its blocks are recomputed."""
    zero = name == "qwen zero_cond_t"
    qwen = name.startswith("qwen")
    model = mixes.patched_model(zero, mixes.EVERY_LINEAR, blocks=BLOCKS) if qwen else KINDS[name].patched(adapters=True)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)
    recompute_blocks(model, every=1)
    assert len(repeated_blocks(model)) == BLOCKS
    return model


class DeviceUse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What operations do with the host copies of swapped weights: they are copied from, and nothing else.

    `copied` counts the copies of each block, `late` those of a block that is about to run; `most` is the number of
    pieces of memory with such copies that were alive at once.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        blocks = [[p for _, _, p in frozen_matrices(block)] for block in repeated_blocks(model)]
        self.hosts = {p.untyped_storage().data_ptr(): number for number, block in enumerate(blocks) for p in block}
        self.largest = max(sum(p.nbytes for p in block) for block in blocks)
        self.firsts = {block[0].data_ptr() for block in blocks}
        self.copied, self.late, self.most, self.alive = [0] * len(blocks), 0, 0, dict[int, int]()
        self.entering: int | None = None
        for number, block in enumerate(repeated_blocks(model)):
            block.register_forward_pre_hook(partial(self._enters, number), prepend=True)
            block.register_forward_pre_hook(partial(self._enters, None))

    def _enters(self, number: int | None, *_: Any) -> None:
        self.entering = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        on_host = [t for t in tensors if t.untyped_storage().data_ptr() in self.hosts]
        if func is torch.ops.aten.copy_.default and on_host:
            target, (source,) = args[0].untyped_storage(), on_host
            number = self.hosts[source.untyped_storage().data_ptr()]
            self.copied[number] += source.data_ptr() in self.firsts
            self.late += source.data_ptr() in self.firsts and number == self.entering
            if target._cdata not in self.alive:
                self.alive[target._cdata] = target.nbytes()
                weakref.finalize(target, self.alive.pop, target._cdata).atexit = False
            self.most = max(self.most, len(self.alive))
            assert target.nbytes() < self.largest + 512 * 20, "room for one block"
        elif on_host:
            assert func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default), func
        return func(*args, **(kwargs or {}))


def check_swapped(name: str, keep: int, device: str = "cpu") -> None:
    """Twice a microbatch in each layout, without gradients between; then twice without."""
    model, kind, mix = adapted(name).to(device), KINDS[name], MIX.to(device, torch.float32)
    exact = sdpa_kernel(SDPBackend.MATH) if device == "cuda" else nullcontext()
    with exact:
        expected = {layout: kind.run(model, mix, layout) for layout in LAYOUTS}
        BlockSwap(model.cpu(), keep=keep, device=torch.device(device))
        use = DeviceUse(model)
        for layout in (*LAYOUTS, *LAYOUTS):
            with use:
                mixes.assert_identical(kind.run(model, mix, layout), expected[layout])
        assert sum(use.copied) == keep + 4 * 2 * (BLOCKS - keep), "no block twice in a sweep, and none copied in vain"
        assert use.late == (sum(use.copied) if keep == 1 else 1), "all but the first were copied ahead"
        for _ in range(2):
            use.copied = [0] * BLOCKS
            with use, torch.no_grad():
                outputs = kind.forward(model, mix, "padded")
            assert all(map(torch.equal, (x.cpu() for x in outputs), expected["padded"].outputs))
        assert sum(use.copied) == (0 if keep == BLOCKS else BLOCKS - max(0, keep - 2))
        mixes.assert_identical(kind.run(model, mix, "packed"), expected["packed"])
    assert use.most == keep


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("qwen", 2),
        ("flux2", 3),
        ("flux", 2),
        pytest.param("qwen zero_cond_t", 2, marks=pytest.mark.slow),
        *(pytest.param("qwen", keep, marks=pytest.mark.slow) for keep in (1, 4, BLOCKS)),
    ],
)
def test_swapped_blocks_give_the_same_bits_from_no_more_slots_than_asked_for(name: str, keep: int, device: str) -> None:
    """FLUX has two kinds of blocks, of different sizes."""
    check_swapped(name, keep, device)


def not_put_back(swap: BlockSwap, number: int, *_: Any) -> None:
    """The block's tensors stay those of the slot."""


def wrong_neighbour(swap: BlockSwap, number: int) -> list[int]:
    """Always the following blocks, in backward too."""
    count, slots = len(swap._parts), len(swap._slots)
    return [*range(number, count), *range(number - 1, -1, -1)][:slots]


def more_than_asked_for(swap: BlockSwap, model: Any, *, keep: int, device: torch.device) -> None:
    PLAIN(swap, model, keep=keep + 1, device=device)


PLAIN = BlockSwap.__init__
BUGS = {"_leave": not_put_back, "_wanted": wrong_neighbour, "__init__": more_than_asked_for}


@pytest.mark.slow
@pytest.mark.parametrize("method", BUGS)
def test_planted_bugs_are_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockSwap, method, BUGS[method])
    with pytest.raises(AssertionError):
        check_swapped("qwen", 2)
