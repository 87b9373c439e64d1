"""Small charts as inline SVG: columns, and parts of a whole in one bar.

Promise: well-formed XML without script or reference; what is drawn is said in words too. Cost: none.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

_COLOURS = ("#4c78a8", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#e45756", "#9d755d", "#bab0ac")
_WIDTH, _HEIGHT, _HEAD, _FOOT, _LINE = 760, 120, 22, 20, 18


def columns(title: str, values: Sequence[tuple[str, int]]) -> str:
    """A column for each (label, count); counts stand above where they fit, labels below, as many as fit."""
    most = max([1, *(count for _, count in values)])
    pitch = _WIDTH / max(1, len(values))
    counted = _width([f"{count:,}" for _, count in values], 11) <= pitch
    every = max(1, math.ceil(_width([label for label, _ in values], 11) / pitch))
    marks = []
    for i, (label, count) in enumerate(values):
        height = _HEIGHT * count / most
        left, top, middle = i * pitch + 4, _HEAD + 16 + _HEIGHT - height, (i + 0.5) * pitch
        marks.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{pitch - 8:.1f}" height="{height:.1f}" '
                     f'fill="{_COLOURS[0]}"><title>{escape(label)}: {count:,}</title></rect>')  # fmt: skip
        if counted:
            marks.append(_text(middle, top - 4, f"{count:,}", 11))
        if i % every == 0:
            marks.append(_text(middle, _HEAD + 16 + _HEIGHT + 14, label, 11))
    return _svg(title, marks, _HEAD + 16 + _HEIGHT + _FOOT)


def stacked(title: str, parts: Mapping[str, int]) -> str:
    """One bar of parts in proportion, and a legend with their shares."""
    total = sum(parts.values()) or 1
    left, marks = 0.0, []
    for i, (name, count) in enumerate(parts.items()):
        width, colour = _WIDTH * count / total, _COLOURS[i % len(_COLOURS)]
        label = f"{name.replace('_', ' ')}: {count:,} ({count / total:.1%})"
        marks.append(f'<rect x="{left:.1f}" y="{_HEAD + 4}" width="{width:.1f}" height="24" fill="{colour}">'
                     f"<title>{escape(label)}</title></rect>")  # fmt: skip
        top = _HEAD + 40 + i * _LINE
        marks.append(f'<rect x="0" y="{top}" width="12" height="12" fill="{colour}"/>')
        marks.append(_text(18, top + 11, label, 12, anchor="start"))
        left += width
    return _svg(title, marks, _HEAD + 44 + len(parts) * _LINE)


def _width(texts: Sequence[str], size: int) -> float:
    """Pixels that the longest takes at the most, and a gap."""
    return size * (0.65 * max(map(len, texts), default=0) + 0.5)


def _text(x: float, y: float, words: str, size: int, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(title: str, marks: Sequence[str], height: int) -> str:
    head = _text(0, 14, title, 13, anchor="start")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="sans-serif"><title>{escape(title)}</title>{head}{"".join(marks)}</svg>'
    )
