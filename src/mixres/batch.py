"""What packages hand to each other, from cache to loss. Fields, shapes and device moves; nothing is computed.

Stored form and model form have different names: a `Sample` is clean and unpadded, a `Batch` is what collate made of
several, a `FlowSample` is a batch at its sigmas.

Legend: B sample, S image token (target first, then controls), V valid target token of the whole batch, T text token,
P packed channel (4 x latent channels), D text width, W width of a pooled prompt.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from mixres.geometry import Grid, token_count


class TextEmbeds(NamedTuple):
    """A prompt as the transformer takes it, on the CPU."""

    tokens: Tensor  # (T, D)
    pooled: Tensor | None = None  # (W,) of the whole prompt, where the transformer takes one
    before: tuple[int, ...] = ()  # tokens before each control, where controls stand within the text


@dataclass(frozen=True)
class Sample:
    """One training sample as it lies in the cache: clean, unpadded, on the CPU."""

    name: str  # what messages call it
    target_latents: Tensor  # (S_target, P)
    control_latents: tuple[Tensor, ...]  # each (S_control, P), in the order of `img_shapes[1:]`
    prompt_embeds: Tensor  # (T, D)
    img_shapes: tuple[Grid, ...]  # target first, then each control
    edit_mask: Tensor | None = None  # (S_target,) float32, foreground fraction of each target token in [0, 1]
    empty_embeds: Tensor | None = None  # (T_empty, D) of the empty prompt with the same controls, for caption dropout
    pooled_embeds: Tensor | None = None  # (W,) of the prompt, where the transformer takes one
    empty_pooled_embeds: Tensor | None = None  # (W,) of the empty prompt
    text_before: tuple[int, ...] = ()  # as in `TextEmbeds`; with the empty prompt the same

    @property
    def text(self) -> TextEmbeds:
        """Its prompt."""
        return TextEmbeds(self.prompt_embeds, self.pooled_embeds, self.text_before)

    def without_caption(self) -> "Sample":
        """The same sample with the empty prompt."""
        assert self.empty_embeds is not None, self.name
        return self.with_text(TextEmbeds(self.empty_embeds, self.empty_pooled_embeds, self.text_before))

    def embedded(self, text: TextEmbeds) -> "Sample":
        """The same sample with its prompt, of which only the length was known."""
        assert len(text.tokens) == len(self.prompt_embeds), (self.name, len(text.tokens), len(self.prompt_embeds))
        return self.with_text(text)

    def with_text(self, text: TextEmbeds) -> "Sample":
        """The same sample with another prompt."""
        return replace(self, prompt_embeds=text.tokens, pooled_embeds=text.pooled, text_before=text.before)


@dataclass(frozen=True)
class Batch:
    """Several samples in one of the two layouts the transformer takes; all that follows is independent of which.

    `padded`: (X, Y) = (B, S) and (B, T), rows padded with zeros; a row holds target | controls | padding.
    `packed`: (X, Y) = (S_total, 1) and (T_total, 1), samples one behind the other, no padding.
    """

    layout: Literal["padded", "packed"]
    indices: tuple[int, ...]  # positions of the samples in the data set; randomness is keyed by them
    names: tuple[str, ...]
    latents: Tensor  # (X, Y, P) clean
    target_index: Tensor  # (V,) int64 rows of `latents.flatten(0, 1)` that hold target tokens, sample by sample
    target_lengths: tuple[int, ...]  # V = sum
    prompt_embeds: Tensor  # (X, Y, D)
    prompt_mask: Tensor | None  # (B, T) bool, None when no text is padded
    text_lengths: tuple[int, ...]
    img_shapes: tuple[tuple[Grid, ...], ...]
    edit_mask: Tensor  # (V,) float32 foreground fraction of each target token
    has_mask: tuple[bool, ...]  # a sample without an edit mask has weight 1 everywhere
    sample_weights: tuple[float, ...]  # in the loss; 0 for a dummy microbatch that only keeps ranks in step
    pooled_embeds: Tensor | None = None  # (B, W), where the transformer takes them
    text_before: tuple[tuple[int, ...], ...] = ()  # of each sample

    @property
    def tokens(self) -> int:
        """Valid tokens, text and image."""
        return sum(self.text_lengths) + sum(token_count(grids) for grids in self.img_shapes)

    @property
    def tokens_computed(self) -> int:
        """Tokens that the transformer computes, padding included."""
        return self.latents.shape[0] * self.latents.shape[1] + self.prompt_embeds.shape[0] * self.prompt_embeds.shape[1]

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, from which copies to CUDA wait for nothing."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, act: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        acted: dict[str, Any] = {name: act(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **acted)


@dataclass(frozen=True)
class FlowSample:
    """A batch at its sigmas. Source: rectified flow, Liu et al. 2022 (arXiv 2209.03003)."""

    noisy_latents: Tensor  # as `Batch.latents`: target tokens interpolated, controls and padding as in the batch
    sigmas: Tensor  # (B,) in [0, 1]; 0 is data, 1 is noise; also the model's `timestep`
    velocity: Tensor  # (V, P) noise - data at the target tokens, the regression target


def extract_batch_field(embeddings: Mapping[str, Any], key: str, batch_idx: int) -> Any:
    """The value of `key` that belongs to sample `batch_idx`.

    `embeddings[key]` may be a list or tuple (one value a sample), a tensor whose first axis is the batch (a 0-d element
    comes back as a Python number), or a scalar that all samples share.

    Raises:
        KeyError: `key` is absent; the message lists the keys there are.
        IndexError: a list or tensor is shorter than `batch_idx` + 1.
    """
    if key not in embeddings:
        raise KeyError(f"no field '{key}' in the embeddings; there are: {', '.join(sorted(embeddings))}")
    value = embeddings[key]
    if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0):
        value = value[batch_idx]
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value


def image_shapes_from_embeddings(
    embeddings: Mapping[str, Any], batch_size: int, pixels_per_token: int = 16
) -> list[list[tuple[int, int, int]]]:
    """Per sample the token grids `(1, h, w)` of its images, target first.

    `img_shapes` is used where present. Otherwise (cache format 1) the grids come from the pixel fields `height`/`width`
    of the target, `height_control`/`width_control` of the first control, `height_control_1`/`width_control_1` of the
    next, and so on; a control whose field is None, or 0, is absent from that sample.

    Raises:
        KeyError: neither `img_shapes` nor `height` and `width` are there.
        ValueError: a height or width is not a multiple of `pixels_per_token`.
    """
    if embeddings.get("img_shapes") is not None:
        per_sample = (extract_batch_field(embeddings, "img_shapes", b) for b in range(batch_size))
        return [[Grid(*map(int, shape)) for shape in shapes] for shapes in per_sample]
    return [list(_grids_from_pixels(embeddings, b, pixels_per_token)) for b in range(batch_size)]


def _grids_from_pixels(embeddings: Mapping[str, Any], batch_idx: int, pixels_per_token: int) -> Iterator[Grid]:
    suffixes = ["", "_control"]
    while f"height_control_{len(suffixes) - 1}" in embeddings:
        suffixes.append(f"_control_{len(suffixes) - 1}")
    for suffix in suffixes:
        if suffix and f"height{suffix}" not in embeddings:
            continue
        sides = [extract_batch_field(embeddings, f"{side}{suffix}", batch_idx) for side in ("height", "width")]
        if suffix and not all(sides):
            continue
        if any(side % pixels_per_token for side in sides):
            raise ValueError(
                f"sample {batch_idx}: height{suffix} x width{suffix} = {sides[0]} x {sides[1]} is not a multiple of "
                f"{pixels_per_token} pixels per token"
            )
        yield Grid(1, int(sides[0]) // pixels_per_token, int(sides[1]) // pixels_per_token)
