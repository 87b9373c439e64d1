"""Lengths of padded rows rounded up to a bounded set, so that compiled code meets few shapes.

Promise: a data set has at most `MOST` text lengths and as many image lengths after rounding, and none is shortened.
Cost: filler, less than one multiple a row and stream; the plan counts it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mixres.data.plan import Lengths

MOST = 4


class Rounding(NamedTuple):
    """What text and image lengths of a padded microbatch are rounded up to multiples of."""

    text: int = 1
    image: int = 1

    def lengths(self, of: Lengths) -> Lengths:
        """As the plan is to count them; the target's stay, they are what the loss is over."""
        return of._replace(
            text=rounded(of.text, self.text),
            image=rounded(of.image, self.image),
            empty_text=rounded(of.empty_text, self.text),
        )


def rounding_of(lengths: Sequence[Lengths], most: int = MOST) -> Rounding:
    """The smallest powers of two whose multiples are at most `most` text and `most` image lengths."""
    texts = {length.text for length in lengths} | {length.empty_text for length in lengths if length.empty_text}
    return Rounding(_multiple(texts, most), _multiple({length.image for length in lengths}, most))


def rounded(length: int, multiple: int) -> int:
    """The smallest multiple that is not below `length`."""
    return -(-length // multiple) * multiple


def _multiple(lengths: Iterable[int], most: int) -> int:
    multiple, found = 1, set(lengths)
    while len({rounded(length, multiple) for length in found}) > most:
        multiple *= 2
    return multiple
