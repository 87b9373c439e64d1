"""How large the page of a long run is, and how long it takes to write and to open: docs/results/report.json.

    python scripts/report_benchmark.py              # measure
    python scripts/report_benchmark.py RUN          # instead: docs/images/report.png, the page of that run

The run that is measured is made up: 20,000 steps, 100 sample grids of six rows each, held-out losses of six sizes at
nine sigmas. Chromium has to be installed.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from browser import Browser
from PIL import Image

from mixres.report.page import report
from mixres.report.run import PAGE
from mixres.training.sample_sheets import Row, image_grid, save_png

DOCS = Path(__file__).parents[1] / "docs"
RESULT = DOCS / "results" / "report.json"
STEPS, GRIDS, ROWS = 20_000, 100, 6
SIDES, SIGMAS = (256, 384, 512, 768, 1024, 1536), tuple(k / 10 for k in range(1, 10))


def make_run(folder: Path, *, steps: int = STEPS, grids: int = GRIDS, prompt: str = "make it rain") -> Path:
    """A run folder as training leaves it, with numbers and images that are made up."""
    draw = np.random.default_rng(7)
    (folder / "samples").mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    every = max(1, steps // max(1, grids))
    for step in range(steps + 1):
        level = 0.3 + 2 * np.exp(-6 * step / steps)
        if step:
            noise, count = draw.lognormal(sigma=0.4, size=3), int(draw.integers(20_000, 33_000))
            line = {"step": step, "epoch": step // 500, "loss": level * noise[0], "grad_norm": 0.2 * noise[1]}
            line |= {"lr": 1e-4 * min(1, step / 200), "samples": 8, "tokens": count, "tokens_computed": count + 900}
            lines.append(line | {"microbatches": int(draw.integers(1, 4)), "seconds": 2 * noise[2]})
        if step == 10:
            lines[-1] |= {"loss": None, "grad_norm": None, "skipped": [prompt, "b.png"]}
        if step % every == 0:
            losses = {f"eval/resolution_{side}": level * (1 + k / 9) for k, side in enumerate(SIDES)}
            losses |= {f"eval/sigma_{sigma}": level * (1.5 - sigma) for sigma in SIGMAS}
            lines.append({"step": step, "eval/loss": level, **losses})
            lines.append({"step": step, "eval/drift_px": level / 9, "eval/scale_pct": level / 50})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    status = {"state": "done", "exit_code": 0, "reason": None, "verb": "train", "step": steps, "max_train_steps": steps,
              "host": "here", "pid": 1, "started": 0.0, "updated": 1.0}  # fmt: skip
    (folder / "run_status.json").write_text(json.dumps(status), encoding="utf-8")
    (folder / "config.yaml").write_text("model:\n  family: auto\n", encoding="utf-8")
    # Photographs compress worse than anything drawn: noise on waves of a few pixels comes near.
    y, x = np.mgrid[: ROWS * 160, :672]
    drawn = []
    for number in range(min(grids, 5)):
        waves = [np.sin(x / (5 + k + number)) + np.cos(y / (7 + k)) for k in range(3)]
        pixels = 128 + 45 * np.stack(waves, -1) + draw.normal(scale=9, size=(*x.shape, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        cells = [[image.crop((c, r, c + 224, r + 160)) for c in range(0, 672, 224)] for r in range(0, ROWS * 160, 160)]
        grid = image_grid(("control", "target", "prediction"), [Row(tuple(row), prompt, "") for row in cells])
        drawn.append(folder / "samples" / f"step-{(number + 1) * every:08d}.png")
        save_png(grid, drawn[-1], [prompt] * ROWS)
    for number in range(len(drawn), grids):
        shutil.copyfile(drawn[number % 5], folder / "samples" / f"step-{(number + 1) * every:08d}.png")
    return folder


def measure() -> dict[str, Any]:
    """Size, and seconds to write and to open until all is painted, the fastest of five first."""
    with tempfile.TemporaryDirectory() as name, Browser() as browser:
        path = make_run(Path(name) / "run") / PAGE
        started = time.perf_counter()
        report(path.parent)
        written, opened = time.perf_counter() - started, []
        for _ in range(5):
            started = time.perf_counter()
            browser.open(path.as_uri(), width=1600)
            browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
            opened.append(round(time.perf_counter() - started, 2))
        assert not browser.errors, browser.errors
        size, version = path.stat().st_size, browser.call("Browser.getVersion")["product"]
    return {"steps": STEPS, "grids": GRIDS, "page_mb": round(size / 1e6, 1), "write_s": round(written, 1),
            "open_s": sorted(opened), "browser": version, "load": round(os.getloadavg()[0], 1)}  # fmt: skip


def numbers(found: dict[str, Any]) -> str:
    """What was measured, in words."""
    fastest, *_, slowest = found["open_s"]
    return (
        f"The page of a run of {found['steps']:,} steps with {found['grids']} grids has {found['page_mb']} MB. It took "
        f"{found['write_s']} s to\nwrite, and opened in {fastest} to {slowest} s in "
        f"{found['browser'].replace('/', ' ')} on two CPU cores at a load of {found['load']}."
    )


def main() -> None:
    """Measure, or draw."""
    if sys.argv[1:]:
        run = Path(sys.argv[1])
        report(run)
        with Browser() as browser:
            browser.open((run / PAGE).absolute().as_uri(), width=1600, height=1470)
            browser.screenshot(DOCS / "images" / "report.png", whole=False)
        return
    found = measure()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
