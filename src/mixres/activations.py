"""Bytes that a training step keeps between forward and backward, by formula from the model's layers and token counts.

Promise: what is counted is what autograd saves, each storage once, weights left out (held against
`torch.autograd.graph.saved_tensors_hooks`). Cost: none beyond reading the names and shapes of the layers once.

Legend: C width, M = 4 C width of the MLP, H heads, r rank, P packed channel; e bytes of a value as layers compute it
(2 in bf16 or under autocast, else those of the model). Of every token a block keeps, in values of e bytes:

  norms          2 C: the inputs of both (in float32 where autocast runs on CUDA), and two numbers each
  modulation     4 C where scales and gates have a row a token: in the layout `packed`, and with `zero_cond_t` of image
                 tokens; 4 C more where modulation trains
  q and k        2 C for their norms: the float32 that they compute in and, where that is a copy, its source; 4 H bytes
                 a norm; 2 C more where the norms' weights train
  attention      4 C (query, key, value, output), and 4 H bytes
  MLP            M, the input of the GELU
  adapters       the input of each (once for all that share it; a copy each where it is cast to another precision, or
                 dropped out, and that mask), and r. DoRA: 2 outputs each. All weights trained: the layers' inputs
The first block has no norm and scale before its attention where nothing trains before it. The last block's text has
only what leads to its attention. Behind the blocks come the last norm, the loss (P a target token) and frequencies.
Under autocast the copies of float32 weights that gradients pass through count too.

With gradient checkpointing every recomputed block keeps its inputs, C a token, and one of them at a time keeps all the
above. torchao's rounded weights are kept once more as layers compute with them. What backward needs for a moment only
is left out, as are noise and targets, which are made before.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mixres.data.plan import Layout, Lengths
from mixres.flops import layer_place

_STREAMS = ("image", "text")
_BLOCK_END = 5  # a stage behind all those of a block
_COPY = 2  # bytes of a value under autocast


class Rows(NamedTuple):
    """What a microbatch is charged for. Filler counts."""

    image: int
    text: int
    target: int


def rows_of(lengths: Sequence[Lengths], layout: Layout) -> Rows:
    """The rows of a microbatch of these samples."""
    target = sum(length.target for length in lengths)
    if layout == "packed":
        return Rows(sum(length.image for length in lengths), sum(length.text for length in lengths), target)
    longest = (max(length.image for length in lengths), max(length.text for length in lengths))
    return Rows(len(lengths) * longest[0], len(lengths) * longest[1], target)


class _Inputs(NamedTuple):
    """Layers of one block, stream and stage that keep their input."""

    layers: int
    width: int
    extra: int  # bytes a row besides the input: behind A, and for DoRA


class ActivationBytes:
    """Counts for one model with its adapters, which may lie on the meta device.

    `untrained`: modules whose output reaches no loss; `rounded`: torchao holds the base's weights. Raises ValueError
    where a layer is none that the formula knows.
    """

    def __init__(
        self,
        transformer: Any,
        *,
        untrained: Sequence[str],
        layout: Layout,
        autocast: bool,
        cuda: bool,
        rounded: bool = False,
    ) -> None:
        config = transformer.config
        self._heads, self._head = int(config.num_attention_heads), int(config.attention_head_dim)
        self._width, self._channels = self._heads * self._head, int(config.in_channels)
        self._two_times = bool(transformer.zero_cond_t)
        self._packed, self._autocast = layout == "packed", autocast
        model_bytes: int = next(p.itemsize for name, p in transformer.named_parameters() if ".norm_q." in name)
        self._e = _COPY if autocast else model_bytes
        self._norm = (4 if autocast and cuda else self._e) * self._width + 8
        self.blocks: int = len(transformer.transformer_blocks)
        trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
        self._linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        self._trained = {name for name in self._linears if f"{name}.weight" in trained}
        adapters = [m.weight.itemsize for n, m in self._linears.items() if n in self._trained and ".lora_A." in n]
        self._rank_bytes = self._e if autocast or not adapters else adapters[0]
        self._own_copies = bool(adapters) and (autocast or self._rank_bytes != self._e)
        drop = max(
            (m.p for n, m in transformer.named_modules() if ".lora_dropout." in n and hasattr(m, "p")), default=0
        )
        self._mask = 0 if not drop else 1 if cuda else self._rank_bytes
        self._dora = any(".lora_magnitude_vector" in name for name in trained)
        self._norms_train = any(".attn.norm_q." in name for name in trained)
        self._earliest = min((layer_place(name)[1] for name in self._trained), default=(self.blocks, 0))
        self._time_trains = any(name.startswith("time_text_embed") for name in self._trained)
        self._inputs = self._inputs_of_layers()
        self._copies = self._copied_weights(tuple(untrained), rounded)
        self._block_rows = [tuple(self.block(b, stream) for stream in _STREAMS) for b in range(self.blocks)]
        self._image_end, self._text_end = self._end_rows()

    def held(self, rows: Rows, *, checkpointing: bool | int) -> int:
        """Bytes kept when the forward pass is done; `checkpointing`: of no block, all, or each so many-th."""
        recomputed = self._recomputed(checkpointing)
        total = len(recomputed) * (rows.image + rows.text) * self._width * self._e
        kept = [self._block_bytes(block, rows) for block in range(self.blocks) if block not in recomputed]
        total += sum(kept) + len(kept) * self._copies // self.blocks + (self._frequencies(rows) if kept else 0)
        loss = (8 if self._e == 8 else 4) * self._channels + 8
        return total + self._image_end * rows.image + self._text_end * rows.text + loss * rows.target

    def peak(self, rows: Rows, *, checkpointing: bool | int) -> int:
        """Bytes kept at the most: with checkpointing one recomputed block's are there besides what is held."""
        held, recomputed = self.held(rows, checkpointing=checkpointing), self._recomputed(checkpointing)
        if not recomputed:
            return held
        block = max(self._block_bytes(block, rows) for block in recomputed) + self._copies // self.blocks
        return held + block + (self._frequencies(rows) if len(recomputed) == self.blocks else 0)

    def _recomputed(self, checkpointing: bool | int) -> range:
        return range(0, self.blocks, int(checkpointing)) if checkpointing else range(0)

    def _block_bytes(self, block: int, rows: Rows) -> int:
        image, text = self._block_rows[block]
        return image * rows.image + text * rows.text

    def _frequencies(self, rows: Rows) -> int:
        return 4 * self._head * (rows.image + rows.text)

    def block(self, block: int, stream: str) -> int:
        """Bytes that `block` keeps of one token of `stream`, "image" or "text"."""
        if self._earliest > (block, _BLOCK_END):
            return 0
        value = self._width * self._e
        row = value if self._packed or (self._two_times and stream == "image") else 0
        modulates = self._time_trains or self._kept(block, stream, 0) > 0
        found = self._norm + row if self._earliest < (block, 0) else 0
        found += self._kept(block, stream, 1) + 2 * (self._rms_bytes() + 4 * self._heads)
        found += 4 * value + 4 * self._heads + (value if modulates else 0)
        if stream == "text" and block == self.blocks - 1:
            return found
        found += sum(self._kept(block, stream, stage) for stage in (2, 3, 4))
        return found + self._norm + 3 * row + 4 * value + (3 * value if modulates else 0)

    def _rms_bytes(self) -> int:
        copy = 0 if self._e == 4 else 4
        return self._width * (self._e + copy + (max(4, self._e) if self._norms_train else 0))

    def _kept(self, block: int, stream: str, stage: int) -> int:
        """Bytes a row that the trained layers at this place keep of their input, and behind it."""
        if (found := self._inputs.get((block, stream, stage))) is None:
            return 0
        copies = found.layers if self._own_copies or self._mask else 1
        masks = found.layers * self._mask if self._earliest < (block, stage) else 0
        return found.width * (copies * self._rank_bytes + masks) + found.extra

    def _inputs_of_layers(self) -> dict[tuple[int, str, int], _Inputs]:
        """The trained layers by place; layers of modulation, stage 0, keep a row a sample: their bytes do not count."""
        layers: dict[tuple[int, str, int], list[tuple[int, int]]] = defaultdict(list)
        for name in self._trained:
            stream, (block, stage) = layer_place(name)
            if ".lora_B." in name:
                continue
            if stage == 0 and stream == "samples":
                stream = "image" if ".img_mod." in name else "text"
            linear, behind = self._linears[name], 0
            if ".lora_A." in name:
                outputs = self._linears[name.replace(".lora_A.", ".lora_B.")].out_features
                behind = self._rank_bytes * linear.out_features + (2 * outputs * self._rank_bytes if self._dora else 0)
            layers[block, stream, stage].append((linear.in_features, behind))
        return {
            place: _Inputs(len(some), some[0][0], sum(behind for _, behind in some)) for place, some in layers.items()
        }

    def _end_rows(self) -> tuple[int, int]:
        """Bytes of an image and of a text token that the last norm and the layers outside the blocks keep."""
        value = self._width * self._e

        def trains(name: str) -> bool:
            return any(t == name or t.startswith(f"{name}.lora_A") for t in self._trained)

        image = self._norm + (value if self._packed else 0)
        image += value * (trains("norm_out.linear") or self._time_trains) + value * trains("proj_out")
        image += self._channels * self._e * trains("img_in")
        text_width = next(m.in_features for n, m in self._linears.items() if n in ("txt_in", "txt_in.base_layer"))
        return image, self._e * text_width * trains("txt_in")

    def _copied_weights(self, untrained: tuple[str, ...], rounded: bool) -> int:
        """The blocks' weights as layers compute with them, where they are others and gradients pass through."""
        total = 0
        for name, linear in self._linears.items():
            dead = any(name == module or name.startswith(f"{module}.") for module in untrained)
            passed = not re.search(r"img_mod\.|txt_mod\.", name) or name in self._trained
            copied = (self._autocast and linear.weight.dtype is torch.float32) or (rounded and ".lora_" not in name)
            if name.startswith("transformer_blocks.") and passed and not dead and copied:
                total += self._e * linear.weight.numel()
        return total
