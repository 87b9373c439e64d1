"""What a person watching a run reads: a bar with rates and time left on a terminal, a line now and then elsewhere.

Cost: a few microseconds a step.
"""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

_LINE_EVERY_S = 10.0


def say(line: str) -> None:
    """One line of the run's own output, past a bar if there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Steps of a run as they end. `enabled` is for the one process that speaks."""

    def __init__(self, *, first: int, last: int, enabled: bool) -> None:
        self._bar = tqdm(
            total=last, initial=first, desc="train", unit="step", disable=not (enabled and sys.stderr.isatty())
        )
        self._lines = enabled and not sys.stderr.isatty()
        self._first, self._last = first, last
        self._started = self._spoken = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, line: Mapping[str, Any]) -> None:
        """A step is done; `line` is what `metrics.jsonl` got of it."""
        step, samples, seconds = line["step"], line["samples"], line["seconds"]
        tokens, padding = line["tokens"], 1 - line["tokens"] / line["tokens_computed"]
        rates = f"{samples / seconds:.1f} samples/s, {tokens / seconds:.0f} tokens/s, padding {padding:.0%}"
        loss = "skipped" if line["loss"] is None else f"{line['loss']:.4f}"
        self._bar.set_postfix_str(f"loss {loss}, {rates}", refresh=False)
        self._bar.update()
        now = time.perf_counter()
        if self._lines and (now - self._spoken >= _LINE_EVERY_S or step in (self._first + 1, self._last)):
            self._spoken = now
            left = (now - self._started) / (step - self._first) * (self._last - step)
            say(f"step {step}/{self._last}  loss {loss}  {rates}, left {_clock(left)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
