"""What a run has trained, as files for other programs: the verb `export`.

Promise: everything wrong with the request is told before anything is written. A file is read back and compared with
what it was to hold, bit for bit, before it gets its name; nothing that is there is written over. Cost: the LoRA in
memory; to merge, the base read once, written once and read back once, one tensor in memory.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mixres import atomic
from mixres.console import counted, log
from mixres.errors import UserError, WorkError
from mixres.inference.comfyui import ZERO_COND_T, lora_tensors
from mixres.inference.export_request import Request
from mixres.inference.merge import CONFIG, INDEX, MergedTensors, ModelFiles
from mixres.inference.tensor_file import Entry, differences, entry_of, in_order, write_tensors
from mixres.models.lora_file import RECIPE_FILE, RECIPE_KEY

_MARK = Entry("F32", (0,))  # what ComfyUI looks for has no content
_USE = {
    ("diffusers", False): "pipeline.load_lora_weights({out!r})",
    ("diffusers", True): "QwenImageTransformer2DModel.from_pretrained({out!r}), as the pipeline's transformer",
    ("comfyui", False): "put it in ComfyUI/models/loras",
    ("comfyui", True): "put it in ComfyUI/models/diffusion_models",
}


def export(request: Request) -> None:
    """Write what was asked for.

    Raises:
        UserError: another export writes to the same place.
        WorkError: what was written is not what comes back, or something has come to lie in its place.
        OSError: the disk is full, or cannot be written. Nothing is left then.
    """
    log(f"source    {request.source}, step {request.recipe.get('step')}")
    metadata = {"format": "pt", RECIPE_KEY: json.dumps(request.recipe, sort_keys=True)}
    with placed(request.out) as partial:
        if request.model:
            _write_weights(request, request.model, partial, metadata)
        elif request.format == "comfyui":
            tensors = lora_tensors(request.adapters)
            entries = {name: entry_of(tensor) for name, tensor in tensors.items()}
            write_checked({partial: entries}, tensors.__getitem__, metadata)
        else:
            assert request.lora is not None
            atomic.write_bytes(partial, request.lora)
            _require(partial, None if partial.read_bytes() == request.lora else "other bytes")
    log(f"result    {request.out}")
    log(f"use       {_USE[request.format, request.model is not None].format(out=str(request.out))}")


def _write_weights(request: Request, model: ModelFiles, partial: Path, metadata: Mapping[str, str]) -> None:
    """The transformer with the adapters folded in: as many files as it had, or one for ComfyUI."""
    merged = MergedTensors(model, request.adapters)
    files: dict[Path, Mapping[str, Entry]]
    if request.format == "comfyui":
        mark = {ZERO_COND_T: _MARK} if model.config.get("zero_cond_t") else {}
        files = {partial: model.entries | mark}
    else:
        partial.mkdir()
        for name in (CONFIG, INDEX):
            if (model.folder / name).is_file():
                atomic.write_bytes(partial / name, (model.folder / name).read_bytes())
        atomic.write_json(partial / RECIPE_FILE, request.recipe)
        files = {partial / name: file.entries for name, file in model.files.items()}

    def tensor(name: str) -> Tensor:
        return torch.empty(0) if name == ZERO_COND_T else merged.tensor(name)

    write_checked(files, tensor, metadata)
    if request.adapters:
        layer = next(iter(request.adapters))
        dtype, share = model.entries[f"{layer}.weight"].dtype, merged.rounding()
        log(f"rounding  to {dtype} moves the weights by {share:.2%} of what the adapters move them by")


def write_checked(
    files: Mapping[Path, Mapping[str, Entry]], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write files of these entries, then read all of them back and compare.

    Raises:
        WorkError: something else comes back.
    """
    names = [name for entries in files.values() for name in in_order(entries)]
    writing = iter(counted(names, "write", "tensor", enabled=True))
    digests = {
        path: write_tensors(path, entries, ((name, tensor(name)) for name in islice(writing, len(entries))), metadata)
        for path, entries in files.items()
    }
    next(writing, None)  # closes the bar
    reading = iter(counted(names, "check", "tensor", enabled=True))
    for path, entries in files.items():
        for problem in differences(path, entries, metadata, digests[path]):
            _require(path, problem)
            next(reading)
    next(reading, None)
    log(f"checked   {len(names)} tensors read back, bit for bit")


def _require(path: Path, problem: str | None) -> None:
    if problem:
        raise WorkError(f"{path}: reading it back gives something else ({problem}): nothing is kept; try another disk")


@contextlib.contextmanager
def placed(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; what is there in the end gets the name `out`.

    Raises:
        UserError: another process writes what is to be `out`.
        WorkError: something has come to lie there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2s(os.fsencode(out.name), digest_size=4).hexdigest()  # any name fits
    room = out.with_name(f"{atomic.TMP_PREFIX}export-{digest}")
    with _own(room, out):
        partial = room / "out"
        yield partial
        if out.exists():
            raise WorkError(f"{out} has come to be while this was written, and is left as it is: name another")
        partial.rename(out)
        atomic.sync_directory(out.parent)


@contextlib.contextmanager
def _own(room: Path, out: Path) -> Iterator[None]:
    """The folder `room`, new and for this process alone; it is gone in the end. The lock ends with its process."""
    room.mkdir(exist_ok=True)
    descriptor = os.open(room, os.O_RDONLY)
    try:
        if _is_taken(descriptor, room):
            raise UserError(f"--out: {out} is being written by another export: wait for it, or choose another name")
        for left in room.iterdir():  # by an export that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield
        finally:
            shutil.rmtree(room, ignore_errors=True)
    finally:
        os.close(descriptor)


def _is_taken(descriptor: int, room: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a network file system without locks on folders: exports are not told apart there
    return not (room.exists() and os.path.samestat(os.fstat(descriptor), room.stat()))  # its owner has ended just now
