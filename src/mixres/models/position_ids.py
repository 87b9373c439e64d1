"""Calls with mixed sizes of the transformers whose positions are ids: FLUX.1 and FLUX.2.

A mixed call is a stock call with `joint_attention_kwargs={"image_lengths": [...], "text_lengths": [...]}`, the valid
tokens of each sample, and with ids of each sample's own:
  padded  `hidden_states (B, S, P)`, `encoder_hidden_states (B, T, D)`, `img_ids (B, S, n)`, `txt_ids (B, T, n)` or
          `(T, n)` where all samples share them;
  packed  `hidden_states (S_total, 1, P)`, `encoder_hidden_states (T_total, 1, D)`, `img_ids (S_total, n)`,
          `txt_ids (T_total, n)`.
Everything else is by sample: `timestep (B,)`, `guidance (B,)`, `pooled_projections (B, W)`. Ids should be int64: in
bfloat16 they are exact up to 256 only.

How: the model's own position module makes the frequencies of all samples at once, and what the attention processors
need rides along in `joint_attention_kwargs`. The stock forward gets empty ids, so that a processor that does not know
the plan fails instead of rotating by the positions of sample 0.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mixres.models.attention import JointRotary, joint_mask, valid_slots
from mixres.models.mixed_call import Call, check_shapes
from mixres.models.packing import packed_lengths

PLAN = "plan"  # the plan's name in `joint_attention_kwargs`, and the processors' argument


def plan_of(call: Mapping[str, Any]) -> JointRotary | None:
    """The plan among a block's arguments; None in a stock call."""
    plan: JointRotary | None = (call.get("joint_attention_kwargs") or {}).get(PLAN)
    return plan


def plan_mixed_call(model: Any, call: Call) -> JointRotary | None:
    """Turn a mixed call into arguments of the stock forward, in place, and return its plan; None for a stock call.

    Raises:
        ValueError: the tensors do not hold the tokens that the lengths account for, only one of the lengths is
            there, or a stock call gives its samples different positions, of which stock would take the first ones.
    """
    attention_kwargs = dict(call.get("joint_attention_kwargs") or {})
    lengths = [attention_kwargs.pop(name, None) for name in ("image_lengths", "text_lengths")]
    if lengths == [None, None]:
        _refuse_own_positions(call)
        return None
    if None in lengths:
        raise ValueError("joint_attention_kwargs: a mixed call needs both image_lengths and text_lengths")
    image, text = ([int(n) for n in counts] for counts in lengths)
    packed = call["img_ids"].dim() == 2
    _check_shapes(call, image, text, packed)
    plan = _plan_packed(model, call, image, text) if packed else _plan_padded(model, call, image, text)
    call["img_ids"], call["txt_ids"] = (call[name].flatten(0, -2)[:0] for name in ("img_ids", "txt_ids"))
    call["joint_attention_kwargs"] = {**attention_kwargs, PLAN: plan}
    return plan


def _refuse_own_positions(call: Call) -> None:
    for name in ("img_ids", "txt_ids"):
        ids = call.get(name)
        if isinstance(ids, Tensor) and ids.dim() == 3 and len(ids) > 1 and not torch.equal(ids[1:], ids[:-1]):
            raise ValueError(
                f"{name}: samples have positions of their own, and the stock forward takes sample 0's for all: give "
                "image_lengths and text_lengths in joint_attention_kwargs"
            )


def _check_shapes(call: Call, image: list[int], text: list[int], packed: bool) -> None:
    if not image or len(image) != len(text) or min(*image, *text) < 1:
        raise ValueError(f"image_lengths {image}, text_lengths {text}: each sample needs a positive number in both")
    slots = max(call["hidden_states"].shape[1], *image)
    text_slots = max(call["encoder_hidden_states"].shape[1], *text)
    ids: dict[str, tuple[int, ...]] = {"img_ids": (sum(image),), "txt_ids": (sum(text),)}
    if not packed:
        shared = call["txt_ids"].dim() == 2
        ids = {"img_ids": (len(image), slots), "txt_ids": (text_slots,) if shared else (len(image), text_slots)}
    check_shapes(call, image, text, packed=packed, stated_by="image_lengths and text_lengths", others=ids)


def _plan_packed(model: Any, call: Call, image: list[int], text: list[int]) -> JointRotary:
    pairs = zip(call["txt_ids"].split(text), call["img_ids"].split(image), strict=True)
    freqs = _frequencies(model, torch.cat(list(chain.from_iterable(pairs))))
    return JointRotary(freqs, packed=packed_lengths(text, image, call["hidden_states"].device))


def _plan_padded(model: Any, call: Call, image: list[int], text: list[int]) -> JointRotary:
    hidden, img_ids, txt_ids = call["hidden_states"], call["img_ids"], call["txt_ids"]
    samples, slots = hidden.shape[:2]
    text_slots = call["encoder_hidden_states"].shape[1]
    ids = torch.cat([txt_ids.expand(samples, -1, -1).to(img_ids), img_ids], dim=1)
    freqs = _frequencies(model, ids.flatten(0, 1)).reshape(samples, text_slots + slots, -1)
    text_mask, image_mask = (
        valid_slots(counts, n, hidden.device) for counts, n in ((text, text_slots), (image, slots))
    )
    mask = joint_mask(text_mask, image_mask, text_slots, hidden)
    if mask is not None:  # padding has the zero frequency: its queries and keys are zero vectors
        freqs = freqs * mask[:, 0, 0, :, None]
    return JointRotary(freqs, mask)


def _frequencies(model: Any, ids: Tensor) -> Tensor:
    """`(tokens, n)` ids -> `(tokens, D/2)` complex64, the stock module's own numbers."""
    cosines, sines = model.pos_embed(ids)  # each number twice, for the two channels of a pair
    return torch.complex(cosines[:, ::2].contiguous(), sines[:, ::2].contiguous())
