"""The pages in a real browser: nothing on its console, everything drawn, at every width, by keyboard, on paper."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixres.inference.compare import Comparison, comparison_page
from mixres.inspection.report import page as inspect_page
from mixres.inspection.thumbnails import Thumbnail
from mixres.pages.page import data_uri, webp
from mixres.report.page import report
from mixres.report.run import PAGE
from support.pages import REPOSITORY, script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
EVIL = """<script>document.title = "taken"</script><img src=x onerror="document.title='taken'">'&"""
BOUND_BYTES, BOUND_S = 20e6, 2.0
benchmark, Browser = script("report_benchmark"), script("browser").Browser
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "[...document.images].filter((i) => i.src && i.offsetParent && !(i.complete && i.naturalWidth)).length"
DRAWN = """[...document.querySelectorAll(".plot")].map((plot) => [...plot.querySelectorAll(".curve")].every(
  (path) => path.getTotalLength() > 0) && plot.clientHeight > 100 && plot.clientWidth > 200)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; the assertion in it names how to install it."""
    with Browser() as one:
        yield one
        assert not one.errors


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 20,000 steps and 100 grids, whose prompts are markup."""
    folder: Path = benchmark.make_run(tmp_path_factory.mktemp("long") / "run", prompt=EVIL)
    (folder / f"{EVIL.replace('/', '')}.txt").write_text("a file")
    (folder / "config.yaml").write_text(EVIL)
    report(folder)
    return folder


def colour(browser: Browser, property: str) -> float:
    """The mean of red, green and blue of the body's text or ground."""
    found = browser.run(f"getComputedStyle(document.body).{property}")
    return float(np.mean([int(part) for part in re.findall(r"\d+", found)[:3]]))


def test_a_long_run_is_small_and_opens_fast_everywhere(browser: Browser, long_run: Path, tmp_path: Path) -> None:
    path = long_run / PAGE
    assert path.stat().st_size < BOUND_BYTES
    for width, dark in ((400, False), (1000, True), (1600, False)):
        browser.open(path.as_uri(), width=width, dark=dark)
        assert browser.run(OVERFLOW) == 0 and browser.run(BROKEN) == 0
        drawn = browser.run(DRAWN)
        assert len(drawn) == 11 and all(drawn)
        assert (colour(browser, "color") > colour(browser, "backgroundColor")) is dark
        browser.screenshot(tmp_path / "page.png", whole=False)
        assert np.asarray(Image.open(tmp_path / "page.png").convert("L"), dtype=float).std() > 10
        assert browser.run("document.title") == "long0/run: done"
    # The work of the page, not the waits of a busy machine: as the browser itself counts it.
    spent = {entry["name"]: entry["value"] for entry in metrics(browser)}
    assert spent["ScriptDuration"] + spent["LayoutDuration"] + spent["RecalcStyleDuration"] < BOUND_S
    assert not browser.errors


def metrics(browser: Browser) -> list[dict[str, float]]:
    browser.call("Performance.enable")
    return browser.call("Performance.getMetrics")["metrics"]


def test_the_keyboard_reaches_every_grid_and_value(browser: Browser, long_run: Path) -> None:
    browser.open((long_run / PAGE).as_uri())
    browser.run("document.querySelector('.timeline input').focus()")
    shown = "[...document.querySelectorAll('.images figure:not([hidden])')].map((figure) => figure.dataset.step)"
    assert browser.run(shown) == ["20000"]
    browser.press("ArrowLeft")
    assert browser.run(shown) == ["19800"]
    browser.press("Home")
    assert browser.run(shown) == ["200"]
    for number in range(100):  # each of them is an image
        assert browser.run(shown) == [str(200 * (number + 1))]
        decoded = "document.querySelector('.images figure:not([hidden]) img').decode().then(() => 1)"
        assert browser.run(decoded) == 1
        browser.press("ArrowRight")
    browser.run(
        "document.querySelector('.timeline').scrollIntoView(); document.querySelectorAll('.timeline button')[0].focus()"
    )
    browser.press("Enter")
    assert browser.run("document.querySelector('.timeline output').textContent") == "step 19,800"
    # Charts: one slider each, and all of them show the step of the one that moves.
    browser.run("document.querySelector('.plot input').focus()")
    at = "[...new Set([...document.querySelectorAll('.at')].map((one) => one.textContent))]"
    assert browser.run(at) == ["step 20,000"]
    browser.press("ArrowLeft")
    assert browser.run(at) == ["step 19,900"]
    browser.press("Home")
    assert browser.run(at) == ["step 0"]
    assert browser.run("document.querySelectorAll('.plot')[1].parentElement.querySelector('b').textContent") == (
        "2.3 at step 0"
    )
    browser.press("Tab")
    assert browser.run("document.activeElement === document.querySelectorAll('.plot input')[1]")
    assert not browser.errors


def test_it_prints(browser: Browser, long_run: Path) -> None:
    browser.open((long_run / PAGE).as_uri(), dark=True)
    paper = browser.pdf()
    pages = len(re.findall(rb"/Type\s*/Page\b", paper))
    assert paper.startswith(b"%PDF") and 2 <= pages <= 12 and len(paper) > 50_000


def test_the_site_follows_the_system_finds_words_and_copies_code(browser: Browser, tmp_path: Path) -> None:
    config = ["-f", str(REPOSITORY / "mkdocs.yml"), "-d", str(tmp_path)]
    build = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "-q", *config]
    subprocess.run(build, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=200)
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:  # its search asks for one
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for width, dark in ((400, True), (1600, False)):
            browser.open(f"http://127.0.0.1:{server.server_port}/index.html", width=width, dark=dark)
            scheme = "document.body.getAttribute('data-md-color-scheme')"
            until(browser, scheme, "slate" if dark else "default")
            assert browser.run(OVERFLOW) == 0 and browser.run(BROKEN) == 0
            assert browser.run("document.images.length") and browser.run(
                "document.querySelector('pre button') !== null"
            )
        browser.run("document.querySelector('#__search').click(); document.querySelector('.md-search__input').focus()")
        browser.call("Input.insertText", text="patch_qwen_model_for_multi_resolution")
        until(
            browser,
            "[...document.querySelectorAll('.md-search-result__link')].some((a) => a.href.includes('api'))",
            True,
        )
        server.shutdown()
    assert not browser.errors


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def until(browser: Browser, script: str, value: object) -> None:
    end = time.monotonic() + 60
    while (found := browser.run(script)) != value:
        assert time.monotonic() < end, found


def test_inspect_and_comparison_have_the_same_style_and_escape_what_users_write(
    browser: Browser, tmp_path: Path
) -> None:
    image = Image.radial_gradient("L").convert("RGB")
    figures = {"model": {"base": EVIL}, "faults": [EVIL], "inputs": [{"name": EVIL, "caption": EVIL}]}
    small = Thumbnail(EVIL, EVIL, EVIL, (data_uri(webp(image, 99, quality=80)), None))
    png = io.BytesIO()
    image.save(png, "PNG")
    pages = {
        "inspect": inspect_page(figures, png.getvalue(), {"faults": [small]}),
        "compare": comparison_page([Comparison(EVIL, {"base": image, "LoRA": image.rotate(90)}, EVIL, EVIL)], EVIL),
    }
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        for width, dark in ((400, True), (1600, False)):
            browser.open(path.as_uri(), width=width, dark=dark)
            assert browser.run(OVERFLOW) == 0 and browser.run(BROKEN) == 0
            assert browser.run("document.title").endswith(EVIL)
            assert (colour(browser, "color") > colour(browser, "backgroundColor")) is dark
    assert not browser.errors


def test_a_page_that_is_served_follows_the_run_and_ends_with_it(browser: Browser, tmp_path: Path) -> None:
    run = benchmark.make_run(tmp_path / "run", steps=40, grids=2, prompt=EVIL)
    words = ["report", str(run), "--serve", "--port", "0"]
    command = [sys.executable, "-c", "import sys; from mixres.cli import main; sys.exit(main())", *words]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as server:
        assert server.stdout
        address = server.stdout.readline().split()[1]
        browser.open(address)
        assert browser.run("document.querySelector('.tiles b').textContent") == "40"
        browser.run("document.querySelector('.timeline input').focus()")
        browser.press("ArrowLeft")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 41, "loss": 0.5, "seconds": 1, "samples": 8, "tokens": 9}) + "\n")
        (run / "samples" / "step-00000040.png").rename(run / "samples" / "step-00000041.png")
        until = time.monotonic() + 60
        while browser.run("document.querySelector('.tiles b').textContent") != "41":
            assert time.monotonic() < until
        assert browser.run("document.querySelector('.timeline output').textContent") == "step 20", (
            "where the reader was"
        )
        assert browser.run("document.activeElement === document.querySelector('.timeline input')")
        assert browser.run("document.title") == f"{tmp_path.name}/run: done" and browser.run(BROKEN) == 0
        assert not browser.errors
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
        assert server.stdout.read().strip() == "report    ended"
    while "no longer answers" not in browser.run("document.querySelector('#live').textContent"):
        assert time.monotonic() < until + 60
    browser.errors.clear()  # that the server is gone
