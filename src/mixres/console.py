"""What a person watching a run reads: a bar with rates and time left on a terminal, a line now and then elsewhere.

Cost: a few microseconds a step.
"""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

LINE_EVERY_S = 10.0
T = TypeVar("T")


def log(line: str) -> None:
    """One line of the run's own output, past a bar if there is one.

    Where it cannot be written (a log on a full disk, a pipe that nobody reads any more) it goes nowhere, and so do all
    that follow: the run is worth more than its lines.
    """
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(items: Collection[T], verb: str, unit: str, *, enabled: bool, note: Callable[[], str] = str) -> Iterator[T]:
    """The items one by one, with progress: a bar on a terminal, a line now and then elsewhere.

    Rate and time left are those since the first item was done: what it had to load is no part of them. `note` adds to
    the line what else there is to know.
    """
    lines = enabled and not sys.stderr.isatty()
    started = logged = time.perf_counter()
    bar = tqdm(items, desc=verb, unit=unit, disable=lines or not enabled, leave=None)  # below a run's own bar: none
    for done, item in enumerate(bar, 1):
        yield item
        now = time.perf_counter()
        if done == 1:
            started = now
        elif enabled and done < len(items) and now - logged >= LINE_EVERY_S:
            logged = now
            rate = (done - 1) / (now - started)
            line = f"{done}/{len(items)}, {rate:.2f} {unit}/s, left {clock((len(items) - done) / rate)}"
            if lines:
                log("; ".join(filter(None, [f"{verb:<9} {line}", note()])))
            else:
                bar.set_postfix_str(note())


@contextmanager
def progress(total: int, verb: str, unit: str) -> Iterator[Callable[[float], None]]:
    """A function to call with what was done since, in items or parts of one: a bar on a terminal, lines elsewhere."""
    lines, started, done = not sys.stderr.isatty(), time.perf_counter(), 0.0
    logged, shape = started, "{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    with tqdm(total=total, desc=verb, unit=unit, disable=lines, leave=None, bar_format=shape) as bar:

        def advance(part: float) -> None:
            nonlocal done, logged
            bar.update(part)
            done, now = done + part, time.perf_counter()
            if lines and now - logged >= LINE_EVERY_S:
                logged, rate = now, done / (now - started)
                log(f"{verb:<9} {done:.1f}/{total}, {rate:.3f} {unit}/s, left {clock((total - done) / rate)}")

        yield advance


class Progress(tqdm):  # type: ignore[type-arg]  # only its stubs are generic
    """Steps of a run as they end. `enabled` is for the main process."""

    def __init__(self, *, first: int, last: int, enabled: bool) -> None:
        self._lines = enabled and not sys.stderr.isatty()
        bar = enabled and not self._lines
        super().__init__(total=last, initial=first, desc="train", unit="step", disable=not bar, dynamic_ncols=True)
        self._first, self._last = first, last
        self._started = self._logged = time.perf_counter()

    def step(self, line: Mapping[str, Any]) -> None:
        """A step is done; `line` is what `metrics.jsonl` got of it."""
        step, seconds = line["step"], line["seconds"]
        loss = "skipped" if line["loss"] is None else f"{line['loss']:.4f}"
        rates = f"{line['samples'] / seconds:.1f} samples/s"
        self.set_postfix_str(f"loss {loss}, {rates}", refresh=False)
        self.update()
        now = time.perf_counter()
        if self._lines and (now - self._logged >= LINE_EVERY_S or step in (self._first + 1, self._last)):
            self._logged = now
            left = (now - self._started) / (step - self._first) * (self._last - step)
            padding = 1 - line["tokens"] / line["tokens_computed"]
            rates += f", {line['tokens'] / seconds:.0f} tokens/s, padding {padding:.0%}"
            log(f"step {step}/{self._last}  loss {loss}  {rates}, left {clock(left)}")


def amount(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
