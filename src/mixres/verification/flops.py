"""Floating-point operations of a training step, by formula from the model's layers and a batch's lengths.

Promise: what is counted is what torch's kernels do, within 1 % (held against torch.utils.flop_counter). Cost: none
beyond reading the names and shapes of the layers once.

A multiply and an add are two operations; R rows, L joint tokens of a sample (or of a padded row), W attention width.

  linear layer   forward 2 R in out. Backward as much again for the gradient of its input, if anything trains before
                 it, and as much again for the gradient of its weight, if that trains: 3 x the forward where all
                 weights train, 2 x where a frozen base carries adapters, which are linear layers of their own.
                 R: image tokens, text tokens, or samples for what modulates by timestep; filler counts.
  attention      forward 4 L^2 W; backward 8 L^2 W, and 2 L^2 W more for the scores, which flash and memory-efficient
                 kernels compute again.
  checkpointing  the forward of the recomputed blocks once more.

`needed` leaves out filler, scores computed again and checkpointing: the numerator of model FLOPs utilisation (MFU,
Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Norms, activations, rotations and the
lengths of DoRA are left out everywhere.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from mixres.batch import Batch
from mixres.geometry import token_count


class TokenCounts(NamedTuple):
    """What a forward call is charged for."""

    image: int
    text: int
    samples: int
    joint_squared: int  # sum of L^2


@dataclass(frozen=True)
class _Linear:
    stream: str  # a field of TokenCounts
    weights: int
    passes: int  # forward, and what backward adds
    again: int  # once more where checkpointing recomputes it


# Where a layer stands in the forward pass of a dual-stream block: (pattern of its name, stream, stage).
_BLOCK_STAGES = (
    (r"img_mod\.|txt_mod\.", "samples", 0),
    (r"attn\.to_[qkv]\b", "image", 1),
    (r"attn\.add_[qkv]_proj\b", "text", 1),
    (r"attn\.to_out\.", "image", 2),
    (r"attn\.to_add_out\b", "text", 2),
    (r"img_mlp\.net\.0\.", "image", 3),
    (r"txt_mlp\.net\.0\.", "text", 3),
    (r"img_mlp\.net\.2\b", "image", 4),
    (r"txt_mlp\.net\.2\b", "text", 4),
)
_ENDS = (
    (r"time_text_embed\..*linear_1\b", "samples", (-2, 0)),
    (r"time_text_embed\..*linear_2\b", "samples", (-2, 1)),
    (r"img_in\b", "image", (-1, 0)),
    (r"txt_in\b", "text", (-1, 0)),
    (r"norm_out\.linear\b", "samples", (10**6, 0)),
    (r"proj_out\b", "image", (10**6, 1)),
)
_Stage = tuple[int, int]
_FIRST: _Stage = (-1, 0)
_ATTENTION = 1  # scores need a gradient once something trains up to this stage


class TrainingFlops:
    """Counts for one model. `untrained`: modules whose output reaches no loss, so that nothing goes back through them;
    `checkpointing`: whether blocks are recomputed, or every how many of them one is.

    Raises:
        ValueError: a linear layer of the model is none that the formula knows.
    """

    def __init__(self, transformer: nn.Module, *, untrained: tuple[str, ...], checkpointing: bool | int) -> None:
        linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        places = {name: layer_place(name) for name in linears}
        trained = {name for name, m in linears.items() if m.weight.requires_grad}
        self._earliest = min((places[name][1] for name in trained), default=None)
        self._layers = [
            _Linear(
                stream=places[name][0],
                weights=linear.in_features * linear.out_features,
                passes=self._passes(name, places[name][1], name in trained, untrained),
                again=int(_FIRST < places[name][1] < (10**6, 0) and _recomputed(places[name][1][0], checkpointing)),
            )
            for name, linear in linears.items()
        ]
        widths = [m.out_features for name, m in linears.items() if re.search(r"attn\.to_q(\.base_layer)?$", name)]
        self._attention_blocks = [
            (
                width,
                self._earliest is not None and self._earliest <= (block, _ATTENTION),
                _recomputed(block, checkpointing),
            )
            for block, width in enumerate(widths)
        ]

    def _passes(self, name: str, stage: _Stage, trains: bool, untrained: tuple[str, ...]) -> int:
        dead = any(name.startswith(f"{module}.") or name == module for module in untrained)
        if dead and not name.endswith("add_q_proj"):  # the scores' gradient reaches a text query all the same
            return 1
        before = self._earliest is not None and self._earliest < stage and stage != _FIRST
        if _of_timestep(name):  # its only input is the timestep's embedding
            before = before and self._earliest is not None and self._earliest < _FIRST
        return 1 + int(before or ".lora_B." in name) + int(trains)

    def computed(self, batch: Batch) -> int:
        """What forward and backward over `batch` do, filler included."""
        counts = computed_tokens(batch)
        linear = sum((x.passes + x.again) * _forward(x, counts) for x in self._layers)
        attention = sum(w * ((14 if back else 4) + 4 * again) for w, back, again in self._attention_blocks)
        return linear + attention * counts.joint_squared

    def needed(self, batch: Batch) -> int:
        """What forward and backward over the valid tokens of `batch` need."""
        counts = valid_tokens(batch)
        linear = sum(x.passes * _forward(x, counts) for x in self._layers)
        attention = sum(w * (12 if back else 4) for w, back, _ in self._attention_blocks)
        return linear + attention * counts.joint_squared


def valid_tokens(batch: Batch) -> TokenCounts:
    """Without filler."""
    images = [token_count(grids) for grids in batch.img_shapes]
    squares = sum((t + s) ** 2 for t, s in zip(batch.text_lengths, images, strict=True))
    return TokenCounts(sum(images), sum(batch.text_lengths), len(images), squares)


def computed_tokens(batch: Batch) -> TokenCounts:
    """With filler."""
    if batch.layout == "packed":
        return valid_tokens(batch)
    rows, image, text = len(batch.img_shapes), batch.latents.shape[1], batch.prompt_embeds.shape[1]
    return TokenCounts(rows * image, rows * text, rows, rows * (image + text) ** 2)


def _forward(layer: _Linear, counts: TokenCounts) -> int:
    rows: int = getattr(counts, layer.stream)
    return 2 * rows * layer.weights


def _recomputed(block: int, checkpointing: bool | int) -> bool:
    return bool(checkpointing) and block % int(checkpointing) == 0


def _of_timestep(name: str) -> bool:
    return re.search(r"img_mod\.|txt_mod\.|norm_out\.linear", name) is not None


def layer_place(name: str) -> tuple[str, _Stage]:
    """The stream and stage of a linear layer, adapters like the layer that carries them."""
    block = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
    if block:
        for pattern, stream, stage in _BLOCK_STAGES:
            if re.match(pattern, block[2]):
                return stream, (int(block[1]), stage)
    for pattern, stream, place in _ENDS:
        if re.match(pattern, name):
            return stream, place
    raise ValueError(f"the FLOPs formula does not know the layer {name}")
