"""The figures of `inspect` for a reader: a few lines for a terminal, and one HTML page that stands alone.

Promise: the page shows every figure of the report, each in an element with `data-key` set to its place in
`inspect.json`. Texts are escaped; charts and the input preview are in the page: no script, no network, no other file.
"""

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from mixres.console import amount, clock
from mixres.preprocessing.fill import readable_size

Figures = Mapping[str, Any]


def template() -> Template:
    """The page; its macros draw the charts."""
    environment = Environment(loader=PackageLoader("mixres.inspection", ""), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"figure": shown, "size": readable_size, "zip": lambda *some: list(zip(*some, strict=True))}
    return environment.get_template("report.html.j2")


def page(report: Figures, preview: bytes | None) -> str:
    """The HTML page of a report; `preview` is a PNG of what the encoders see."""
    return template().render(report=report, preview=preview and base64.b64encode(preview).decode())


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


def summary_lines(report: Figures) -> list[str]:
    """The report in a terminal's lines."""
    lines, cache = [], report["cache"]
    if "tokens" in report:
        for kind, row in report["tokens"]["per_example"].items():
            lines.append(f"{'tokens' if kind == 'text' else '':<9} {kind.replace('_', ' '):<21} "
                         f"{row['least']:>8,} to {row['most']:>8,}, median {row['median']:>10,.1f}")  # fmt: skip
        sizes, buckets = report["sizes"], report["bucketing"]
        pixels = sizes["pixels"]["targets_as_trained"]
        lines += [
            f"sizes     {sizes['different_target_sizes']} of targets, {pixels['least']:,} to {pixels['most']:,} pixels"
            f", median {pixels['median']:,.0f}; aspects {sizes['least_aspect']:.2f} to {sizes['most_aspect']:.2f}",
            f"buckets   would crop {buckets['cropped']} of {report['items']['training_examples']} targets (by up to "
            f"{buckets['cropped_most']:.1%} of the area), enlarge {buckets['enlarged']} and drop {buckets['dropped']} "
            "in each epoch",
        ]
    if "plan" in report:
        lines += _plan_lines(report["plan"])
    if memory := report.get("memory"):
        lines.append(_memory_line(memory))
    size, free = readable_size(cache["bytes"]), readable_size(cache["free_bytes"])
    lines.append(f"cache     {cache['entries']} entries, {size}; {free} are free")
    if measured := report["measured"]:
        lines.append(_measured_line(measured))
    return [*lines, *(f"notice    {notice}" for notice in report["notices"])]


def _plan_lines(plan: Figures) -> list[str]:
    steps, ranks = amount(plan["steps_per_epoch"], "step"), amount(plan["ranks"], "rank")
    lines = [
        f"plan      {steps} an epoch on {ranks}, {amount(plan['samples_per_step'], 'sample')} a step, "
        f"{plan['layout']}, at most {plan['max_tokens']} tokens a microbatch"
    ]
    for name, sums in plan["sums"].items():
        each = f"{sums['fewest_microbatches']} to {sums['most_microbatches']} microbatches a step"
        lines.append(
            f"{name:<9} {amount(sums['steps'], 'step')}: {sums['tokens']:,} tokens, {sums['tokens_computed']:,} "
            f"computed, padding {sums['padding_share']:.1%}, {sums['microbatches']} microbatches ({each}), "
            f"idle {sums['idle_share']:.1%}"
        )
    return lines


def _memory_line(memory: Figures) -> str:
    parts = {name: count for name, count in memory["bytes"].items() if count and "_checkpointing" not in name}
    own = ", ".join(f"{name.replace('_', ' ')} {readable_size(count)}" for name, count in parts.items())
    other = "without" if memory["gradient_checkpointing"] else "with"
    count = memory["bytes"][f"activations_{other}_checkpointing"]
    return f"memory    {own} (activations {other} gradient checkpointing: {readable_size(count)})"


def _measured_line(measured: Figures) -> str:
    if not measured["fits"]:
        return f"measured  the largest microbatch does not fit {measured['device']}"
    peak = "" if measured["peak_bytes"] is None else f", peak {readable_size(measured['peak_bytes'])}"
    return (
        f"measured  {measured['seconds']:.3g} s for the largest microbatch on {measured['device']}{peak}; at this rate "
        f"{clock(measured['epoch_seconds'])} an epoch, {clock(measured['run_seconds'])} the run"
    )
