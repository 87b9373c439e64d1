"""`train.py` with failures: `PLANTED` lists them as KIND:RANK:CALL, each in that call of that kind on that rank.

Kinds: `slow` and `memory` in an image of a grid (counted from 0 on by each rank), `block` inside the transformer at
such an image, `entry` where an evaluation reads a sample.
"""

import os
import sys
import time
from collections import Counter
from typing import Any

import torch

from mixres.cli import main
from mixres.errors import WorkError
from mixres.models.qwen.edit import QwenImageEdit
from mixres.training.validation import HeldOutLoss

PLANTED = set(os.environ["PLANTED"].split(","))
calls: Counter[str] = Counter()
sample_image, read = QwenImageEdit.sample_image, HeldOutLoss._read


def due(kind: str) -> bool:
    calls[kind] += 1
    return f"{kind}:{os.environ['RANK']}:{calls[kind] - 1}" in PLANTED


def fail(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("planted")


def planted_image(self: Any, pipeline: Any, **options: Any) -> Any:
    if due("slow"):
        time.sleep(float(os.environ["SLOW_S"]))
    if due("memory"):
        fail()
    hooks = [pipeline.transformer.transformer_blocks[1].register_forward_pre_hook(fail)] if due("block") else []
    try:
        return sample_image(self, pipeline, **options)
    finally:
        for hook in hooks:
            hook.remove()


def planted_read(self: Any, position: int) -> Any:
    if due("entry"):
        raise WorkError("planted: a damaged entry")
    return read(self, position)


QwenImageEdit.sample_image, HeldOutLoss._read = planted_image, planted_read
sys.exit(main(sys.argv[1:]))
