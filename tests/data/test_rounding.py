"""Lengths rounded up to a bounded set: few of them, none shortened."""

from hypothesis import given, strategies as st

from mixres.data.plan import MAX_LENGTHS, Lengths, Rounding, rounded, rounding_of

samples = st.builds(Lengths, st.integers(1, 1500), st.integers(1, 20000), st.just(1), st.sampled_from([0, 3, 700]))


@given(st.lists(samples, min_size=1, max_size=40))
def test_few_lengths_are_left_and_none_is_shortened(lengths: list[Lengths]) -> None:
    rounding = rounding_of(lengths)
    after = [rounding.lengths(length) for length in lengths]
    texts = {length.text for length in after} | {length.empty_text for length in after} - {0}
    assert len(texts) <= MAX_LENGTHS
    assert len({length.image for length in after}) <= MAX_LENGTHS
    for old, new in zip(lengths, after, strict=True):
        assert (old.text <= new.text, old.image <= new.image, old.empty_text <= new.empty_text) == (True, True, True)
        assert new.text - old.text < rounding.text and new.image - old.image < rounding.image
        assert new.target == old.target


def test_lengths_that_are_few_stay() -> None:
    assert rounding_of([Lengths(5, 100, 50), Lengths(7, 133, 60)]) == Rounding(1, 1)
    assert rounding_of([Lengths(5, n, 1) for n in (100, 133, 150, 199, 260)]) == Rounding(1, 32)
    assert [rounded(n, 64) for n in (1, 64, 65)] == [64, 64, 128]
