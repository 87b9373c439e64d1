"""Folders of real files: what pairs with what, and the line a user reads for everything else."""

import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from unicodedata import normalize

import pytest

from mixres.data.folder import _stem
from mixres.data.images import Limits
from mixres.data.records import EditRecord
from mixres.data.scan import find_records, scan
from mixres.errors import UserError
from support.pairs import EMPTY, found, names, scanned, write_image, write_pair

NFC, NFD = normalize("NFC", "é"), normalize("NFD", "é")
FORMATS = ".bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp"


def test_every_file_of_one_record(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", "  make it blue\n")
    for name in ("control_images/a_control_1.jpg", "control_images/a_control_2.webp", "training_images/a_mask.png"):
        write_image(tmp_path / name)
    controls = tuple(tmp_path / "control_images" / c for c in ("a.png", "a_control_1.jpg", "a_control_2.webp"))
    target, mask = tmp_path / "training_images/a.png", tmp_path / "training_images/a_mask.png"
    assert found(tmp_path) == ([EditRecord("training_images/a.png", target, controls, "make it blue", mask)], [])


def test_order_is_that_of_the_names_and_ten_controls_count_as_numbers(tmp_path: Path) -> None:
    for stem in ("b", "a", "sub/c", "B2", "10", "9", f"e{NFD}", "ez"):
        write_pair(tmp_path, stem)
    for number in range(1, 12):
        write_image(tmp_path / f"control_images/a_control_{number}.png")
    records, problems = found(tmp_path)
    assert problems == []
    stems = ["10", "9", "B2", "a", "b", f"e{NFD}", "ez", "sub/c"]
    assert names(records) == [f"{stem}.png" for stem in stems], "as they stand on disk, not in form NFC"
    assert [path.stem for path in records[3].controls] == ["a", *(f"a_control_{number}" for number in range(1, 12))]


def test_stems_are_the_same_on_windows() -> None:
    """Else the order of the records, and with it the plan, would differ: a backslash comes after letters."""
    path, folder = "d\\training_images\\sub\\a.b.png", "d\\training_images"
    assert _stem(PureWindowsPath("C:\\", path), PureWindowsPath("C:\\", folder)) == "sub/a.b"


def test_stems_that_look_like_masks_or_controls_but_are_targets(tmp_path: Path) -> None:
    for stem in ("b_mask", "a", "a_control_1"):
        write_pair(tmp_path, stem)
    records, problems = found(tmp_path)
    assert (names(records), problems) == (["a.png", "a_control_1.png", "b_mask.png"], [])
    assert all(r.mask is None and len(r.controls) == 1 for r in records)


def test_unicode_forms_pair_and_paths_stay_as_on_disk(tmp_path: Path) -> None:
    write_image(tmp_path / f"training_images/caf{NFC}.png")
    write_image(tmp_path / f"control_images/caf{NFD}.png")
    write_image(tmp_path / f"training_images/caf{NFD}_mask.png")
    (tmp_path / f"training_images/caf{NFD}.txt").write_text("x")
    (record,), problems = found(tmp_path)
    assert (record.prompt, problems) == ("x", [])
    assert record.controls == (tmp_path / f"control_images/caf{NFD}.png",)
    assert record.mask == tmp_path / f"training_images/caf{NFD}_mask.png"


def test_side_files_and_hidden_files_are_no_part_of_the_data(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    for name in (".DS_Store", "._a.png", "metadata.jsonl", "Thumbs.db", "readme.md"):
        (tmp_path / "training_images" / name).write_bytes(b"x")
    (tmp_path / "control_images/a.txt").write_text("captions of controls are not read, and do no harm")
    (tmp_path / "control_images/.cache").mkdir()
    records, problems = found(tmp_path)
    assert (len(records), problems) == (1, [])


T, C = "training_images", "control_images"
Spoil = Callable[[Path], object]


def add(*names: str) -> Spoil:
    return lambda root: [write_image(root / name) for name in names]


def write(name: str, data: bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(data)


def link(name: str, to: str) -> Spoil:
    return lambda root: (root / name).symlink_to(to)


SPOILED: dict[str, tuple[Spoil, list[str]]] = {  # the beginnings of the problems
    "no control": (lambda root: (root / f"{C}/b.png").unlink(), [f"{T}/b.png: has no control image {C}/b.*; add it"]),
    "gap": (add(f"{C}/b_control_2.png"), [f"{T}/b.png: its control images have a gap: {C}/b_control_1.* is missing"]),
    "first control missing": (
        lambda root: (root / f"{C}/b.png").rename(root / f"{C}/b_control_1.png"),
        [f"{T}/b.png: its control images have a gap: {C}/b.* is missing; add it"],
    ),
    "control without target": (add(f"{C}/z.png"), [f"{C}/z.png: is a control image without a target of its name; add"]),
    "several of each": (
        lambda root: (
            add(f"{T}/b.jpg", f"{T}/b_mask.png", f"{T}/b_mask.jpg", f"{C}/b.jpg")(root),
            add(f"{C}/b_control_1.png", f"{C}/b_control_01.png")(root),
            os.link(root / f"{T}/b.txt", root / f"{T}/b.TXT"),
        ),
        [
            f"{T}/b.jpg: has several {role}; keep one"
            for role in (
                "targets: b.jpg, b.png",
                "captions: b.TXT, b.txt",
                "masks: b_mask.jpg, b_mask.png",
                "controls: b.jpg, b.png",
                "controls 1: b_control_01.png, b_control_1.png",
            )
        ],
    ),
    "one name in two Unicode forms": (
        lambda root: [write_pair(root, f"b{form}") for form in (NFC, NFD)],
        [
            f"{T}/b{NFD}.png: has several {role}: b{NFD}.{suffix}, b{NFC}.{suffix}; keep one"
            for role, suffix in (("targets", "png"), ("captions", "txt"), ("controls", "png"))
        ],
    ),
    "case clash": (
        lambda root: write_pair(root, "B"),
        [f"{T}/{a}.png: the name differs only in case from that of '{b}'; rename one" for a, b in ("Bb", "bB")],
    ),
    "no caption": (lambda root: (root / f"{T}/b.txt").unlink(), [f"{T}/b.png: has no caption file b.txt{EMPTY}"]),
    "blank caption": (write(f"{T}/b.txt", b" \n\t "), [f"{T}/b.txt: the caption is empty{EMPTY}"]),
    "byte order mark": (write(f"{T}/b.txt", b"\xef\xbb\xbfblue"), [f"{T}/b.txt: the caption holds a byte order mark"]),
    "Latin-1": (write(f"{T}/b.txt", b"caf\xe9"), [f"{T}/b.txt: the caption is not UTF-8; save it as UTF-8"]),
    "NUL": (write(f"{T}/b.txt", b"a\0b"), [f"{T}/b.txt: the caption holds a NUL character; take it out"]),
    "caption too long": (
        lambda root: os.truncate(root / f"{T}/b.txt", 2**40),  # sparse: no memory holds it
        [f"{T}/b.txt: the caption is over 1048576 bytes long; shorten it"],
    ),
    "caption without target": (write(f"{T}/z.txt", b"x"), [f"{T}/z.txt: is a caption without a target image of its"]),
    "unsupported suffix": (write(f"{T}/z.heic", b"x"), [f"{T}/z.heic: is neither a caption (.txt) nor an image in a"]),
    "pipe": (lambda root: os.mkfifo(root / f"{T}/z.png"), [f"{T}/z.png: is not a regular file; take it out"]),
    "broken link": (link(f"{T}/z.png", "nowhere"), [f"{T}/z.png: is a broken link; fix it, or take it out"]),
    "link loop": (link(f"{T}/loop", f"../{T}"), [f"{T}/loop: is a link to a folder that it lies in; take it out"]),
    "name not UTF-8": (add(os.fsdecode(b"training_images/\xff.png")), [f"{T}/\\udcff.png: the name is not UTF-8"]),
}


@pytest.mark.parametrize(("spoil", "expected"), SPOILED.values(), ids=SPOILED)
def test_problem_of_a_folder(tmp_path: Path, spoil: Spoil, expected: list[str]) -> None:
    for stem in ("a", "b", "c"):
        write_pair(tmp_path, stem)
    spoil(tmp_path)
    records, problems = found(tmp_path)
    assert len(problems) == len(expected)
    assert all(one.startswith(f"ROOT/{other}") for one, other in zip(problems, expected, strict=True)), problems
    hurt = any("/b." in line for line in expected)
    assert names(records) == (["a.png", "c.png"] if hurt else ["a.png", "b.png", "c.png"])


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_pair(root, "a")
    write_image(tmp_path / "outside/deep/b.png")
    (tmp_path / "outside/deep/b.txt").write_text("x")
    (root / f"{T}/b.png").symlink_to(tmp_path / "outside/deep/b.png")
    (root / f"{T}/b.txt").symlink_to("../../outside/deep/b.txt")
    (root / f"{T}/deep").symlink_to(tmp_path / "outside/deep")
    (root / f"{C}/b.png").symlink_to("a.png")
    records, problems = found(root)
    assert names(records) == ["a.png"]
    reason = "is a link out of its data folder; set data.follow_symlinks=true"
    expected = [f"ROOT/{T}/{name}: {reason}" for name in ("b.png", "b.txt", "deep")]
    assert problems[:-1] == expected and problems[-1].startswith(f"ROOT/{C}/b.png: is a control image without a target")
    records, problems = found(root, follow_symlinks=True)
    assert names(records) == ["a.png", "b.png"]
    assert problems == [f"ROOT/{T}/deep/b.png: has no control image {C}/deep/b.*; add it"]


@pytest.mark.parametrize(
    ("policy", "prompts", "skips"), [("error", [], [False] * 2), ("skip", [], [True] * 2), ("use_empty", ["", ""], [])]
)
def test_empty_caption_policy(tmp_path: Path, policy: str, prompts: list[str], skips: list[bool]) -> None:
    write_pair(tmp_path, "a", "  ")
    write_pair(tmp_path, "b", None)
    records, problems = find_records(str(tmp_path), empty_caption=policy)  # type: ignore[arg-type]
    assert [r.prompt for r in records] == prompts
    assert [problem.skip for problem in problems] == skips


def test_sources_that_cannot_be_read_are_named_with_the_problems_of_the_others(tmp_path: Path) -> None:
    for folder in ("empty", "half"):
        (tmp_path / folder / C).mkdir(parents=True)
    (tmp_path / "empty" / T).mkdir()
    write_pair(tmp_path / "one", "a")
    write_pair(tmp_path / "one", "b", prompt=None)
    (tmp_path / f"one/{C}/a.png").write_bytes(b"")
    (tmp_path / "linked").mkdir()
    for name in (T, C):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "one" / name)
    (tmp_path / "data.txt").write_text("x")
    torn = tmp_path / "torn.csv"
    torn.symlink_to("/proc/self/mem")  # opens, and its first byte cannot be had
    sources = [str(tmp_path / name) for name in ("none", "data.txt", "torn.csv", "one", "half", "empty", "linked")]
    with pytest.raises(UserError) as caught:
        scan(sources, limits=Limits(), key="data.train")
    where = f"put targets and captions into {T}/, control images into {C}/ beside it"
    assert [message.replace(str(tmp_path), "ROOT") for message in caught.value.messages] == [
        "data.train: ROOT/none: no such folder or manifest; correct the path",
        "data.train: ROOT/data.txt: is neither a folder nor a .jsonl, .csv, .tar or .parquet file; name one",
        "data.train: ROOT/torn.csv: cannot be read: Input/output error; make it readable",
        f"data.train: ROOT/half/{T}: no such folder; {where}",
        f"data.train: ROOT/empty/{T}: holds no image ({FORMATS}); add some",
        f"data.train: ROOT/linked/{T}: is a link out of its data folder; set data.follow_symlinks=true",
        f"data.train: ROOT/linked/{C}: is a link out of its data folder; set data.follow_symlinks=true",
        f"ROOT/one/{T}/b.png: has no caption file b.txt{EMPTY}",
        f"ROOT/one/{C}/a.png: is empty (0 bytes); copy it again (belongs to {T}/a.png)",
    ]
    write_image(tmp_path / f"one/{C}/a.png")
    followed = scan(sources[-1:], limits=Limits(follow_symlinks=True))
    assert (len(followed.records), followed.unusable) == (1, 1)


def test_a_folder_without_control_images_is_text_to_image(tmp_path: Path) -> None:
    write_image(tmp_path / "training_images/a.png")
    (tmp_path / "training_images/a.txt").write_text("a cat")
    (item,), problems = scanned(tmp_path)
    assert (item.record.controls, item.control_sizes, item.record.prompt, problems) == ((), (), "a cat", [])
