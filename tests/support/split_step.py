"""A program for every rank of `torchrun`: bytes that a split model's steps, average, checkpoint and result take.

Arguments: the configuration, and JSON of the ways as (name, microbatches, overrides). The last line of the first rank
is JSON. "cached", "unsynced" and "whole" in a name plant what has been wrong before.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mixres.config.load import load_config
from mixres.data.collate import collate
from mixres.preprocessing.fill import family_of
from mixres.training import distributed, result
from mixres.training.checkpoint import Checkpoints
from mixres.training.distributed import gather, make_accelerator
from mixres.training.resume import save_run
from mixres.training.setup import TrainState, load_trained
from mixres.training.step import run_step
from mixres.verification.synthetic import synthetic_samples
from support.counting import peak_of


class Cached:
    """An objective computed under autocast, with its cache of cast weights."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def loss(self, *args: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
            return self.objective.loss(*args, **named)


def step_of(trained: TrainState, count: int, objective: Any) -> Callable[[], Any]:
    samples = synthetic_samples(trained.config, trained.family, count)
    batches = [collate([s], indices=[i], weights=[1.0], layout="packed") for i, s in enumerate(samples)]
    model, optimizer = trained.model, trained.optimizer
    return lambda: run_step(
        trained.accelerator, model, optimizer, objective, batches, count=count, step=0, divisor=count, max_grad_norm=1.0
    )


def measured(trained: TrainState, name: str, count: int) -> dict[str, int]:
    rank, ranks, _ = distributed.dist_env()
    folder = Path(trained.config.logging.output_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, keep=2, rank=rank, ranks=ranks, gather=gather)
    step = step_of(trained, count, Cached(trained.objective) if "cached" in name else trained.objective)

    def save() -> None:
        save_run(checkpoints, trained.parameters, trained.optimizer, step=1, state={})

    def write() -> None:
        if "whole" in name:
            weights = [weight.full_tensor() for weight in trained.transformer.state_dict().values()]
        result.write_results(trained, folder, step=1, keep=rank == 0)
        weights = []  # noqa: F841 - until here

    step()  # the optimizer's state is there from now on
    blocks: Any = trained.transformer.transformer_blocks
    parameters = list(trained.transformer.parameters())
    return {
        "step": peak_of(step),
        "average and result": peak_of(write),
        "checkpoint": peak_of(save),
        "gradients": sum(p.to_local().nbytes for p in parameters if isinstance(p, DTensor) and p.requires_grad),
        "block": max(4 * sum(p.numel() for p in block.parameters()) for block in blocks),
        "tensor": max(p.nbytes for p in parameters),
    }


def main(file: Path, ways: list[tuple[str, int, list[str]]]) -> None:
    accelerator = make_accelerator(mixed_precision="no", report_to="none", folder=file.parent)
    small, found = distributed._small_gradients, {}
    for name, count, words in ways:
        config = load_config(file, words)
        distributed._small_gradients = (lambda model: True) if "unsynced" in name else small
        found[name] = measured(load_trained(config, family_of(config), accelerator), name, count)
    everyone = gather(found)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
