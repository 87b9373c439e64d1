"""Files are whole or absent, whatever the name, and a failed write leaves the old content and nothing else."""

import json
import os
from pathlib import Path

import pytest

from mixres import atomic
from support.jobs import longest_file


@pytest.mark.parametrize(
    "name",
    ["plain.txt", "with space", "line\nbreak", "-leading-dash", "图片.bin", "n" * 255, os.fsdecode(b"\xff\xfe.txt")],
    ids=["plain", "space", "newline", "dash", "chinese", "255-bytes", "not-utf8"],
)
def test_write_replaces_the_content_and_leaves_no_other_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    atomic.write_bytes(path, b"first, and longer than the second")
    atomic.write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_exception_in_the_block_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic.write_text(path, "old")

    def fail() -> None:
        with atomic.replace(path) as tmp:
            tmp.write_text("half of the n")
            assert tmp.parent == path.parent, "a rename is atomic inside one directory"
            assert tmp.name.startswith(atomic.TMP_PREFIX)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_system_that_takes_no_more_bytes_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with longest_file(1000), pytest.raises(OSError, match="File too large") as caught:
        atomic.write_bytes(path, bytes(5000))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_keeps_its_line_ends_and_a_new_file_has_the_mode_that_open_would_give(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "ours", "一\r\n二\n")
    assert (tmp_path / "ours").read_bytes() == "一\r\n二\n".encode()
    (tmp_path / "theirs").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_json_takes_any_name_and_refuses_what_has_no_form(tmp_path: Path) -> None:
    value = {"name": os.fsdecode(b"\xff.png"), "prompt": "交换红色和蓝色", "n": [1, 2.5, None, True]}
    atomic.write_json(tmp_path / "a.json", value)
    for wrong in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            atomic.write_json(tmp_path / "a.json", {"x": wrong})
    data = (tmp_path / "a.json").read_bytes()
    assert json.loads(data) == value, "the old file stays"
    assert "交换红色和蓝色".encode() in data
