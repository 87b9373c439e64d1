"""What `verify` and `bench` share: a run on one process that trains nothing, and what to say of the machine.

Promise: model, data, objective and precision are those a training run of the same configuration has; nothing of the
run folder is touched but `reports/`. Cost: loading the transformer.
"""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mixres import __version__
from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.diffusion.objective import Objective
from mixres.errors import UserError
from mixres.models.family import Family
from mixres.preprocessing.training_data import check_folder
from mixres.training.distributed import make_accelerator
from mixres.training.setup import TrainState, build_objective, load_trained
from mixres.training.step import run_step

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class Workbench:
    """Everything that a training step needs but the samples."""

    config: Config
    accelerator: Accelerator
    trained: TrainState
    objective: Objective


def one_process(config: Config, verb: str) -> Accelerator:
    """The accelerator of the only process.

    Raises:
        UserError: a launcher started several, or the run folder cannot be written.
    """
    folder = Path(config.logging.output_dir)
    check_folder(folder)
    accelerator = make_accelerator(mixed_precision=config.train.mixed_precision, report_to="none", folder=folder)
    if accelerator.num_processes > 1:
        raise UserError(
            f"{verb}: works on one process, {accelerator.num_processes} were started: python train.py {verb}"
        )
    return accelerator


def set_up(config: Config, family: Family, accelerator: Accelerator) -> Workbench:
    """Load the model as training would on one process.

    Raises:
        UserError: the base cannot be loaded.
    """
    # One process has nothing to split; compiled blocks are for the lengths of a plan, these verbs batch otherwise.
    whole = config.train.model_copy(update={"parallel": "ddp", "compile": False})
    config = config.model_copy(update={"train": whole})
    return Workbench(config, accelerator, load_trained(config, family, accelerator), build_objective(config, family))


def step_seconds(setting: Workbench, microbatches: Iterable[Batch], *, count: int, step: int, divisor: int) -> float:
    """Seconds of `run_step` over `count` microbatches. No weight changes: the learning rate is zero.

    Raises:
        WorkError: the device has not enough memory for a microbatch.
    """
    accelerator, trained = setting.accelerator, setting.trained
    for group in trained.optimizer.param_groups:
        group["lr"] = 0.0 * group["lr"]  # a tensor stays one
    start = time.perf_counter()
    run_step(
        accelerator,
        trained.model,
        trained.optimizer,
        setting.objective,
        microbatches,
        count=count,
        step=step,
        divisor=divisor,
        max_grad_norm=setting.config.train.max_grad_norm,
    )
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
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
    found = {"mixres": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a build of one's own may carry no metadata
            found[name] = "unknown"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures of a report were measured on."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "accelerator": accelerator,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`; None where the system does not tell."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    kilobytes = _proc_value("/proc/meminfo", "MemAvailable")
    return None if kilobytes is None else 1024 * kilobytes


def peak_memory(device: torch.device, work: Callable[[], Any]) -> int | None:
    """Bytes at the peak of `work`: on CUDA all that is allocated, weights included; on a CPU how far the process grew.

    None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    before = _reset_resident_peak()
    work()
    peak = _proc_value("/proc/self/status", "VmHWM")
    return None if before is None or peak is None else max(0, 1024 * (peak - before))


def _reset_resident_peak() -> int | None:
    """Give freed memory back and start Linux's high-water mark anew; returns the kilobytes that are resident."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return None
    return _proc_value("/proc/self/status", "VmRSS")


def _proc_value(file: str, field: str) -> int | None:
    try:
        lines = Path(file).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) if values else None
