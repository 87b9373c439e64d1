"""The demo's data: what it promises of sizes and edits, and that it is written once, whole, and nowhere else."""

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from mixres import cli
from mixres.data.scan import find_records
from mixres.geometry import Size, control_area, control_size, target_size
from mixres.quickstart import data as demo


class Read(NamedTuple):
    """A pair as it is on disk."""

    photograph: str
    prompt: str
    target: Image.Image
    control: Image.Image

    @property
    def rounded(self) -> Size:
        return target_size(Size(*self.target.size), max_pixels=1 << 20, multiple_of=demo.MULTIPLE_OF)


@pytest.fixture(scope="module")
def pairs(demo_root: Path) -> dict[str, list[Read]]:
    read: dict[str, list[Read]] = {}
    for part in demo.PARTS:
        records, problems = find_records(str(demo_root / part))
        assert problems == []
        read[part] = []
        for record in records:
            (control,) = record.controls
            name = record.target.stem.split("_", 1)[1]
            read[part].append(Read(name, record.prompt, Image.open(record.target), Image.open(control)))
    return read


def tree(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".demo.lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_no_size_aspect_or_photograph_is_in_both_parts(pairs: dict[str, list[Read]]) -> None:
    sizes = [pair.target.size for part in pairs.values() for pair in part]
    assert len(set(sizes)) == len(sizes) == demo.TRAIN_PAIRS + demo.HELD_OUT_PAIRS
    assert sum(side % 16 != 0 for size in sizes for side in size) > len(sizes)  # of twice as many sides
    train, held_out = ({pair.rounded for pair in pairs[part]} for part in demo.PARTS)
    assert (train, held_out) == (set(demo.TRAIN_SIZES), set(demo.HELD_OUT_SIZES))
    assert len(held_out) >= 6 and not train & held_out
    assert not {size.width / size.height for size in train} & {size.width / size.height for size in held_out}
    photographs = [{pair.photograph for pair in pairs[part]} for part in demo.PARTS]
    assert photographs == [{"astronaut", "china", "flower", "rocket", "hubble_deep_field"}, {"chelsea", "coffee"}]


@pytest.mark.parametrize("part", demo.PARTS)
def test_a_target_is_its_control_with_red_and_blue_swapped(
    pairs: dict[str, list[Read]], part: str, demo_root: Path
) -> None:
    """Up to resampling: far nearer than to the control itself. The files differ in size, but become one grid."""
    attribution = (demo_root / part / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert {pair.prompt for pair in pairs[part]} == set(demo.PROMPTS)
    for pair in pairs[part]:
        assert f"- {pair.photograph}: " in attribution
        assert pair.target.mode == pair.control.mode == "RGB" and pair.control.size != pair.target.size
        assert control_size(Size(*pair.control.size), area=control_area("target", pair.rounded)) == pair.rounded
        resized = np.asarray(pair.control.resize(pair.target.size, Image.Resampling.LANCZOS))
        target = np.asarray(pair.target).astype(float)
        error = np.abs(demo.swap_red_and_blue(resized) - target).mean()
        assert error < 3, pair
        if pair.photograph != "hubble_deep_field":  # hardly any colour
            assert error < 0.2 * np.abs(resized - target).mean(), pair


def test_it_is_written_once(demo_root: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in demo_root.rglob("*") if file.name != ".demo.lock"}
    assert demo.write_demo(demo_root) == [f"{demo_root / part}: there already" for part in demo.PARTS]
    assert {file: file.stat().st_mtime_ns for file in demo_root.rglob("*") if file.name != ".demo.lock"} == before


@pytest.mark.slow
def test_a_killed_write_is_redone(demo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_root / "held_out", tmp_path / "held_out")  # so that only the training pairs are written here
    process = subprocess.Popen([sys.executable, "-c", "from mixres.cli import main; main()", "quickstart", tmp_path])
    half_done = tmp_path / ".tmp-train" / "training_images"
    deadline = time.monotonic() + 60
    while not (half_done.is_dir() and len(list(half_done.iterdir())) > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "train").exists()
    demo.write_demo(tmp_path)
    assert tree(tmp_path) == tree(demo_root)


@pytest.mark.parametrize("file", ["mine.txt", "demo.json"])
def test_a_folder_of_the_users_or_of_another_version_is_left_alone(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "train" / file
    mine.parent.mkdir()
    mine.write_text('{"version": 0}', encoding="utf-8")
    assert cli.main(["quickstart", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"mixres: error: {tmp_path / 'train'} exists and is not ")
    assert list(tree(tmp_path)) == [f"train/{file}"]
