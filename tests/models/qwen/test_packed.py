"""A packed batch computes exactly the valid tokens, with one row of modulation a token; no layer waits for a value."""

import functools
from typing import Any

import pytest
import torch

from support import mixes
from support.host_reads import HostReads


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_exactly_the_valid_tokens_are_computed(zero_cond_t: bool) -> None:
    mix, model = mixes.main_mix(), mixes.patched_model(zero_cond_t)
    rows: dict[str, int] = {}

    def count(name: str, layer: torch.nn.Linear, args: tuple[Any, ...]) -> None:
        rows[name] = args[0].numel() // layer.in_features

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(functools.partial(count, name))
    mixes.forward_packed(model, mix)
    image, text, samples = 512 + 770 + 560, 19 + 7 + 40, 3
    for name, found in rows.items():
        if "img_mod" in name or "timestep_embedder" in name:
            expected = samples * (2 if zero_cond_t else 1)
        elif "txt_mod" in name or "norm_out" in name:
            expected = samples
        else:
            expected = text if any(part in name for part in ("txt_", "add_")) else image
        assert found == expected, name
    assert len(rows) == 2 * 14 + 6


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_no_layer_reads_a_value_from_the_device(zero_cond_t: bool) -> None:
    """Lengths are Python integers from the call on; what is read is read once a call, not once a layer."""
    mix, model = mixes.random_mix(4), mixes.patched_model(zero_cond_t, mixes.EVERY_LINEAR)
    found: dict[str, int] = {}
    model.enable_gradient_checkpointing()
    for layout in mixes.LAYOUTS:
        with HostReads() as reads:
            outputs = mixes.FORWARDS[layout](model, mix)
            mixes.loss(outputs, mix).backward()
        found[layout] = reads.count
    with HostReads() as reads:
        assert torch.ones(1).sum().item() == 1
    assert reads.count == 1
    assert found["packed"] == 0 and found["padded"] <= 1  # padded asks once whether the text mask hides anything
    call = mixes.padded_call(mix)
    assert not call["encoder_hidden_states_mask"].all()
    with HostReads() as reads, torch.no_grad():
        told = model(**call, attention_kwargs={"text_is_padded": True})[0]
    assert reads.count == 0, "training knows it from the lengths"
    with torch.no_grad():
        assert torch.equal(told, model(**call)[0])
