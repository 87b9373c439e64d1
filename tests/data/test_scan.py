"""The scan: every bad file in one pass, exact sizes and digests, and what a second scan decodes again."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash
from PIL import Image

from mixres.atomic import TMP_PREFIX
from mixres.data import decode
from mixres.data.decode import Share
from mixres.data.images import ImageFacts, Limits
from mixres.data.records import SETTLED_NS
from mixres.data.scan import Scan, scan
from mixres.data.scan_cache import Job, ScanMemo
from mixres.geometry import Size
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
    for stem in "abcdef":
        write_pair(tmp_path, stem)
    target, control = tmp_path / "training_images", tmp_path / "control_images"
    (target / "a.png").write_bytes((target / "a.png").read_bytes()[:3000])
    (control / "b.png").write_bytes(b"<html>")
    write_image(control / "c.png", (40, 15))
    write_image(target / "d_mask.png", (89, 60))
    (target / "e.txt").write_bytes(b"\xff")
    records, problems = scanned(tmp_path)
    assert names([r.record for r in records]) == ["f.png"]
    reasons = {
        "training_images/e.txt": "the caption is not UTF-8",
        "training_images/a.png": "is damaged, it does not decode: ",
        "control_images/b.png": "is not an image in a supported format",
        "control_images/c.png": "40x15 is too small: no side may be under 16 pixels; take it out",
        "training_images/d_mask.png": "the mask is 89x60 pixels, its target 90x60; give it the target's size",
    }
    for problem, (name, reason) in zip(problems, reasons.items(), strict=True):
        assert problem.startswith(f"ROOT/{name}: {reason}")
        owner = name.replace("control", "training").replace("_mask", "")
        assert problem.endswith(f" (belongs to {owner})") == (name != owner)


def test_a_scan_keeps_the_order_of_sources_and_decodes_a_shared_file_once(tmp_path: Path) -> None:
    write_pair(tmp_path / "one", "b")
    write_pair(tmp_path / "two", "a")
    manifest = tmp_path / "one/training_images/train.jsonl"
    manifest.write_text('{"path_target": "b.png", "prompt": "x"}\n' * 5)
    sources = [str(tmp_path / "one"), str(manifest), str(tmp_path / "two")]
    result = scan(sources, limits=Limits())
    assert (result.decoded, result.problems) == (4, [])
    assert [r.record.target.name for r in result.records] == [*["b.png"] * 6, "a.png"]  # type: ignore[union-attr]


def test_records_of_one_name_in_two_sources_are_counted_twice(tmp_path: Path) -> None:
    for source in ("one", "two"):
        write_pair(tmp_path / source, "good")
        write_pair(tmp_path / source, "both", prompt=None)
        (tmp_path / source / "control_images/both.png").unlink()
    result = scan([str(tmp_path / "one"), str(tmp_path / "two")], limits=Limits())
    assert (len(result.records), len(result.problems), result.unusable) == (2, 4, 2)


def test_the_smallest_side_is_the_callers(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    assert scanned(tmp_path, min_side=48)[1] == []
    assert "48x64 is too small: no side may be under 49 pixels" in scanned(tmp_path, min_side=49)[1][0]


FOLDERS = 21
RANKS = 3
_folders = iter(range(FOLDERS))
FILES = 9  # of each folder of `settled`: four pairs and a mask


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pairs that nobody has written to for longer than the clock of a file system is coarse."""
    root = tmp_path_factory.mktemp("settled")
    for folder in map(str, range(FOLDERS)):
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
    memo = tmp_path / "cache" / "scan"
    plain = rescan(data, None)
    first, second = rescan(data, memo), rescan(data, memo)
    assert (first.decoded, first.unchanged) == (FILES, 0) == (plain.decoded, plain.unchanged)
    assert (second.decoded, second.unchanged) == (0, FILES)
    assert plain[:2] == first[:2] == second[:2]
    assert len(first.records) == 4
    assert rescan(data, tmp_path / "other.json").decoded == FILES
    monkeypatch.chdir(data.parent)
    assert rescan(Path(data.name), memo).decoded == 0, "the folder is named in another way"


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


def write_byte(path: Path, hide: bool = False) -> None:
    """Another last byte in the same inode; `hide` as `cp -p`, `rsync -t` or an image tool that keeps the times."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    if hide:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_in_another(path: Path) -> None:
    other = Path(shutil.copy2(path, path.with_name("other.tmp")))
    write_byte(other, hide=True)
    other.replace(path)


CHANGES = {"write": write_byte, "hide": partial(write_byte, hide=True), "swap": swap_in_another}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_byte_is_seen(data: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    before = rescan(data, tmp_path / "memo")
    for which, name in enumerate(("training_images/2.bmp", "control_images/2.bmp")):
        size = (data / name).stat().st_size
        change(data / name)
        assert (data / name).stat().st_size == size
        after = rescan(data, tmp_path / "memo")
        assert after.decoded == 1 + which, "what was just written is not remembered"
        digest = xxhash.xxh3_128_hexdigest((data / name).read_bytes())
        assert after.records[2].digests[which] == digest != before.records[2].digests[which]


def test_an_image_and_a_mask_of_one_file_are_two_things(data: Path, tmp_path: Path) -> None:
    row = {"path_target": "training_images/0.bmp", "path_control": "training_images/0_mask.png", "prompt": "x"}
    for name, more, counts in (("image", {}, (2, 0)), ("mask", {"path_mask": row["path_control"]}, (1, 2))):
        (data / f"{name}.jsonl").write_text(json.dumps(row | more))
        result = rescan(data / f"{name}.jsonl", tmp_path / "memo")
        assert (result.decoded, result.unchanged, result.problems) == (*counts, [])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda part: part[:-20],
    "a bit": lambda part: part[:-3] + bytes([part[-3] ^ 1]) + part[-2:],
    "empty": lambda part: b"",
    "of another reader": lambda part: part.replace(b"Pillow", b"Willow"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_memo_counts_as_none_and_is_made_again(
    data: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    memo = tmp_path / "memo"
    good, (part,) = rescan(data, memo), memo.iterdir()
    part.write_bytes(damage(part.read_bytes()))
    again = rescan(data, memo)
    assert (again.decoded, again[:2]) == (FILES, good[:2])
    assert rescan(data, memo).decoded == 0


def test_parts_that_nobody_writes_any_more_become_part_of_the_next(data: Path, tmp_path: Path) -> None:
    """So do temporary files of killed writers go; no row is lost."""
    memo = tmp_path / "memo"
    sources = [data / f"{number}.jsonl" for number in range(4)]
    for number, source in enumerate(sources):
        row = {"path_target": f"training_images/{number}.bmp", "prompt": "x"}
        source.write_text(json.dumps(row))
        assert rescan(source, memo).decoded == 1
    (memo / f"{TMP_PREFIX}1").touch()
    for path in memo.iterdir():
        os.utime(path, (0, 0))
    (memo / f"{TMP_PREFIX}2").touch()
    assert len([*memo.iterdir()]) == 6 and rescan(data, memo).unchanged == 4
    assert len([*memo.glob("*.rows")]) == 1 and [*memo.glob(f"{TMP_PREFIX}*")] == [memo / f"{TMP_PREFIX}2"]
    assert [rescan(source, memo).decoded for source in [data, *sources]] == [0] * 5
    # A process that saves several times keeps what it has merged, and ranks that merge one part keep it once.
    for path in memo.iterdir():
        os.utime(path, (0, 0))
    ranks = [ScanMemo(memo), ScanMemo(memo)]
    facts = ImageFacts(Size(8, 8), "0" * 32, False, False)
    for number in range(2):
        for rank in ranks:
            image = data / f"control_images/{number}.bmp"
            rank.add(Job(image, is_mask=number == 0), image.stat(), facts, Limits())
            rank.save()
    assert rescan(data, memo).unchanged == FILES
    rows = sum(path.stat().st_size for path in memo.glob("*.rows"))
    for path in [*memo.glob("*.rows")]:
        shutil.copy(path, path.with_name(f"again-{path.name}"))
    for path in memo.iterdir():
        os.utime(path, (0, 0))
    last = ScanMemo(memo)
    last.add(Job(image, is_mask=True), image.stat(), facts, Limits())
    last.save()
    assert len([*memo.iterdir()]) == 1 and sum(path.stat().st_size for path in memo.iterdir()) < rows


@pytest.mark.parametrize("case", ["together", "one is slow", "one is dead", "one comes late", "folders of their own"])
def test_ranks_share_a_scan_and_each_finds_what_one_process_finds(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Whatever becomes of rank 1: nobody waits for it, and what it has written is used."""
    (data / "control_images/3.bmp").write_bytes(b"<html>")
    plain, decoded, inspect = rescan(data, None), Counter[int](), decode.inspect_image

    def counted(path: Path, limits: Limits, *, is_mask: bool) -> ImageFacts:
        rank = limits.max_bytes % RANKS
        decoded[rank] += 1
        time.sleep(0.3 if (rank, case) == (1, "one is slow") else 0.04)
        return inspect(path, limits, is_mask=is_mask)

    def ranks_scan(rank: int) -> Scan:
        memo = tmp_path / (f"memo{rank}" if case == "folders of their own" else "memo")
        limits = Limits(max_bytes=2**29 // RANKS * RANKS + rank)
        return scan([str(data)], limits=limits, memo=memo, share=Share(rank, RANKS), progress=False)

    one_core = SimpleNamespace(cpu_count=int)
    for name, value in {"inspect_image": counted, "_FIRST": 1, "SAVE_S": 0.0, "os": one_core}.items():
        monkeypatch.setattr(decode, name, value)
    late = [1] if case in ("one is dead", "one comes late") else []
    with ThreadPoolExecutor(RANKS) as pool:
        found = [*pool.map(ranks_scan, [rank for rank in range(RANKS) if rank not in late])]
    if case == "one comes late":
        before = decoded.total()
        found.append(ranks_scan(1))
        assert decoded.total() == before + 1, "the file that cannot be used"
    assert all(x[:2] == plain[:2] for x in found)
    assert (decoded.total() == RANKS * FILES) == (case == "folders of their own"), decoded
    assert decoded.total() <= 2 * FILES or case == "folders of their own", "some at once by several, never all"
    assert case != "one is slow" or decoded[1] < FILES - RANKS


def test_a_memo_that_cannot_be_written_is_done_without_and_a_bad_file_is_reported_each_time(
    data: Path, tmp_path: Path
) -> None:
    (data / "control_images/1.bmp").write_bytes(b"<html>")
    (tmp_path / "file").touch()
    for memo, decoded in (("file", FILES), ("file", FILES), ("memo", FILES), ("memo", 1)):
        result = rescan(data, tmp_path / memo)
        assert (len(result.records), result.decoded, len(result.problems)) == (3, decoded, 1)
