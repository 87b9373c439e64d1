"""The figures of `inspect` for a reader: a few lines for a terminal, and one HTML page that stands alone.

Promise: the page shows every figure of the report, each in an element with `data-key` set to its place in
`inspect.json`. Texts are escaped; charts and the input preview are in the page: no script, no network, no other file.
"""

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape

from mixres.console import amount, clock
from mixres.preprocessing.cache_folder import readable_size


def template(name: str) -> Template:
    """A template of this package, with the filters that write figures."""
    loader, escape = PackageLoader("mixres.inspection", ""), select_autoescape(["html.j2"])
    environment = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined)
    environment.filters |= {"figure": shown, "spec": format, "size": readable_size, "amount": amount, "clock": clock}
    return environment.get_template(name)


def page(report: Mapping[str, Any], preview: bytes | None) -> str:
    """The HTML page of a report; `preview` is a PNG of what the encoders see."""
    encoded = preview and base64.b64encode(preview).decode()
    return template("report.html.j2").render(report=report, preview=encoded)


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The report in a terminal's lines."""
    return template("summary.txt.j2").render(report=report).strip().splitlines()


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
