"""The loss on held-out samples at fixed noise and fixed sigmas, while a run trains.

Promise: a function of the weights, the held-out samples and the sigmas alone, so the same bits in the middle of a run,
after a resume and by itself. Every sample is computed alone, without dropout, on noise that no step draws; the ranks
divide the work, and who computes what changes nothing else. The training is untouched: no random generator is used, no
mode is left behind. Cost: one forward pass a sample and sigma.

The loss is the bare squared error of the velocity, a mean over target tokens and channels: without weights of sigmas,
masks or sets, so that runs that differ in those can be compared.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from mixres.batch import Batch
from mixres.console import counted, log
from mixres.data.plan import Microbatch
from mixres.diffusion.flow_matching import fixed_flow_sample
from mixres.diffusion.objective import velocity_loss
from mixres.preprocessing.fill import CachedData
from mixres.preprocessing.samples import CachedSample
from mixres.training.run_folder import RunFolder
from mixres.training.setup import TrainState
from mixres.training.side_work import attempt, prepared

# Sides of the squares that resolution bands are named after; a target is in the band whose area is nearest to its own.
SIDES = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
Losses = Mapping[tuple[int, float], float]  # by position of the sample, and sigma
Sink = Callable[[Mapping[str, Any]], None]


class HeldOutLoss:
    """Evaluates a run at step 0, every `evaluate.every` steps and at its end; with 0 there, or no samples, never.

    Each of `sinks` gets the line of metrics, on the first rank.
    """

    def __init__(self, trained: TrainState, encoded: CachedData, run: RunFolder, sinks: Sequence[Sink]) -> None:
        config = trained.config
        self.accelerator, self.objective, self.transformer = trained.accelerator, trained.objective, trained.transformer
        self.run, self.sinks, self.sigmas = run, sinks, config.evaluate.sigmas
        self.lockstep = config.train.parallel == "fsdp2"
        self.every, self.last = config.evaluate.every, config.train.max_train_steps
        self.ema = trained.ema if config.evaluate.use_ema else None
        self.samples = encoded.held_out if self.every else []
        self.dataset = encoded.dataset(self.samples, "padded")
        keys = self.dataset.keys
        longest_first = sorted(range(len(keys)), key=lambda i: (-self.samples[i].lengths.total, keys[i]))
        self.passes = list(itertools.product(longest_first, self.sigmas))

    def due(self, step: int) -> bool:
        """Whether the weights of `step` are to be evaluated."""
        return bool(self.samples) and (step % self.every == 0 or step == self.last)

    def __call__(self, step: int) -> bool:
        """Evaluate if it is due, on all ranks; False where a rank was asked to stop first: then there is no line.

        Where it fails there is none either; the reason is logged, and the run continues.
        """
        if not self.due(step):
            return True
        found = attempt(self.losses, lockstep=self.lockstep)
        if isinstance(found, str):
            if self.run.is_main:
                log(f"evaluate  step {step}: no evaluation ({found}): the run continues without it")
            return True
        if None in found:
            return False
        if self.run.is_main:
            losses = {key: loss for part in found if part is not None for key, loss in part.items()}
            line = metrics_line(losses, self.samples)
            loss = "not finite" if line["eval/loss"] is None else f"{line['eval/loss']:.4f}"
            log(f"evaluate  step {step}: held-out loss {loss} ({len(self.samples)} samples)")
            for sink in self.sinks:
                sink({"step": step, **line})
        return True

    def losses(self) -> Losses | None:
        """The loss of each sample at each sigma that this rank computes; None where the run is asked to stop.

        Raises:
            WorkError: a cache entry is damaged or missing.
        """
        found: dict[tuple[int, float], float] = {}
        own = self.passes_of(self.accelerator.process_index, self.accelerator.num_processes)
        with self._held_still():
            for position, sigma in counted(own, "evaluate", "pass", enabled=self.run.is_main):
                read = partial(self.dataset.batch, Microbatch((position,), (1.0,)))
                batch = prepared(read, stop_requested=self.run.stop_requested, lockstep=self.lockstep)
                if batch is None:
                    return None
                found[position, sigma] = self._loss(batch, position, sigma)
        return found

    def passes_of(self, rank: int, ranks: int) -> list[tuple[int, float]]:
        """What a rank computes: sample and sigma, one after the other.

        Every rank has as many, since sharded weights are gathered in every pass: one with none left repeats the last.
        """
        end = -(-len(self.passes) // ranks) * ranks
        return [self.passes[min(k, len(self.passes) - 1)] for k in range(rank, end, ranks)]

    def _loss(self, batch: Batch, position: int, sigma: float) -> float:
        batch = batch.to(self.accelerator.device)
        keys = [self.samples[position].noise_key]
        flow = fixed_flow_sample(batch, keys=keys, sigma=sigma, dtype=self.objective.dtype)
        with self.accelerator.autocast():
            velocity = self.objective.predict(self.transformer, batch, flow)
        return float(velocity_loss(velocity, batch, flow, normalization="sample"))

    @contextmanager
    def _held_still(self) -> Iterator[None]:
        """No gradient, no dropout, and the weights that are to be evaluated; all is restored afterwards."""
        was_training = self.transformer.training
        self.transformer.eval()
        try:
            with torch.no_grad(), self.ema.averaged() if self.ema else nullcontext():
                yield
        finally:
            self.transformer.train(was_training)


def resolution_band(pixels: int) -> int:
    """The one of `SIDES` whose square is nearest in area, by ratio, to a target of so many pixels."""
    return max([SIDES[0], *(upper for lower, upper in itertools.pairwise(SIDES) if pixels >= lower * upper)])


def metrics_line(losses: Losses, samples: Sequence[CachedSample]) -> dict[str, float | None]:
    """Means over all samples and sigmas, at each sigma, and over each resolution band; None: not finite."""
    bands = [resolution_band(sample.target_size.width * sample.target_size.height) for sample in samples]
    sigmas = sorted({sigma for _, sigma in losses})
    groups = {"loss": list(losses)}
    groups |= {f"sigma_{sigma}": [key for key in losses if key[1] == sigma] for sigma in sigmas}
    groups |= {f"resolution_{band}": [key for key in losses if bands[key[0]] == band] for band in sorted(set(bands))}
    means = {name: math.fsum(losses[key] for key in keys) / len(keys) for name, keys in groups.items()}
    return {f"eval/{name}": mean if math.isfinite(mean) else None for name, mean in means.items()}
