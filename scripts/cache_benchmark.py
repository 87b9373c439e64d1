"""What caching costs beyond the bare encoders, and reading beyond the training step. Run it while nothing else runs:

    python scripts/cache_benchmark.py --config configs/quickstart.yaml

All ratios are of one process, interleaved; a figure is the median over rounds with its lowest and highest. The cache
of the configuration is filled where it is not full; what is encoded to be timed goes to a folder beside it and is
removed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch

from mixres.batch import Sample
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.cache import Cache
from mixres.data.scan import ScannedRecord
from mixres.preprocessing.encode import encode_inputs, entry_sizes
from mixres.preprocessing.fill import CachedData, encode_all, family_of, fill, keyed_records
from mixres.training.setup import build_loader, build_plan
from mixres.verification.setup import Workbench, machine, one_process, precision_label, set_up, step_seconds

EXAMPLES, STEPS = 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_intermixed_args()
    config = load_config(Path(given.config), given.words)
    accelerator = one_process(config, "cache_benchmark")
    family = family_of(config)
    log(f"machine   {machine(accelerator.device)}, {precision_label(config)}")
    caching_over_encoders(config, family, accelerator.device, given.rounds)
    encoded = encode_all(config, family, device=accelerator.device)
    setting = set_up(config, family, accelerator)
    reading_over_step(config, encoded, setting, given.rounds)


def caching_over_encoders(config: Config, family: ModuleType, device: torch.device, rounds: int) -> None:
    """Reading, decoding, checking, claiming, encoding and writing an entry, over encoding decoded pictures alone."""
    _, train, _, keys = keyed_records(config, family, is_main=True)
    chosen = dict(islice(zip(keys, train, strict=False), EXAMPLES))
    model = config.model
    encoders = family.load_encoders(
        model.pretrained_model_name_or_path, revision=model.revision, dtype=getattr(torch, model.dtype), device=device
    )
    inputs = {key: encode_inputs(config, family, scanned) for key, scanned in chosen.items()}
    sizes = entry_sizes(config, family, chosen)

    def encode(scanned: ScannedRecord) -> Sample:
        sample: Sample = family.encode(encoders, **encode_inputs(config, family, scanned))
        return sample

    def encode_bare(key: str) -> None:
        family.encode(encoders, **inputs[key])

    def cache_entry(cache: Cache, key: str) -> None:
        fill(cache, {key: chosen[key]}, sizes, lambda: encode)

    ratios = []
    for _ in range(rounds + 1):  # the first one warms up
        bare = caching = 0.0
        with tempfile.TemporaryDirectory(dir=Path(config.cache.cache_dir).parent) as folder:
            cache = Cache(Path(folder))
            for key in chosen:
                bare += seconds(partial(encode_bare, key), device)
                caching += seconds(partial(cache_entry, cache, key), device)
        ratios.append(bare / caching)
    tell(f"caching: throughput over that of the bare encoders at batch 1 ({len(chosen)} examples)", ratios[1:])


def reading_over_step(config: Config, encoded: CachedData, setting: Workbench, rounds: int) -> None:
    """Reading and collating a step's samples in one process, over the step: below 1 the step never waits."""
    plan = build_plan(config, encoded, world_size=1)
    first_reads: list[float] = []
    reads: list[float] = []
    for round_ in range(rounds + 1):
        fresh = CachedData(Cache(encoded.cache.root), encoded.train, encoded.held_out)  # verifies each entry once more
        for ratios in (first_reads, reads):
            reading = stepping = 0.0
            loader = build_loader(config, fresh, plan, rank=0, first=0, workers=0)
            for step in range(min(STEPS, config.train.max_train_steps)):
                planned = plan.step(step)
                start = time.perf_counter()
                batches = [next(loader) for _ in planned.ranks[0]]
                reading += time.perf_counter() - start
                divisor = setting.objective.divisor(planned.samples, planned.target_tokens)
                stepping += step_seconds(setting, batches, count=len(batches), step=step, divisor=divisor)
            if round_:
                ratios.append(reading / stepping)
    tell("reading: time over that of the training step, checksums verified", first_reads)
    tell("reading: time over that of the training step, later reads", reads)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of `work`, the device's part included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def tell(what: str, ratios: Sequence[float]) -> None:
    log(f"{what}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
