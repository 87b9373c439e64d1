"""Packed samples through Z-Image's stock forward: one row of all tokens, `(1, tokens, C)`.

The forward leaves four things to methods of its own: to cut images into tokens and fill each stream up, to give a
stream positions and a mask, to join both streams, and to put images together again. In a packed call these four are
shadowed for its time, and call the stock ones: what they return for many samples is handed on as that of one.

Promise: no token is computed but those of the samples. The learned padding that fills each stream of a sample up to a
multiple of 32 is among them: the model attends to it alone as well. Cost: modulation parameters are expanded to one row
per token in each block; the linear layers that make them still run once per sample.

Legend: B sample, S_total and T_total image and text tokens of the microbatch, learned padding included, L_total both, P
channels of a token, C width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn

from mixres.models.attention import JointRotary
from mixres.models.blocks import repeated_blocks
from mixres.models.mixed_call import argument_names, by_name
from mixres.models.modulation import SampleRows, expand_rows
from mixres.models.packing import PackedLengths, Runs, interleave, packed_lengths

HELPERS = ("patchify_and_embed", "_prepare_sequence", "_build_unified_sequence", "unpatchify")
_BLOCK_NAMES = argument_names(ZImageTransformerBlock.forward)


def install_packed_hooks(model: Any) -> None:
    """Hooks that do nothing unless the call is packed.

    What they look at is there from the start: a block would be compiled anew once it has appeared.
    """
    blocks: list[Any] = repeated_blocks(model)
    for block in blocks:
        if block.modulation:
            block.adaLN_modulation.packed_runs = None
            block.adaLN_modulation.register_forward_hook(_expand_later)
            block.register_forward_pre_hook(_announce, with_kwargs=True)
            block.register_forward_hook(_forget, always_call=True)
    for final in model.all_final_layer.values():
        final.adaLN_modulation.packed_runs = None
        final.adaLN_modulation.register_forward_hook(_expand)
    model.register_forward_hook(_end_packed, always_call=True)


def begin_packed(model: Any) -> None:
    """Shadow the methods until the call ends."""
    call = _PackedCall(model)
    vars(model).update({name: getattr(call, name) for name in HELPERS})


def _end_packed(model: Any, args: tuple[Any, ...], output: Any) -> None:
    for name in HELPERS:
        vars(model).pop(name, None)
    for final in model.all_final_layer.values():
        final.adaLN_modulation.packed_runs = None


class _PackedCall:
    """What stands in place of the model's methods of the same names during one call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stock = {name: getattr(model, name) for name in HELPERS}

    def patchify_and_embed(self, *args: Any) -> tuple[Any, ...]:
        """The tokens, positions and padding masks of each stream of all samples, as lists of one."""
        images, texts, self.sizes, *rest = self.stock["patchify_and_embed"](*args)
        self.lengths = packed_lengths([len(x) for x in texts], [len(x) for x in images], images[0].device)
        image_ids, text_ids, *padding = rest
        # A text that is filled up has more positions than tokens; the stock forward leaves the last ones out.
        text_ids = [ids[: len(x)] for ids, x in zip(text_ids, texts, strict=True)]
        image_ids, text_ids, *padding = ([torch.cat(part)] for part in (image_ids, text_ids, *padding))
        return [torch.cat(images)], [torch.cat(texts)], self.sizes, image_ids, text_ids, *padding

    def _prepare_sequence(
        self, tokens: list[Tensor], ids: Any, padding: Any, pad_token: Any, *args: Any
    ) -> tuple[Any, ...]:
        """One stream, `(1, tokens, C)`, with its plan in place of its frequencies."""
        states, freqs, *rest = self.stock["_prepare_sequence"](tokens, ids, padding, pad_token, *args)
        own, none = self.lengths, (0,) * len(self.lengths.text)
        text, image = (none, own.image) if pad_token is self.model.x_pad_token else (own.text, none)
        return states, JointRotary(freqs[0], packed=packed_lengths(text, image, states.device)), *rest

    def _build_unified_sequence(
        self, image: Tensor, image_plan: JointRotary, _lengths: Any, _noise: Any, text: Tensor, text_plan: JointRotary,
        *args: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """`(1, L_total, C)`: each sample's image, then its text, as the stock method joins them; there is no mask."""
        assert image_plan.freqs is not None and text_plan.freqs is not None
        freqs = _interleave(image_plan.freqs[None], text_plan.freqs[None], self.lengths)[0]
        for final in self.model.all_final_layer.values():
            final.adaLN_modulation.packed_runs = self.lengths.joint_runs
        return _interleave(image, text, self.lengths), JointRotary(freqs, packed=self.lengths), None, None

    def unpatchify(self, rows: Sequence[Tensor], _sizes: Any, *args: Any) -> Any:
        """The image of each sample, `(channels, 1, height, width)`, from one row of `L_total` tokens."""
        (row,) = rows
        samples = list(torch.split(row.flatten(0, -2), list(self.lengths.joint)))
        return self.stock["unpatchify"](samples, self.sizes, *args)


def _interleave(image: Tensor, text: Tensor, lengths: PackedLengths) -> Tensor:
    """`interleave` with each sample's image before its text."""
    return interleave(image, text, replace(lengths, text=lengths.image, image=lengths.text))


def _announce(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set how the block's modulation expands. Runs again when checkpointing recomputes the block."""
    plan = by_name(_BLOCK_NAMES, args, kwargs)["freqs_cis"]
    if isinstance(plan, JointRotary) and plan.packed is not None:
        block.adaLN_modulation.packed_runs = plan.packed.joint_runs


def _forget(block: Any, args: tuple[Any, ...], output: Any) -> None:
    block.adaLN_modulation.packed_runs = None


def _expand_later(modulation: nn.Module, args: tuple[Any, ...], output: Tensor) -> SampleRows | None:
    """`(B, 4 C)`, which the block cuts in four, each of one row a token."""
    runs: Runs | None = modulation.packed_runs  # type: ignore[assignment]
    return None if runs is None else SampleRows(output, runs)


def _expand(modulation: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """`(B, C)` -> `(1, L_total, C)`; with the axis that the layer adds, its output is `(1, 1, L_total, P)`."""
    runs: Runs | None = modulation.packed_runs  # type: ignore[assignment]
    return None if runs is None else expand_rows(output[None], runs)
