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
                 dropped out, and that mask), and r. DoRA: its own output and the base's. All weights trained: the
                 layers' inputs
Nothing is kept where no gradient comes by: what lies before all that trains, and in the block where training begins
what that does not reach. The last block's text has only what leads to its attention. Outside the blocks come the last
norm, the inputs of what trains there, the loss (P a target token) and frequencies. Weights that layers compute with in
another precision count once more where gradients pass through: float32 ones under autocast, torchao's rounded ones, and
those that a DoRA with dropout casts.

With gradient checkpointing every recomputed block keeps its inputs, C a token, and one of them at a time keeps all the
above. What backward needs for a moment only is left out, as are noise and targets, which are made before.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mixres.data.plan import Layout, Lengths
from mixres.verification.flops import layer_place

_STREAMS = ("image", "text")
_ATTENTION, _BLOCK_END = 1, 5  # the stage whose outputs meet in attention; one behind all those of a block
_LAST, _ = layer_place("proj_out")[1]  # in place of a block's number, for what lies behind all
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
        self._mask = 0 if not drop else 1 if cuda else adapters[0]
        dora = any(".lora_magnitude_vector" in name for name in trained)
        # The base's output is without its bias, in the wider precision of both; of a dropped input it is computed anew.
        self._dora = (self._rank_bytes if drop else max(self._e, model_bytes)) + self._rank_bytes if dora else 0
        self._cast_by_dora = bool(dora and drop and adapters[0] != model_bytes)
        self._norms_train = any(".attn.norm_q." in name for name in trained)
        self._first = _first_places(self._trained)
        self._inputs = self._inputs_of_layers()
        self._copies, self._end_copies = self._copied_weights(tuple(untrained), rounded)
        self._block_rows = [tuple(self.block(b, stream) for stream in _STREAMS) for b in range(self.blocks)]
        self._image_end, self._text_end = self._end_rows()

    def held(self, rows: Rows, *, checkpointing: bool | int) -> int:
        """Bytes kept when the forward pass is done; `checkpointing`: of no block, all, or each so many-th."""
        recomputed, kept = self._split(checkpointing)
        total = len(recomputed) * (rows.image + rows.text) * self._width * self._e + self._end_copies
        total += sum(self._block_bytes(block, rows) for block in kept) + (self._frequencies(rows) if kept else 0)
        loss = (8 if self._e == 8 else 4) * self._channels + 8
        return total + self._image_end * rows.image + self._text_end * rows.text + loss * rows.target

    def peak(self, rows: Rows, *, checkpointing: bool | int) -> int:
        """Bytes kept at the most: with checkpointing one recomputed block's are there besides what is held."""
        recomputed, kept = self._split(checkpointing)
        again = max((self._block_bytes(block, rows) for block in recomputed), default=0)
        again += self._frequencies(rows) if recomputed and not kept else 0
        return self.held(rows, checkpointing=checkpointing) + again

    def _split(self, checkpointing: bool | int) -> tuple[list[int], list[int]]:
        """The blocks that are recomputed, and the others, without those before all that trains: they keep nothing."""
        recomputed, kept = list[int](), list[int]()
        for block, rows in enumerate(self._block_rows):
            if any(rows):
                (recomputed if checkpointing and block % int(checkpointing) == 0 else kept).append(block)
        return recomputed, kept

    def _flows(self, stream: str, place: tuple[int, int]) -> bool:
        """Whether a gradient goes back into the input of `place`, a block and a stage: something before it trains."""
        for source, first in self._first.items():
            if source == stream:
                begins = first
            elif source == "samples":
                begins = 0, 0  # it modulates every block
            else:  # both streams meet in the attention of a block
                begins = max(first[0], 0) + (first[1] > _ATTENTION), _ATTENTION
            if begins < place and stream in (source, *_STREAMS):
                return True
        return False

    def _block_bytes(self, block: int, rows: Rows) -> int:
        image, text = self._block_rows[block]
        return image * rows.image + text * rows.text + self._copies // self.blocks

    def _frequencies(self, rows: Rows) -> int:
        return 4 * self._head * (rows.image + rows.text)

    def block(self, block: int, stream: str) -> int:
        """Bytes that `block` keeps of one token of `stream`, "image" or "text"."""
        value = self._width * self._e
        row = value if self._packed or (self._two_times and stream == "image") else 0
        flows = [self._flows(stream, (block, stage)) for stage in range(_BLOCK_END + 1)]
        modulates = "samples" in self._first or self._kept(block, stream, 0) > 0
        found = flows[0] * (self._norm + row) + self._kept(block, stream, 1) + modulates * value
        found += (2 if flows[1] else self._queries_and_keys(block, stream)) * (self._rms_bytes() + 4 * self._heads)
        found += flows[2] * (4 * value + 4 * self._heads)
        if stream == "text" and block == self.blocks - 1:
            return found
        found += sum(self._kept(block, stream, stage) for stage in (2, 3, 4))
        found += flows[3] * (self._norm + 2 * row) + flows[4] * 4 * value + flows[5] * row
        return found + modulates * 3 * value

    def _queries_and_keys(self, block: int, stream: str) -> int:
        """How many of both train, in a block that no gradient leaves."""
        names = ("to_q", "to_k") if stream == "image" else ("add_q_proj", "add_k_proj")
        layers = {name.partition(".lora_")[0] for name in self._trained}
        return len(layers & {f"transformer_blocks.{block}.attn.{name}" for name in names})

    def _rms_bytes(self) -> int:
        copy = 0 if self._e == 4 else 4
        return self._width * (self._e + copy + (max(4, self._e) if self._norms_train else 0))

    def _kept(self, block: int, stream: str, stage: int) -> int:
        """Bytes a row that the trained layers at this place keep of their input, and behind it."""
        if (found := self._inputs.get((block, stream, stage))) is None:
            return 0
        copies = found.layers if self._own_copies or self._mask else 1
        masks = found.layers * self._mask if self._flows(stream, (block, stage)) else 0
        return found.width * (copies * self._rank_bytes + masks) + found.extra

    def _inputs_of_layers(self) -> dict[tuple[int, str, int], _Inputs]:
        """The trained layers by place; layers of modulation, stage 0, keep a row a sample: their bytes do not count."""
        layers: dict[tuple[int, str, int], list[tuple[int, int]]] = defaultdict(list)
        for name in self._trained:
            stream, (block, stage) = _place(name)
            if ".lora_B." in name:
                continue
            linear, behind = self._linears[name], 0
            if ".lora_A." in name:
                outputs = self._linears[name.replace(".lora_A.", ".lora_B.")].out_features
                behind = self._rank_bytes * linear.out_features + self._dora * outputs
            layers[block, stream, stage].append((linear.in_features, behind))
        return {
            place: _Inputs(len(some), some[0][0], sum(behind for _, behind in some)) for place, some in layers.items()
        }

    def _end_rows(self) -> tuple[int, int]:
        """Bytes of an image and of a text token that the last norm and the layers outside the blocks keep."""
        value = self._width * self._e
        image = self._kept(-1, "image", 0) + self._kept(_LAST, "image", 1)
        image += (self._norm + (value if self._packed else 0)) * self._flows("image", (_LAST, 0))
        image += value * ("samples" in self._first or (_LAST, "image", 0) in self._inputs)
        text_width = next(m.in_features for n, m in self._linears.items() if n in ("txt_in", "txt_in.base_layer"))
        return image, self._kept(-1, "text", 0) + max(4, self._e) * text_width * self._norms_train

    def _copied_weights(self, untrained: tuple[str, ...], rounded: bool) -> tuple[int, int]:
        """Weights as layers compute with them, where those are others and gradients pass: the blocks', and the rest."""
        found = [0, 0]
        for name, linear in self._linears.items():
            own, inside = ".lora_" in name, name.startswith("transformer_blocks.")
            dead = any(name == module or name.startswith(f"{module}.") for module in untrained)
            passed = self._flows(*layer_place(name)) or ".lora_B." in name or (name == "txt_in" and self._norms_train)
            if dead or not passed:
                continue
            copied = (self._autocast and linear.weight.dtype is torch.float32) or (rounded and inside and not own)
            by_dora = self._cast_by_dora and name.replace("base_layer", "lora_A.default") in self._trained and not own
            found[not inside] += (copied * self._e + by_dora * self._rank_bytes) * linear.weight.numel()
        return found[0], found[1]


def _first_places(trained: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Where training begins in each stream; that of the timestep is called "samples"."""
    first: dict[str, tuple[int, int]] = {}
    for stream, place in map(_place, trained):
        first[stream] = min(place, first.get(stream, place))
    return first


def _place(name: str) -> tuple[str, tuple[int, int]]:
    """The stream and place of a layer; one that modulates a stream is of that stream."""
    stream, place = layer_place(name)
    if stream == "samples" and place[0] >= 0:
        stream = "text" if ".txt_mod." in name else "image"
    return stream, place
