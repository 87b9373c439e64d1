"""The page on data: its trees and manifests are read, and its table of sizes is what the size rules give."""

import re
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from mixres.data.images import Limits
from mixres.data.scan import scan
from mixres.geometry import Size, control_size, target_size
from support.pages import DOCS

PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
PHOTO = Image.fromarray(skimage.data.chelsea()).resize((90, 60))


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


@pytest.mark.parametrize("title", ["A folder", "JSON lines and CSV"])
def test_the_layouts_are_read(tmp_path: Path, title: str) -> None:
    tree = re.findall(r"```\n(\w+/\n.*?)```", section(title), re.DOTALL)[0]
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = re.split(r"\s{2,}", line.strip())[0]
        folders[depth:] = [name]
        path = tmp_path / "".join(folders)
        if name.endswith("/"):
            path.mkdir()
        elif path.suffix == ".txt":
            path.write_text("make it blue")
        elif path.suffix in (".jsonl", ".csv"):
            block = re.findall(rf"```{path.suffix[1:]}\n(.*?)```", section(title), re.DOTALL)[0]
            path.write_text(block)
        else:
            PHOTO.save(path)
    (root,) = tmp_path.iterdir()
    sources = [root] if title == "A folder" else [root / "my_pairs.jsonl", root / "my_pairs.csv"]
    for source in sources:
        found = scan([str(source)], limits=Limits())
        assert found.problems == []
        assert len(found.records) >= 2
        assert {len(one.record.controls) for one in found.records} == ({1, 3} if title == "A folder" else {1, 2})
        assert any(one.record.mask for one in found.records)


def test_the_table_of_target_sizes() -> None:
    rows = re.findall(r"\| ([\w ,:]+) \| (\d+)x(\d+) \| (\d+)x(\d+) \| (\d+)x(\d+) \|", section("Sizes"))
    assert len(rows) >= 8
    for name, *numbers in rows:
        width, height, *expected = map(int, numbers)
        source = Size(width, height)
        target = target_size(source, max_pixels=1024 * 1024, multiple_of=16)
        assert [*target, *control_size(source, area=1024 * 1024)] == expected, name
