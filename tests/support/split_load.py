"""A program for every rank of `torchrun`: load a model in several ways, measure memory, compare what came out.

Arguments: the configuration, and JSON of the ways as (name, overrides of the configuration). The last line is JSON.
"""

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mixres.config.load import load_config
from mixres.models.lora import add_lora, promote, train_all
from mixres.models.pretrained import own_rows
from mixres.preprocessing.fill import family_of
from mixres.training.distributed import gather, make_accelerator, shard
from mixres.training.setup import load_trained


def anonymous() -> int:
    """Bytes of this process that are no pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak_above(base: int) -> Iterator[list[int]]:
    """The most anonymous bytes above `base` within the block, looked at every 2 ms."""
    peak, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], anonymous() - base)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def old_way(config: Any, family: Any, accelerator: Any) -> nn.Module:
    """Everything on the device, in its final precision, before it is split."""
    transformer = family.load_transformer(dtype=torch.bfloat16, device=accelerator.device)
    transformer._apply(torch.clone)  # what `.to` does on a device that is no CPU
    if config.model.lora:
        add_lora(transformer, **config.model.adapter_settings(), untrained=(), seed=0, presets=family.lora_presets)
    else:
        train_all(transformer, untrained=())
        promote(transformer, torch.bfloat16)
    shard(transformer, accelerator.device, size=accelerator.num_processes, half=True, cpu_offload=False)
    return transformer  # type: ignore[no-any-return]


def differing(config: Any, family: Any, split: nn.Module) -> list[str]:
    """The parameters whose rows are not those of a model that one process loads."""
    whole = family.load_transformer(dtype=torch.bfloat16, device="cpu")  # mapped
    if config.model.lora:
        untrained, presets = family.untrained_modules(whole), family.lora_presets
        add_lora(whole, **config.model.adapter_settings(), untrained=untrained, seed=config.train.seed, presets=presets)
    pairs = zip(split.named_parameters(), whole.named_parameters(), strict=True)
    found = []
    for (name, ours), (other, theirs) in pairs:
        assert name == other and isinstance(ours, DTensor)
        rows, local = own_rows(ours), ours.to_local()
        same = rows is not None and torch.equal(local, theirs[rows.start : rows.stop].to(local.dtype))
        found += [] if same and ours.shape == theirs.shape else [name]
    return found


def main(file: Path, ways: list[tuple[str, list[str]]]) -> None:
    found = {}
    accelerator = make_accelerator(mixed_precision="no", report_to="none", folder=file.parent)
    for name, words in ways:
        config = load_config(file, words)
        family = family_of(config)
        family.transformer_skeleton()  # what is imported with the first
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        start, base = time.perf_counter(), anonymous()
        with peak_above(base) as peak:
            if name.startswith("old"):
                model: nn.Module = old_way(config, family, accelerator)
            else:
                model = load_trained(config, family, accelerator).transformer
        seconds = time.perf_counter() - start
        own = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
        found[name] = {
            "peak": peak[0],
            "share": own,
            "block": max(2 * sum(p.numel() for p in block.parameters()) for block in model.transformer_blocks),
            "precisions": sorted({str(p.dtype) for p in model.parameters()}),
            "differing": [] if name.startswith("old") else differing(config, family, model),
            "seconds": seconds,
            "base": base,
        }
        del model
    everyone = gather(found)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
