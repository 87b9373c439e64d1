"""`train.py` with failures: `PLANTED` lists them as KIND:RANK:CALL, each in that call of that kind on that rank.

Kinds: `slow` and `memory` in a batch of a grid (counted from 0 on by each rank), `block` inside the transformer at
such a batch, `entry` where an evaluation reads a sample.
"""

import os
import sys
import time
from collections import Counter
from typing import Any

import torch

from mixres.cli import main
from mixres.data.loader import MicrobatchDataset
from mixres.errors import WorkError
from mixres.training import sample_sheets

PLANTED = set(os.environ["PLANTED"].split(","))
calls: Counter[str] = Counter()
make_images, batch = sample_sheets.make_images, MicrobatchDataset.batch


def due(kind: str) -> bool:
    calls[kind] += 1
    return f"{kind}:{os.environ['RANK']}:{calls[kind] - 1}" in PLANTED


def fail(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("planted")


def planted_images(family: Any, pipeline: Any, *arguments: Any, **options: Any) -> Any:
    if due("slow"):
        time.sleep(float(os.environ["SLOW_S"]))
    if due("memory"):
        fail()
    hooks = [pipeline.transformer.transformer_blocks[1].register_forward_pre_hook(fail)] if due("block") else []
    try:
        return make_images(family, pipeline, *arguments, **options)
    finally:
        for hook in hooks:
            hook.remove()


def planted_batch(self: Any, microbatch: Any) -> Any:
    if due("entry"):
        raise WorkError("planted: a damaged entry")
    return batch(self, microbatch)


sample_sheets.make_images, MicrobatchDataset.batch = planted_images, planted_batch  # type: ignore[method-assign]
sys.exit(main(sys.argv[1:]))
