"""`metrics.jsonl`, the record of a run that everything else is derived from, and an optional tracker beside it.

Promise: one line a step, each step once, also after a kill and a resume. A tracker that fails never stops training,
and a lost network delays no step. Cost: one write a step.
"""

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from accelerate import Accelerator
from PIL import Image

from mixres import atomic
from mixres.training.run_folder import METRICS

# wandb's own defaults block for 90 s where there is no network, and at the end for as long as there is none.
_WANDB_TIMEOUT_S, _WANDB_FINISH_S = 20, 10
_log = logging.getLogger(__name__)


class MetricsLog:
    """Appends to `metrics.jsonl` in `folder`; None, for all processes but the first, writes nothing.

    Lines beyond `step` are cut when it is opened, all of them where that is 0: they will be written again. `evaluated`:
    the evaluation of `step` is among those that stay. Where the disk is full, lines are kept until it is not.
    """

    def __init__(self, folder: Path | None, *, step: int) -> None:
        self._file: io.FileIO | None = None
        self._pending, self._warned, self.evaluated = b"", False, False
        if folder is None:
            return
        path = folder / METRICS
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines() if step else []
            kept = [line for line in lines if 0 <= _step_of(line) <= step]
            atomic.write_text(path, "".join(f"{line}\n" for line in kept))
            self.evaluated = any(_step_of(line) == step and '"eval/loss"' in line for line in kept)
        self._file = io.FileIO(path, "a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """One line."""
        if self._file is None:
            return
        self._pending += json.dumps(values, allow_nan=False).encode() + b"\n"
        try:
            self._pending = self._pending[self._file.write(self._pending) or 0 :]  # a full disk may take a part
            self._warned = False
        except OSError as error:
            if not self._warned:
                _log.warning("%s cannot be written (%s): its lines wait in memory", self._file.name, error.strerror)
            self._warned = True


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return -1  # a line that a kill cut short


class Tracker:
    """wandb, TensorBoard or trackio through accelerate; `none` does nothing."""

    def __init__(self, accelerator: Accelerator, kind: str, project: str, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator if kind != "none" else None
        try:
            if kind == "wandb":
                self._start_wandb(accelerator, project, config)
            elif kind != "none":
                own = {"trackio": {"config": dict(config), "embed": False}} if kind == "trackio" else {}
                accelerator.init_trackers(project, None, own)
        except Exception as error:  # as in `log`
            _log.warning("the tracker could not be started (%s): the run continues without it", error)
            self._accelerator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Not `end_training`: that takes the process group down, too, which the run still needs.
        for tracker in self._accelerator.trackers if self._accelerator else ():
            try:
                tracker.finish()
            except Exception as failure:  # as in `log`
                _log.warning("the tracker could not be closed: %s", failure)

    @staticmethod
    def _start_wandb(accelerator: Accelerator, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        limits = wandb.Settings(init_timeout=_WANDB_TIMEOUT_S, finish_timeout=_WANDB_FINISH_S)
        # Its own default is the working directory.
        settings = {"settings": limits, "dir": os.environ.get("WANDB_DIR", str(accelerator.logging_dir))}
        try:
            # Without a key wandb would ask at a terminal and wait for an answer.
            asked = accelerator.is_main_process and "WANDB_MODE" not in os.environ
            if asked and not wandb.login(prompt=False, verify=False):
                raise PermissionError("no API key, `wandb login` keeps one")
            accelerator.init_trackers(project, dict(config), {"wandb": settings})
        except Exception as error:  # whatever the network does, metrics.jsonl is the record
            reason = str(error).partition("\n")[0]
            _log.warning("wandb cannot be used (%s): logging offline, `wandb sync` sends it later", reason)
            accelerator.trackers.clear()  # the one that failed is in it, and would be started again
            accelerator.init_trackers(project, dict(config), {"wandb": {**settings, "mode": "offline"}})

    def log(self, values: Mapping[str, Any]) -> None:
        """Scalars of the step `values["step"]`; after the first failure nothing more is sent to the tracker."""
        if self._accelerator:
            scalars = {k: v for k, v in values.items() if k != "step" and isinstance(v, int | float)}
            with self._tolerant():
                self._accelerator.log(scalars, step=values["step"])

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """An image of `step`, for example a sample grid; failures as in `log`."""
        for tracker in self._accelerator.trackers if self._accelerator else ():
            form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with self._tolerant():
                if tracker.name == "trackio":  # accelerate has no images for it
                    import trackio

                    tracker.log({name: trackio.Image(image.convert("RGB"))}, step=step)
                else:
                    tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, **form)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker's failure is not the run's
            _log.warning("the tracker failed (%s): nothing more is sent to it", error)
            self._accelerator = None
