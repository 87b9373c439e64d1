"""The demo's data: what it promises of sizes and edits, and that it is written once, whole, and nowhere else."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixres import cli
from mixres.data.images import Limits
from mixres.data.records import EditRecord
from mixres.data.scan import find_records, scan
from mixres.errors import UserError
from mixres.geometry import Size, control_area, control_size, target_size
from mixres.quickstart import data as demo


def records(folder: Path) -> list[EditRecord]:
    found, problems = find_records(str(folder))
    assert problems == []
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def tree(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".demo.lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_scan_takes_every_pair(demo_root: Path) -> None:
    limits = Limits(max_source_pixels=10**6, max_bytes=10**7, max_aspect=8, follow_symlinks=False)
    scanned, problems, *_ = scan([str(demo_root / "train"), str(demo_root / "held_out")], limits=limits, progress=False)
    assert problems == []
    assert len(scanned) == demo.TRAIN_PAIRS + demo.HELD_OUT_PAIRS


def rounded(path: Path) -> Size:
    height, width = pixels(path).shape[:2]
    return target_size(Size(width, height), max_pixels=1 << 20, multiple_of=demo.MULTIPLE_OF)


def test_every_target_has_its_own_size(demo_root: Path) -> None:
    sizes = [pixels(r.target).shape[:2] for part in demo.PARTS for r in records(demo_root / part)]
    assert len(set(sizes)) == len(sizes) == demo.TRAIN_PAIRS + demo.HELD_OUT_PAIRS
    sides = [side for size in sizes for side in size]
    assert sum(side % 16 != 0 for side in sides) > len(sides) / 2


def test_held_out_sizes_and_aspects_are_not_trained_on(demo_root: Path) -> None:
    train, held_out = ({rounded(r.target) for r in records(demo_root / part)} for part in demo.PARTS)
    assert train == set(demo.TRAIN_SIZES)
    assert held_out == set(demo.HELD_OUT_SIZES)
    assert len(held_out) >= 6
    assert not train & held_out
    assert not {size.width / size.height for size in train} & {size.width / size.height for size in held_out}


@pytest.mark.parametrize("part", demo.PARTS)
def test_controls_have_sizes_of_their_own_and_the_grid_of_their_target(demo_root: Path, part: str) -> None:
    for record in records(demo_root / part):
        (control,) = record.controls
        height, width = pixels(control).shape[:2]
        assert (height, width) != pixels(record.target).shape[:2]
        size = rounded(record.target)
        assert control_size(Size(width, height), area=control_area("target", size)) == size


def test_held_out_photographs_are_not_trained_on(demo_root: Path) -> None:
    def photographs(part: str) -> set[str]:
        return {record.target.stem.split("_", 1)[1] for record in records(demo_root / part)}

    assert photographs("train") == {"astronaut", "china", "flower", "rocket", "hubble_deep_field"}
    assert photographs("held_out") == {"chelsea", "coffee"}


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_every_photograph_is_attributed(demo_root: Path, part: str) -> None:
    text = (demo_root / part / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for record in records(demo_root / part):
        assert f"- {record.target.stem.split('_', 1)[1]}: " in text
    assert ("danielbuechele" in text and "vultilion" in text) == (part == "train")


@pytest.mark.parametrize("part", demo.PARTS)
def test_instructions_are_english_and_chinese(demo_root: Path, part: str) -> None:
    prompts = [record.prompt for record in records(demo_root / part)]
    assert set(prompts) == set(demo.PROMPTS) == {"swap red and blue", "交换红色和蓝色"}
    assert min(prompts.count(prompt) for prompt in demo.PROMPTS) > len(prompts) / 5


@pytest.mark.parametrize("part", demo.PARTS)
def test_target_is_its_control_with_red_and_blue_swapped(demo_root: Path, part: str) -> None:
    """Up to resampling: far nearer than to the control itself."""
    for record in records(demo_root / part):
        target, (control,) = pixels(record.target), record.controls
        with Image.open(control) as picture:
            resized = np.asarray(picture.resize(target.shape[1::-1], Image.Resampling.LANCZOS))
        error = np.abs(demo.swap_red_and_blue(resized).astype(float) - target).mean()
        assert error < 3, record.name
        if "hubble" not in record.name:  # hardly any colour
            assert error < 0.2 * np.abs(resized.astype(float) - target).mean(), record.name


def test_written_once_and_then_soon_done(demo_root: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in demo_root.rglob("*") if file.name != ".demo.lock"}
    code = (
        "import sys; from mixres.cli import main\n"
        "code = main(['quickstart', sys.argv[1]])\n"
        "assert not {'diffusers', 'transformers', 'skimage'} & {*sys.modules}; sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code, demo_root], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{demo_root / part}: there already" for part in demo.PARTS]
    assert {file: file.stat().st_mtime_ns for file in demo_root.rglob("*") if file.name != ".demo.lock"} == before


def test_a_killed_write_is_redone(demo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_root / "held_out", tmp_path / "held_out")  # so that only the training pairs are written here
    process = subprocess.Popen([sys.executable, "-c", "from mixres.cli import main; main()", "quickstart", tmp_path])
    half_done = tmp_path / ".tmp-train-new" / "training_images"
    deadline = time.monotonic() + 60
    while not (half_done.is_dir() and len(list(half_done.iterdir())) > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "train").exists()
    demo.write_demo(tmp_path)
    assert tree(tmp_path) == tree(demo_root)


def test_an_older_version_is_written_anew(demo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "held_out" / "demo.json").write_text(json.dumps({"version": 0}), encoding="utf-8")
    (tmp_path / "held_out" / "training_images" / "999_old.png").write_bytes(b"")
    demo.write_demo(tmp_path)
    assert tree(tmp_path) == tree(demo_root)


def test_a_folder_of_the_users_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "train" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError):
        demo.write_demo(tmp_path)
    assert cli.main(["quickstart", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"mixres: error: {tmp_path / 'train'} exists and is not the demo's: name another folder, or move it away\n"
    )
    assert captured.out == ""
    assert tree(tmp_path) == {"train/mine.txt": hashlib.sha256(b"mine").hexdigest()}
