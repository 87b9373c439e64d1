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

from mixres import demo
from mixres.data.dataset import find_records, scan
from mixres.data.images import Limits
from mixres.data.records import EditRecord
from mixres.errors import UserError

EDITS = {text: edit for edit in (demo._SWAP, *demo._OTHERS) for text in edit.instructions}


def records(folder: Path) -> list[EditRecord]:
    found, faults = find_records(str(folder))
    assert faults == []
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
    scanned, faults = scan([str(demo_root / "train"), str(demo_root / "held_out")], limits=limits, progress=False)
    assert faults == []
    assert len(scanned) == demo.TRAIN_PAIRS + demo.HELD_OUT_PAIRS


def test_sizes_are_many_and_mixed(demo_root: Path) -> None:
    train, held_out = records(demo_root / "train"), records(demo_root / "held_out")
    assert len(train) >= 64
    assert len(held_out) >= 12
    sizes = [pixels(record.target).shape[:2] for record in train]
    held_out_sizes = [pixels(record.target).shape[:2] for record in held_out]
    assert len(set(sizes)) >= 20
    assert not set(sizes) & set(held_out_sizes)
    assert all(64 <= side <= 320 for size in sizes + held_out_sizes for side in size)
    sides = [side for size in sizes for side in size]
    assert sum(side % 16 != 0 for side in sides) > len(sides) / 2


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_third_of_the_controls_has_another_size_and_aspect(demo_root: Path, part: str) -> None:
    found = records(demo_root / part)
    other = 0
    for record in found:
        (control,) = record.controls
        (height, width), (control_height, control_width) = pixels(record.target).shape[:2], pixels(control).shape[:2]
        aspects = sorted([width / height, control_width / control_height])
        other += (height, width) != (control_height, control_width) and aspects[1] / aspects[0] > 1.2
    assert other == len(found) // 3


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


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_instructions_are_english_and_chinese(demo_root: Path, part: str) -> None:
    prompts = [record.prompt for record in records(demo_root / part)]
    assert set(prompts) <= set(EDITS)
    assert {"swap red and blue", "交换红色和蓝色"} <= set(prompts)
    assert sum(EDITS[prompt] is demo._SWAP for prompt in prompts) > len(prompts) / 2
    if part == "train":
        assert set(prompts) == set(EDITS)


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_target_is_the_named_edit_of_the_centre_of_its_control(demo_root: Path, part: str) -> None:
    """Where the sizes agree to the last bit, elsewhere up to resampling: far nearer than any other edit."""
    for record in records(demo_root / part):
        target, control = pixels(record.target), pixels(record.controls[0])
        edit = EDITS[record.prompt]
        if target.shape == control.shape:
            np.testing.assert_array_equal(edit.apply(control), target)
            continue
        height, width = target.shape[:2]
        scale = min(control.shape[0] / height, control.shape[1] / width)
        top, left = (control.shape[0] - height * scale) / 2, (control.shape[1] - width * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        centre = Image.fromarray(control).resize((width, height), Image.Resampling.LANCZOS, box=box)
        expected = edit.apply(np.asarray(centre)).astype(float)
        error = np.abs(expected - target).mean()
        assert error < 10, record.name
        assert error < 0.5 * np.abs(expected[::-1, ::-1] - target).mean(), record.name


def test_edits_do_what_they_say() -> None:
    red, grey = np.array([[[200, 30, 10]]], dtype=np.uint8), np.array([[[100, 100, 100]]], dtype=np.uint8)
    sepia, brighter, black_and_white = (edit.apply for edit in demo._OTHERS)
    assert demo._SWAP.apply(red).tolist() == [[[10, 30, 200]]]
    assert sepia(grey).tolist() == [[[135, 120, 94]]]
    assert brighter(grey).min() > 130
    assert brighter(np.array([[[0, 255, 0]]], dtype=np.uint8)).tolist() == [[[0, 255, 0]]]
    assert black_and_white(red).tolist() == [[[79, 79, 79]]]


def test_written_once_and_then_soon_done(demo_root: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in demo_root.rglob("*") if file.name != ".demo.lock"}
    code = (
        "import sys; from mixres.demo import main\n"
        "code = main([sys.argv[1]])\n"
        "assert not {'diffusers', 'transformers', 'skimage'} & {*sys.modules}; sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code, demo_root], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{demo_root / part}: there already" for part in demo.PARTS]
    assert {file: file.stat().st_mtime_ns for file in demo_root.rglob("*") if file.name != ".demo.lock"} == before


def test_a_killed_write_is_redone(demo_root: Path, tmp_path: Path) -> None:
    for part in ("base", "held_out"):  # so that only the pictures are written here
        shutil.copytree(demo_root / part, tmp_path / part)
    process = subprocess.Popen([sys.executable, "-m", "mixres.demo", tmp_path])
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
    assert demo.main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"mixres: error: {tmp_path / 'train'} exists and is not the demo's: name another folder, or move it away\n"
    )
    assert captured.out == ""
    assert tree(tmp_path) == {"train/mine.txt": hashlib.sha256(b"mine").hexdigest()}
