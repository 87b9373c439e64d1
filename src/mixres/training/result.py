"""The result of a run: a LoRA file, or the whole transformer, in the formats that the stock pipelines load.

Promise: a name appears when its file is whole; what it was trained as stands beside it or in its metadata. Cost: the
trained weights once in memory on the rank that writes.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from mixres import atomic
from mixres.errors import WorkError
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, lora_file
from mixres.training.distributed import full_tensors
from mixres.training.setup import TrainState, recipe


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
    except (OSError, SafetensorError) as error:
        what = f"{folder}: the result could not be written ({getattr(error, 'strerror', None) or error})"
        raise WorkError(f"{what}; step {step} is saved: make room and run the same command again") from error
    return path


def _write_result(trained: TrainState, folder: Path, *, step: int, keep: bool) -> Path:
    """The LoRA file, or the transformer in the base's precision. On all ranks; the one that is to `keep` it writes."""
    config, family = trained.config, trained.family
    path = folder / (FILE_NAME if config.model.lora else "transformer")
    folder.mkdir(exist_ok=True)
    if config.model.lora:
        weights = full_tensors(trained.parameters, keep=keep)
        if keep:
            atomic.write_bytes(path, lora_file(weights, trained.transformer, recipe(config, family, step)))
        return path
    weights = full_tensors(trained.transformer.state_dict(), keep=keep, dtype=getattr(torch, config.model.dtype))
    if keep:  # through a model of the same shape: the trained one may be sharded
        model = family.transformer_skeleton()
        model.load_state_dict(weights, assign=True)
        partial = folder / f"{atomic.TMP_PREFIX}transformer"
        for old in (partial, path):
            shutil.rmtree(old, ignore_errors=True)
        try:
            model.save_pretrained(partial)
            atomic.write_json(partial / RECIPE_FILE, recipe(config, family, step))
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path
