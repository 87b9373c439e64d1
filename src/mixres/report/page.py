"""The verb `report`: one page that shows a run in any state, and stands alone.

Promise: the page is under 20 MB whatever the run; the run is read only. Cost: of each sample grid a small copy is
encoded, about 0.1 s, as long as there are at most `_MAX_GRIDS`.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from mixres import atomic
from mixres.console import amount, clock, log
from mixres.errors import UserError, one_line
from mixres.pages.page import data_uri, template, webp
from mixres.report.charts import HEIGHT, charts, shown
from mixres.report.run import PAGE, Run, column, inside, moment, number, read_run

PREVIEW = "reports/inputs.png"
_MAX_GRIDS, _GRID_BYTES = 100, 9 * 2**20  # in one page; in base64 a third is added
_SHAPES = ((1600, 80), (1200, 70), (900, 60), (600, 50), (300, 40), (150, 30))  # side and quality, until it fits
_MAX_SKIPS, _MAX_FILES = 20, 200
_WINDOW = 100  # steps that rates are a mean over


def report(run: Path, *, serve: bool = False, port: int | None = None) -> None:
    """Write the page of the run into its folder; with `serve`, show it on 127.0.0.1 instead, fresh until Ctrl-C.

    Raises:
        UserError: the folder cannot be written, or the port is in use.
    """
    if serve:
        from mixres.report.serve import serve_run

        serve_run(run, port, lambda: page(read_run(run), embed=False))
        return
    path, text = run / PAGE, page(read_run(run))
    try:
        atomic.write_bytes(path, text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; --serve shows the page without a file"
        ) from error
    log(f"report    {path}, {len(text) / 1e6:.1f} MB")


def page(run: Run, *, embed: bool = True) -> bytes:
    """The page of a run; `embed`: with its images in it, else with their addresses, for a server of the folder."""
    filters: dict[str, Callable[..., Any]] = {
        "figure": shown,
        "clock": clock,
        "moment": moment,
        "amount": amount,
        "size": _size,
        "href": _href,
    }
    grids, preview = run.grids, next(inside(run.folder, PREVIEW), None)
    if embed and len(grids) > _MAX_GRIDS:
        grids = [grids[round(k)] for k in np.linspace(0, len(grids) - 1, _MAX_GRIDS)]
    shapes = list(_SHAPES)  # one grid is as large as the next
    each = _GRID_BYTES // max(1, len(grids))
    text = template("mixres.report", "report.html.j2", **filters).render(
        run=run,
        title=one_line("/".join(run.folder.resolve().parts[-2:]).removeprefix("//")),
        now=time.time(),
        live=not embed,
        height=HEIGHT,
        tiles=_tiles(run),
        charts=charts(run),
        grids=[
            {"step": step, "file": f"samples/{path.name}", "image": _image(path, run, each, embed=embed, shapes=shapes)}
            for step, path in grids
        ],
        prompts=_prompts(run.grids[-1][1]) if run.grids else [],
        preview=_image(preview, run, 2**20, embed=embed, shapes=list(_SHAPES)) if preview else None,
        recipe=run.text("config.yaml"),
        skipped=[line for line in run.steps if isinstance(line.get("skipped"), list)],
        max_skips=_MAX_SKIPS,
        files=run.files(),
        max_files=_MAX_FILES,
    )
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate is a byte of a name that is not UTF-8


def _tiles(run: Run) -> list[dict[str, Any]]:
    """The few numbers at the top: name, value, and what stands below it."""
    steps, total = run.steps, number(run.status, "max_train_steps") or 0
    of = f"of {total:,.0f}" if total else ""
    tiles: list[dict[str, Any]] = [
        {"name": "Step", "value": f"{run.last:,}", "note": of, "part": run.last / total if total else None}
    ]
    recent = steps[-min(_WINDOW, max(1, len(steps) // 10)) :]  # of a short run the end, too
    losses = column(recent, "loss")
    if np.isfinite(losses).any():
        tiles.append(
            {
                "name": "Training loss",
                "value": shown(float(np.nanmean(losses))),
                "note": f"mean of the last {amount(len(recent), 'step')}",
            }
        )
    held_out = [(line["step"], value) for line in run.evaluations if (value := number(line, "eval/loss")) is not None]
    if held_out:
        best = min(held_out, key=lambda each: each[1])
        lowest = "; the lowest" if best == held_out[-1] else f"; lowest {shown(best[1])} at {best[0]:,}"
        note = f"at step {held_out[-1][0]:,}{lowest * (len(held_out) > 1)}"
        tiles.append({"name": "Held-out loss", "value": shown(held_out[-1][1]), "note": note})
    seconds, samples, tokens = (float(np.nansum(column(recent, key))) for key in ("seconds", "samples", "tokens"))
    if seconds > 0:
        rates = {
            "name": "Samples a second",
            "value": shown(samples / seconds),
            "note": f"{shown(tokens / seconds)} tokens a second",
        }
        spent = clock(float(np.nansum(column(steps, "seconds"))))
        left = (
            clock(seconds / len(recent) * (total - run.last)) if run.state == "running" and total > run.last else None
        )
        tiles += [rates, {"name": "Time in steps", "value": spent, "note": f"{left} left" if left else ""}]
    skipped = sum(bool(line.get("skipped")) for line in steps)
    if steps:
        note = "not finite, nothing was updated" if skipped else "all numbers were finite"
        tiles.append({"name": "Skipped steps", "value": f"{skipped:,}", "note": note, "bad": bool(skipped)})
    return tiles


def _image(path: Path, run: Run, most: int, *, embed: bool, shapes: list[tuple[int, int]]) -> dict[str, Any] | None:
    """Address and size of an image; None where it cannot be read. Of `shapes` those that are too large go."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            size = {"width": file.width, "height": file.height}
            if not embed:
                return {"src": _href(path.relative_to(run.folder).as_posix()), **size}
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's for damaged files
        return None
    while len(encoded := webp(image, shapes[0][0], quality=shapes[0][1], method=2)) > most and len(shapes) > 1:
        shapes.pop(0)
    return {"src": data_uri(encoded), **size}


def _prompts(path: Path) -> Sequence[str]:
    """What was asked for in the rows of a grid, from its metadata."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            texts = {name: str(text) for name, text in image.info.items() if str(name).startswith("caption-")}
    except (OSError, ValueError, SyntaxError):
        return []
    return [texts[name] for name in sorted(texts, key=lambda name: (len(name), name))]


def _size(count: float) -> str:
    """Bytes for a reader, in units of 1000."""
    power = min(int(math.log10(count) // 3), 3) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def _href(name: str) -> str:
    return quote(os.fsencode(name))
