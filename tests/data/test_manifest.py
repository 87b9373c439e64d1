"""Manifests as people and scripts write them: what is a row, and the line a user reads for what is none."""

import csv
import io
import json
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from mixres.data.records import EditRecord
from mixres.data.scan import find_records
from support.pairs import found, names, write_image

GOOD: dict[str, Any] = {"path_target": "t.png", "path_control": "c.png", "prompt": "把猫变成蓝色"}
HEAD, ROW = b"path_target,path_control,prompt\n", b"t.png,c.png,make it blue\n"
PATHS = "path_target, path_control, path_control_1, ..., path_mask"
BOM = "the file starts with a byte order mark; save it as UTF-8 without one"
GAP = "its control images have a gap: 'path_control_2' without 'path_control_1'; number them anew"
OUTSIDE = "is not below the manifest's folder; move it there"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("data/t.png", "data/c.png", "data/c1.png", "data/m.png", "data/sub/a, b.png", "secret.png"):
        write_image(tmp_path / name)
    (tmp_path / "data/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data/linked").symlink_to(tmp_path)
    return tmp_path / "data"


def json_lines(root: Path, *rows: object) -> Path:
    """`rows` are objects, or bytes that stand in the file as they are."""
    path = root / "train.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def table(root: Path, data: bytes) -> Path:
    path = root / "train.csv"
    path.write_bytes(data)
    return path


def test_rows_are_records_in_their_order(root: Path) -> None:
    full = GOOD | {"path_control_1": "c1.png", "path_mask": "m.png", "prompt": " two\nlines ", "id": 7}
    records, problems = found(json_lines(root, full, b"", GOOD | {"path_mask": None, "path_control_1": None}))
    assert problems == []
    assert records == [
        EditRecord("t.png", root / "t.png", (root / "c.png", root / "c1.png"), "two\nlines", root / "m.png"),
        EditRecord("t.png", root / "t.png", (root / "c.png",), "把猫变成蓝色"),
    ]


ROWS: list[dict[str, Any]] = [
    GOOD | {"prompt": 'say "hello", twice\nand once more', "id": "7"},
    GOOD | {"path_target": "sub/a, b.png", "path_control_1": "c1.png"},
    GOOD | {"prompt": " spaces ", "path_mask": "m.png"},
]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_csv_manifest_holds_what_the_same_json_lines_hold(root: Path, quoting: Any, line_end: str) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in ROWS for key in row))
    writer = csv.DictWriter(text, columns, restval="", quoting=quoting, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(ROWS)
    records, problems = found(table(root, text.getvalue().encode()))
    assert (records, problems) == found(json_lines(root, *ROWS))
    assert (len(records), problems) == (3, [])


BAD_PATHS = {
    "absent": ("none.png", "'path_target': none.png is not a local file; correct the path"),
    "folder": ("sub", "'path_target': sub is not a local file; correct the path"),
    "URL": ("https://example.org/a.png", "is not a local file; correct the path"),
    "name too long": ("m" * 300, "cannot be opened: File name too long; make it readable, or correct the path"),
    "inner dots": ("sub/../../secret.png", OUTSIDE),
    "absolute": ("/etc/passwd", OUTSIDE),
    "absolute, of Windows": ("C:\\pictures\\a.png", OUTSIDE),
    "inner dots, of Windows": ("sub\\..\\..\\secret.png", OUTSIDE),
    "link out": ("link.png", "is a link out of the manifest's folder; set data.follow_symlinks=true"),
    "linked folder": ("linked/secret.png", "is a link out of"),
    "NUL": ("a\0.png", "a\\x00.png holds characters that no path has; correct it"),
    "surrogate": ("\udc80.png", "holds characters that no path has; correct it"),
    "number": (3, "'path_target' is not a path; write one in quotes"),
    "null": (None, "has no 'path_target'; add it"),
}
BAD_LINES: dict[str, tuple[object, str]] = {
    **{name: (GOOD | {"path_target": path}, reason) for name, (path, reason) in BAD_PATHS.items()},
    "not JSON": (b'{"path_target": ', "the line is not JSON: Expecting value (character 18); correct it"),
    "no object": (b"[1]", "the line is not a JSON object; write one"),
    "deep": (b"[" * 200_000, "the line is not JSON: "),
    "Latin-1": (b'{"prompt": "caf\xe9"}', "the line is not JSON: 'utf-8' codec can't decode byte 0xe9 in position 15"),
    "byte order mark": (b"\xef\xbb\xbf{}", BOM),
    "long line": (b"x" * (2**22 + 10), "the line is over 4194304 bytes long; shorten it"),
    "duplicate key": (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice; take one out"),
    "gap": (GOOD | {"path_control_2": "c1.png"}, GAP),
    "unknown key": (GOOD | {"path_masks": "m.png"}, f"unknown key 'path_masks'; write one of: {PATHS}"),
    "prompt number": (GOOD | {"prompt": 3}, "'prompt' is not a string; write it in quotes"),
    "prompt null": (GOOD | {"prompt": None}, "has no prompt; write one, or set data.empty_caption"),
    "prompt blank": (GOOD | {"prompt": " "}, "the prompt is empty; write one, or set"),
    "prompt surrogate": (GOOD | {"prompt": "\ud83d"}, "the caption is not UTF-8; save it as UTF-8"),
}
COMMAS = "fields, the first line names 3; quote what holds commas"
BAD_CSV_ROWS = {
    "Latin-1": (b"t.png,c.png,caf\xe9\n", "the row is not UTF-8; save it as UTF-8"),
    "short": (b"t.png,c.png\n", f"the row has 2 {COMMAS}"),
    "comma": (b"t.png,c.png,a,b\n", f"the row has 4 {COMMAS}"),
    "quote": (b't.png,c.png,"a"b\n', "the row is not CSV: ',' expected after '\"'; quote it as RFC 4180 says"),
    "field": (b"t.png,c.png," + b"x" * 2**18 + b"\n", "the row is not CSV: field larger than field"),
    "line": (b"t.png,c.png," + b"x," * 2**22 + b"\n", "the line is over 4194304 bytes long; shorten it"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_problem_of_a_json_line(root: Path, row: object, reason: str) -> None:
    records, (problem,) = found(json_lines(root, GOOD, row, GOOD))
    assert len(records) == 2, "the rows around it are read"
    assert problem.startswith("ROOT:2: ") and reason in problem and problem.isprintable()


@pytest.mark.parametrize(("row", "reason"), BAD_CSV_ROWS.values(), ids=BAD_CSV_ROWS)
def test_problem_of_a_csv_row(root: Path, row: bytes, reason: str) -> None:
    records, (problem,) = found(table(root, HEAD + ROW + row + ROW))
    assert len(records) == 2, "the rows around it are read"
    assert problem.startswith("ROOT:3: ") and reason in problem and problem.isprintable()


def test_all_problems_of_one_line_are_listed(root: Path) -> None:
    bad = {"path_target": "../x", "path_control": "http://x/y.png", "path_mask": "none.png", "prompt": ""}
    assert len(found(json_lines(root, bad))[1]) == 4


def test_csv_rows_are_numbered_by_their_first_line_and_blank_lines_are_none(root: Path) -> None:
    """The last line needs no end; a quote that is never closed is a problem of its row."""
    two = HEAD + b't.png,c.png,"two\nlines"\n' + b"no.png,c.png,a\n\n"
    absent = "ROOT:4: 'path_target': no.png is not a local file; correct the path"
    unclosed = "ROOT:6: the row is not CSV: unexpected end of data; quote it as RFC 4180 says"
    for end, count, reasons in ((ROW.rstrip(), 2, [absent]), (b't.png,c.png,"open\n' + ROW, 1, [absent, unclosed])):
        records, problems = found(table(root, two + end))
        assert (len(records), problems) == (count, reasons)


def test_paths_written_on_windows(root: Path) -> None:
    write_image(root / "sub\\own.png")
    rows = [GOOD | {"path_target": path} for path in ("sub\\a, b.png", "sub\\own.png")]
    records, problems = found(json_lines(root, *rows))
    assert problems == []
    assert [record.target for record in records] == [root / "sub/a, b.png", root / "sub\\own.png"], "a name here"


def test_links_may_be_followed_but_never_dots(root: Path) -> None:
    rows = (GOOD | {"path_target": name} for name in ("link.png", "../secret.png"))
    records, problems = found(json_lines(root, *rows), follow_symlinks=True)
    assert (names(records), problems) == (["link.png"], [f"ROOT:2: 'path_target': ../secret.png {OUTSIDE}"])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_path_is_found_in_the_other_unicode_form(root: Path, form: Any) -> None:
    on_disk, other = (normalize(f, "é.png") for f in (form, "NFC" if form == "NFD" else "NFD"))
    write_image(root / on_disk)
    (record,), problems = found(json_lines(root, GOOD | {"path_target": other}))
    assert (record.target, problems) == (root / on_disk, [])


BAD_COLUMNS = {
    "UTF-16": ((HEAD + ROW).decode().encode("utf-16"), [BOM]),
    "semicolons": (
        b"path_target;path_control;prompt\n",
        [
            "has no column 'path_target'; add it, or rename one of: path_target;path_control;prompt",
            f"unknown key 'path_target;path_control;prompt'; write one of: {PATHS}",
        ],
    ),
    "twice": (b"path_target,prompt,prompt\n", ["the column 'prompt' stands twice; take one out"]),
    "blank": (b"\n", ["has no column 'path_target'; add it, or rename one of: "]),
    "second control alone": (
        b"path_target,path_control_1,prompt\n",
        ["has no column 'path_control'; add it, or rename one of: path_target, path_control_1, prompt"],
    ),
}


@pytest.mark.parametrize(("head", "reasons"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_bad_columns_are_reported_once(root: Path, head: bytes, reasons: list[str]) -> None:
    assert found(table(root, head + b"t.png,c.png,a\n" * 3)) == ([], [f"ROOT:1: {reason}" for reason in reasons])


def test_empty_prompts_follow_the_policy(root: Path) -> None:
    source = table(root, HEAD + b"t.png,c.png,\n")
    assert [record.prompt for record in found(source, empty_caption="use_empty")[0]] == [""]
    assert [problem.skip for problem in find_records(str(source), empty_caption="skip")[1]] == [True]


def test_rows_without_controls(root: Path) -> None:
    """Text to image: no column or key for controls, or one that is empty."""
    null = {"path_target": "t.png", "path_control": None, "prompt": "a"}
    for write, data in ((json_lines, null), (table, b"path_target,prompt\nt.png,a\n"), (table, HEAD + b"t.png,,a\n")):
        (record,), problems = found(write(root, data))  # type: ignore[operator]
        assert (record.controls, record.prompt, problems) == ((), "a", [])
    records, problems = found(table(root, b"path_target,path_control,path_control_1,prompt\nt.png,,c1.png,a\n"))
    assert (records, problems) == ([], ["ROOT:2: has no 'path_control'; add it"])
