"""A configuration's data as a run sees them: what is held out, what is reported, what stops a run before encoding."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mixres import cli
from mixres.data.images import Limits
from mixres.data.scan import ScannedRecord, scan, split_held_out
from support.caching import CONTROLS, TARGETS, Caching


def names(records: list[ScannedRecord]) -> set[str]:
    return {scanned.record.name for scanned in records}


def copy_pair(caching: Caching, target: Path, part: str, stem: str) -> Path:
    """The pair of `target` once more in `part`, under another name; its target."""
    for file in caching.pair(target):
        copy = caching.data / part / file.parent.name / f"{stem}{file.suffix}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return caching.data / part / TARGETS / f"{stem}.png"


@pytest.fixture(scope="module")
def demo_records(demo_data: Path) -> list[ScannedRecord]:
    return scan([str(demo_data)], limits=Limits()).records


@pytest.mark.parametrize(("fraction", "side"), [("0.0001", "none"), ("0.9999", "all")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(caching: Caching, fraction: str, side: str) -> None:
    fix = "give another fraction, or a folder"
    assert caching.problems(f"data.held_out={fraction}") == [
        f"data.held_out: {fraction} of 10 records is {side}; {fix}"
    ]


def test_a_split_follows_the_seed_and_is_about_its_fraction(demo_records: list[ScannedRecord]) -> None:
    parts = [names(split_held_out(demo_records, 0.25, seed)[1]) for seed in range(20)]
    assert len({frozenset(part) for part in parts}) == 20
    assert len(demo_records) * 0.2 < sum(map(len, parts)) / 20 < len(demo_records) * 0.3
    assert parts[0] < names(split_held_out(demo_records, 0.5, 0)[1]), "a larger fraction holds out the same and more"


def test_no_record_changes_sides_when_others_come_go_or_are_renamed(
    demo_records: list[ScannedRecord], demo_data: Path, tmp_path: Path
) -> None:
    held_out = names(split_held_out(demo_records, 0.3, 7)[1])
    some = demo_records[::-2]
    assert names(split_held_out(some, 0.3, 7)[1]) == held_out & names(some)
    data = shutil.copytree(demo_data, tmp_path / "data")
    for path in list(data.rglob("*.*")):
        shutil.copyfile(path, path.with_name(f"copy_{path.name}"))
    for path in (data / TARGETS).glob("copy_*.txt"):
        path.write_text("another prompt")
    both = names(split_held_out(scan([str(data)], limits=Limits()).records, 0.3, 7)[1])
    copies = {name for name in both if "copy_" in name}
    assert both - copies == {name.replace("copy_", "") for name in copies} == held_out


@pytest.fixture
def regular(caching: Caching) -> str:
    """Three of the training pairs in a folder of their own."""
    for target in caching.files()[:3]:
        copy_pair(caching, target, "regular", target.stem)
        for file in caching.pair(target):
            file.unlink()
    return f"data.regularization={caching.data / 'regular'}"


def test_regularisation_records_are_trained_behind_the_others_and_never_held_out(
    caching: Caching, regular: str
) -> None:
    train, held_out = caching.usable(regular)
    assert names(train[7:]) == {f"{TARGETS}/{path.name}" for path in caching.files(part="regular")}
    assert "data      7 training, 3 regularisation and 3 held-out records with 13 controls\n" in caching.output()
    train, held_out = caching.usable(regular, "data.held_out=0.4")
    assert sum(scanned.regularization for scanned in train) == 3 and 0 < len(held_out) < 7
    assert len(train) + len(held_out) == 10 and not names(train) & names(held_out)
    assert not any(scanned.regularization for scanned in held_out)


def test_the_log_counts_what_was_found(caching: Caching) -> None:
    """Of several frames the first and of a long caption the beginning are used, where that is asked for."""
    for number, path in enumerate(caching.files(CONTROLS)[:2]):
        with Image.open(path) as image:
            image.load()
        image.putalpha(number * 255)  # one of the two is opaque
        image.save(path)
    path = caching.first()
    with Image.open(path) as image:
        image.save(path, save_all=True, append_images=[image.rotate(90)])
    path.with_suffix(".txt").write_text("图片 " * 1000, encoding="utf-8")
    asked = ("data.first_frame=true", "data.long_caption=truncate")
    words = ("data.background=black", "batch.samples_per_step=11", *asked)
    train, _ = caching.usable(*words)
    assert caching.output().splitlines()[1:] == [
        "data      10 training and 3 held-out records with 13 controls",
        "data      1 record with transparency, which is laid on black",
        "data      1 record with several frames or pages in an image: the first is used",
        "data      1 prompt cut to 1024 tokens",
        "data      10 training records for batch.samples_per_step=11: every step is an epoch, and smaller than it "
        "should be",
    ]
    caching.usable(*words, is_main=False)
    assert caching.output() == "", "the other ranks log nothing"
    prompt = train[0].record.prompt
    assert ("图片 " * 1000).startswith(prompt) and 0 < len(prompt) < 1000


def damage(caching: Caching, regular: str) -> dict[str, list[str]]:
    """Problems of every kind in all three parts: the reasons by the file or record that each must name."""
    images, held = caching.files(), caching.first(part="held_out")
    images[0].write_bytes(b"")  # two problems of one record
    (caching.data / "train" / CONTROLS / images[0].name).write_bytes(b"")
    images[1].with_suffix(".txt").write_text("long " * 300)
    images[2].with_suffix(".txt").write_text("see <|image_pad|>")
    for file in caching.pair(images[2]):
        file.rename(file.with_stem("line\nbreak"))
    control = caching.pair(images[3])[2]
    shutil.copyfile(control, control.with_name(f"{control.stem}_control_1.png"))
    copy_pair(caching, images[4], "held_out", "twin")  # it is trained too
    held.with_suffix(".txt").write_text(" \n")
    caching.first(part="regular").write_bytes(b"")
    return {
        images[0].name: ["is empty (0 bytes); copy it again"] * 2,
        images[1].name: ["the prompt is 1199 tokens long, more than 1024; shorten it, or set data.long_caption="],
        "line\\nbreak.png": ["the prompt contains <|image_pad|>, a marker of the text encoder: take it out"],
        images[3].name: ["exactly one control image, there are 2; give it one"],
        "twin.png": [f"is held out and trained on, as train/{TARGETS}/{images[4].name}; take one of the two out"],
        held.stem: ["the caption is empty; write one, or set data.empty_caption to use_empty or skip"],
        caching.first(part="regular").name: ["is empty (0 bytes); copy it again"],
    }  # fmt: skip


def test_problems_of_all_kinds_and_parts_come_in_one_list(
    caching: Caching, regular: str, few_pairs: Path, tmp_path: Path
) -> None:
    expected = damage(caching, regular)
    caching.cache = tmp_path / "empty"
    *found, summary = caching.problems(regular)
    for name, reasons in expected.items():
        lines = [line for line in found if line.partition(": ")[0].rpartition("/")[2].startswith(name)]
        assert len(lines) == len(reasons) and all(r in line for r, line in zip(reasons, lines, strict=True)), name
    fix = "fix the data, or set data.on_bad_item=skip to leave the others out"
    assert summary == f"data: {len(found)} problems; 7 of 14 records can be used: {fix}"
    assert len(found) == sum(map(len, expected.values()))
    assert caching.problems(regular, is_main=False) == [*found, summary], "whichever rank ends first"
    assert not list(caching.cache.glob("??/*")) and not caching.run.exists()
    # Those that are skipped are listed, and so is a file that belongs to none.
    stray = caching.data / "train" / CONTROLS / "stray.png"
    shutil.copyfile(caching.files(CONTROLS)[-1], stray)
    train, held_out = caching.usable(regular, "data.on_bad_item=skip")
    assert (len(train), len(held_out)) == (5, 2)
    file = caching.run / "bad_items.jsonl"
    assert f"data      {len(found) + 1} problems, listed in {file}: 7 of 14 records left out\n" in caching.output()
    listed = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert all(line.keys() == {"path", "reason", "example"} for line in listed)
    assert [line["path"] for line in listed if line["example"] is None] == [str(stray)]
    owners = sorted(Path(line["example"]).stem for line in listed if line["example"])
    assert owners == sorted(Path(name).stem for name, reasons in expected.items() for _ in reasons)
    shutil.rmtree(caching.data / "train")
    shutil.rmtree(caching.data / "held_out")
    shutil.copytree(few_pairs, caching.data, dirs_exist_ok=True)
    caching.usable("data.on_bad_item=skip")
    assert not file.exists(), "a list that is out of date does not stay"


def test_a_source_that_is_missing_is_reported_with_the_problems_of_the_others(caching: Caching, regular: str) -> None:
    caching.first().write_bytes(b"")
    found = caching.problems(regular, f"data.held_out={caching.data / 'nowhere'}")
    assert found[0] == "data.held_out: nowhere: no such folder or manifest; correct the path"
    assert [line.partition(": ")[2] for line in found[1:]] == ["is empty (0 bytes); copy it again"]


def test_an_image_that_its_size_rule_makes_shorter_than_a_token_is_refused(caching: Caching) -> None:
    for folder in (TARGETS, CONTROLS):
        Image.new("RGB", (480, 60)).save(caching.first(folder))
    name, fix = caching.first().name, "no side may be under 16 pixels: give a larger one"
    words = ("data.resize.target.max_pixels=1024", "data.resize.control.area=1024")
    assert len(caching.problems(*words)) == 1 + 1, "an aligned control is as large as its target"
    found = caching.problems(*words, "data.resize.control.align=never")
    assert [line.partition("480x60 becomes 91x11 by data.resize.")[2] for line in found if f"/{name}: " in line] == [
        f"target.max_pixels; {fix}",
        f"control.area; {fix} (belongs to {TARGETS}/{name})",
    ]


def test_sizes_that_the_base_cannot_take_are_refused_together(caching: Caching) -> None:
    found = caching.problems("data.resize.control.text_area=2048", "data.resize.target.multiple_of=24")
    assert found[0].startswith("data.resize.target.multiple_of: 24 is not a multiple of 16, the pixels of one token")
    assert [message.partition(":")[0] for message in found[1:]] == ["data.resize.control.text_area"]


@pytest.mark.parametrize("verb", ["cache", "inspect", "verify", "bench"])
def test_a_run_folder_that_cannot_be_written_is_refused_before_any_work(
    verb: str, caching: Caching, tmp_path: Path
) -> None:
    file, caching.cache = tmp_path / "file", tmp_path / "empty"
    file.write_text("mine")
    for caching.run in (file / "run", tmp_path / ("x" * 300)):
        assert cli.main([verb, "--config", str(caching.file), *caching.words()]) == 2
        line = f"mixres: error: logging.output_dir: {caching.run} cannot be written; name another folder\n"
        assert caching.capsys.readouterr().err == line
    assert not [*caching.cache.rglob("*")]
