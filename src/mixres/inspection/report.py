"""The figures of `inspect` for a reader: a few lines for a terminal, and one HTML page that stands alone.

Promise: the page shows every figure of the report, each in an element with `data-key` set to its place in
`inspect.json`; charts are inline SVG, the picture is in the page: no script, no network, no other file. Cost: none.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mixres.console import amount, clock
from mixres.inspection.charts import columns, stacked
from mixres.preprocessing.fill import readable_size

Figures = Mapping[str, Any]
_LARGE = 10**6  # bytes that are also said in MB or GB

SECTIONS = {  # in the order of the page: title, and what to know to read it
    "faults": ("Problems", "What keeps the run from training. All that follows is of the examples that are usable."),
    "left_out": ("Left out", "Examples that are not trained, as the configuration says."),
    "notices": ("Notices", "Allowed, and perhaps not meant."),
    "items": ("Items", "What was found, training and held-out data together where it is not said."),
    "sizes": (
        "Sizes",
        "Of the training examples, in pixels. Targets keep their size up to data.resize.target.max_pixels; controls "
        "get the area of the stock pipeline, or data.resize.control.area. Nothing is cropped. Aspect: width / height.",
    ),
    "tokens": (
        "Tokens",
        "Of a training example, as it will be encoded. A control that the text encoder sees counts in the text too.",
    ),
    "plan": (
        "Plan",
        "Sums are over all ranks. Computed tokens include filler; padding share is filler over computed tokens. Idle "
        "share is what ranks wait for the heaviest of each step, if time goes by tokens.",
    ),
    "bucketing": (
        "What buckets would do",
        "The same targets with a trainer that sorts them into buckets of equal size: sides multiples of 64, area up to "
        "data.resize.target.max_pixels, nearest aspect, scaled to cover and cropped at the centre; what does not fill "
        "a batch of samples_per_step is dropped in each epoch. Mean batch: of trainers that keep the rest.",
    ),
    "cache": ("Cache", "All entries, if none is there yet."),
    "memory": (
        "Memory",
        "Bytes on each device, by the formulas of activations.py and memory_estimate.py; activations are those of the "
        "largest microbatch. What a layer needs for a moment, the allocator and the libraries come on top.",
    ),
    "measured": (
        "Measured",
        "The largest microbatch, forward, backward and update. Epoch and run are at its rate for the heaviest rank.",
    ),
    "model": ("Model and versions", ""),
    "inputs": (
        "What the model sees",
        "Behind every resizing, as it is handed to VAE and text encoder; the mask on the token grid.",
    ),
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; } h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
p { margin: .2rem 0 .6rem; color: #555; max-width: 50rem; }
table { border-collapse: collapse; margin: .4rem 0 1rem; } th, td { padding: .15rem .7rem; text-align: right; }
tr { border-bottom: 1px solid #ddd; } th { font-weight: normal; color: #555; } th[scope=row] { text-align: left; }
td.text, ol { text-align: left; overflow-wrap: anywhere; } #problems li { color: #a00; } img, svg { max-width: 100%; }
section, table, svg, img { break-inside: avoid; } h2 { break-after: avoid; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } th, td { padding: .1rem .4rem; }
  img { max-height: 24cm; } @page { margin: 1.5cm; } }
"""


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


def page(report: Figures, picture: bytes | None) -> str:
    """The HTML page of a report; `picture` is a PNG of what the encoders see."""
    base = escape(str(report["model"]["base"]))
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>mixres inspect: {base}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>mixres inspect: {base}</h1>",
    ]
    for key, (title, text) in SECTIONS.items():
        if report.get(key) is None or report[key] == []:
            continue
        parts += [f'<section id="{key}"><h2>{title}</h2>', f"<p>{escape(text)}</p>" if text else ""]
        parts += [*_charts(key, report[key]), *_tables(report[key], key)]
        if key == "inputs" and picture:
            parts.append(f'<img alt="contact sheet" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
        parts.append("</section>")
    return "\n".join([*filter(None, parts), "</body></html>", ""])


def _charts(key: str, figures: Any) -> Iterator[str]:
    """Drawn from figures that stand in the tables below."""
    if key == "tokens":
        kinds = {kind: values["sum"] for kind, values in figures["per_example"].items()}
        parts = {kind: kinds[kind] for kind in kinds if kind not in ("all", "text_without_caption")}
        yield stacked("tokens of all training examples", parts)
        yield columns("examples by all their tokens, a column from its number up", _bins(figures["of_all"]))
    elif key == "sizes":
        yield columns("target files by aspect, width / height, a column from its number up", _bins(figures["aspects"]))
    elif key == "plan":
        epoch = figures["sums"]["epoch"]
        filler = epoch["tokens_computed"] - epoch["tokens"]
        yield stacked("computed tokens of an epoch", {"valid": epoch["tokens"], "filler": filler})
        if len(figures["tokens_of_rank"]) > 1:
            yield columns(
                "computed tokens of each rank in an epoch",
                [(str(row["rank"]), row["epoch"]) for row in figures["tokens_of_rank"]],
            )
    elif key == "memory":
        total = {name: count for name, count in figures["bytes"].items() if "_checkpointing" not in name}
        parts = {name: count for name, count in total.items() if name != "total" and count}
        yield stacked(f"bytes on each device, {readable_size(total['total'])} together", parts)
    elif key == "bucketing":
        yield columns("pictures", [(name, figures[name]) for name in ("cropped", "enlarged", "dropped")])


def _bins(bins: Sequence[Figures]) -> list[tuple[str, int]]:
    return [(shown(row["from"]), row["count"]) for row in bins]


def _tables(value: Any, path: str) -> Iterator[str]:
    """Every figure below `path`: single ones in one table, records of one kind in one each, texts in a list."""
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        entries = "".join(f'<li data-key="{path}.{i}">{escape(entry)}</li>' for i, entry in enumerate(value))
        yield f"<ol>{entries}</ol>"
    elif isinstance(value, list):
        yield _grid({str(i): row for i, row in enumerate(value)}, path, named=False)
    elif all(isinstance(row, dict) for row in value.values()):
        yield _grid(value, path, named=True)
    else:
        single = {key: entry for key, entry in value.items() if not isinstance(entry, dict | list)}
        rows = (
            f'<tr><th scope="row">{_label(key)}</th>{_cell(entry, key, path)}</tr>' for key, entry in single.items()
        )
        yield f"<table>{''.join(rows)}</table>" if single else ""
        for key, entry in value.items():
            if key not in single:
                yield f"<h3>{_label(key)}</h3>"
                yield from _tables(entry, f"{path}.{key}")


def _grid(rows: Mapping[str, Figures], path: str, *, named: bool) -> str:
    """Records with the same keys: a row a record, or where they are few and long a column."""
    keys = list(next(iter(rows.values())))
    if named and len(keys) > 2 * len(rows):
        head = "".join(f"<th>{_label(name)}</th>" for name in rows)
        lines = [
            f'<tr><th scope="row">{_label(key)}</th>'
            + "".join(_cell(row[key], key, f"{path}.{name}") for name, row in rows.items())
            + "</tr>"
            for key in keys
        ]
        return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"
    head = ("<th></th>" if named else "") + "".join(f"<th>{_label(key)}</th>" for key in keys)
    lines = [
        "<tr>"
        + (f'<th scope="row">{_label(name)}</th>' if named else "")
        + "".join(_cell(row[key], key, f"{path}.{name}") for key in keys)
        + "</tr>"
        for name, row in rows.items()
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _cell(value: Any, key: str, path: str) -> str:
    kind = ' class="text"' if isinstance(value, str) else ""
    large = isinstance(value, int) and value >= _LARGE and "bytes" in f"{path}.{key}"
    size = f" ({readable_size(value)})" if large else ""
    return f'<td{kind} data-key="{path}.{key}">{escape(shown(value, key))}{size}</td>'


def _label(key: str) -> str:
    return escape(key.replace("_", " "))


def summary_lines(report: Figures) -> list[str]:
    """The report in a terminal's lines."""
    lines = []
    if "tokens" in report:
        for kind, row in report["tokens"]["per_example"].items():
            lines.append(f"{'tokens' if kind == 'text' else '':<9} {kind.replace('_', ' '):<21} "
                         f"{row['least']:>8,} to {row['most']:>8,}, median {row['median']:>10,.1f}")  # fmt: skip
        lines.append(_size_line(report["sizes"]))
        lines += _bucket_lines(report["bucketing"], report["items"]["training_examples"])
    lines += [*_plan_lines(report["plan"]), *_memory_lines(report["memory"])] if "plan" in report else []
    cache = report["cache"]
    size, free = readable_size(cache["bytes"]), readable_size(cache["free_bytes"])
    lines.append(f"cache     {cache['entries']} entries, {size}; {free} are free")
    if measured := report["measured"]:
        lines += _measured_lines(measured)
    return [*lines, *(f"notice    {notice}" for notice in report["notices"])]


def _size_line(sizes: Figures) -> str:
    pixels = sizes["pixels"]["targets_as_trained"]
    return (
        f"sizes     {sizes['different_target_sizes']} of targets, {pixels['least']:,} to {pixels['most']:,} pixels, "
        f"median {pixels['median']:,.0f}; aspects {sizes['least_aspect']:.2f} to {sizes['most_aspect']:.2f}"
    )


def _plan_lines(plan: Figures) -> list[str]:
    steps, ranks = amount(plan["steps_per_epoch"], "step"), amount(plan["ranks"], "rank")
    lines = [
        f"plan      {steps} an epoch on {ranks}, {amount(plan['samples_per_step'], 'sample')} a step, "
        f"{plan['layout']}, at most {plan['max_tokens']} tokens a microbatch"
    ]
    for name, sums in plan["sums"].items():
        steps = amount(sums["steps"], "step")
        each = f"{sums['fewest_microbatches']} to {sums['most_microbatches']} microbatches a step"
        lines.append(
            f"{name:<9} {steps}: {sums['tokens']:,} tokens, {sums['tokens_computed']:,} computed, "
            f"padding {sums['padding_share']:.1%}, {sums['microbatches']} microbatches ({each}), "
            f"idle {sums['idle_share']:.1%}"
        )
    return lines


def _bucket_lines(buckets: Figures, count: int) -> list[str]:
    return [
        f"buckets   would crop {buckets['cropped']} of {count} targets (by up to {buckets['cropped_most']:.1%} of the "
        f"area), enlarge {buckets['enlarged']} and drop {buckets['dropped']} in each epoch"
    ]


def _memory_lines(memory: Figures | None) -> list[str]:
    if memory is None:
        return []
    parts = {name: count for name, count in memory["bytes"].items() if count and "_checkpointing" not in name}
    own = ", ".join(f"{name.replace('_', ' ')} {readable_size(count)}" for name, count in parts.items())
    other = "without" if memory["gradient_checkpointing"] else "with"
    count = memory["bytes"][f"activations_{other}_checkpointing"]
    return [f"memory    {own} (activations {other} gradient checkpointing: {readable_size(count)})"]


def _measured_lines(measured: Figures) -> list[str]:
    if not measured["fits"]:
        return [f"measured  the largest microbatch does not fit {measured['device']}"]
    peak = "" if measured["peak_bytes"] is None else f", peak {readable_size(measured['peak_bytes'])}"
    return [
        f"measured  {measured['seconds']:.3g} s for the largest microbatch on {measured['device']}{peak}; at this rate "
        f"{clock(measured['epoch_seconds'])} an epoch, {clock(measured['run_seconds'])} the run"
    ]
