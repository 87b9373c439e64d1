"""The scan: every bad file in one pass, exact sizes and digests, and what a second scan decodes again."""

import json
import os
import shutil
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from PIL import Image

from mixres.data.images import Limits
from mixres.data.scan import Scan, scan
from mixres.data.scan_cache import SETTLED_NS
from support.pairs import PHOTO, names, scanned, write_image, write_pair


def test_a_scan_returns_upright_sizes_and_digests(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    write_image(tmp_path / "control_images/a_control_1.png", (70, 33))
    write_image(tmp_path / "training_images/a_mask.png", (60, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(tmp_path / "training_images/a.png", exif=exif)
    (item,), problems = scanned(tmp_path)
    record = item.record
    assert (item.target_size, item.control_sizes, problems) == ((60, 90), ((48, 64), (70, 33)), [])
    assert all(type(side) is int for size in (item.target_size, *item.control_sizes) for side in size)
    assert record.mask is not None
    files = (record.target, *record.controls, record.mask)
    assert item.digests == tuple(xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files)
    assert not item.flattened


def test_a_scan_lists_every_bad_file_at_once(tmp_path: Path) -> None:
    for stem in "abcdefghij":
        write_pair(tmp_path, stem)
    target, control = tmp_path / "training_images", tmp_path / "control_images"
    (target / "a.png").write_bytes((target / "a.png").read_bytes()[:3000])
    (target / "b.png").write_bytes(b"")
    (control / "c.png").write_bytes(b"<html>")
    write_image(target / "d.png", (900, 100))
    write_image(control / "e.png", (40, 15))
    write_image(target / "f_mask.png", (89, 60))
    write_image(target / "g.png", (4000, 5))
    PHOTO.save(target / "h.gif", save_all=True, append_images=[PHOTO.rotate(90)])
    (target / "h.png").unlink()
    (target / "i.txt").write_bytes(b"\xff")
    records, problems = scanned(tmp_path)
    assert names([r.record for r in records]) == ["j.png"]
    reasons = {
        "training_images/i.txt": "the caption is not UTF-8",
        "training_images/a.png": "is damaged, it does not decode: ",
        "training_images/b.png": "is empty (0 bytes)",
        "control_images/c.png": "is not an image in a supported format",
        "training_images/d.png": "900x100 has aspect 9.0",
        "control_images/e.png": "40x15 is too small: no side may be under 16 pixels; take it out",
        "training_images/f_mask.png": "the mask is 89x60 pixels, its target 90x60; give it the target's size",
        "training_images/g.png": "4000x5 has aspect 800.0",
        "training_images/h.gif": "has 2 frames or pages",
    }
    assert len(problems) == len(reasons)
    for problem, (name, reason) in zip(problems, reasons.items(), strict=True):
        assert problem.startswith(f"ROOT/{name}: {reason}")
        owner = name.replace("control", "training").replace("_mask", "")
        assert problem.endswith(f" (belongs to {owner})") == (name != owner and not name.endswith(".txt"))


def test_a_scan_keeps_the_order_of_sources_and_decodes_a_shared_file_once(tmp_path: Path) -> None:
    write_pair(tmp_path / "one", "b")
    write_pair(tmp_path / "two", "a")
    manifest = tmp_path / "one/training_images/train.jsonl"
    manifest.write_text('{"path_target": "b.png", "prompt": "x"}\n' * 5)
    sources = [str(tmp_path / "one"), str(manifest), str(tmp_path / "two")]
    for workers in (1, 4):
        result = scan(sources, limits=Limits(), workers=workers)
        assert (result.decoded, result.problems) == (4, [])
        assert [r.record.target.name for r in result.records] == [*["b.png"] * 6, "a.png"]  # type: ignore[union-attr]


def test_records_of_one_name_in_two_sources_are_counted_twice(tmp_path: Path) -> None:
    sources = [tmp_path / "one", tmp_path / "two"]
    for source in sources:
        write_pair(source, "good")
        write_pair(source, "both", prompt=None)
        (source / "control_images/both.png").unlink()
    result = scan([str(source) for source in sources], limits=Limits())
    assert (len(result.records), len(result.problems), result.unusable) == (2, 4, 2)


def test_a_scan_counts_transparency_and_a_mask_may_serve_as_a_control(tmp_path: Path) -> None:
    see_through = PHOTO.copy()
    see_through.putalpha(100)
    see_through.save(tmp_path / "t.png")
    write_image(tmp_path / "m.png", mode="L")
    row = {"path_target": "t.png", "path_control": "m.png", "path_mask": "m.png", "prompt": "x"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (item,), problems = scanned(tmp_path / "train.jsonl")
    assert (item.flattened, problems) == (True, [])


def test_min_side_is_the_callers(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    assert len(scanned(tmp_path, min_side=48)[0]) == 1
    assert "48x64 is too small: no side may be under 49 pixels" in scanned(tmp_path, min_side=49)[1][0]


def test_a_scan_is_quiet_where_stderr_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path, "a")
    scanned(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_scan_holds_no_pixels_of_what_it_has_seen(tmp_path: Path) -> None:
    for number in range(12):
        write_pair(tmp_path, f"p{number:02}")
        write_image(tmp_path / f"training_images/p{number:02}.png", (600, 500))
        broken = tmp_path / f"control_images/p{number:02}.png"
        broken.write_bytes(broken.read_bytes()[:100] + bytes(500_000))
    threads = threading.active_count()
    tracemalloc.start()
    result = scan([str(tmp_path)], limits=Limits(), workers=1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(result.problems) == 12
    assert held < 1_000_000, "the bytes of 12 damaged files would be 6 MB"
    assert threading.active_count() <= threads + 1, "at most the bar's own"


# --- A second scan

FILES = 9  # of each folder of `settled`: four pairs and a mask
_folders = iter(range(18))


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pairs that nobody has written to for longer than the clock of a file system is coarse."""
    root = tmp_path_factory.mktemp("settled")
    for folder in map(str, range(18)):
        for number in range(4):
            write_pair(root / folder, f"{number}", suffix="bmp")
            write_image(root / folder / f"training_images/{number}.bmp", (90 + 4 * number, 60))
        write_image(root / folder / "training_images/0_mask.png", mode="L")
    write_pair(root / "pages", "a", suffix="tif")
    PHOTO.save(root / "pages/control_images/a.tif", save_all=True, append_images=[PHOTO.rotate(90)])
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    return root


@pytest.fixture
def data(settled: Path) -> Path:
    return settled / str(next(_folders))


def rescan(data: Path, memo: Path | None, **options: float) -> Scan:
    return scan([str(data)], limits=Limits(**options), memo=memo)  # type: ignore[arg-type]


def test_unchanged_files_are_not_decoded_again_and_give_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = tmp_path / "cache" / "scan.json"
    plain = rescan(data, None)
    first, second = rescan(data, memo), rescan(data, memo)
    assert (first.decoded, first.unchanged) == (FILES, 0) == (plain.decoded, plain.unchanged)
    assert (second.decoded, second.unchanged) == (0, FILES)
    assert plain[:2] == first[:2] == second[:2]
    assert len(first.records) == 4
    assert rescan(data, tmp_path / "other.json").decoded == FILES
    monkeypatch.chdir(data.parent)
    assert rescan(Path(data.name), memo).decoded == 0, "the folder is named in another way"


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:  # the same inode
        file.write(content)


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
    digest = xxhash.xxh3_128_hexdigest((data / name).read_bytes())
    assert after.records[2].digests[which] == digest != before.records[2].digests[which]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    write_pair(tmp_path / "fresh", "a")
    assert [rescan(tmp_path / "fresh", tmp_path / "memo").decoded for _ in range(2)] == [2, 2]


def test_limits_hold_for_what_is_remembered(data: Path, tmp_path: Path) -> None:
    rescan(data, tmp_path / "memo")
    for limits in ({"max_source_pixels": 94 * 60}, {"max_bytes": 284 * 60 + 54}, {"max_aspect": 94 / 60}):
        tight = rescan(data, tmp_path / "memo", **limits)
        assert tight[:2] == rescan(data, None, **limits)[:2], limits
        assert (len(tight.records), tight.unchanged) == (2, FILES - 2), limits
    assert rescan(data, tmp_path / "memo").decoded == 0


def test_the_first_of_several_pages_is_remembered_for_those_who_ask_for_it(settled: Path, tmp_path: Path) -> None:
    asked = [rescan(settled / "pages", tmp_path / "memo", first_frame=True) for _ in range(2)]
    assert [result.decoded for result in asked] == [2, 0]
    assert [item.first_of_several for result in asked for item in result.records] == [True, True]
    (problem,) = rescan(settled / "pages", tmp_path / "memo").problems
    assert "a.tif: has 2 frames or pages" in str(problem)


def test_a_memo_that_cannot_be_written_is_done_without(data: Path, tmp_path: Path) -> None:
    (tmp_path / "memo").mkdir()
    for _ in range(2):
        result = rescan(data, tmp_path / "memo")
        assert (len(result.records), result.decoded) == (4, FILES)


def test_every_scan_reports_a_bad_file(data: Path, tmp_path: Path) -> None:
    (data / "control_images/1.bmp").write_bytes(b"<html>")
    problems = [rescan(data, tmp_path / "memo").problems for _ in range(3)]
    assert "is not an image in a supported format" in str(problems[0][0])
    assert [len(found) for found in problems] == [1, 1, 1]
    assert problems[0] == problems[1] == problems[2]


def test_an_image_and_a_mask_of_one_file_are_two_things(data: Path, tmp_path: Path) -> None:
    row = {"path_target": "training_images/0.bmp", "path_control": "training_images/0_mask.png", "prompt": "x"}
    for name, more, counts in (("image", {}, (2, 0)), ("mask", {"path_mask": row["path_control"]}, (1, 2))):
        (data / f"{name}.jsonl").write_text(json.dumps(row | more))
        result = rescan(data / f"{name}.jsonl", tmp_path / "memo")
        assert (result.decoded, result.unchanged) == counts


def edit(change: Callable[[dict[str, list[object]]], dict[str, object]], **fields: str) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        memo = json.loads(content)
        return json.dumps(memo | fields | {"rows": change(memo["rows"])}).encode()

    return damage


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-20],
    "binary": lambda content: b"\xff\xfe" + bytes(100),
    "no memo": lambda content: b"{}",
    "version": edit(lambda rows: dict(rows), version="another Pillow"),
    "rows": edit(lambda rows: {key: [*row[:4], "wide"] if i else None for i, (key, row) in enumerate(rows.items())}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_memo_counts_as_none_and_is_made_again(
    data: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    memo = tmp_path / "memo"
    good = rescan(data, memo)
    whole = memo.read_bytes()
    memo.write_bytes(damage(whole))
    again = rescan(data, memo)
    assert (again.decoded, again[:2]) == (FILES, good[:2])
    assert (rescan(data, memo).decoded, json.loads(memo.read_bytes())) == (0, json.loads(whole))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_scan_of_100_000_records_decodes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, most_links = 100_000, 50_000  # a file has at most 65,000 names on ext4; to write each anew takes a minute
    folders = [tmp_path / "data" / name for name in ("training_images", "control_images")]
    for first in range(0, count, most_links):
        write_pair(tmp_path / f"seed{first}", "a", suffix="bmp")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for file in (tmp_path / f"seed{first}" / folder.name).iterdir():
                for number in range(first, first + most_links):
                    os.link(file, folder / f"{number}{file.suffix}")
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    seconds = []
    for expected in (2 * count, 0):
        started = time.perf_counter()
        result = rescan(tmp_path / "data", tmp_path / "memo")
        seconds.append(time.perf_counter() - started)
        assert (len(result.records), result.problems, result.decoded) == (count, [], expected)
    with capsys.disabled():
        megabytes = (tmp_path / "memo").stat().st_size / 1e6
        scans = f"scan {seconds[0]:.1f} s, again {seconds[1]:.1f} s"
        sys.stdout.write(f"\n{count} records: {scans}, memo {megabytes:.0f} MB\n")
