"""The curves of a run, ready to be drawn: a few hundred points each, in paths that any width stretches.

Promise: of many steps the first, the last, the lowest and the highest of every small part are drawn, so no spike is
lost; the x of a point is its step exactly, its y right to 1e-5 of the axis. What is missing leaves a gap.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mixres.report.run import Line, Run, column

HEIGHT = 10_000  # of the drawing, in units of its own
_PARTS = 300  # of a curve, each with four points at most
_LOG_FROM = 30.0  # how far the highest value stands above the middle where the axis is logarithmic
_NAMES = {
    "eval/drift_px": "shift, pixels",
    "eval/scale_pct": "scale, per cent",
}


@dataclass(frozen=True)
class Curve:
    """Values over steps, NaN where there is none. `kind`: `line`, `faint` for what another smooths, or `points`."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    kind: str = "line"


@dataclass(frozen=True)
class Drawn:
    """A curve as the page has it: an SVG path in steps and 1/`HEIGHT` of the axis from the top, and a dot a point."""

    name: str
    kind: str
    path: str
    dots: str


@dataclass(frozen=True)
class Chart:
    """Axes and curves; ticks are (fraction of the axis from its start, label)."""

    title: str
    first: int
    last: int
    low: float
    high: float
    log: bool
    curves: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[int]  # steps


def charts(run: Run) -> list[Chart]:
    """All charts that the run has numbers for."""
    steps, evaluations = column(run.steps, "step"), run.evaluations
    loss, seconds = column(run.steps, "loss"), column(run.steps, "seconds")
    skipped = [int(line["step"]) for line in run.steps if line.get("skipped")]
    window = min(max(20, len(steps) // 100), max(1, len(steps) // 4))
    mean = f"mean of {window} steps"

    def each(key_or_values: str | np.ndarray, *, smooth: bool = True) -> list[Curve]:
        values = column(run.steps, key_or_values) if isinstance(key_or_values, str) else key_or_values
        if not smooth or window < 3:
            return [Curve("each step", steps, values)]
        return [Curve("each step", steps, values, "faint"), Curve(mean, steps, smoothed(values, window))]

    def evaluated(prefix: str, unit: str = "") -> list[Curve]:
        keys = sorted({key for line in evaluations for key in line if key.startswith(prefix)}, key=_natural)
        return [_points(evaluations, key, f"{key.removeprefix(prefix)}{unit}") for key in keys]

    shift = [
        _points(evaluations, key, name) for key, name in _NAMES.items() if any(key in line for line in evaluations)
    ]
    known = {"eval/loss", *_NAMES}
    other = sorted({key for line in evaluations for key in line if key.startswith("eval/")} - known)
    other = [key for key in other if not key.startswith(("eval/resolution_", "eval/sigma_"))]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate, samples = column(run.steps, "tokens") / seconds, column(run.steps, "samples") / seconds
        parts = column(run.steps, "microbatches")
        padding = 100 * (1 - column(run.steps, "tokens") / column(run.steps, "tokens_computed"))
    numbered = [int(line["step"]) for line in (*run.steps, *evaluations)]
    first = min(numbered, default=0)
    chart = partial(_chart, (first, max([*numbered, first + 1])))
    everything = [
        chart("Training loss", each(loss), marks=skipped),
        chart("Held-out loss", [_points(evaluations, "eval/loss", "all samples")]),
        chart("Held-out loss by size, side in pixels", evaluated("eval/resolution_")),
        chart("Held-out loss by sigma", evaluated("eval/sigma_")),
        chart("Shift and scale of sample grids", shift),
        *(chart(key, [_points(evaluations, key, key)]) for key in other),
        chart("Gradient norm, before the clip", each("grad_norm"), marks=skipped),
        chart("Learning rate", each("lr", smooth=False), from_zero=True),
        chart("Tokens a second, without padding", each(rate), from_zero=True),
        chart("Samples a second", each(samples), from_zero=True),
        *(
            chart(title, each(values), from_zero=True)
            for title, values in (("Padding, per cent of the tokens computed", padding), ("Microbatches a step", parts))
            if len(set(values[np.isfinite(values)])) > 1  # what never changes is no curve
        ),
    ]
    return [found for found in everything if found]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over `window` steps around each one; what is missing does not count."""
    there = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(there, values, 0.0), there))
    middle = np.arange(len(values))
    low, high = np.maximum(middle - window // 2, 0), np.minimum(middle + window - window // 2, len(values))
    with np.errstate(invalid="ignore"):
        found: np.ndarray = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(there, found, math.nan)


def thinned(values: np.ndarray, parts: int = _PARTS) -> np.ndarray:
    """The positions to draw: all of few values; of many, first, lowest, highest and last of each part."""
    if len(values) <= 4 * parts:
        return np.arange(len(values))
    kept: set[int] = set()
    edges = np.linspace(0, len(values), parts + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        there = start + np.flatnonzero(np.isfinite(values[start:end]))
        if len(there):
            part = values[there]
            kept |= {int(there[0]), int(there[part.argmin()]), int(there[part.argmax()]), int(there[-1])}
        else:
            kept.add(int(start))  # a gap
    return np.array(sorted(kept))


def shown(value: float) -> str:
    """A number on an axis or a tile: four digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _points(lines: Sequence[Line], key: str, name: str) -> Curve:
    own = [line for line in lines if key in line]
    return Curve(name, column(own, "step"), column(own, key), "points")


def _chart(
    span: tuple[int, int],
    title: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = False,
    marks: Sequence[int] = (),
) -> Chart | None:
    curves = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not curves:
        return None
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    low, high = float(values.min()), float(values.max())
    log = low > 0 and high > _LOG_FROM * float(np.median(values))
    low, high, y_ticks = _log_axis(low, high) if log else _axis(min(low, 0.0) if from_zero else low, high)
    drawn = [_drawn(curve, low, high, log=log) for curve in curves]
    return Chart(title, *span, low, high, log, drawn, _steps_axis(*span), y_ticks, list(marks))


def _drawn(curve: Curve, low: float, high: float, *, log: bool) -> Drawn:
    scale = np.log if log else np.asarray
    fractions = (scale(curve.values) - scale(low)) / (scale(high) - scale(low))
    kept, path, gap = thinned(curve.values), [], True
    dots = []
    for position in kept:
        if gap_here := not np.isfinite(fractions[position]):
            gap = gap_here
            continue
        at = f"{int(curve.steps[position])} {HEIGHT * (1 - fractions[position]):.1f}"
        path.append(f"{'M' if gap else 'L'}{at}")
        dots.append(f"M{at}h0")
        gap = False
    few = curve.kind == "points" or len(dots) == 1
    return Drawn(curve.name, curve.kind, "".join(path), "".join(dots) if few else "")


def _steps_axis(first: int, last: int) -> list[tuple[float, str]]:
    step = max(1, round(_nice((last - first) / 4)))
    ticks = range(-(-first // step) * step, last + 1, step)
    return [((tick - first) / (last - first), f"{tick:,}") for tick in ticks]


def _axis(low: float, high: float) -> tuple[float, float, list[tuple[float, str]]]:
    """A linear axis between round numbers, and its ticks."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    step = _nice((high - low) / 4)
    start, end = math.floor(low / step), math.ceil(high / step)
    ticks = [((k - start) / (end - start), shown(k * step)) for k in range(start, end + 1)]
    return start * step, end * step, ticks


def _log_axis(low: float, high: float) -> tuple[float, float, list[tuple[float, str]]]:
    """As `_axis`, of powers of ten, with what lies between them where those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 5)
    between = (1, 2, 5) if len(powers) <= 4 else (1,)
    values = [k * 10.0**power for power in powers if power % every == 0 for k in between]
    start, end = (
        max(v for v in [10.0 ** powers[0], *values] if v <= low),
        min(v for v in [*values, 10.0 ** powers[-1]] if v >= high),
    )
    ticks = [(math.log(v / start) / math.log(end / start), shown(v)) for v in values if start <= v <= end]
    return start, end, ticks


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(k for k in (1, 2, 5, 10) if k * power >= step * (1 - 1e-9))


def _natural(key: str) -> tuple[float, str]:
    try:
        return float(key.rpartition("_")[2]), key
    except ValueError:
        return math.inf, key
