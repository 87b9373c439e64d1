"""Hugging Face data sets that `save_to_disk` has written: their rows are records, their folder is never left."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import xxhash

from mixres.data import records
from mixres.data.images import Limits
from mixres.data.scan import find_records, scan
from mixres.errors import UserError
from support.pairs import EMPTY, PHOTO, scanned
from support.samples import pickled_mkdir

IMAGES = ("path_target", "path_control", "path_control_1", "path_mask")
ARROW = "data-00000-of-00001.arrow"


def png(size: tuple[int, int] = (90, 60), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PHOTO.resize(size).convert(mode).save(file, "PNG")
    return file.getvalue()


def row(**values: Any) -> dict[str, Any]:
    return {"path_target": png(), "path_control": png((48, 64)), "prompt": "make it blue"} | values


def save(folder: Path, *rows: dict[str, Any], shards: int = 1) -> Path:
    """Images are bytes or None; every column that a row names is one of all."""
    columns = list(dict.fromkeys(key for values in rows for key in values))
    kinds = {key: datasets.Image() if key in IMAGES else datasets.Value("string") for key in columns}

    def cell(key: str, value: Any) -> Any:
        return {"bytes": value, "path": None} if key in IMAGES and value else value

    cells = [{key: cell(key, values.get(key)) for key in columns} for values in rows]
    datasets.Dataset.from_list(cells, features=datasets.Features(kinds)).save_to_disk(folder, num_shards=shards)
    return folder


def refusal(folder: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        find_records(str(folder))
    return [message.replace(str(folder), "ROOT") for message in caught.value.messages]


def test_rows_are_records_and_their_bytes_those_that_were_saved(tmp_path: Path) -> None:
    rows = [
        row(prompt=" 把猫变成蓝色 "),
        row(path_control_1=png((33, 70)), path_mask=png((90, 60), "L")),
        row(path_target=png((64, 64)), prompt="third"),
    ]
    records, problems = scanned(save(tmp_path / "set", *rows, shards=2))
    assert problems == []
    assert [item.record.prompt for item in records] == ["把猫变成蓝色", "make it blue", "third"]
    assert [item.target_size for item in records] == [(90, 60), (90, 60), (64, 64)]
    assert [item.control_sizes for item in records] == [((48, 64),), ((48, 64), (33, 70)), ((48, 64),)]
    assert [item.record.mask is not None for item in records] == [False, True, False]
    for item, values in zip(records, rows, strict=True):
        record = item.record
        saved = [values[key] for key in IMAGES if values.get(key)]
        assert [x.read_bytes() for x in (record.target, *record.controls, record.mask) if x] == saved
        assert item.digests[0] == xxhash.xxh3_128_hexdigest(saved[0]), "the same key in the cache as the file"


def test_columns_have_the_names_that_the_configuration_gives(tmp_path: Path) -> None:
    """A column that has the name of a role is left alone, as ever, unless it is named."""
    folder = save(tmp_path / "set", row(target="text", text="darker"))
    (item,), problems = scanned(folder, columns={"prompt": "text"})
    assert (item.record.prompt, item.target_size, problems) == ("darker", (90, 60), [])
    with pytest.raises(UserError, match=r"has no column 'txt', which data\.columns names"):
        find_records(str(folder), columns={"prompt": "txt"})


def test_a_scan_that_remembers_takes_no_column_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of one row with equal bytes differ by nothing else."""
    monkeypatch.setattr(records, "SETTLED_NS", -(10**12))
    images = [io.BytesIO(), io.BytesIO()]
    for image, file in zip((PHOTO, PHOTO.rotate(180)), images, strict=True):
        image.resize((64, 48)).save(file, "BMP")
    data = [image.getvalue() for image in images]
    folder = save(tmp_path / "set", row(path_target=data[0], path_control=data[1]))
    swapped = {"target": "path_control", "control": "path_target"}
    for columns, order in (({}, (0, 1)), (swapped, (1, 0)), ({}, (0, 1))):
        found = scan([str(folder)], limits=Limits(), progress=False, memo=tmp_path / "scan", columns=columns)
        assert found.records[0].digests == tuple(xxhash.xxh3_128_hexdigest(data[i]) for i in order)
    assert (found.decoded, found.unchanged) == (0, 2)


def test_arrow_files_that_change_places_change_the_state_of_their_images(tmp_path: Path) -> None:
    """None of them has changed itself, and an image of equal size then stands under the name of another."""
    folder = save(tmp_path / "set", row(), row(), shards=2)
    state = json.loads((folder / "state.json").read_text())
    before = find_records(str(folder))[0][0].target.stat()
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert find_records(str(folder))[0][0].target.stat() != before


def test_every_bad_row_is_named_by_its_number(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"path_target": png()[:300]}, {"path_control": None, "path_control_1": png()}, {"prompt": ""},
        {"path_mask": png((89, 60), "L")}, {"path_control": b"<html>"}, {"prompt": None}, {"path_control": None},
    ]  # fmt: skip
    rows = [row(**change) for change in changes]
    records, problems = scanned(save(tmp_path / "set", *rows))
    assert [item.record.name for item in records] == [f"{tmp_path}/set:0", f"{tmp_path}/set:7"]
    assert records[1].record.controls == (), "text to image"
    expected = [
        "ROOT:2: has no 'path_control'; add it",
        f"ROOT:3: the prompt is empty{EMPTY}",
        f"ROOT:6: has no prompt{EMPTY}",
        "ROOT:1:path_target: is damaged, it does not decode",
        "ROOT:4:path_mask: the mask is 89x60 pixels, its target 90x60; give it the target's size (belongs to ROOT:4)",
        "ROOT:5:path_control: is not an image in a supported format",
    ]
    assert len(problems) == len(expected)
    assert all(problem.startswith(line) for problem, line in zip(problems, expected, strict=True)), problems
    assert len(scanned(tmp_path / "set", empty_caption="use_empty")[0]) == 4


def test_bad_columns_are_reported_once_and_others_are_left_alone(tmp_path: Path) -> None:
    values = row(path_masks="x", pathology="a column of its own", image="y")
    del values["path_target"]
    columns = "path_control, prompt, path_masks, image"
    assert refusal(save(tmp_path / "set", values, values)) == [
        f"ROOT: has no column 'path_target'; add it, or rename one of: {columns}",
        "ROOT: unknown key 'path_masks'; write one of: path_target, path_control, path_control_1, ..., path_mask",
    ]


def test_text_is_no_image_and_a_path_is_not_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    PHOTO.save(secret)
    storage = datasets.Features({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    for cell, kind, reason in (
        (str(secret), datasets.Value("string"), "is not an image; cast the column to datasets.Image"),
        ({"bytes": None, "path": str(secret)}, storage, "does not hold the bytes of its image; save the data set with"),
    ):
        features = datasets.Features({"path_target": kind, "prompt": datasets.Value("string")})
        table = datasets.Dataset.from_list([{"path_target": cell, "prompt": "x"}], features)
        table.save_to_disk(tmp_path / reason[:4])
        records, (problem,) = find_records(str(tmp_path / reason[:4]))
        assert records == [] and problem.reason.startswith(f"'path_target' {reason}")


@pytest.mark.parametrize("name", [f"../other/{ARROW}", "/etc/passwd", "link.arrow", ".."])
def test_a_file_outside_the_folder_is_not_opened(tmp_path: Path, name: str) -> None:
    folder, _ = save(tmp_path / "set", row()), save(tmp_path / "other", row())
    (folder / "link.arrow").symlink_to(tmp_path / "other" / ARROW)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"][0]["filename"] = name
    (folder / "state.json").write_text(json.dumps(state))
    assert refusal(folder) == [f"ROOT/state.json: names a file outside its folder: {name}; save it again"]


def test_planted_scripts_and_pickles_are_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", row())
    mark = tmp_path / "mark"
    for name in ("set.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(mark)!r})")
    for name in ("dataset.pkl", "dataset.pickle", "indices.arrow"):
        (folder / name).write_bytes(pickled_mkdir(mark))
    assert len(scanned(folder)[0]) == 1
    (folder / ARROW).write_bytes(pickled_mkdir(mark))
    (message,) = refusal(folder)
    assert message.startswith("ROOT: the data set cannot be read: ")
    assert not mark.exists()


def test_a_data_set_of_splits_names_them(tmp_path: Path) -> None:
    split = datasets.load_from_disk(str(save(tmp_path / "one", row())))
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "all")
    assert refusal(tmp_path / "all") == [
        "ROOT: holds several data sets; name one or a list of them: ROOT/test, ROOT/train"
    ]
    assert len(find_records(str(tmp_path / "all" / "train"))[0]) == 1


def test_a_damaged_data_set_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", row())
    arrow = folder / ARROW
    arrow.write_bytes(arrow.read_bytes()[:200])
    for _ in ("truncated", "missing"):
        (message,) = refusal(folder)
        assert message.startswith("ROOT: the data set cannot be read: ")
        arrow.unlink(missing_ok=True)
    for damage in (b"", b"{", b"[]", b'{"_data_files": [{}]}'):
        (folder / "state.json").write_bytes(damage)
        assert refusal(folder) == ["ROOT/state.json: cannot be read; save the data set again"]


def test_without_the_package_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "set", row())
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python itself does for a module that must not be found
    assert refusal(folder) == [
        "ROOT: is a Hugging Face data set, and 'datasets' is not installed: pip install 'mixres[datasets]'"
    ]
