"""A second scan: what is not decoded again, and what is although it looks the same."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import skimage.data
import xxhash
from PIL import Image

from mixres.data.images import Limits
from mixres.data.scan import Scan, scan
from mixres.data.scan_cache import SETTLED_NS

PHOTO = Image.fromarray(skimage.data.chelsea()).resize((90, 60))
PAIRS = 4


def write_pair(root: Path, stem: str, size: tuple[int, int] = (90, 60)) -> None:
    for folder in ("training_images", "control_images"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        PHOTO.resize(size).save(root / folder / f"{stem}.bmp")
    (root / f"training_images/{stem}.txt").write_text("make it blue")


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pairs that nobody has written to for longer than the clock of a file system is coarse."""
    root = tmp_path_factory.mktemp("settled")
    for test in range(24):
        for number in range(PAIRS):
            write_pair(root / f"{test}", f"{number}", (90 + 4 * number, 60))
        PHOTO.resize((90, 60)).convert("L").save(root / f"{test}/training_images/0_mask.png")
    write_pair(root / "pages", "a")
    pages = [PHOTO, PHOTO.rotate(90)]
    pages[0].save(root / "pages/control_images/a.tif", save_all=True, append_images=pages[1:])
    (root / "pages/control_images/a.bmp").unlink()
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    return root


_taken = iter(range(24))


@pytest.fixture
def data(settled: Path) -> Path:
    return settled / str(next(_taken))


def rescan(data: Path, memo: Path | None, **options: float) -> Scan:
    return scan([str(data)], limits=Limits(**options), memo=memo)  # type: ignore[arg-type]


FILES = 2 * PAIRS + 1


def test_unchanged_files_are_not_decoded_again_and_say_the_same(data: Path, tmp_path: Path) -> None:
    memo = tmp_path / "cache" / "scan.json"
    plain = rescan(data, None)
    first, second = rescan(data, memo), rescan(data, memo)
    assert (first.decoded, first.unchanged) == (FILES, 0) == (plain.decoded, plain.unchanged)
    assert (second.decoded, second.unchanged) == (0, FILES)
    assert plain[:2] == first[:2] == second[:2]
    assert len(first.records) == PAIRS
    assert rescan(data, tmp_path / "other.json").decoded == FILES


def test_the_memo_holds_where_the_folder_is_named_in_another_way(data: Path, tmp_path: Path) -> None:
    rescan(data, tmp_path / "memo")
    there = os.getcwd()  # noqa: PTH109
    try:
        os.chdir(data.parent)
        assert rescan(Path(data.name), tmp_path / "memo").decoded == 0
    finally:
        os.chdir(there)


def flip_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def flip_byte_and_hide_it(path: Path) -> None:
    """As `cp -p`, `rsync -t` or an image tool that keeps the times."""
    before = path.stat()
    flip_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_in_another(path: Path) -> None:
    before, other = path.stat(), path.with_name("other.tmp")
    shutil.copyfile(path, other)
    flip_byte(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [flip_byte, flip_byte_and_hide_it, swap_in_another])
@pytest.mark.parametrize("name", ["training_images/2.bmp", "control_images/2.bmp"])
def test_a_changed_byte_is_seen(data: Path, tmp_path: Path, change: Callable[[Path], None], name: str) -> None:
    before = rescan(data, tmp_path / "memo")
    size = (data / name).stat().st_size
    change(data / name)
    assert (data / name).stat().st_size == size
    after = rescan(data, tmp_path / "memo")
    assert (after.decoded, after.unchanged) == (1, FILES - 1)
    which = name.startswith("control")
    assert (
        after.records[2].digests[which]
        == xxhash.xxh3_128_hexdigest((data / name).read_bytes())
        != before.records[2].digests[which]
    )


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    write_pair(tmp_path / "fresh", "a")
    assert [rescan(tmp_path / "fresh", tmp_path / "memo").decoded for _ in range(2)] == [2, 2]


def test_limits_hold_for_what_is_remembered(data: Path, tmp_path: Path) -> None:
    rescan(data, tmp_path / "memo")
    for limits in ({"max_source_pixels": 94 * 60}, {"max_bytes": 284 * 60 + 54}, {"max_aspect": 94 / 60}):
        tight = rescan(data, tmp_path / "memo", **limits)
        assert tight[:2] == rescan(data, None, **limits)[:2], limits
        assert len(tight.records) == 2, limits
        assert tight.unchanged == 2 * 2 + 1
    assert rescan(data, tmp_path / "memo").decoded == 0


def test_the_first_of_several_pages_is_remembered_for_those_who_ask_for_it(settled: Path, tmp_path: Path) -> None:
    asked = [rescan(settled / "pages", tmp_path / "memo", first_frame=True) for _ in range(2)]
    assert [found.decoded for found in asked] == [2, 0]
    assert [item.first_of_several for found in asked for item in found.records] == [True, True]
    (problem,) = rescan(settled / "pages", tmp_path / "memo").problems
    assert "a.tif: has 2 frames or pages" in str(problem)


def test_a_memo_that_cannot_be_written_is_done_without(data: Path, tmp_path: Path) -> None:
    (tmp_path / "memo").mkdir()
    for _ in range(2):
        found = rescan(data, tmp_path / "memo")
        assert (len(found.records), found.decoded) == (PAIRS, FILES)


def test_a_bad_file_is_told_by_every_scan(data: Path, tmp_path: Path) -> None:
    (data / "control_images/1.bmp").write_bytes(b"<html>")
    problems = [rescan(data, tmp_path / "memo").problems for _ in range(3)]
    assert len(problems[0]) == 1
    assert "is not a picture in a supported format" in str(problems[0][0])
    assert problems[0] == problems[1] == problems[2]


def test_a_picture_and_a_mask_of_one_file_are_two_things(data: Path, tmp_path: Path) -> None:
    row = {"path_target": "training_images/0.bmp", "path_control": "training_images/0_mask.png", "prompt": "x"}
    (data / "as_picture.jsonl").write_text(json.dumps(row))
    (data / "as_mask.jsonl").write_text(json.dumps(row | {"path_mask": "training_images/0_mask.png"}))
    assert rescan(data / "as_picture.jsonl", tmp_path / "memo").decoded == 2
    assert rescan(data / "as_mask.jsonl", tmp_path / "memo")[2:] == (1, 2, 0)


def other_version(memo: Path) -> None:
    text = memo.read_text().partition(" ")[2].replace('"version": "', '"version": "0')
    memo.write_text(f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}")


def flip_digest(memo: Path) -> None:
    """One character of one digest: still JSON, and a wrong key for the cache."""
    text = memo.read_text()
    at = text.rindex('"', 0, text.rindex('"')) + 1
    memo.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])


def wrong_rows(memo: Path) -> None:
    memo_of = json.loads(memo.read_text().partition(" ")[2])
    rows = {key: [*row[:4], "wide"] if i else None for i, (key, row) in enumerate(memo_of["rows"].items())}
    text = json.dumps(memo_of | {"rows": rows})
    memo.write_text(f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}")


@pytest.mark.parametrize(
    "damage",
    [
        lambda memo: memo.write_bytes(b""),
        lambda memo: memo.write_bytes(memo.read_bytes()[:-20]),
        lambda memo: memo.write_bytes(b"\xff\xfe" + bytes(100)),
        lambda memo: memo.write_text("{}"),
        flip_digest,
        other_version,
        wrong_rows,
    ],
    ids=["empty", "truncated", "binary", "json", "bit", "version", "rows"],
)
def test_a_damaged_memo_counts_as_none_and_is_made_anew(
    data: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    memo = tmp_path / "memo"
    good = rescan(data, memo)
    whole = memo.read_bytes()
    damage(memo)
    assert memo.read_bytes() != whole
    again = rescan(data, memo)
    assert (again.decoded, again[:2]) == (FILES, good[:2])
    assert (rescan(data, memo).decoded, memo.read_bytes()) == (0, whole)


def test_scans_of_one_memo_at_a_time_keep_each_others_rows(settled: Path, tmp_path: Path) -> None:
    folders = [settled / str(next(_taken)) for _ in range(2)] * 2
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda folder: rescan(folder, tmp_path / "memo"), folders))
    assert all(len(found.records) == PAIRS for found in first)
    assert [rescan(folder, tmp_path / "memo").decoded for folder in folders] == [0] * 4
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rescan_of_100_000_examples_decodes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, most_links = 100_000, 50_000  # a file has at most 65,000 names on ext4; to write each anew takes a minute
    folders = [tmp_path / "data" / name for name in ("training_images", "control_images")]
    for first in range(0, count, most_links):
        write_pair(tmp_path / f"seed{first}", "a", (16, 16))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for file in (tmp_path / f"seed{first}" / folder.name).iterdir():
                for number in range(first, first + most_links):
                    os.link(file, folder / f"{number}{file.suffix}")
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    seconds = []
    for expected in (2 * count, 0):
        started = time.perf_counter()
        found = rescan(tmp_path / "data", tmp_path / "memo")
        seconds.append(time.perf_counter() - started)
        assert (len(found.records), found.problems, found.decoded) == (count, [], expected)
    with capsys.disabled():
        megabytes = (tmp_path / "memo").stat().st_size / 1e6
        scans = f"scan {seconds[0]:.1f} s, again {seconds[1]:.1f} s"
        sys.stdout.write(f"\n{count} examples: {scans}, memo {megabytes:.0f} MB\n")
