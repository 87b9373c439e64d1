"""Checkpoints that survive a kill at any instant, and a reader that never opens a pickle.

Promise: a checkpoint directory is whole or it does not count; the newest valid one wins, all ranks agree on which, and
the ones before it stay until it is committed. Cost: one write, one read (for the hash) and one fsync per file; of what
is on a device one tensor at a time is copied to the host.

A checkpoint `step-00000100/` holds safetensors and JSON files and, written last, `manifest.json` with the size and
xxh3-128 of each. It is written under a temporary name, renamed, and only then are older ones removed. Where weights are
split over ranks, each rank writes its rows into a file of its own; any number of ranks reads them back by rows.
"""

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixres import atomic
from mixres.errors import WorkError
from mixres.models.tensor_files import write_tensors

MANIFEST = "manifest.json"
STATE = "state.json"
_NO_LINKS = (errno.EPERM, errno.EINVAL, errno.ENOTSUP)  # EINVAL: Windows without the right to make them
_BLOCK_BYTES = 1 << 24
_HEADROOM = 1.2  # free space asked for, as a multiple of the tensors
_NAME = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)
T = TypeVar("T")
Gather = Callable[[Any], list[Any]]  # one rank's value -> all ranks' values, on every rank
Groups = Mapping[str, Mapping[str, Tensor]]  # tensors by name, by group


class Checkpoint:
    """A directory whose manifest has been checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        self._files = {name: safe_open(path / name, "pt") for name in sorted(_manifest(path)) if name != STATE}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """The whole tensors saved in `group`, by name: their shapes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self._parts(group):
            for key in file.keys():  # noqa: SIM118 - no dict
                shape = tuple(file.get_slice(key).get_shape())
                shapes[key] = (shapes[key][0] + shape[0], *shape[1:]) if key in shapes else shape
        return shapes

    def tensor(self, group: str, key: str, rows: range | None = None) -> Tensor:
        """Tensor `key` of `group`, whole or only `rows` of it; other rows are not read."""
        pieces, first = [], 0
        for file in self._parts(group):
            if key not in file.keys():  # noqa: SIM118
                continue
            if rows is None:
                pieces.append(file.get_tensor(key))
                continue
            saved = file.get_slice(key)
            count = saved.get_shape()[0]
            low, high = (min(max(edge - first, 0), count) for edge in (rows.start, rows.stop))
            pieces.append(saved[low:high])
            first += count
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of `group`, whole."""
        return {key: self.tensor(group, key) for key in self.shapes(group)}

    def close(self) -> None:
        """Close the files; only the state can be read from here on. An open file keeps its space on the disk."""
        self._files = {}

    def _parts(self, group: str) -> list[Any]:
        """The open files of a group, in the order of the rows they hold."""
        name = re.compile(rf"{group}(-\d+-of-\d+)?\.safetensors")
        return [file for file_name, file in self._files.items() if name.fullmatch(file_name)]


class Checkpoints:
    """The checkpoints under `root`, of which the newest `keep` stay. On several ranks all of them call each method.

    `gather` gives every rank's value to every rank; with one process there is nothing to gather.
    """

    def __init__(
        self, root: Path, *, keep: int, rank: int = 0, ranks: int = 1, gather: Gather = lambda value: [value]
    ) -> None:
        self.root, self.keep, self.rank, self.ranks, self.gather = root, keep, rank, ranks, gather
        self._damaged: set[str] = set()  # names

    def save(self, step: int, whole: Groups, state: Mapping[str, Any], *, rows: Groups | None = None) -> None:
        """Commit a checkpoint after optimizer step `step`.

        `whole` are groups of tensors that are the same on all ranks: rank 0 writes them. `rows` are this rank's rows
        (the first dimension) of tensors that are split over the ranks in their order: every rank writes its own.

        Raises:
            OSError: on all ranks, where one finds the disk full or not writable; older checkpoints are untouched and
                no part of this one is left.
        """
        final = self.root / f"step-{step:08d}"
        partial = self.root / f"{atomic.TMP_PREFIX}{final.name}"
        files = self._files(whole, rows)
        try:
            self._together(lambda: self._begin(partial, files))
            written = self._together(lambda: {name: _write(partial / name, group) for name, group in files.items()})
            manifest = {name: entry for part in written for name, entry in part.items()}
            self._together(lambda: self._commit(partial, final, manifest, {**state, "step": step}))
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint whose files match its manifest; each damaged one is logged as a warning.

        All ranks get the same one: they divide the hashing, and what is damaged for one of them does not count.

        Raises:
            WorkError: on all ranks, where one cannot read a file. That is no damage: the next save would delete a whole
                checkpoint because of a moment's failure.
        """
        for name in reversed(self.gather([path.name for path in self._all()])[0]):
            path = self.root / name
            found = self._together(partial(problem_of, path, rank=self.rank, ranks=self.ranks), _unreadable)
            problems = [problem for problem in found if problem]
            if not problems:
                return Checkpoint(path)
            self._damaged.add(name)
            if self.rank == 0:
                _log.warning("%s is damaged (%s): trying the checkpoint before it", path, problems[0])
        return None

    def any(self) -> bool:
        """Whether there is a checkpoint at all, valid or not."""
        return bool(self.gather(self._all())[0])

    def _files(self, whole: Groups, rows: Groups | None) -> dict[str, dict[str, Tensor]]:
        """What this rank writes, by file name."""
        if rows is None:
            return {f"{group}.safetensors": dict(tensors) for group, tensors in whole.items() if self.rank == 0}
        own = whole if self.rank == 0 else {}
        return {
            f"{group}-{self.rank + 1:05d}-of-{self.ranks:05d}.safetensors": {**own.get(group, {}), **tensors}
            for group, tensors in rows.items()
        }

    def _together(self, act: Callable[[], T], raised: Callable[[OSError], Exception] = lambda error: error) -> list[T]:
        """What `act` gives on each rank; the first rank's failure is raised on all of them, as what `raised` makes."""
        result, failure = None, None
        try:
            result = act()
        except OSError as error:
            failure = raised(error)
        results: list[Any] = self.gather((result, failure))
        for _, other in results:
            if other is not None:
                raise other
        return [result for result, _ in results]

    def _begin(self, partial: Path, files: Groups) -> None:
        needed = sum(self.gather(sum(t.nbytes for group in files.values() for t in group.values())))
        if self.rank != 0:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob(f"{atomic.TMP_PREFIX}*"):  # of a run that was killed: there is one writer
            _remove(stale)
        free = shutil.disk_usage(self.root).free
        if free < _HEADROOM * needed:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {int(_HEADROOM * needed):,} are asked for")
        partial.mkdir()

    def _commit(
        self, partial: Path, final: Path, manifest: dict[str, list[int | str]], state: Mapping[str, Any]
    ) -> None:
        if self.rank != 0:
            return
        atomic.write_bytes(partial / STATE, json.dumps(state, allow_nan=False, indent=2).encode())
        atomic.write_json(partial / MANIFEST, {**manifest, STATE: _digest(partial / STATE)})
        if final.exists():  # an earlier run saved this step and is being repeated
            shutil.rmtree(final)
        partial.rename(final)
        atomic.sync_directory(self.root)
        self._damaged.discard(final.name)
        self._point_latest(final)
        self._rotate(final)

    def _all(self) -> list[Path]:
        found = [p for p in self.root.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def _rotate(self, newest: Path) -> None:
        """Those found damaged, and those beyond `newest`, of a life before, must not push out valid ones."""
        paths = self._all()
        whole = [path for path in paths[: paths.index(newest) + 1] if path.name not in self._damaged]
        for path in [path for path in paths if path not in whole[-self.keep :]]:
            # Renamed first: a kill while files are being deleted must not leave half a checkpoint under its name.
            gone = path.with_name(f"{atomic.TMP_PREFIX}old-{path.name}")
            path.rename(gone)
            _remove(gone)

    def _point_latest(self, final: Path) -> None:
        """A link for people; the run itself reads the folders. Windows and FAT disks may have none."""
        link = self.root / f"{atomic.TMP_PREFIX}latest"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(final.name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            link.replace(self.root / "latest")


def problem_of(path: Path, *, rank: int = 0, ranks: int = 1) -> str | None:
    """Why the files of a checkpoint, of which each of `ranks` reads a part, are not as saved; None if they are.

    Raises:
        OSError: a file that is there cannot be read.
    """
    try:
        manifest = _manifest(path)
        if STATE not in manifest:
            return "its manifest is incomplete"
        for name in sorted(manifest)[rank::ranks]:
            if Path(name).name != name or _digest(path / name) != manifest[name]:
                return f"{name} is not what was saved"
        Checkpoint(path)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        return str(error) or type(error).__name__
    return None


def _unreadable(error: OSError) -> WorkError:
    return WorkError(
        f"resume: {error.filename or 'a checkpoint'} cannot be read ({error.strerror or error}); nothing was deleted: "
        "run the same command again, or remove that checkpoint to resume from the one before it"
    )


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _write(path: Path, tensors: Mapping[str, Tensor]) -> list[int | str]:
    write_tensors(path, tensors, tensors.__getitem__)
    return _digest(path)


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
