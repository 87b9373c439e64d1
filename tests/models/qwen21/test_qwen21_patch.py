"""The patch of Qwen-Image-2.1: what stays stock, what a mixed call computes, what is refused."""

import re
from math import prod
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)

from mixres.geometry import Grid
from mixres.models import qwen21_multi_resolution_patch as patch_module
from mixres.models.qwen21 import attention
from mixres.models.qwen21.layout import positions, runs_of, streams
from support import mixes
from support.host_reads import HostReads
from support.kinds import Qwen21

KIND = Qwen21()
patch = patch_module.patch_qwen21_model_for_multi_resolution


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("causal_condition", [False, True])
def test_stock_calls_give_what_the_stock_model_gives_bit_for_bit(causal_condition: bool, checkpointing: bool) -> None:
    """Before and after mixed calls, forward and gradient; with the key-value cache too."""
    kind = Qwen21(causal_condition=causal_condition)
    stock, patched, mix = kind.stock(adapters=True), kind.patched(adapters=True), kind.mix("random 2")
    models = (stock, patched)
    if checkpointing:
        stock.enable_gradient_checkpointing(), patched.enable_gradient_checkpointing()
    call = kind.alone_calls(mix)[0]
    two = {**call, "hidden_states": call["hidden_states"].expand(2, -1, -1), "timestep": torch.tensor([0.2, 0.9])}
    two |= {"encoder_hidden_states": call["encoder_hidden_states"].expand(2, -1, -1)}
    two |= {"img_mask": call["img_mask"].expand(2, -1), "img_shapes": call["img_shapes"] * 2}
    for _ in range(2):
        for arguments in (call, two):
            pair = [(model, model(**arguments)[0]) for model in models]
            results = [mixes.backward(model, [out], out.square().mean()) for model, out in pair]
            mixes.assert_identical(results[1], results[0])
        for layout in mixes.LAYOUTS:
            kind.run(patched, mix, layout)
    if causal_condition:
        caches = [QwenImage21KVCache(2) for _ in models]
        for mode in ("extract", "cached"):
            with torch.no_grad():
                outs = [m(**call, kv_cache=c, kv_cache_mode=mode)[0] for m, c in zip(models, caches, strict=True)]
            assert torch.equal(*outs)


def test_rows_of_the_text_encoder_at_image_slots_reach_nothing() -> None:
    """So they are not kept. In a stock call 0 or 1000 may stand there; elsewhere it matters."""
    model = KIND.stock()
    call = next(call for call in KIND.alone_calls(KIND.mix("main")) if len(call["img_shapes"][0]) > 1)
    embeds = call["encoder_hidden_states"]
    is_slot = call["img_mask"][:, : embeds.shape[1], None]
    outputs = [model(**{**call, "encoder_hidden_states": x})[0] for x in (embeds, embeds * ~is_slot, embeds * is_slot)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_exactly_the_valid_tokens_are_computed_in_a_packed_batch() -> None:
    mix, model = KIND.mix("main"), KIND.patched()
    rows: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(
                lambda layer, args, name=name: rows.update({name: args[0].numel() // layer.in_features})
            )
    with HostReads() as reads:
        KIND.forward(model, mix, "packed")
    image, text = (sum(map(len, tensors)) for tensors in (mix.images, mix.texts))
    for name, found in rows.items():
        expected = {"txt_in": text, "img_in": image}.get(name.partition(".")[0], text + image)
        if re.search(r"^time_|^modulation|^norm_out", name):
            expected = len(mix.texts) + 1  # a row for all that is not denoised
        assert found == expected, name
    assert reads.count == 0


# Planted problems.


def frames_by_one(shapes: Any, text_runs: Any) -> Any:
    """Images are a position later than where the text before them ends."""
    return [block + torch.tensor([n % 2, 0, 0]) for n, block in enumerate(positions(shapes, text_runs))]


class RowsShifted(attention.TokenRows):
    """Tokens are modulated as others should be."""

    def __init__(self, is_target: Any = None, runs: Any = ()) -> None:
        shifted = tuple((max(row - 1, 0), tokens) for row, tokens in runs)
        super().__init__(None if is_target is None else is_target.roll(9, 1), shifted)


def runs_of_sample_0(mix: mixes.Mix) -> list[list[int]]:
    """All text of a sample behind its controls: sample 0 has none."""
    return [[*[0] * (len(grids) - 1), len(text)] for grids, text in zip(mix.shapes, mix.texts, strict=True)]


def with_a_row_at_a_slot(mix: mixes.Mix) -> mixes.Mix:
    """The last sample has one more row of text, as if that of a slot had been kept."""
    longer = torch.cat([mix.texts[-1], torch.full((1, mixes.TEXT_WIDTH), 1e3)])
    return mixes.Mix(mix.shapes, mix.images, [*mix.texts[:-1], longer], mix.timesteps, mix.velocities)


@pytest.mark.parametrize("layout", mixes.LAYOUTS)
def test_the_measure_sees_planted_problems(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mix, model, reference = KIND.mix("main"), KIND.patched(adapters=True), KIND.alone("main")

    def errors(mix: mixes.Mix) -> tuple[float, float]:
        found = KIND.run(model, mix, layout)
        return mixes.forward_error(found, reference), mixes.gradient_error(found, reference)

    plain, found = errors(mix), {"a row at an image slot": errors(with_a_row_at_a_slot(mix))}
    for name, values in {
        "positions": {f"{patch_module.__name__}.positions": frames_by_one},
        "modulation": {f"{patch_module.__name__}.TokenRows": RowsShifted},
        "layout of sample 0": {"support.kinds.Qwen21.text_runs": lambda kind, mix: runs_of_sample_0(mix)},
    }.items():
        with monkeypatch.context() as planted:
            for place, value in values.items():
                planted.setattr(place, value)
            found[name] = errors(mix)
    assert plain[0] <= 1e-6 and plain[1] <= 1e-5
    for name, (forward, gradient) in found.items():
        assert forward > 1e-4 and gradient > 1e-2, (name, forward, gradient)


# What is refused.


def test_a_stock_call_of_samples_with_other_layouts_is_refused() -> None:
    """Stock computes them with sample 0's layout: other grids, text before other controls, texts of other lengths."""
    model, mix = KIND.patched(), mixes.make_mix([[(1, 4, 6), (1, 2, 4)]] * 2, [9, 9])
    first, second = KIND.alone_calls(mix)
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    both: dict[str, Any] = {name: torch.cat([first[name], second[name]]) for name in names}
    both |= {"img_mask": first["img_mask"].expand(2, -1), "img_shapes": first["img_shapes"] * 2}
    assert model(**both).sample.isfinite().all()
    text = torch.ones(both["encoder_hidden_states"].shape[:2])
    shorter = text.clone()
    shorter[1, -1] = 0
    other_grids = {"img_shapes": [*first["img_shapes"], [(1, 4, 2), (1, 6, 4)]]}
    other_places = {"img_mask": torch.cat([first["img_mask"], first["img_mask"].roll(1, 1)])}
    model(**both, encoder_hidden_states_mask=text)
    for change in (other_grids, other_places, {"encoder_hidden_states_mask": shorter}):
        with pytest.raises(ValueError, match=r"layouts of their own .* sample 0's for all: call it with one"):
            model(**(both | change))


def test_calls_that_cannot_be_meant_are_refused() -> None:
    model, mix = KIND.patched(), KIND.mix("main")
    padded, packed = KIND.padded_call(mix), KIND.packed_call(mix)
    runs = KIND.text_runs(mix)
    fewer = {"attention_kwargs": {"text_runs": runs[:-1]}}
    other = {"attention_kwargs": {"text_runs": [runs[0], [7], runs[2]]}}
    longer = {"attention_kwargs": {"text_runs": [[20], *runs[1:]]}}
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("do not fit img_shapes", padded | fewer),
        ("each sample needs one for each image", packed | other),
        ("packed batch: encoder_hidden_states has leading shape .66, 1., .* .67, 1.", packed | longer),
        ("packed batch: hidden_states", packed | {"hidden_states": packed["hidden_states"][1:]}),
        ("padded batch: hidden_states", padded | {"hidden_states": padded["hidden_states"][:, 1:]}),
        ("padded batch: encoder_hidden_states", padded | {"encoder_hidden_states": torch.ones(3, 39, 24)}),
        ("timestep has leading shape .2,., .* .3,.", padded | {"timestep": mix.timesteps[:2]}),
        *((f"cannot use {name}: leave it out", padded | {name: torch.ones(1)})
          for name in ("kv_cache", "kv_cache_mode", "img_mask", "encoder_hidden_states_mask")),
    ]  # fmt: skip
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            model(**call)
    model.transformer_blocks[1].attn.set_processor(QwenImage21AttnProcessor())
    for call in (padded, packed):
        with pytest.raises(ValueError, match="something has replaced attention processors: call patch_qwen21"):
            model(**call)
    flex = KIND.stock()
    flex.transformer_blocks[0].attn.set_processor(QwenImage21FlexAttnProcessor())
    with pytest.raises(ValueError, match="not QwenImage21FlexAttnProcessor"):
        patch(flex)
    assert not flex._forward_pre_hooks
    with pytest.raises(TypeError, match="not QwenImageTransformer2DModel"):
        patch(QwenImageTransformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=1))


def test_a_packed_row_has_the_blocks_of_each_sequence_in_their_order() -> None:
    """Samples with 0 to 2 controls, some with no text before one."""
    grids = [[Grid(1, 4, 4), Grid(1, 2, 2), Grid(1, 2, 6)], [Grid(1, 2, 4)], [Grid(1, 2, 2), Grid(1, 4, 2)]]
    samples = [positions(*sample) for sample in zip(grids, [[3, 0, 5], [7], [0, 4]], strict=True)]
    assert [[(run.first, run.end, run.is_text) for run in runs_of(blocks)] for blocks in samples] == [
        [(0, 3, True), (3, 7, False), (7, 19, False), (19, 24, True), (24, 40, False)],
        [(0, 7, True), (7, 15, False)],
        [(0, 8, False), (8, 12, True), (12, 16, False)],
    ]
    text, image = streams(samples[0])
    assert torch.equal(text, torch.cat([samples[0][0], samples[0][4]])) and len(samples[0][2]) == 0
    assert torch.equal(image, torch.cat([samples[0][5], samples[0][1], samples[0][3]]))


def test_both_kernels_of_a_layer_get_the_keys_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's variable-length kernel is asked for, computed sequence by sequence."""

    def kernel(query: Any, key: Any, value: Any, queries: Any, keys: Any, window: Any) -> Any:
        parts = []
        for b in range(len(queries[0]) - 1):
            q = query[queries[0][b] : queries[0][b + 1]]
            k, v = (x[keys[0][b] : keys[0][b + 1]] for x in (key, value))
            assert len(q) <= queries[1] and len(k) <= keys[1]
            mask = torch.ones(len(q), len(k), dtype=torch.bool)
            if window == (-1, 0):  # to the last key of the last query
                mask = mask.tril(len(k) - len(q))
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            parts.append(attended.transpose(0, 1))
        return torch.cat(parts)

    mix, processor = KIND.mix("main"), attention.Qwen21MultiResAttnProcessor()
    pairs = zip(mix.shapes, KIND.text_runs(mix), strict=True)
    runs = tuple(runs_of(positions([Grid(*grid) for grid in grids], text)) for grids, text in pairs)
    none = torch.zeros(0, dtype=torch.int64)
    plan = attention.BlockCausal(None, text=none, image=none, rows=None, samples=runs)
    streams = [torch.randn(1, sum(blocks[-1].end for blocks in runs), 2, 8, dtype=torch.float64) for _ in range(3)]
    expected = processor.attend_packed(*streams, plan)
    monkeypatch.setattr(attention, "attend_varlen", kernel)
    found = attention.attend_blocks(*(x[0] for x in streams), runs)[None]
    assert (found - expected).norm() < 1e-14 * expected.norm()


def test_the_lines_of_the_stock_forward_that_the_patch_follows() -> None:
    """A new diffusers that asks for its slots otherwise is seen here before anything is computed wrongly."""
    text, image = torch.tensor([0, 1, 6]), torch.tensor([2, 3, 4, 5])
    plan = attention.BlockCausal(None, text=text, image=image, rows=None)
    assert torch.where(plan, 4, 1)[0] is plan and torch.repeat_interleave(plan[0], plan) is image
    assert prod(plan[-1]) == 0, "no slots are appended"
    states = torch.randn(2, 3, 6)
    joint = states.repeat_interleave(plan, dim=1)
    assert torch.equal(joint[:, text], states) and joint.shape == (2, 7, 6) and not joint[:, image].any()
