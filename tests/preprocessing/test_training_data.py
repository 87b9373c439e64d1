"""A configuration's data as a run sees them: what is held out, what is told, and what stops it before any encoding."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mixres import cli
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.images import Limits
from mixres.data.scan import ScannedRecord, scan, split_held_out
from mixres.errors import UserError
from mixres.preprocessing.training_data import usable_records
from support.family_cases import with_family

Setup = Callable[..., Config]


@pytest.fixture
def data(few_pairs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(few_pairs, tmp_path / "data")


@pytest.fixture
def setup(small_run: Path, data: Path, tmp_path: Path) -> Setup:
    def config(*overrides: str) -> Config:
        common = [
            f"data.train={data / 'train'}",
            f"data.held_out={data / 'held_out'}",
            f"cache.cache_dir={tmp_path / 'cache'}",
            f"logging.output_dir={tmp_path / 'run'}",
        ]
        return load_config(small_run, [*common, *overrides])

    return config


def names(records: list[ScannedRecord]) -> set[str]:
    return {scanned.record.name for scanned in records}


def first(data: Path, kind: str, part: str = "train", suffix: str = ".png") -> Path:
    return min((data / part / kind).glob(f"*{suffix}"))


def messages(config: Config) -> list[str]:
    with pytest.raises(UserError) as caught:
        usable_records(*with_family(config), is_main=True)
    return list(caught.value.messages)


# --- Held out


def test_a_share_holds_out_examples_that_are_not_trained(setup: Setup) -> None:
    every = usable_records(*with_family(setup("data.held_out=null")), is_main=False)[0]
    train, held_out = usable_records(*with_family(setup("data.held_out=0.4")), is_main=False)
    assert len(every) == 10
    assert names(train) | names(held_out) == names(every)
    assert not names(train) & names(held_out)
    assert 0 < len(held_out) < 10
    assert usable_records(*with_family(setup("data.held_out=0.4")), is_main=False) == (train, held_out)


@pytest.mark.parametrize(("fraction", "side"), [(0.0001, "none"), (0.9999, "all")])
def test_a_fraction_that_leaves_one_side_empty_is_refused(setup: Setup, fraction: float, side: str) -> None:
    (problem,) = messages(setup(f"data.held_out={fraction}"))
    assert re.match(rf"data\.held_out: {fraction} of 10 \w+ is {side}; give another \w+, or a folder", problem)


def test_an_image_that_its_size_rule_makes_shorter_than_a_token_is_refused(setup: Setup, data: Path) -> None:
    for kind in ("training_images", "control_images"):
        Image.new("RGB", (480, 60)).save(first(data, kind))
    *found, _ = messages(setup("data.resize.target.max_pixels=1024", "data.resize.control.area=1024"))
    texts = [line.partition(": ")[2] for line in found if "480x60" in line]
    assert [re.sub(r" by data.*", "", text) for text in texts] == ["480x60 becomes 91x11"] * 2
    assert "data.resize.target.max_pixels; " in texts[0] and "data.resize.control.area; " in texts[1]


def test_a_share_follows_the_seed_and_is_about_its_size(demo_data: Path) -> None:
    records = scan([str(demo_data)], limits=Limits()).records
    assert len(records) == 72
    parts = [names(split_held_out(records, 0.25, seed)[1]) for seed in range(20)]
    assert len({frozenset(part) for part in parts}) == 20
    assert 72 * 0.2 < sum(map(len, parts)) / 20 < 72 * 0.3
    nested = [names(split_held_out(records, share, 0)[1]) for share in (0.1, 0.25, 0.5, 0.9)]
    assert nested[0] <= nested[1] <= nested[2] <= nested[3], (
        "a larger share holds out what a smaller one does, and more"
    )


def test_no_example_changes_sides_when_others_come_go_or_are_renamed(demo_data: Path, tmp_path: Path) -> None:
    records = scan([str(demo_data)], limits=Limits()).records
    train, held_out = split_held_out(records, 0.3, 7)
    some = records[::2]
    assert names(split_held_out(some, 0.3, 7)[1]) == names(held_out) & names(some)
    assert split_held_out(reversed(records), 0.3, 7) == (train[::-1], held_out[::-1])
    moved = shutil.copytree(demo_data, tmp_path / "moved")
    for path in list(moved.rglob("*.*")):
        path.rename(path.with_name(f"new {path.name}"))
    renamed = split_held_out(scan([str(moved)], limits=Limits()).records, 0.3, 7)[1]
    assert {name.replace("new ", "") for name in names(renamed)} == names(held_out)


def test_one_target_under_several_names_and_prompts_is_on_one_side(demo_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(demo_data, tmp_path / "data")
    for path in list(data.rglob("*.*")):
        shutil.copyfile(path, path.with_name(f"copy_{path.name}"))
    for path in (data / "training_images").glob("copy_*.txt"):
        path.write_text("another instruction")
    for part in split_held_out(scan([str(data)], limits=Limits()).records, 0.3, 0):
        copies = {name for name in names(part) if "copy_" in name}
        assert len(part) == 2 * len(copies) > 0
        assert {name.replace("copy_", "") for name in copies} == names(part) - copies


def test_a_held_out_example_that_is_also_trained_is_a_problem(setup: Setup, data: Path) -> None:
    target = first(data, "training_images")
    for file in (target, target.with_suffix(".txt"), data / "train" / "control_images" / target.name):
        shutil.copyfile(file, data / "held_out" / file.parent.name / f"twin{file.suffix}")
    config = setup()
    twin = data / "held_out/training_images/twin.png"
    assert messages(config)[:-1] == [f"{twin}: is held out and trained on, as {target}; take one of the two out"]
    train, held_out = usable_records(*with_family(setup("data.on_bad_item=skip")), is_main=True)
    assert (len(train), len(held_out)) == (10, 3)


@pytest.mark.parametrize(("share", "what"), [("0.0001", "none"), ("0.9999", "all")])
def test_a_share_that_leaves_a_side_empty_is_told(setup: Setup, share: str, what: str) -> None:
    fix = "give another share, or a folder"
    assert messages(setup(f"data.held_out={share}")) == [f"data.held_out: {share} of 10 examples is {what}; {fix}"]


# --- Regularisation


@pytest.fixture
def regular(data: Path) -> Path:
    """Three of the training pairs in a folder of their own."""
    for target in sorted((data / "train/training_images").glob("*.png"))[:3]:
        for file in (target, target.with_suffix(".txt"), data / "train/control_images" / target.name):
            moved = data / "regular" / file.parent.name / file.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            file.rename(moved)
    return data / "regular"


def test_regularisation_examples_are_trained_behind_the_others_and_marked(
    setup: Setup, regular: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = usable_records(*with_family(setup(f"data.regularization={regular}")), is_main=True)
    assert [scanned.regularization for scanned in train] == [False] * 7 + [True] * 3
    assert names(train[7:]) == {path.relative_to(regular).as_posix() for path in regular.glob("*/*.png")} & names(train)
    assert len(held_out) == 3 and not any(scanned.regularization for scanned in held_out)
    line = "data      7 training, 3 regularisation and 3 held-out examples with 13 controls\n"
    assert line in capsys.readouterr().out


def test_regularisation_examples_are_never_held_out(setup: Setup, data: Path, regular: Path) -> None:
    share = setup(f"data.regularization={regular}", "data.held_out=0.4")
    train, held_out = usable_records(*with_family(share), is_main=False)
    assert sum(scanned.regularization for scanned in train) == 3
    assert 0 < len(held_out) < 7
    assert len(train) + len(held_out) == 10
    target = min((data / "held_out/training_images").glob("*.png"))
    for file in (target, target.with_suffix(".txt"), data / "held_out/control_images" / target.name):
        shutil.copyfile(file, regular / file.parent.name / file.name)
    problem = messages(setup(f"data.regularization={regular}"))[0]
    assert problem.startswith(f"{target}: is held out and trained on")


def test_problems_of_the_regularisation_set_are_told_with_the_others(setup: Setup, data: Path, regular: Path) -> None:
    min((regular / "training_images").glob("*.png")).write_bytes(b"")
    first(data, "training_images").write_bytes(b"")
    *problems, summary = messages(setup(f"data.regularization={regular}"))
    assert [problem.partition(": ")[2] for problem in problems] == ["is empty (0 bytes); copy it again"] * 2
    assert summary.startswith("data: 2 problems; 11 of 13 examples can be used: fix the data, or")
    (missing, *_) = messages(setup(f"data.regularization={data / 'nowhere'}"))
    assert missing == f"data.regularization: {data / 'nowhere'}: no such folder or manifest; correct the path"


# --- What is told


def test_the_summary_counts(setup: Setup, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, path in enumerate(sorted((data / "train" / "control_images").glob("*.png"))[:2]):
        with Image.open(path) as image:
            image.load()
        image.putalpha(number * 255)  # one of the two is opaque
        image.save(path)
    usable_records(*with_family(setup()), is_main=True)
    assert capsys.readouterr().out.splitlines() == [
        "scan      26 pictures: 26 decoded, 0 unchanged since the last scan",
        "data      10 training and 3 held-out examples with 13 controls",
        "data      1 example with transparency, which is laid on white",
    ]
    usable_records(*with_family(setup("data.background=black")), is_main=True)
    assert capsys.readouterr().out.endswith("data      1 example with transparency, which is laid on black\n")
    usable_records(*with_family(setup()), is_main=False)
    assert capsys.readouterr().out == "", "the other ranks say nothing"


def test_the_first_of_several_frames_is_used_and_counted_where_that_is_asked_for(
    setup: Setup, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = first(data, "training_images")
    with Image.open(path) as image:
        image.save(path, save_all=True, append_images=[image.rotate(90)])
    fix = "save the one to train on as a still image, or set data.first_frame=true"
    assert messages(setup())[:-1] == [f"{path}: has 2 frames or pages; {fix}"]
    train, _ = usable_records(*with_family(setup("data.first_frame=true")), is_main=True)
    assert len(train) == 10
    said = "data      1 example with several frames or pages in a picture: the first counts\n"
    assert capsys.readouterr().out.endswith(said)


def test_problems_of_all_kinds_and_parts_come_in_one_list(setup: Setup, data: Path) -> None:
    images = sorted((data / "train/training_images").glob("*.png"))
    images[0].write_bytes(b"")
    images[1].with_suffix(".txt").write_text("long " * 300)
    images[2].with_suffix(".txt").write_text("see <|image_pad|>")
    first(data, "training_images", "held_out", ".txt").write_text(" ")
    *problems, summary = messages(setup())
    assert [problem.replace(f"{data}/", "").partition(": ")[2] for problem in sorted(problems)] == [
        "the caption is empty; write one, or set data.empty_caption to use_empty or skip",
        "is empty (0 bytes); copy it again",
        "the prompt is 1199 tokens long, more than 1024; shorten it, or set data.long_caption=truncate",
        "the prompt contains <|image_pad|>, a marker of the text encoder: take it out",
    ]
    assert summary.startswith(
        "data: 4 problems; 9 of 13 examples can be used: fix the data, or set data.on_bad_item=skip"
    )


def test_a_source_that_is_missing_is_told_with_the_problems_of_the_other(setup: Setup, data: Path) -> None:
    first(data, "training_images").write_bytes(b"")
    found = messages(setup(f"data.held_out={data / 'nowhere'}"))
    assert found[0] == f"data.held_out: {data / 'nowhere'}: no such folder or manifest; correct the path"
    assert [line.partition(": ")[2] for line in found[1:]] == ["is empty (0 bytes); copy it again"]
    fix = "correct the path, or write a fraction as a number such as 0.2"
    assert messages(setup("data.held_out=0,2"))[0] == f"data.held_out: 0,2: no such folder or manifest; {fix}"


def test_long_captions_are_cut_where_that_is_asked_for(
    setup: Setup, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = first(data, "training_images", suffix=".txt")
    text.write_text("图片 " * 1000, encoding="utf-8")
    (problem, _) = messages(setup())
    assert re.search(r"the prompt is \d{4} tokens long, more than 1024", problem)
    train, _ = usable_records(*with_family(setup("data.long_caption=truncate")), is_main=True)
    assert len(train) == 10
    assert capsys.readouterr().out.endswith("data      1 prompt cut to 1024 tokens\n")
    prompt = train[0].record.prompt
    assert ("图片 " * 1000).startswith(prompt)
    assert 0 < len(prompt) < 1000


def test_what_is_skipped_is_listed_with_names_of_any_kind(
    setup: Setup, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["line\nbreak", "-dash", "图片", "n" * 251]
    for stem in bad:
        (data / f"train/training_images/{stem}.png").write_bytes(b"GIF89a")
        (data / f"train/training_images/{stem}.txt").write_text("x")
        shutil.copyfile(first(data, "control_images"), data / f"train/control_images/{stem}.png")
    stray = data / "train/control_images/stray.png"
    shutil.copyfile(first(data, "control_images"), stray)
    train, _ = usable_records(*with_family(setup("data.on_bad_item=skip")), is_main=True)
    assert len(train) == 10
    said = f"data      5 problems, listed in {tmp_path / 'run/bad_items.jsonl'}: 4 of 17 examples left out\n"
    assert said in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "run/bad_items.jsonl").read_text().splitlines()]
    assert [line["path"] for line in listed if line["example"] is None] == [str(stray)]
    shown = [line["path"].rpartition("/")[2] for line in listed if line["example"]]
    assert sorted(shown) == sorted(f"{stem.replace(chr(10), chr(92) + 'n')}.png" for stem in bad)
    assert all(line["path"].endswith(line["example"]) for line in listed if line["example"])


def test_every_kind_of_problem_counts_the_examples_that_it_costs(setup: Setup, data: Path, tmp_path: Path) -> None:
    images = sorted((data / "train/training_images").glob("*.png"))
    images[0].write_bytes(b"")  # two problems of one example
    (data / "train/control_images" / images[0].name).write_bytes(b"")
    images[1].with_suffix(".txt").unlink()
    images[2].with_suffix(".txt").write_text("long " * 300)
    images[3].with_suffix(".txt").write_text("see <|image_pad|>")
    control = data / "train/control_images" / images[4].name
    control.rename(control.with_name(f"{images[4].stem}-before.png"))
    (data / "train/training_images/photo.heic").write_bytes(b"ftypheic")
    twin = data / "held_out/training_images" / "twin.png"
    for file in (images[5], images[5].with_suffix(".txt"), data / "train/control_images" / images[5].name):
        shutil.copyfile(file, data / "held_out" / file.parent.name / f"twin{file.suffix}")
    *problems, summary = messages(setup())
    assert len(problems) == 9  # the renamed control is one of its own
    assert summary.startswith("data: 9 problems; 8 of 14 examples can be used: fix the data, or set")
    usable_records(*with_family(setup("data.on_bad_item=skip")), is_main=True)
    listed = [json.loads(line) for line in (tmp_path / "run/bad_items.jsonl").read_text().splitlines()]
    examples = [line["example"] for line in listed]
    assert sorted(filter(None, examples)) == sorted(
        [f"training_images/{image.name}" for image in (images[0], *images[:5])] + ["training_images/twin.png"]
    )
    assert [line["path"] for line in listed if line["path"] == str(twin)]


def test_a_step_that_holds_more_samples_than_there_are_is_told(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    usable_records(*with_family(setup("batch.samples_per_step=10")), is_main=True)
    assert "samples_per_step" not in capsys.readouterr().out
    usable_records(*with_family(setup("batch.samples_per_step=11")), is_main=True)
    line = "data      10 training examples for batch.samples_per_step=11: every step is an epoch, and smaller than it "
    assert capsys.readouterr().out.endswith(f"{line}should be\n")


@pytest.mark.parametrize("verb", ["cache", "inspect", "verify", "bench"])
def test_a_run_folder_that_cannot_be_is_told_before_any_work(
    verb: str, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder, cache = file / "run", tmp_path / "cache"
    words = [f"logging.output_dir={folder}", f"cache.cache_dir={cache}"]
    assert cli.main([verb, "--config", str(small_run), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    why = f"{file} is no folder; name another"
    assert line == f"mixres: error: logging.output_dir: {folder} cannot be written: {why}"
    assert not [*cache.rglob("*")]
    assert cli.main([verb, "--config", str(small_run), f"logging.output_dir={tmp_path / ('x' * 300)}", words[1]]) == 2
    assert "File name too long; name another" in capsys.readouterr().err
