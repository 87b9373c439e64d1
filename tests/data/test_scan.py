"""Folders and manifests made of real files: what pairs with what, and the line a user reads for everything else."""

import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

import pytest
import skimage.data
import xxhash
from PIL import Image

from mixres.data.images import Limits
from mixres.data.records import EditRecord, Problem
from mixres.data.scan import ScannedRecord, find_records, scan
from mixres.errors import UserError

PHOTO = Image.fromarray(skimage.data.chelsea()).resize((90, 60))
NFC, NFD = normalize("NFC", "é"), normalize("NFD", "é")


def picture(path: Path, size: tuple[int, int] = (90, 60), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PHOTO.resize(size).convert(mode).save(path)
    return path


def two_near(root: Path) -> None:
    control = root / "control_images/b.png"
    for number in (1, 2):
        control.with_name(f"b-{number}.png").write_bytes(control.read_bytes())
    control.unlink()


def pair(root: Path, stem: str, prompt: str | bytes | None = "make it blue") -> None:
    picture(root / f"training_images/{stem}.png")
    picture(root / f"control_images/{stem}.png", (48, 64))
    if prompt is not None:
        (root / f"training_images/{stem}.txt").write_bytes(prompt.encode() if isinstance(prompt, str) else prompt)


def found(source: Path, **options: object) -> tuple[list[EditRecord], list[str]]:
    records, problems = find_records(str(source), **options)  # type: ignore[arg-type]
    return records, [str(problem).replace(f"{source}", "ROOT") for problem in problems]


def scanned(source: Path, min_side: int = 16) -> tuple[list[ScannedRecord], list[str]]:
    records, problems, *_ = scan([str(source)], limits=Limits(), min_side=min_side)
    return records, [str(problem).replace(f"{source}", "ROOT") for problem in problems]


def names(records: list[EditRecord]) -> list[str]:
    return [record.name.removeprefix("training_images/") for record in records]


# --- Folders: what pairs


def test_everything_of_one_example(tmp_path: Path) -> None:
    pair(tmp_path, "a", "  make it blue\n")
    for name in ("control_images/a_control_1.jpg", "control_images/a_control_2.webp", "training_images/a_mask.png"):
        picture(tmp_path / name)
    records, problems = found(tmp_path)
    assert problems == []
    assert records == [
        EditRecord(
            name="training_images/a.png",
            target=tmp_path / "training_images/a.png",
            controls=tuple(tmp_path / "control_images" / c for c in ("a.png", "a_control_1.jpg", "a_control_2.webp")),
            prompt="make it blue",
            mask=tmp_path / "training_images/a_mask.png",
        )
    ]


def test_order_is_that_of_the_names_and_ten_controls_count_as_numbers(tmp_path: Path) -> None:
    for stem in ("b", "a", "sub/c", "B2", "10", "9"):
        pair(tmp_path, stem)
    for number in range(1, 12):
        picture(tmp_path / f"control_images/a_control_{number}.png")
    records, problems = found(tmp_path)
    assert problems == []
    assert names(records) == ["10.png", "9.png", "B2.png", "a.png", "b.png", "sub/c.png"]
    controls = [path.stem for path in records[3].controls]
    assert controls == ["a", *(f"a_control_{number}" for number in range(1, 12))]


def test_names_of_any_kind(tmp_path: Path) -> None:
    stems = ["with space", "line\nbreak", "-dash", "图片", "n" * 251, "dots.in.name", "quote'\"", "%s{}"]
    for stem in stems:
        pair(tmp_path, stem)
    records, problems = scanned(tmp_path)
    assert problems == []
    assert sorted(r.record.target.stem for r in records) == sorted(stems)
    assert all(r.record.name.isprintable() for r in records)


def test_stems_that_look_like_masks_or_controls_but_are_targets(tmp_path: Path) -> None:
    for stem in ("b_mask", "a", "a_control_1"):
        pair(tmp_path, stem)
    records, problems = found(tmp_path)
    assert problems == []
    assert names(records) == ["a.png", "a_control_1.png", "b_mask.png"]
    assert all(r.mask is None and len(r.controls) == 1 for r in records)


def test_unicode_forms_pair_and_twins_stay_apart(tmp_path: Path) -> None:
    picture(tmp_path / f"training_images/caf{NFC}.png")
    picture(tmp_path / f"control_images/caf{NFD}.png")
    picture(tmp_path / f"training_images/caf{NFD}_mask.png")
    (tmp_path / f"training_images/caf{NFD}.txt").write_text("x")
    for form in (NFC, NFD):
        pair(tmp_path, f"twin{form}", prompt=f"of {len(form)}")
    records, problems = found(tmp_path)
    assert problems == []
    assert [r.prompt for r in records] == ["x", "of 2", "of 1"]
    assert records[0].controls == (tmp_path / f"control_images/caf{NFD}.png",), "the path is as it is on disk"
    assert records[0].mask is not None
    assert {r.target.name for r in records[1:]} == {r.controls[0].name for r in records[1:]}
    assert [r.target.name == r.controls[0].name for r in records[1:]] == [True, True]


def test_a_twin_never_takes_the_control_of_the_other(tmp_path: Path) -> None:
    pair(tmp_path, f"a{NFC}")
    pair(tmp_path, f"a{NFD}")
    (tmp_path / f"control_images/a{NFD}.png").unlink()
    records, problems = found(tmp_path)
    assert [r.target.stem for r in records] == [f"a{NFC}"]
    assert problems == [f"ROOT/training_images/a{NFD}.png: has no control image control_images/a{NFD}.*; add it"]


def test_side_files_and_hidden_files_are_no_part_of_the_data(tmp_path: Path) -> None:
    pair(tmp_path, "a")
    for name in (".DS_Store", "._a.png", "metadata.jsonl", "Thumbs.db", "readme.md"):
        (tmp_path / "training_images" / name).write_bytes(b"x")
    (tmp_path / "control_images/a.txt").write_text("captions of controls are not read, and do no harm")
    (tmp_path / "control_images/.cache").mkdir()
    records, problems = found(tmp_path)
    assert (len(records), problems) == (1, [])


# --- Folders: what is wrong


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def move(name: str, other: str) -> Callable[[Path], None]:
    return lambda root: (root / name).rename(root / other) and None


def add(name: str, size: tuple[int, int] = (90, 60)) -> Callable[[Path], None]:
    return lambda root: picture(root / name, size) and None


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(data) and None


EMPTY = "; write one, or set data.empty_caption to use_empty or skip"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        pytest.param(
            remove("control_images/b.png"),
            ["training_images/b.png: has no control image control_images/b.*; add it"],
            id="no_control",
        ),
        pytest.param(
            add("control_images/b_control_2.png"),
            ["training_images/b.png: its control images have a gap: control_images/b_control_1.* is missing; add it"],
            id="gap_in_controls",
        ),
        pytest.param(
            move("control_images/b.png", "control_images/b_control_1.png"),
            ["training_images/b.png: its control images have a gap: control_images/b.* is missing; add it"],
            id="first_control_missing",
        ),
        pytest.param(
            add("control_images/b.jpg"),
            ["training_images/b.png: has several controls: b.jpg, b.png; keep one"],
            id="two_first_controls",
        ),
        pytest.param(
            lambda root: [add(f"control_images/b_control_{n}.png")(root) for n in ("1", "01")],
            ["training_images/b.png: has several controls 1: b_control_01.png, b_control_1.png; keep one"],
            id="two_second_controls",
        ),
        pytest.param(
            add("control_images/z.png"),
            ["control_images/z.png: is a control image without a target of its name; add that, or take it out"],
            id="control_without_target",
        ),
        pytest.param(
            move("control_images/b.png", "control_images/B.png"),
            ["training_images/b.png: has no control image control_images/b.*; B.png may be meant: rename it"],
            id="control_in_other_case",
        ),
        pytest.param(
            move("control_images/b.png", "control_images/b_control.png"),
            ["training_images/b.png: has no control image control_images/b.*; b_control.png may be meant: rename it"],
            id="control_with_a_suffix",
        ),
        pytest.param(
            two_near,
            [
                "control_images/b-2.png: is a control image without a target of its name; add that, or take it out",
                "training_images/b.png: has no control image control_images/b.*; b-1.png may be meant: rename it",
            ],
            id="two_controls_of_nearly_its_name",
        ),
        pytest.param(
            add("training_images/b.jpg"),
            ["training_images/b.jpg: has several targets: b.jpg, b.png; keep one"],
            id="duplicate_stem",
        ),
        pytest.param(
            lambda root: pair(root, "B"),
            [
                "training_images/B.png: the name differs only in case from that of 'b'; rename one",
                "training_images/b.png: the name differs only in case from that of 'B'; rename one",
            ],
            id="case_clash",
        ),
        pytest.param(
            lambda root: [add(f"training_images/b_mask.{suffix}")(root) for suffix in ("png", "jpg")],
            ["training_images/b.png: has several masks: b_mask.jpg, b_mask.png; keep one"],
            id="two_masks",
        ),
        pytest.param(
            remove("training_images/b.txt"),
            ["training_images/b.png: has no caption file b.txt" + EMPTY],
            id="no_caption",
        ),
        pytest.param(
            put("training_images/b.txt", b" \n\t "),
            ["training_images/b.txt: the caption is empty" + EMPTY],
            id="blank_caption",
        ),
        pytest.param(
            put("training_images/b.txt", b"\xef\xbb\xbfmake it blue"),
            ["training_images/b.txt: the caption starts with a byte order mark; save it as UTF-8 without one"],
            id="byte_order_mark",
        ),
        pytest.param(
            put("training_images/b.txt", "make it blue".encode("utf-16")),
            ["training_images/b.txt: the caption starts with a byte order mark; save it as UTF-8 without one"],
            id="utf16",
        ),
        pytest.param(
            put("training_images/b.txt", b"caf\xe9"),
            ["training_images/b.txt: the caption is not UTF-8 (byte 3); save it as UTF-8"],
            id="latin1",
        ),
        pytest.param(
            put("training_images/b.txt", b"a\0b"),
            ["training_images/b.txt: the caption holds a NUL character; take it out"],
            id="nul",
        ),
        pytest.param(
            put("training_images/b.txt", b"x" * (2**20 + 1)),
            ["training_images/b.txt: the caption is over 1048576 bytes long; shorten it"],
            id="caption_too_long",
        ),
        pytest.param(
            lambda root: os.truncate(root / "training_images/b.txt", 2**40),  # sparse: no memory holds it
            ["training_images/b.txt: the caption is over 1048576 bytes long; shorten it"],
            id="caption_of_a_terabyte",
        ),
        pytest.param(
            put("training_images/b.txt", "one \ufefftwo".encode()),
            ["training_images/b.txt: the caption holds a byte order mark (character 4); take it out"],
            id="inner_byte_order_mark",
        ),
        pytest.param(
            lambda root: os.link(root / "training_images/b.txt", root / "training_images/b.TXT"),
            ["training_images/b.png: has several captions: b.TXT, b.txt; keep one"],
            id="two_captions",
        ),
        pytest.param(
            put("training_images/z.txt", b"x"),
            ["training_images/z.txt: is a caption without a target picture of its name; add that, or take it out"],
            id="caption_without_target",
        ),
        pytest.param(
            put("training_images/z.heic", b"x"),
            [
                "training_images/z.heic: is neither a caption (.txt) nor a picture in a supported format "
                "(.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp); convert it, or take it out"
            ],
            id="unsupported_suffix",
        ),
        pytest.param(
            lambda root: os.mkfifo(root / "training_images/z.png"),
            ["training_images/z.png: is not a regular file; take it out"],
            id="pipe",
        ),
        pytest.param(
            lambda root: (root / "training_images/z.png").symlink_to("nowhere"),
            ["training_images/z.png: is a broken link; fix it, or take it out"],
            id="broken_link",
        ),
        pytest.param(
            lambda root: (root / "training_images/loop").symlink_to(root / "training_images"),
            ["training_images/loop: is a link to a folder that it lies in; take it out"],
            id="link_loop",
        ),
        pytest.param(
            lambda root: picture(root / os.fsdecode(b"training_images/\xff.png")),
            ["training_images/\\udcff.png: the name is not UTF-8; rename the file"],
            id="name_not_utf8",
        ),
    ],
)
def test_problem_of_a_folder(tmp_path: Path, spoil: Callable[[Path], object], expected: list[str]) -> None:
    for stem in ("a", "b", "c"):
        pair(tmp_path, stem)
    spoil(tmp_path)
    records, problems = found(tmp_path)
    assert problems == [f"ROOT/{line}" for line in expected]
    unharmed = {"a.png", "c.png"} | (set() if any("/b." in line for line in expected) else {"b.png"})
    assert set(names(records)) == unharmed


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    pair(root, "a")
    picture(tmp_path / "outside/deep/b.png")
    (tmp_path / "outside/deep/b.txt").write_text("x")
    (root / "training_images/b.png").symlink_to(tmp_path / "outside/deep/b.png")
    (root / "training_images/b.txt").symlink_to("../../outside/deep/b.txt")
    (root / "training_images/deep").symlink_to(tmp_path / "outside/deep")
    (root / "control_images/b.png").symlink_to("a.png")
    records, problems = found(root)
    assert names(records) == ["a.png"]
    reason = "is a link out of its data folder; set data.follow_symlinks=true"
    expected = [f"ROOT/training_images/{name}: {reason}" for name in ("b.png", "b.txt", "deep")]
    assert problems[:3] == expected
    assert problems[3:] == [
        "ROOT/control_images/b.png: is a control image without a target of its name; add that, or take it out"
    ]
    records, problems = found(root, follow_symlinks=True)
    assert names(records) == ["a.png", "b.png"]
    assert problems == ["ROOT/training_images/deep/b.png: has no control image control_images/deep/b.*; add it"]


@pytest.mark.parametrize(
    ("policy", "prompts", "skips"), [("error", [], [False] * 2), ("skip", [], [True] * 2), ("use_empty", ["", ""], [])]
)
def test_empty_caption_policy(tmp_path: Path, policy: str, prompts: list[str], skips: list[bool]) -> None:
    pair(tmp_path, "a", "  ")
    pair(tmp_path, "b", None)
    records, problems = find_records(str(tmp_path), empty_caption=policy)  # type: ignore[arg-type]
    assert [r.prompt for r in records] == prompts
    assert [problem.skip for problem in problems] == skips


def test_examples_without_controls(tmp_path: Path) -> None:
    """Text to image: neither the folder `control_images` nor a path of a control is there."""
    pair(tmp_path, "a", "a cat")
    for file in (tmp_path / "control_images").iterdir():
        file.unlink()
    (tmp_path / "control_images").rmdir()
    file = manifest(tmp_path, {"path_target": "pictures/t.png", "path_control": None, "prompt": "a dog"})
    for source, prompt in ((tmp_path, "a cat"), (file, "a dog")):
        (record,), problems = find_records(str(source))
        assert (record.controls, record.prompt, problems) == ((), prompt, [])
    found = scan([str(tmp_path)], limits=Limits())
    assert ([item.control_sizes for item in found.records], found.problems) == ([()], [])


def test_source_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty/training_images").mkdir(parents=True)
    (tmp_path / "empty/control_images").mkdir()
    pair(tmp_path / "one", "a")
    (tmp_path / "half/control_images").mkdir(parents=True)
    (tmp_path / "linked").mkdir()
    for name in ("training_images", "control_images"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "one" / name)
    (tmp_path / "data.txt").write_text("x")
    sources = [str(tmp_path / name) for name in ("none", "data.txt", "one", "half", "empty", "linked")]
    with pytest.raises(UserError) as caught:
        scan(sources, limits=Limits())
    assert [message.replace(str(tmp_path), "ROOT") for message in caught.value.messages] == [
        "ROOT/none: no such folder or manifest; correct the path",
        "ROOT/data.txt: is neither a folder nor a .jsonl or .csv manifest; name one",
        "ROOT/half/training_images: no such folder: make it; data have training_images/ and, for edits, "
        "control_images/",
        "ROOT/empty/training_images: holds no picture (.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp); add some",
        "ROOT/linked/training_images: is a link out of its data folder; set data.follow_symlinks=true",
        "ROOT/linked/control_images: is a link out of its data folder; set data.follow_symlinks=true",
    ]
    assert len(scan([sources[-1]], limits=Limits(follow_symlinks=True))[0]) == 1


def test_sources_that_are_none_are_told_with_the_problems_of_the_others(tmp_path: Path) -> None:
    pair(tmp_path / "one", "a")
    pair(tmp_path / "one", "b", prompt=None)
    (tmp_path / "one/control_images/a.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        scan([str(tmp_path / "none"), str(tmp_path / "one")], limits=Limits())
    assert [message.replace(str(tmp_path), "ROOT") for message in caught.value.messages] == [
        "ROOT/none: no such folder or manifest; correct the path",
        f"ROOT/one/training_images/b.png: has no caption file b.txt{EMPTY}",
        "ROOT/one/control_images/a.png: is empty (0 bytes); copy it again (belongs to training_images/a.png)",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train.{suffix}"
    path.symlink_to("/proc/self/mem")  # opens, and its first byte cannot be had
    with pytest.raises(UserError) as caught:
        find_records(str(path))
    assert caught.value.messages == (f"{path}: cannot be read: Input/output error; make it readable",)


# --- Manifests


def manifest(root: Path, *rows: object) -> Path:
    """`rows` are objects, or bytes that stand in the file as they are."""
    for name, size in {"t.png": (90, 60), "c.png": (48, 64), "c1.png": (33, 70), "m.png": (90, 60)}.items():
        picture(root / "pictures" / name, size)
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path = root / "train.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


GOOD = {"path_target": "pictures/t.png", "path_control": "pictures/c.png", "prompt": "把猫变成蓝色"}


def test_manifest_rows_in_their_order(tmp_path: Path) -> None:
    full = GOOD | {
        "path_control_1": "pictures/c1.png",
        "path_mask": "pictures/m.png",
        "prompt": " two\nlines ",
        "id": 7,
    }
    path = manifest(tmp_path, full, b"", GOOD | {"path_mask": None, "path_control_1": None})
    records, problems = found(path)
    assert problems == []
    pictures = tmp_path / "pictures"
    assert records == [
        EditRecord(
            name="pictures/t.png",
            target=pictures / "t.png",
            controls=(pictures / "c.png", pictures / "c1.png"),
            prompt="two\nlines",
            mask=pictures / "m.png",
        ),
        EditRecord(
            name="pictures/t.png", target=pictures / "t.png", controls=(pictures / "c.png",), prompt="把猫变成蓝色"
        ),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(
            b'{"path_target": ', "the line is not JSON: Expecting value (character 18); correct it", id="not_json"
        ),
        pytest.param(b"[1]", "the line is not a JSON object; write one", id="not_an_object"),
        pytest.param(b"[" * 200_000, "the line is not JSON: ", id="deep"),
        pytest.param(b'{"prompt": "caf\xe9"}', "the line is not UTF-8 (byte 15); save it as UTF-8", id="latin1"),
        pytest.param(b"x" * (2**22 + 10), "the line is over 4194304 bytes long; shorten it", id="long_line"),
        pytest.param(
            b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice; take one out", id="duplicate_key"
        ),
        pytest.param(GOOD | {"path_target": None}, "has no 'path_target'; add it", id="no_target"),
        pytest.param(
            {"path_target": "pictures/t.png", "path_control_1": "pictures/c1.png", "prompt": "x"},
            "has no 'path_control'; add it",
            id="no_first_control",
        ),
        pytest.param(GOOD | {"path_target": 3}, "'path_target' is not a path; write one in quotes", id="number"),
        pytest.param(GOOD | {"path_target": " "}, "'path_target' is not a path; write one in quotes", id="blank"),
        pytest.param(
            GOOD | {"path_control_2": "pictures/c1.png"},
            "its control images have a gap: 'path_control_2' without 'path_control_1'; number them anew",
            id="gap",
        ),
        pytest.param(
            GOOD | {"path_masks": "pictures/m.png"},
            "unknown key 'path_masks'; write one of: path_target, path_control, path_control_1, ..., path_mask",
            id="typo",
        ),
        pytest.param(
            GOOD | {"path_mask": "no.png"}, "'path_mask': no.png does not exist; correct the path", id="absent"
        ),
        pytest.param(
            GOOD | {"path_mask": "pictures"}, "'path_mask': pictures is not a file; correct the path", id="folder"
        ),
        pytest.param(GOOD | {"path_mask": "m" * 300}, "File name too long", id="name_too_long"),
        pytest.param(
            GOOD | {"path_target": "../secret.png"},
            "../secret.png is not below the manifest's folder; move it there",
            id="dots",
        ),
        pytest.param(
            GOOD | {"path_target": "pictures/../../secret.png"},
            "is not below the manifest's folder; move it there",
            id="inner_dots",
        ),
        pytest.param(
            GOOD | {"path_target": "/etc/passwd"}, "is not below the manifest's folder; move it there", id="absolute"
        ),
        pytest.param(GOOD | {"path_target": "link.png"}, "is a link out of the manifest's folder", id="link_out"),
        pytest.param(GOOD | {"path_target": "linked/secret.png"}, "is a link out of", id="linked_folder"),
        pytest.param(
            GOOD | {"path_target": "a\0.png"}, "a\\x00.png holds characters that no path has; correct it", id="nul"
        ),
        pytest.param(
            b'{"path_target": "\\udc80.png", "path_control": "pictures/c.png", "prompt": "x"}',
            "holds characters that no path has; correct it",
            id="surrogate",
        ),
        *(
            pytest.param(
                GOOD | {"path_target": url}, "is a URL; download it, mixres reads local files only", id=url[:5]
            )
            for url in (
                "https://example.org/a.png",
                "FILE:///etc/passwd",
                "s3://bucket/a.png",
                "data:image/png;base64,A",
            )
        ),
        pytest.param(GOOD | {"prompt": 3}, "'prompt' is not a string; write it in quotes", id="prompt_number"),
        pytest.param(GOOD | {"prompt": None}, "has no prompt; write one, or set data.empty_caption", id="prompt_null"),
        pytest.param(GOOD | {"prompt": " "}, "the prompt is empty; write one, or set", id="prompt_blank"),
        pytest.param(
            GOOD | {"prompt": "\ufeffa"}, "the caption holds a byte order mark (character 0)", id="prompt_bom"
        ),
        pytest.param(GOOD | {"prompt": "a\0"}, "the caption holds a NUL character; take it out", id="prompt_nul"),
        pytest.param(
            b'{"path_target": "pictures/t.png", "path_control": "pictures/c.png", "prompt": "\\ud83d"}',
            "the caption is not valid Unicode (character 0); write it anew",
            id="prompt_surrogate",
        ),
    ],
)
def test_problem_of_a_manifest_line(tmp_path: Path, row: object, reason: str) -> None:
    root = tmp_path / "data"
    picture(tmp_path / "secret.png")
    path = manifest(root, GOOD, row, GOOD)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    records, problems = found(path)
    assert len(records) == 2
    assert len(problems) == 1
    assert problems[0].startswith("ROOT:2: ")
    assert reason in problems[0]
    assert problems[0].isprintable()


def test_all_problems_of_one_line_are_listed(tmp_path: Path) -> None:
    bad = {"path_target": "../x", "path_control": "http://x/y.png", "path_mask": "none.png", "prompt": ""}
    _, problems = found(manifest(tmp_path, bad))
    assert len(problems) == 4


def test_byte_order_mark_of_a_manifest(tmp_path: Path) -> None:
    path = manifest(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert found(path)[1] == ["ROOT:1: the file starts with a byte order mark; save it as UTF-8 without one"]


def test_manifest_may_follow_links_but_never_dots(tmp_path: Path) -> None:
    root = tmp_path / "data"
    picture(tmp_path / "outside.png")
    path = manifest(root, GOOD | {"path_target": "link.png"}, GOOD | {"path_target": "../outside.png"})
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    records, problems = found(path, follow_symlinks=True)
    assert names(records) == ["link.png"]
    assert problems == ["ROOT:2: 'path_target': ../outside.png is not below the manifest's folder; move it there"]


def test_manifest_finds_the_other_unicode_form(tmp_path: Path) -> None:
    picture(tmp_path / f"pictures/{NFD}.png")
    records, problems = found(manifest(tmp_path, GOOD | {"path_target": f"pictures/{NFC}.png"}))
    assert problems == []
    assert records[0].target.name == f"{NFD}.png"


# --- The scan


def test_scan_returns_upright_sizes_and_digests(tmp_path: Path) -> None:
    pair(tmp_path, "a")
    picture(tmp_path / "control_images/a_control_1.png", (70, 33))
    picture(tmp_path / "training_images/a_mask.png", (60, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(tmp_path / "training_images/a.png", exif=exif)
    [item], problems = scanned(tmp_path)
    assert problems == []
    assert item.target_size == (60, 90)
    assert item.control_sizes == ((48, 64), (70, 33))
    record = item.record
    assert record.mask is not None
    assert item.digests == tuple(
        xxhash.xxh3_128_hexdigest(p.read_bytes()) for p in (record.target, *record.controls, record.mask)
    )
    assert not item.flattened


def test_scan_lists_every_bad_file_at_once(tmp_path: Path) -> None:
    for stem in "abcdefghij":
        pair(tmp_path, stem)
    target, control = tmp_path / "training_images", tmp_path / "control_images"
    (target / "a.png").write_bytes((target / "a.png").read_bytes()[:3000])
    (target / "b.png").write_bytes(b"")
    (control / "c.png").write_bytes(b"<html>")
    picture(target / "d.png", (900, 100))
    picture(control / "e.png", (40, 15))
    picture(target / "f_mask.png", (89, 60))
    picture(target / "g.png", (4000, 5))
    PHOTO.save(target / "h.gif", save_all=True, append_images=[PHOTO.rotate(90)])
    (target / "h.png").unlink()
    (target / "i.txt").write_bytes(b"\xff")
    records, problems = scanned(tmp_path)
    assert names([r.record for r in records]) == ["j.png"]
    formats = "JPEG, PNG, WEBP, BMP, TIFF, GIF"
    [truncated] = [f for f in problems if "/a.png" in f]
    assert truncated.startswith("ROOT/training_images/a.png: is damaged, it does not decode: ")
    assert sorted(f for f in problems if "/a.png" not in f) == sorted(
        [
            "ROOT/training_images/i.txt: the caption is not UTF-8 (byte 0); save it as UTF-8",
            "ROOT/training_images/b.png: is empty (0 bytes); copy it again",
            f"ROOT/control_images/c.png: is not a picture in a supported format ({formats}); convert it "
            "(belongs to training_images/c.png)",
            "ROOT/training_images/d.png: 900x100 has aspect 9.0, more than data.limits.max_aspect = 8; cut it, or "
            "raise the limit",
            "ROOT/control_images/e.png: 40x15 is too small: no side may be under 16 pixels; take it out "
            "(belongs to training_images/e.png)",
            "ROOT/training_images/f_mask.png: the mask is 89x60 pixels, its target 90x60; give it the target's size "
            "(belongs to training_images/f.png)",
            "ROOT/training_images/g.png: 4000x5 has aspect 800.0, more than data.limits.max_aspect = 8; cut it, or "
            "raise the limit",
            "ROOT/training_images/h.gif: has 2 frames or pages; save the one to train on as a still image, "
            "or set data.first_frame=true",
        ]
    )


def test_scan_keeps_the_order_of_sources_and_decodes_a_shared_control_once(tmp_path: Path) -> None:
    pair(tmp_path / "one", "b")
    pair(tmp_path / "two", "a")
    path = manifest(tmp_path / "three", *[GOOD] * 5)
    sources = [str(tmp_path / "one"), str(path), str(tmp_path / "two")]
    for workers in (1, 4):
        records, problems, *_ = scan(sources, limits=Limits(), workers=workers)
        assert problems == []
        assert [r.record.target.name for r in records] == ["b.png", *["t.png"] * 5, "a.png"]


def test_scan_counts_transparency_and_a_mask_may_serve_as_a_control(tmp_path: Path) -> None:
    path = manifest(tmp_path, GOOD | {"path_mask": "pictures/m.png", "path_control": "pictures/m.png"})
    see_through = PHOTO.copy()
    see_through.putalpha(100)
    see_through.save(tmp_path / "pictures/t.png")
    [item], problems = scanned(path)
    assert problems == []
    assert item.flattened


def test_min_side_is_the_callers(tmp_path: Path) -> None:
    pair(tmp_path, "a")
    assert len(scanned(tmp_path, min_side=48)[0]) == 1
    assert scanned(tmp_path, min_side=49)[1] == [
        "ROOT/control_images/a.png: 48x64 is too small: no side may be under 49 pixels; take it out "
        "(belongs to training_images/a.png)"
    ]


def test_scan_is_quiet_where_stderr_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, "a")
    scanned(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_scan_holds_no_pixels_of_what_it_has_seen(tmp_path: Path) -> None:
    for number in range(12):
        pair(tmp_path, f"p{number:02}")
        picture(tmp_path / f"training_images/p{number:02}.png", (600, 500))
        broken = tmp_path / f"control_images/p{number:02}.png"
        broken.write_bytes(broken.read_bytes()[:100] + bytes(500_000))
    threads = threading.active_count()
    tracemalloc.start()
    result = scan([str(tmp_path)], limits=Limits(), workers=1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(result[1]) == 12
    assert held < 1_000_000, "the bytes of 12 damaged files would be 6 MB"
    assert threading.active_count() <= threads + 1, "at most the bar's own"


def test_problem_reads_as_path_and_reason() -> None:
    assert str(Problem("a/b.png", "is empty (0 bytes); copy it again")) == "a/b.png: is empty (0 bytes); copy it again"
