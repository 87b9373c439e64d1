"""CSV manifests as spreadsheets and scripts write them: what is a row, and the line a user reads for what is none."""

import csv
import io
import json
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from mixres.data.records import EditRecord
from mixres.data.scan import find_records

HEAD = b"path_target,path_control,prompt\n"
GOOD = b"t.png,c.png,make it blue\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    photo = Image.fromarray(skimage.data.chelsea()).resize((90, 60))
    for name in ("t.png", "c.png", "c1.png", "m.png", "a, b.png"):
        photo.save(tmp_path / name)
    return tmp_path


def found(root: Path, data: bytes, **options: object) -> tuple[list[EditRecord], list[str]]:
    (root / "train.csv").write_bytes(data)
    records, problems = find_records(str(root / "train.csv"), **options)  # type: ignore[arg-type]
    return records, [str(problem).removeprefix(f"{root}/") for problem in problems]


def as_csv(rows: list[dict[str, str]], **options: object) -> bytes:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", **options)  # type: ignore[arg-type]
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


ROWS: list[dict[str, str]] = [
    {"path_target": "t.png", "path_control": "c.png", "prompt": 'say "hello", twice\nand once more', "id": "7"},
    {"path_target": "a, b.png", "path_control": "c.png", "prompt": "把猫变成蓝色", "path_control_1": "c1.png"},
    {"path_target": "t.png", "path_control": "c.png", "prompt": " spaces ", "path_mask": "m.png"},
]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_csv_manifest_says_what_the_same_json_lines_say(root: Path, quoting: int, line_end: str) -> None:
    records, problems = found(root, as_csv(ROWS, quoting=quoting, lineterminator=line_end))
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert problems == []
    assert (records, []) == find_records(str(root / "train.jsonl"))
    assert records[0].prompt == 'say "hello", twice\nand once more'
    assert records[1].controls == (root / "c.png", root / "c1.png")
    assert records[2].mask == root / "m.png"


def test_the_last_line_needs_no_end_and_blank_lines_are_none(root: Path) -> None:
    records, problems = found(root, HEAD + b"\n" + GOOD + b"\r\n" + GOOD.rstrip())
    assert (len(records), problems) == (2, [])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"t.png,c.png,caf\xe9\n", "the row is not UTF-8; save it as UTF-8", id="latin1"),
        pytest.param(
            b"t.png,c.png\n", "the row has 2 fields, the first line names 3; quote what holds commas", id="short"
        ),
        pytest.param(
            b"t.png,c.png,a,b\n", "the row has 4 fields, the first line names 3; quote what holds commas", id="comma"
        ),
        pytest.param(
            b't.png,c.png,"a"b\n', "the row is not CSV: ',' expected after '\"'; quote it as RFC 4180 says", id="quote"
        ),
        pytest.param(b"t.png,c.png," + b"x" * 2**18 + b"\n", "the row is not CSV: field larger than field", id="field"),
        pytest.param(
            b"t.png,c.png," + b"x," * 2**22 + b"\n", "the line is over 4194304 bytes long; shorten it", id="line"
        ),
        pytest.param(b"t.png,c.png,\n", "has no prompt; write one, or set data.empty_caption", id="no_prompt"),
        pytest.param(b't.png,c.png," "\n', "the prompt is empty; write one, or set", id="blank_prompt"),
        pytest.param(b"t.png,c.png,a\0b\n", "the caption holds a NUL character; take it out", id="nul"),
        pytest.param(b",c.png,a\n", "has no 'path_target'; add it", id="no_target"),
        pytest.param(b"none.png,c.png,a\n", "'path_target': none.png does not exist; correct the path", id="absent"),
        pytest.param(b"../t.png,c.png,a\n", "../t.png is not below the manifest's folder; move it there", id="dots"),
        pytest.param(b"/etc/passwd,c.png,a\n", "is not below the manifest's folder; move it there", id="absolute"),
        pytest.param(
            b"https://a.example/b.png,c.png,a\n", "is a URL; download it, mixres reads local files only", id="url"
        ),
        pytest.param(b"link.png,c.png,a\n", "is a link out of the manifest's folder", id="link"),
    ],
)
def test_problem_of_a_csv_row(root: Path, data: bytes, reason: str) -> None:
    (root / "link.png").symlink_to("/etc/passwd")
    records, problems = found(root, HEAD + GOOD + data + GOOD)
    assert len(records) == 2, "the rows around it are read"
    assert len(problems) == 1
    assert problems[0].startswith("train.csv:3: ")
    assert reason in problems[0]
    assert problems[0].isprintable()


def test_rows_are_numbered_by_their_first_line(root: Path) -> None:
    records, problems = found(root, HEAD + b't.png,c.png,"two\nlines"\n' + b"no.png,c.png,a\n" + GOOD)
    assert len(records) == 2
    assert problems == ["train.csv:4: 'path_target': no.png does not exist; correct the path"]


def test_a_quote_that_is_never_closed_is_a_problem_of_its_row(root: Path) -> None:
    records, problems = found(root, HEAD + GOOD + b't.png,c.png,"open\n' + GOOD)
    assert len(records) == 1
    assert problems == ["train.csv:3: the row is not CSV: unexpected end of data; quote it as RFC 4180 says"]


@pytest.mark.parametrize(
    ("head", "reasons"),
    [
        pytest.param(
            b"\xef\xbb\xbf" + HEAD, ["the file starts with a byte order mark; save it as UTF-8 without one"], id="bom"
        ),
        pytest.param(
            (HEAD + GOOD).decode().encode("utf-16"),
            ["the file starts with a byte order mark; save it as UTF-8 without one"],
            id="utf16",
        ),
        pytest.param(
            b"path_target;path_control;prompt\n",
            [
                "the first line names no column 'path_target'; add it to: path_target;path_control;prompt",
                "unknown key 'path_target;path_control;prompt'; write one of: path_target, path_control, "
                "path_control_1, ..., path_mask",
            ],
            id="semicolons",
        ),
        pytest.param(
            b"path_target,path_control,path_masks,prompt\n",
            ["unknown key 'path_masks'; write one of: path_target, path_control, path_control_1, ..., path_mask"],
            id="typo",
        ),
        pytest.param(
            b"path_target,path_control,path_control_2,prompt\n",
            ["its control images have a gap: 'path_control_2' without 'path_control_1'; number them anew"],
            id="gap",
        ),
        pytest.param(
            b"path_target,path_control,prompt,prompt\n",
            ["the column 'prompt' stands twice; take one out"],
            id="column_twice",
        ),
        pytest.param(
            b"\n",
            ["the first line names no column 'path_target'; add it to: "],
            id="blank",
        ),
        pytest.param(
            b"path_target,path_control_1,prompt\n",
            ["the first line names no column 'path_control'; add it to: path_target, path_control_1, prompt"],
            id="second_control_alone",
        ),
    ],
)
def test_columns_that_cannot_be_meant_are_told_once(root: Path, head: bytes, reasons: list[str]) -> None:
    records, problems = found(root, head + b"t.png,c.png,m.png,a\n" * 3)
    assert records == []
    assert problems == [f"train.csv:1: {reason}" for reason in reasons]


def test_a_gap_in_the_controls_of_one_row(root: Path) -> None:
    head = b"path_target,path_control,path_control_1,path_control_2,prompt\n"
    records, problems = found(root, head + b"t.png,c.png,,,a\nt.png,c.png,,c1.png,b\n")
    assert [record.prompt for record in records] == ["a"]
    assert problems == [
        "train.csv:3: its control images have a gap: 'path_control_2' without 'path_control_1'; number them anew"
    ]


def test_empty_prompts_of_a_csv_follow_the_policy(root: Path) -> None:
    records, problems = found(root, HEAD + b"t.png,c.png,\n", empty_caption="use_empty")
    assert ([record.prompt for record in records], problems) == ([""], [])


def test_rows_without_controls(root: Path) -> None:
    """Text to image: a table that has no column for controls, or a field that is empty."""
    for data in (b"path_target,prompt\nt.png,a\n", HEAD + b"t.png,,a\n"):
        (record,), problems = found(root, data)
        assert (record.controls, record.prompt, problems) == ((), "a", [])
    records, problems = found(root, b"path_target,path_control,path_control_1,prompt\nt.png,,c1.png,a\n")
    assert (records, problems) == ([], ["train.csv:2: has no 'path_control'; add it"])
