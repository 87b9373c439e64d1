"""What `verify` and `bench` share: a setup on one process that trains nothing, and a description of the machine.

Promise: model, data, objective and precision are those of a training run of the same configuration. Of the run folder
only `reports/` changes. Cost: loading the transformer.
"""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from mixres import __version__
from mixres.batch import Batch, Sample
from mixres.config.schema import Config
from mixres.data.plan import Lengths
from mixres.errors import UserError
from mixres.geometry import Grid, token_count
from mixres.models.family import Family
from mixres.models.registry import load_family
from mixres.preprocessing.fill import CachedData, encode_all, family_of
from mixres.preprocessing.live_texts import text_device
from mixres.preprocessing.training_data import check_folder
from mixres.training.distributed import make_accelerator
from mixres.training.setup import TrainState, load_trained
from mixres.training.step import run_step
from mixres.verification.synthetic import synthetic_samples

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


class Source(NamedTuple):
    """Samples by index: those of the cache, or synthetic ones."""

    lengths: Sequence[Lengths]
    names: Sequence[str]
    img_shapes: Sequence[tuple[Grid, ...]]
    read: Callable[[int], Sample]
    encoded: CachedData | None = None  # where they are of the cache


def cached_source(config: Config, device: torch.device) -> tuple[Family, Source]:
    """The training samples from the cache, which is filled where they are missing.

    Raises:
        UserError: base, data or `cache.text_device` are wrong.
    """
    family = family_of(config)
    text_device(config, device, ranks=1)  # else it would be looked for after hours of encoding
    encoded = encode_all(config, family, device=device)
    samples, names = encoded.train, [sample.record.name for sample in encoded.train]
    shapes = [sample.entry.img_shapes for sample in samples]

    def read(index: int) -> Sample:
        return encoded.read(samples[index])

    return family, Source([sample.lengths for sample in samples], names, shapes, read, encoded)


def synthetic_source(config: Config, count: int) -> tuple[Family, Source]:
    """Random weights and `count` samples in the shapes of the base: no weight, image or cache is read."""
    model = config.model
    family = load_family(model.family, model.pretrained_model_name_or_path, revision=model.revision, synthetic=True)
    return family, source_of(synthetic_samples(config, family, count))


def source_of(samples: Sequence[Sample]) -> Source:
    """These samples, held in memory."""
    empty = [0 if sample.empty_embeds is None else len(sample.empty_embeds) for sample in samples]
    lengths = [
        Lengths(len(sample.prompt_embeds), token_count(sample.img_shapes), len(sample.target_latents), own)
        for sample, own in zip(samples, empty, strict=True)
    ]
    names, shapes = [sample.name for sample in samples], [sample.img_shapes for sample in samples]
    return Source(lengths, names, shapes, samples.__getitem__)


def one_process(config: Config, verb: str) -> Accelerator:
    """The accelerator of the only process.

    Raises:
        UserError: a launcher started several, or the run folder cannot be written.
    """
    folder = Path(config.logging.output_dir)
    check_folder(folder)
    train = config.train
    accelerator = make_accelerator(
        mixed_precision=train.mixed_precision, report_to="none", folder=folder, deterministic=train.deterministic
    )
    if (count := accelerator.num_processes) > 1:
        raise UserError(f"{verb}: works on one process, {count} were started: python train.py {verb}")
    return accelerator


def set_up(config: Config, family: Family, accelerator: Accelerator, *, compiled: bool = False) -> TrainState:
    """Everything that a training step needs but the samples: the model, loaded as training would on one process.

    Blocks are compiled only where that is asked for here as well: what is compiled are the lengths of a plan.

    Raises:
        UserError: the base cannot be loaded.
    """
    # One process has nothing to split.
    train = config.train.model_copy(update={"parallel": "ddp", "compile": compiled and config.train.compile})
    config = config.model_copy(update={"train": train})
    return load_trained(config, family, accelerator)


def step_seconds(setup: TrainState, microbatches: Iterable[Batch], *, count: int, step: int, divisor: int) -> float:
    """Seconds of `run_step` over `count` microbatches. No weight changes: the learning rate is zero.

    Raises:
        WorkError: the device has not enough memory for a microbatch.
    """
    for group in setup.optimizer.param_groups:
        group["lr"] = 0.0 * group["lr"]  # a tensor stays one
    start = time.perf_counter()
    run_step(
        setup.accelerator,
        setup.model,
        setup.optimizer,
        setup.objective,
        microbatches,
        count=count,
        step=step,
        divisor=divisor,
        max_grad_norm=setup.config.train.max_grad_norm,
    )
    if setup.accelerator.device.type == "cuda":
        torch.cuda.synchronize(setup.accelerator.device)
    return time.perf_counter() - start


def report_path(config: Config, name: str) -> Path:
    """Where a report of this run lies; the folder is made."""
    folder = Path(config.logging.output_dir) / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def precision_label(config: Config) -> str:
    """The precision that a step computes in, as reports name it."""
    autocast = config.train.mixed_precision == "bf16" and config.model.dtype != "bfloat16"
    return f"{config.model.dtype}, autocast bf16" if autocast else config.model.dtype


def versions() -> dict[str, str]:
    """Of mixres and the libraries that compute."""
    return {"mixres": __version__, **{name: version(name) for name in LIBRARIES}}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures of a report were measured on."""
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system has no figure."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _proc_bytes("/proc/meminfo", "MemAvailable")


def peak_memory(device: torch.device, work: Callable[[], Any]) -> int | None:
    """Bytes at the peak of `work`: on CUDA all that is allocated, weights included; on a CPU how far the process grew.

    None where the system has no figure.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    try:  # give freed memory back, and reset Linux's high-water mark
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError, TypeError):  # another system
        return None
    before = _proc_bytes("/proc/self/status", "VmRSS")
    work()
    peak = _proc_bytes("/proc/self/status", "VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _proc_bytes(file: str, field: str) -> int | None:
    """What the line of this name states; None on a system without such files."""
    path = Path(file)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
