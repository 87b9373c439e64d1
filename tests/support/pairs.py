"""Small real images on disk, alone and in pairs of target and control."""

from pathlib import Path

import skimage.data
from PIL import Image

from mixres.data.images import Limits
from mixres.data.records import EditRecord
from mixres.data.scan import ScannedRecord, find_records, scan

PHOTO = Image.fromarray(skimage.data.chelsea()).resize((90, 60))
EMPTY = "; write one, or set data.empty_caption to use_empty or skip"


def write_image(path: Path, size: tuple[int, int] = (90, 60), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PHOTO.resize(size).convert(mode).save(path)
    return path


def write_pair(root: Path, stem: str, prompt: str | bytes | None = "make it blue", suffix: str = "png") -> None:
    write_image(root / f"training_images/{stem}.{suffix}")
    write_image(root / f"control_images/{stem}.{suffix}", (48, 64))
    if prompt is not None:
        (root / f"training_images/{stem}.txt").write_bytes(prompt.encode() if isinstance(prompt, str) else prompt)


def found(source: Path, **options: object) -> tuple[list[EditRecord], list[str]]:
    """Records, and problems in which the source is called ROOT."""
    records, problems = find_records(str(source), **options)  # type: ignore[arg-type]
    return records, [str(problem).replace(f"{source}", "ROOT") for problem in problems]


def scanned(source: Path, **options: object) -> tuple[list[ScannedRecord], list[str]]:
    """As `found`, after every image was decoded."""
    result = scan([str(source)], limits=Limits(), **options)  # type: ignore[arg-type]
    return result.records, [str(problem).replace(f"{source}", "ROOT") for problem in result.problems]


def names(records: list[EditRecord]) -> list[str]:
    return [record.name.removeprefix("training_images/") for record in records]
