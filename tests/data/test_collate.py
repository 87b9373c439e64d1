"""Collate against the samples it was given: valid tokens bit for bit, zeros elsewhere, an index of the targets."""

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from mixres.batch import Batch, Sample
from mixres.data.collate import collate
from mixres.data.plan import Layout, Lengths, Rounding, computed_tokens, rounded
from mixres.geometry import Grid
from support.samples import make_sample

LAYOUTS: tuple[Layout, ...] = ("padded", "packed")
derandomized = settings(derandomize=True, deadline=None, database=None, max_examples=80)

grids = st.builds(Grid, st.just(1), st.integers(1, 5), st.integers(1, 5))


samples = st.builds(
    make_sample,
    st.lists(grids, min_size=1, max_size=4).map(tuple),
    name=st.text(max_size=3),
    text=st.integers(1, 7),
    mask=st.booleans(),
    pooled=st.just(3),
    seed=st.integers(0, 2**32),
)


def collated(chosen: list[Sample], layout: Layout, rounding: Rounding = Rounding()) -> Batch:  # noqa: B008
    indices = [7 * i + 2 for i in range(len(chosen))]
    weights = [float(i % 2) for i in indices]
    return collate(chosen, indices=indices, weights=weights, layout=layout, rounding=rounding)


def rows(tensor: Tensor, lengths: list[int], layout: str) -> tuple[list[Tensor], Tensor]:
    """The valid tokens of each sample, and all others."""
    if layout == "packed":
        assert tensor.shape[1] == 1
        return list(tensor[:, 0].split(lengths)), tensor[:0, 0]
    assert tensor.shape[:2] == (len(lengths), max(lengths))
    padding = [row[n:] for row, n in zip(tensor, lengths, strict=True)]
    return [row[:n] for row, n in zip(tensor, lengths, strict=True)], torch.cat(padding)


def image(sample: Sample) -> Tensor:
    return torch.cat([sample.target_latents, *sample.control_latents])


mixes = st.lists(samples, min_size=1, max_size=5)


@derandomized
@given(mixes, st.sampled_from(LAYOUTS))
def test_valid_tokens_are_copied_bit_for_bit_and_padding_is_zero(chosen: list[Sample], layout: Layout) -> None:
    batch = collated(chosen, layout)
    for tensor, wanted in (
        (batch.latents, [image(sample) for sample in chosen]),
        (batch.prompt_embeds, [sample.prompt_embeds for sample in chosen]),
    ):
        valid, padding = rows(tensor, [len(x) for x in wanted], layout)
        assert tensor.dtype == torch.bfloat16
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(valid, wanted, strict=True))
        assert not padding.view(torch.int16).any()  # +0.0, no other bits
        assert tensor.data_ptr() not in [x.data_ptr() for x in (*wanted, *(s.target_latents for s in chosen))]


@derandomized
@given(mixes, st.sampled_from(LAYOUTS))
def test_target_index_selects_exactly_the_target_tokens(chosen: list[Sample], layout: Layout) -> None:
    batch = collated(chosen, layout)
    targets = torch.cat([sample.target_latents for sample in chosen])  # of random numbers: no two tokens are equal
    assert torch.equal(batch.latents.flatten(0, 1)[batch.target_index], targets)
    assert batch.target_index.dtype == torch.int64
    assert batch.target_lengths == tuple(len(sample.target_latents) for sample in chosen)


@derandomized
@given(mixes, st.sampled_from(LAYOUTS))
def test_all_else_goes_with_its_sample(chosen: list[Sample], layout: Layout) -> None:
    batch = collated(chosen, layout)
    assert batch.layout == layout
    assert batch.indices == tuple(7 * i + 2 for i in range(len(chosen)))
    assert batch.sample_weights == tuple(float(i % 2) for i in batch.indices)
    assert batch.names == tuple(sample.name for sample in chosen)
    for pooled, sample in zip(batch.pooled_embeds, chosen, strict=True):
        assert torch.equal(pooled, sample.pooled_embeds)
    assert batch.img_shapes == tuple(sample.img_shapes for sample in chosen)
    assert batch.has_mask == tuple(sample.edit_mask is not None for sample in chosen)
    for found, sample in zip(batch.edit_mask.split(list(batch.target_lengths)), chosen, strict=True):
        assert torch.equal(found, torch.zeros(len(found)) if sample.edit_mask is None else sample.edit_mask)
    texts = [len(sample.prompt_embeds) for sample in chosen]
    assert batch.text_lengths == tuple(texts)
    if layout == "packed" or len(set(texts)) == 1:
        assert batch.prompt_mask is None, "no text is padded"
    else:
        assert batch.prompt_mask is not None and batch.prompt_mask.dtype == torch.bool
        assert batch.prompt_mask.tolist() == [[t < n for t in range(max(texts))] for n in texts]
    lengths = [Lengths(n, len(image(s)), len(s.target_latents)) for n, s in zip(texts, chosen, strict=True)]
    assert batch.tokens == sum(length.total for length in lengths)
    assert batch.tokens_computed == computed_tokens(lengths, layout)  # what the plan counted on


@derandomized
@given(mixes)
def test_rounded_rows_hold_the_same_tokens_and_more_padding(chosen: list[Sample]) -> None:
    plain, rounding = collated(chosen, "padded"), Rounding(text=4, image=8)
    batch = collated(chosen, "padded", rounding)
    for name, multiple in (("latents", 8), ("prompt_embeds", 4)):
        before, after = getattr(plain, name), getattr(batch, name)
        longest = before.shape[1]
        assert after.shape == (len(chosen), rounded(longest, multiple), before.shape[2])
        assert torch.equal(after[:, :longest], before)
        assert not after[:, longest:].any()
    assert torch.equal(batch.latents.flatten(0, 1)[batch.target_index], plain.latents.flatten(0, 1)[plain.target_index])
    lengths = [len(sample.prompt_embeds) for sample in chosen]
    if batch.prompt_mask is None:
        assert min(lengths) == batch.prompt_embeds.shape[1]
    else:
        assert batch.prompt_mask.sum(dim=1).tolist() == lengths
    made = [Lengths(n, len(image(s)), 1) for n, s in zip(lengths, chosen, strict=True)]
    counted = [Lengths(*row) for row in rounding.table(made).tolist()]
    assert batch.tokens_computed == computed_tokens(counted, "padded")
