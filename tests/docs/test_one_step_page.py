"""docs/one_step.md shows what the functions that train give, station by station."""

import math
import re
from pathlib import Path

import torch

from support.pages import DOCS, script

PAGE = (DOCS / "one_step.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")
BYTES = re.compile(r"\d+ bytes")


def test_every_block_is_what_the_code_gives(tiny_base: Path, tmp_path: Path) -> None:
    """Words, shapes and counts are equal; decimals are, but for the last digit that a machine may round otherwise."""
    blocks = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    found = script("one_step").stations(tmp_path, tiny_base)
    assert len(found) == len(blocks) == 7
    for block, text in zip(blocks, found, strict=True):
        assert NUMBER.sub("#", BYTES.sub("bytes", block)) == NUMBER.sub("#", BYTES.sub("bytes", text))
        for stated, given in zip(NUMBER.findall(block), NUMBER.findall(text), strict=True):
            assert math.isclose(float(stated), float(given), rel_tol=1e-2, abs_tol=2e-3), text
    assert torch.get_num_threads() == 1
