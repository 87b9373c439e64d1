"""A program for every rank of `torchrun`: bytes at the peak of a real step of a split model.

Arguments: the configuration, and JSON of the ways as (name, overrides). The last line of the first rank is JSON.
"""

import json
import sys
from functools import partial
from pathlib import Path

from torch import Tensor

from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.inspection.storages import bytes_of
from mixres.models.family import Family
from mixres.preprocessing.fill import family_of
from mixres.training.denoising import ImageInputs, from_noise, make_images
from mixres.training.distributed import dist_env, gather, is_split, make_accelerator
from mixres.training.optimizer import make_state, optimizer_tensors
from mixres.training.setup import load_trained
from mixres.training.step import run_step
from mixres.verification.synthetic import SampleTokens, noise_batch, synthetic_samples
from support.counting import allocated_at_peak, peak_of


def sizes(config: Config, family: Family, count: int) -> list[SampleTokens]:
    """Of the samples of a step."""
    return [(s.img_shapes, len(s.prompt_embeds)) for s in synthetic_samples(config, family, count)]


def real_peak(config: Config, family: Family, count: int) -> int:
    """Bytes at the peak of a step of one microbatch of `count` samples, by the allocator's record.

    Of split weights tensor by tensor: that record lacks what gloo's threads free.
    """
    half = "no" if is_split(config.train.parallel) else config.train.mixed_precision
    accelerator = make_accelerator(mixed_precision=half, report_to="none", folder=Path(config.logging.output_dir))
    trained = load_trained(config, family, accelerator)
    batch = noise_batch(config, family, sizes(config, family, count))
    model, optimizer, objective = trained.model, trained.optimizer, trained.objective
    step = partial(
        run_step, accelerator, model, optimizer, objective, [batch], count=1, step=0, divisor=1, max_grad_norm=1.0
    )
    step()  # the optimizer's state and position tables are there from now on
    state = optimizer_tensors(optimizer, trained.parameters).values()
    held = (*trained.transformer.parameters(), *state, *(v for v in vars(batch).values() if isinstance(v, Tensor)))
    work = peak_of if is_split(config.train.parallel) else allocated_at_peak
    return bytes_of(held) + work(step)


def real_grid_peak(config: Config, family: Family) -> int:
    """Bytes at the peak of an image as a sample grid makes it, tensor by tensor."""
    folder = Path(config.logging.output_dir)
    trained = load_trained(config, family, make_accelerator(mixed_precision="no", report_to="none", folder=folder))
    make_state(trained.optimizer)
    dtype = next(trained.transformer.parameters()).dtype
    pipeline = family.load_sampling_pipeline(transformer=trained.transformer, dtype=dtype, device="cpu")
    sample = from_noise(family, pipeline, synthetic_samples(config, family, 1)[0], seed=1)
    inputs = [ImageInputs(sample, guidance=1.0)]
    make = partial(make_images, family, pipeline, inputs, steps=2)
    make()  # position tables are there from now on
    state = optimizer_tensors(trained.optimizer, trained.parameters).values()
    return bytes_of([*trained.transformer.parameters(), *state, *pipeline.vae.parameters()]) + peak_of(make)


def main(file: Path, ways: list[tuple[str, list[str]]]) -> None:
    found = {}
    for name, words in ways:
        config = load_config(file, words)
        found[name] = real_peak(config, family_of(config), 1)
    everyone = gather(found)
    if dist_env().rank == 0:
        sys.stdout.write(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
