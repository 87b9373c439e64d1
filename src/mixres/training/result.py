"""The result of a run: a LoRA file, or the whole transformer, in the formats that the stock pipelines load.

Promise: a name appears when its file is whole, and the result before it stays until then; what it was trained as stands
beside it or in its metadata. Cost: a LoRA once in memory on the rank that writes, of all weights one tensor at a time.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixres import atomic
from mixres.errors import WorkError
from mixres.geometry import Size
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, lora_file
from mixres.models.tensor_files import write_model
from mixres.preprocessing.samples import CachedSample, table_of
from mixres.training.distributed import full_tensor
from mixres.training.setup import TrainState, recipe

TRAINING_SET = "training_set.json"


def training_set(samples: Sequence[CachedSample]) -> dict[str, Any]:
    """What a model card reports of them: how many, and how many of each size, without a name."""
    table = table_of(samples)
    own = table["target"][~table["regularization"]]
    sizes, counts = np.unique(own, axis=0, return_counts=True)
    counted = {str(Size(*size)): count for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)}
    return {"samples": len(own), "regularization": len(samples) - len(own), "sizes": counted}


def write_results(trained: TrainState, folder: Path, *, step: int, keep: bool) -> Path:
    """What was trained and, where one is kept, its average in `ema/`; the path of the first.

    On all ranks; the one that is to `keep` them writes.

    Raises:
        WorkError: they cannot be written.
    """
    try:
        path = _write_result(trained, folder, step=step, keep=keep)
        if trained.ema:
            with trained.ema.averaged():
                _write_result(trained, folder / "ema", step=step, keep=keep)
    except OSError as error:
        what = f"{folder}: the result could not be written ({error.strerror or error})"
        raise WorkError(f"{what}; step {step} is saved: make room and run the same command again") from error
    return path


def _write_result(trained: TrainState, folder: Path, *, step: int, keep: bool) -> Path:
    """The LoRA file, or the transformer in the base's precision. On all ranks; the one that is to `keep` it writes."""
    config, family = trained.config, trained.family
    path = folder / (FILE_NAME if config.model.lora else "transformer")
    folder.mkdir(exist_ok=True)
    if config.model.lora:
        weights = {}
        for name, parameter in trained.parameters.items():
            full = full_tensor(parameter)
            if keep:
                weights[name] = full.cpu()
        if keep:
            atomic.write_bytes(path, lora_file(weights, trained.transformer, recipe(config, family, step)))
        return path
    weights, dtype = trained.transformer.state_dict(), getattr(torch, config.model.dtype)
    shapes = {name: torch.empty(weight.shape, dtype=dtype, device="meta") for name, weight in weights.items()}
    partial, old = (folder / f"{atomic.TMP_PREFIX}{name}" for name in ("transformer", "old-transformer"))
    try:
        if keep:
            _remove(partial, old)
            partial.mkdir()
            family.transformer_skeleton().save_config(partial)
        write_model(partial if keep else None, shapes, lambda name: full_tensor(weights[name].to(dtype)))
        if keep:
            atomic.write_json(partial / RECIPE_FILE, recipe(config, family, step))
            if path.exists():
                path.rename(old)
            partial.rename(path)
            atomic.sync_directory(folder)
    finally:
        if keep:
            _remove(partial, old)
    return path


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
