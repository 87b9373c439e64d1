"""The figures of `inspect` for a reader: a few lines for a terminal, and one HTML page that stands alone.

Promise: the page shows every figure of the report, each in an element with `data-key` set to its place in
`inspect.json`. Texts are escaped; charts and images are in the page: no script, no network, no other file.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mixres.console import amount, clock
from mixres.inspection.thumbnails import Thumbnail
from mixres.pages.page import data_uri, template
from mixres.preprocessing.cache_folder import readable_size

Thumbnails = Mapping[str, Sequence[Thumbnail]]  # by the section that they stand in


def page(report: Mapping[str, Any], preview: bytes | None, thumbnails: Thumbnails | None = None) -> str:
    """The HTML page of a report; `preview` is a PNG of what the encoders see."""
    encoded = preview and data_uri(preview, "png")
    return _template("report.html.j2").render(report=report, preview=encoded, thumbnails=thumbnails or {})


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The report in a terminal's lines."""
    return _template("summary.txt.j2").render(report=report).strip().splitlines()


def shown(value: Any, key: str = "") -> str:
    """One figure as the page shows it: 12,345, or 4 digits, or per cent, or as it is."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if key.endswith("_share") or key in ("cropped_most", "cropped_mean", "most_change_of_aspect"):
            return f"{100 * value:.4g} %"
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}".removesuffix(".0")
    return str(value)


_template = partial(
    template, "mixres.inspection", figure=shown, spec=format, size=readable_size, amount=amount, clock=clock
)
