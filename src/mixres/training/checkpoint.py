"""Checkpoints that survive a kill at any instant, and a reader that never opens a pickle.

Promise: a checkpoint directory is whole or it does not count; the newest valid one wins, and the ones before it stay
until it is committed. Cost: one write, one fsync and one hash per file; the largest file once in memory.

A checkpoint `step-00000100/` holds safetensors and JSON files and, written last, `manifest.json` with the size and
xxh3-128 of each. It is written under a temporary name, renamed, and only then are older ones removed.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load_file, save
from torch import Tensor

from mixres import atomic

MANIFEST = "manifest.json"
STATE = "state.json"
_BLOCK_BYTES = 1 << 24
_NAME = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


class Checkpoint:
    """A directory whose manifest has been checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as `name`."""
        loaded: dict[str, Tensor] = load_file(self.path / f"{name}.safetensors")
        return loaded


class Checkpoints:
    """The checkpoints under `root`, of which the newest `keep` stay."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self.root, self.keep = root, keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Commit a checkpoint after optimizer step `step`: one safetensors file per entry of `tensors`.

        Raises:
            OSError: the disk is full or not writable; older checkpoints are untouched and no part of this one is left.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        final = self.root / f"step-{step:08d}"
        for stale in self.root.glob(f"{atomic.TMP_PREFIX}*"):  # of a run that was killed: there is one writer
            _remove(stale)
        partial = self.root / f"{atomic.TMP_PREFIX}{final.name}"
        partial.mkdir()
        try:
            manifest = {
                name: _write(partial / name, save(_plain(group)))
                for name, group in ((f"{name}.safetensors", group) for name, group in tensors.items())
            }
            text = json.dumps({**state, "step": step}, allow_nan=False, indent=2)
            manifest[STATE] = _write(partial / STATE, text.encode())
            atomic.write_json(partial / MANIFEST, manifest)
            if final.exists():  # an earlier run saved this step and is being repeated
                shutil.rmtree(final)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        atomic.sync_directory(self.root)
        self._point_latest(final)
        self._rotate()
        return final

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint whose files are what its manifest says; damaged ones are told in a warning each."""
        for path in reversed(self._all()):
            fault = _fault(path)
            if fault is None:
                return Checkpoint(path)
            _log.warning("%s is damaged (%s): trying the checkpoint before it", path, fault)
        return None

    def any(self) -> bool:
        """Whether there is a checkpoint at all, valid or not."""
        return bool(self._all())

    def _all(self) -> list[Path]:
        found = [p for p in self.root.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def _rotate(self) -> None:
        for path in self._all()[: -self.keep]:
            # Renamed first: a kill while files are being deleted must not leave half a checkpoint under its name.
            gone = path.with_name(f"{atomic.TMP_PREFIX}old-{path.name}")
            path.rename(gone)
            _remove(gone)

    def _point_latest(self, final: Path) -> None:
        link = self.root / f"{atomic.TMP_PREFIX}latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self.root / "latest")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write(path: Path, data: bytes) -> list[int | str]:
    atomic.write_bytes(path, data)
    return [len(data), xxhash.xxh3_128_hexdigest(data)]


def _digest(path: Path) -> list[int | str]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fault(path: Path) -> str | None:
    """Why the files of a checkpoint are not what its manifest says; None where they are."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if STATE not in manifest:
            return "its manifest is incomplete"
        for name, written in manifest.items():
            if _digest(path / name) != written:
                return f"{name} is not what was saved"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None
