"""`inspect` counts controls on another token grid than their target, and says what to set."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mixres import cli
from mixres.data.manifest import ALIGN


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "differing", "apart"), [("auto", 2, 32), ("never", 3, 32), ("always", 0, 0)])
def test_pairs_on_two_grids_are_counted(rule: str, differing: int, apart: int, small_run: Path, tmp_path: Path) -> None:
    """Controls by an area of 96 x 96 pixels beside targets of 64 x 48; one is 2 % wider than its target."""
    rows = []
    for name, size in (("same", (128, 96)), ("wider", (262, 192)), ("other", (96, 128)), ("told", (96, 128))):
        Image.new("RGB", (64, 48)).save(tmp_path / f"{name}.png")
        Image.new("RGB", size).save(tmp_path / f"{name}-before.png")
        row = {"path_target": f"{name}.png", "path_control": f"{name}-before.png", "prompt": "x"}
        rows.append(row | ({ALIGN: True} if name == "told" else {}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = [f"data.train={tmp_path / 'pairs.jsonl'}", "data.held_out=null", "data.resize.control.area=9216"]
    words += [f"data.resize.control.align={rule}", f"logging.output_dir={tmp_path / 'run'}"]
    assert cli.main(["inspect", "--config", str(small_run), *words, f"cache.cache_dir={tmp_path / 'cache'}"]) == 0
    report = json.loads((tmp_path / "run" / "reports" / "inspect.json").read_text())
    sizes = report["sizes"]
    near = {"auto": 1, "never": 2, "always": 0}[rule]
    assert sizes["controls_of_another_grid"] == differing
    assert sizes["of_them_nearly_of_the_targets_aspect"] == near
    assert sizes["most_pixels_apart_at_an_edge"] == apart
    said = [notice for notice in report["notices"] if "another token grid" in notice]
    assert len(said) == bool(near)
    fix = {"auto": "scale the files of a pair alike", "never": "set data.resize.control.align=auto"}
    assert rule == "always" or fix[rule] in said[0]
