"""The page on data: its problems are what a run reports of such files, its trees and size tables are what is done."""

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.images import Limits
from mixres.data.plan import Lengths, Plan
from mixres.data.scan import find_records, scan
from mixres.errors import UserError
from mixres.geometry import Size, control_size, target_size
from mixres.models.qwen import edit as family
from mixres.preprocessing.fill import encode_all
from mixres.preprocessing.training_data import usable_records

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8")
PHOTO = Image.fromarray(skimage.data.chelsea()).resize((90, 60))
TARGETS, CONTROLS = "training_images", "control_images"
Setup = Callable[..., Config]


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def lines(title: str) -> list[str]:
    """What stands in the fenced blocks of a section, the lines that are wrapped put together."""
    blocks = re.findall(r"```\n(.*?)```", section(title), re.DOTALL)
    return re.sub(r"\n {2,}", " ", "".join(blocks)).splitlines()


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def put(root: Path, name: str, data: bytes | Image.Image) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(data) if isinstance(data, Image.Image) else data)


def put_pair(
    root: Path, target: str, data: bytes | Image.Image = PHOTO, caption: bytes | None = b"make it blue"
) -> None:
    stem = Path(target).stem
    put(root, f"{TARGETS}/{target}", data)
    put(root, f"{CONTROLS}/{stem}.png", PHOTO)
    if caption is not None:
        put(root, f"{TARGETS}/{stem}.txt", caption)


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(12_000 * 1501)))


def bad_pictures(root: Path) -> None:
    jpeg = encode(PHOTO, "JPEG")
    put_pair(root, "truncated.jpg", jpeg[: len(jpeg) // 2])
    put_pair(root, "empty.png", b"")
    put_pair(root, "page.png", b"<!DOCTYPE html><html>404 Not ScannedData</html>")
    put_pair(root, "float.tif", encode(PHOTO.convert("F"), "TIFF"))
    put_pair(root, "exif.png", encode(PHOTO, exif=b"Exif\0\0no TIFF header"))
    gray, bits = encode(Image.fromarray(np.zeros((60, 90), np.uint16)), "TIFF"), struct.pack("<HHI", 258, 3, 1)
    put_pair(root, "scan.tif", gray.replace(bits + b"\x10", bits + b"\x0c"))
    put_pair(root, "animated.gif", encode(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]))
    put_pair(root, "bomb.png", bomb())
    put_pair(root, "tiny.png", PHOTO.resize((40, 12)))
    put_pair(root, "sliver.png", PHOTO.resize((5000, 40)))
    put_pair(root, "heavy.bmp", b"")
    os.truncate(root / TARGETS / "heavy.bmp", 2**29 + 1)
    put(root, f"{CONTROLS}/control.png", b"")
    put(root, f"{TARGETS}/control.png", PHOTO)
    put(root, f"{TARGETS}/control.txt", b"make it blue")
    for name, mask in {
        "masked": Image.new("L", (60, 90)),
        "seethrough": Image.new("RGBA", (90, 60), (0, 0, 0, 9)),
        "binary": Image.fromarray(np.eye(60, 90, dtype=np.uint8)),
    }.items():
        put_pair(root, f"{name}.png")
        put(root, f"{TARGETS}/{name}_mask.png", mask)


def bad_captions(root: Path) -> None:
    put_pair(root, "blank.png", caption=b" \n")
    put_pair(root, "none.png", caption=None)
    put_pair(root, "marked.png", caption=b"\xef\xbb\xbfmake it blue")
    put_pair(root, "latin1.png", caption=b"caf\xe9")
    put_pair(root, "nul.png", caption=b"make\0it")
    put_pair(root, "joined.png", caption="make \ufeffit blue".encode())
    put_pair(root, "huge.png", caption=b"x" * (2**20 + 1))
    put_pair(root, "long.png", caption=b"0123456789 " * 200)
    put_pair(root, "token.png", caption=b"see <|image_pad|>")
    put(root, f"{TARGETS}/orphan.txt", b"make it blue")


def bad_names(root: Path) -> None:
    for name in ("alone", "retina", "gap", "two", "several", "twice", "Case", "case", "other", "extra"):
        put_pair(root, f"{name}.png")
    (root / CONTROLS / "alone.png").unlink()
    (root / CONTROLS / "retina.png").rename(root / CONTROLS / "retina_control.png")
    put(root, f"{CONTROLS}/gap_control_2.png", PHOTO)
    put(root, f"{CONTROLS}/two_control_1.png", PHOTO)
    put(root, f"{CONTROLS}/several.jpg", encode(PHOTO, "JPEG"))
    put(root, f"{TARGETS}/twice.jpg", encode(PHOTO, "JPEG"))
    put(root, f"{TARGETS}/extra_mask.png", Image.new("L", (90, 60)))
    put(root, f"{TARGETS}/extra_mask.bmp", encode(Image.new("L", (90, 60)), "BMP"))
    (root / CONTROLS / "other.png").rename(root / CONTROLS / "Other.png")
    put(root, f"{TARGETS}/photo.heic", b"ftypheic")
    os.mkfifo(root / TARGETS / "pipe.png")
    (root / TARGETS / "broken.png").symlink_to("nowhere.png")
    (root / TARGETS / "link.png").symlink_to("/etc/passwd")
    (root / TARGETS / "loop").symlink_to("../training_images")
    put(root, os.fsdecode(f"{TARGETS}/".encode() + b"\xff.png"), PHOTO)


@pytest.fixture
def setup(small_run: Path, tmp_path: Path) -> Setup:
    common = [f"cache.cache_dir={tmp_path / 'cache'}", f"logging.output_dir={tmp_path / 'run'}", "data.held_out=null"]
    return lambda root, *more: load_config(small_run, [f"data.train={root}", *common, *more])


def refusal(config: Config) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        usable_records(config, family, is_main=True)
    return caught.value.messages


def shown(text: str, root: Path) -> str:
    text = text.replace(f"{root}/", "").replace(str(root), root.name)
    return re.sub(r"(does not decode): [^(]*\(.*\);", r"\1: ...;", text)


@pytest.mark.parametrize(
    ("title", "spoil"),
    [("Pictures", bad_pictures), ("Captions", bad_captions), ("Names and pairs", bad_names)],
)
def test_the_problems_of_a_folder(tmp_path: Path, setup: Setup, title: str, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "my_pairs")
    told = [shown(message, tmp_path / "my_pairs") for message in refusal(setup(tmp_path / "my_pairs"))[:-1]]
    assert sorted(lines(title)) == sorted(told)


GOOD = {"path_target": "a.png", "path_control": "b.png", "prompt": "make it blue"}


def test_the_problems_of_json_lines(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a.png", "b.png"):
        put(root, name, PHOTO)
    (root / "link.png").symlink_to("/etc/passwd")
    (root / "folder").mkdir()
    rows: list[Any] = [
        b'{"path_target": ',
        b"[1]",
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'"' + b"x" * 2**22,
        {"path_control": "b.png", "prompt": "x"},
        {"path_target": "a.png", "path_control_1": "b.png", "prompt": "x"},
        GOOD | {"path_target": 3},
        GOOD | {"path_control_2": "b.png"},
        GOOD | {"path_masks": "b.png"},
        GOOD | {"path_mask": "c.png"},
        GOOD | {"path_mask": "folder"},
        GOOD | {"path_target": "../a.png"},
        GOOD | {"path_target": "/data/a.png"},
        GOOD | {"path_target": "link.png"},
        GOOD | {"path_target": "https://example.org/a.png"},
        GOOD | {"path_target": "a\0.png"},
        GOOD | {"prompt": 3},
        GOOD | {"prompt": None},
        GOOD | {"prompt": " "},
        b'{"path_target": "a.png", "path_control": "b.png", "prompt": "\\ud83d"}',
        GOOD | {"prompt": "\ufeffmake it blue"},
    ]
    data = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    put(root, "my_pairs.jsonl", b"\xef\xbb\xbf{}\n" + b"\n".join(data))
    problems = find_records(str(root / "my_pairs.jsonl"))[1]
    assert lines("JSON lines") == [shown(str(problem), root) for problem in problems]


def test_the_problems_of_csv(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path, name, PHOTO)
    told = []
    for head in (
        b"\xef\xbb\xbfpath_target,path_control,prompt",
        b"path_target;prompt",
        b"path_target,path_control_1,prompt",
        b"path_target,path_control,id,id",
    ):
        put(tmp_path, "my_pairs.csv", head + b"\na.png,b.png,x\n")
        told += find_records(str(tmp_path / "my_pairs.csv"))[1]
    rows = [b"a.png,b.png", b'a.png,b.png,"x"y', b"a.png,b.png,caf\xe9", b",b.png,x"]
    put(tmp_path, "my_pairs.csv", b"path_target,path_control,prompt\n" + b"\n".join(rows))
    told += find_records(str(tmp_path / "my_pairs.csv"))[1]
    assert lines("CSV") == [shown(str(problem), tmp_path) for problem in told]


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pictures = {"path_target", "path_control"}
    kinds = {key: datasets.Image() if key in pictures else datasets.Value("string") for key in rows[0]}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).save_to_disk(folder)
    return folder


def stored(folder: Path, row: dict[str, Any]) -> Path:
    """Cells as they are: `datasets.Image` would look for the file that is named."""
    cell = datasets.Features({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    kinds = {"path_target": cell, "path_control": cell, "prompt": datasets.Value("string")}
    datasets.Dataset.from_list([row], features=datasets.Features(kinds)).save_to_disk(folder)
    return folder


def test_the_problems_of_a_saved_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    cell = {"bytes": encode(PHOTO), "path": None}
    good = {"path_target": cell, "path_control": cell, "prompt": "x"}
    rows = [good | {"path_target": None}, good | {"prompt": ""}, good | {"path_target": {"bytes": b"", "path": None}}]
    told = [str(problem) for problem in scan([str(saved(tmp_path / "my_set", rows))], limits=Limits()).problems]
    datasets.Dataset.from_list([{"path_target": "a.png", "path_control": "b.png", "prompt": "x"}]).save_to_disk(
        tmp_path / "my_texts"
    )
    told += [str(problem) for problem in find_records(str(tmp_path / "my_texts"))[1]]
    named = good | {"path_target": {"bytes": None, "path": "/data/a.png"}}
    told += [str(problem) for problem in find_records(str(stored(tmp_path / "my_names", named)))[1]]
    sources = [saved(tmp_path / "my_images", [{"image": "a", "prompt": "x"}])]
    datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "my_set"))}).save_to_disk(
        tmp_path / "my_sets"
    )
    away = saved(tmp_path / "my_links", [good])
    state = json.loads((away / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../my_set/data.arrow"
    (away / "state.json").write_text(json.dumps(state))
    (saved(tmp_path / "my_state", [good]) / "state.json").write_text("{")
    for source in [*sources, tmp_path / "my_sets", away, tmp_path / "my_state"]:
        told += messages(source)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    told += messages(tmp_path / "my_set")
    assert lines("Saved data sets") == [shown(line, tmp_path) for line in told]


def messages(source: Path | str) -> list[str]:
    with pytest.raises(UserError) as caught:
        find_records(str(source))
    return list(caught.value.messages)


def test_the_problems_of_sources(tmp_path: Path) -> None:
    (tmp_path / "half" / CONTROLS).mkdir(parents=True)
    for name in (TARGETS, CONTROLS):
        (tmp_path / "bare" / name).mkdir(parents=True)
    (tmp_path / "pairs.txt").write_text("x")
    (tmp_path / "torn.jsonl").symlink_to("/proc/self/mem")  # a file that opens and cannot be read
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / TARGETS).symlink_to(tmp_path / "bare" / TARGETS)
    names = ("nowhere", "pairs.txt", "torn.jsonl", "half", "bare", "linked")
    told = [line for name in names for line in messages(tmp_path / name)]
    told.insert(1, messages("0,2")[0])
    assert lines("Sources") == [shown(line, tmp_path) for line in told]


def test_what_is_held_out_and_the_last_line(tmp_path: Path, setup: Setup) -> None:
    for folder, first, second in (("my_pairs", "a.png", "z.png"), ("held_out", "b.png", "c.png")):
        put_pair(tmp_path / folder, first)
        put_pair(tmp_path / folder, second, PHOTO.rotate(180))
    told = []
    for held_out in (str(tmp_path / "held_out"), "0.0001", "0.9999"):
        told += refusal(setup(tmp_path / "my_pairs", f"data.held_out={held_out}"))
    last = told.pop(2)
    assert lines("What is held out") == [shown(line, tmp_path) for line in told]
    assert lines("The scan") == [last]


def test_the_problems_of_sizes(tmp_path: Path, setup: Setup) -> None:
    root = tmp_path / "my_pairs"
    put_pair(root, "slim.png", PHOTO.resize((480, 60)))
    put(root, f"{CONTROLS}/slim.png", PHOTO.resize((480, 60)))
    told = list(refusal(setup(root, "data.resize.target.max_pixels=1024", "data.resize.control.area=1024"))[:-1])
    for path in root.rglob("slim*"):
        path.unlink()
    put_pair(root, "large.png", PHOTO.resize((184, 64)))
    with pytest.raises(UserError) as caught:
        encode_all(setup(root, "batch.max_tokens=60"), family, device=torch.device("cpu"))
    told += caught.value.messages
    assert not list(tmp_path.glob("cache/??")), "nothing has been encoded"
    lengths, plan = [Lengths(30, 42, 30)], {"seed": 0, "samples_per_step": 1, "max_tokens": 60}
    with pytest.raises(UserError) as caught:
        Plan(lengths, names=[f"{TARGETS}/wordy.png"], layout="packed", **plan)
    told += caught.value.messages
    assert lines("Sizes") == [shown(line, root) for line in told]


# --- Layouts


@pytest.mark.parametrize("title", ["A folder", "JSON lines and CSV"])
def test_a_tree_of_the_page_is_read_without_a_problem(tmp_path: Path, title: str) -> None:
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
        assert {len(item.record.controls) for item in found.records} == {1, 3} if title == "A folder" else {1, 2}
        assert any(item.record.mask for item in found.records)


# --- Sizes


def test_the_table_of_target_sizes() -> None:
    rows = re.findall(r"\| ([\w ,:]+) \| (\d+)x(\d+) \| (\d+)x(\d+) \| (\d+)x(\d+) \|", section("Sizes"))
    assert len(rows) >= 8
    for name, *numbers in rows:
        width, height, *expected = map(int, numbers)
        source = Size(width, height)
        target = target_size(source, max_pixels=1024 * 1024, multiple_of=16)
        assert [*target, *control_size(source, area=1024 * 1024)] == expected, name
