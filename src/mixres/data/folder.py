"""A folder of pairs -> records: `training_images/a.png` with `a.txt`, `control_images/a.png`, more files for more.

Promise: each target is paired with its own files or is named with every reason why not, and so is each image or
caption that belongs to no target; the order is that of the names. Cost: one listing of the folders, one read a caption.

Names under `training_images/` and `control_images/`, sub-folders included: control `a` first, then `a_control_1`,
`a_control_2`, ...; mask `a_mask` beside its target. Without the folder `control_images/` no record has controls.
Names are compared in Unicode form NFC, since macOS writes NFD. Hidden files and files of `SIDE_SUFFIXES` are no part
of the data set.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from unicodedata import normalize

from mixres.data.images import SUFFIXES
from mixres.data.records import EditRecord, EmptyCaption, Problem, has_surrogate, printable, prompt_of_file
from mixres.errors import Problems, UserError

TARGETS, CONTROLS = "training_images", "control_images"
SIDE_SUFFIXES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".xml", ".log", ".ini", ".db"})
_CONTROL_STEM = re.compile(r"(.+)_control_0*([1-9]\d{0,3})", re.DOTALL)
_LINK_OUT = "is a link out of its data folder; set data.follow_symlinks=true"
_FORMATS = ", ".join(sorted(SUFFIXES))


@dataclass
class _Files:
    """Names of the files of one target by role; more than one in a role is a problem."""

    targets: list[Path]
    masks: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    controls: dict[int, list[Path]] = field(default_factory=lambda: defaultdict(list))


def records_from_folder(
    root: Path, *, follow_symlinks: bool, empty_caption: EmptyCaption
) -> tuple[list[EditRecord], list[Problem]]:
    """All records under `root`, sorted by name, and all problems.

    Raises:
        UserError: `training_images` is missing or holds no image, or one of the two folders leads out of `root`.
    """
    _check_folders(root, follow_symlinks)
    problems: list[Problem] = []
    images, captions = _list_files(root / TARGETS, follow_symlinks, problems)
    if not images:
        raise UserError(f"{printable(root / TARGETS)}: holds no image ({_FORMATS}); add some")
    controlled = (root / CONTROLS).is_dir()
    controls = _list_files(root / CONTROLS, follow_symlinks, problems)[0] if controlled else {}
    by_stem = _targets_and_masks(images)
    for stem, paths in captions.items():
        if stem in by_stem:
            by_stem[stem].captions = paths
        else:
            problems += _orphans(paths, "a caption without a target image")
    for stem, paths in controls.items():
        match = _CONTROL_STEM.fullmatch(stem)
        if stem in by_stem:
            by_stem[stem].controls[0] += paths
        elif match and match[1] in by_stem:
            by_stem[match[1]].controls[int(match[2])] += paths
        else:
            problems += _orphans(paths, "a control image without a target")
    spellings = defaultdict(list)
    for stem in by_stem:
        spellings[stem.casefold()].append(stem)
    records = []
    for stem, files in sorted(by_stem.items(), key=lambda pair: _stem(pair[1].targets[0], root / TARGETS)):
        reasons = _pairing_problems(stem, files, controlled)
        reasons += [
            f"the name differs only in case from that of '{printable(other)}'; rename one"
            for other in sorted(spellings[stem.casefold()])
            if other != stem
        ]
        target = files.targets[0]
        prompt, found = prompt_of_file(target, next(iter(files.captions), None), empty_caption)
        name = printable(target.relative_to(root).as_posix())
        found = [*(Problem(printable(target), reason) for reason in reasons), *found]
        problems += [problem._replace(example=name) for problem in found]
        if not found:
            own = tuple(files.controls[slot][0] for slot in sorted(files.controls))
            records.append(EditRecord(name, target, own, prompt, files.masks[0] if files.masks else None))
    return records, problems


def _check_folders(root: Path, follow_symlinks: bool) -> None:
    problems = Problems()
    if not (root / TARGETS).is_dir():
        where = f"put targets and captions into {TARGETS}/, control images into {CONTROLS}/ beside it"
        if root.name in (TARGETS, CONTROLS):
            where = "name the folder above it"
        problems.add(f"{printable(root / TARGETS)}: no such folder; {where}")
    for folder in (root / TARGETS, root / CONTROLS):
        if not follow_symlinks and not folder.resolve().is_relative_to(root.resolve()):
            problems.add(f"{printable(folder)}: {_LINK_OUT}")
    problems.raise_if_any()


def _stem(path: PurePath, folder: PurePath) -> str:
    """The path without suffix, relative to the folder, with `/` on every system: records stand in the order of it.

    `relative_to` would take as long as all the rest.
    """
    return path.as_posix().removesuffix(path.suffix)[len(folder.as_posix()) + 1 :]


def _list_files(
    folder: Path, follow_symlinks: bool, problems: list[Problem]
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Images and captions by stem in form NFC (path without suffix, relative to the folder); the rest are problems."""
    images: dict[str, list[Path]] = defaultdict(list)
    captions: dict[str, list[Path]] = defaultdict(list)
    for path in _walk(folder, None if follow_symlinks else folder.parent.resolve(), (), problems):
        stem, suffix = normalize("NFC", _stem(path, folder)), path.suffix.lower()
        if suffix in SUFFIXES:
            images[stem].append(path)
        elif suffix == ".txt":
            captions[stem].append(path)
        elif suffix not in SIDE_SUFFIXES:
            reason = f"is neither a caption (.txt) nor an image in a supported format ({_FORMATS})"
            problems.append(Problem(printable(path), f"{reason}; convert it, or take it out"))
    return images, captions


def _walk(folder: Path, allowed: Path | None, above: tuple[Path, ...], problems: list[Problem]) -> Iterator[Path]:
    """Regular files below `folder`, sorted; links out of `allowed`, loops and odd files go to `problems`."""
    above = (*above, folder.resolve())
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(Problem(printable(folder), f"the folder cannot be listed: {error.strerror}; make it readable"))
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if reason := _entry_problem(entry, path, allowed, above):
            problems.append(Problem(printable(path), reason))
        elif entry.is_dir():
            yield from _walk(path, allowed, above, problems)
        else:
            yield path


def _entry_problem(entry: os.DirEntry[str], path: Path, allowed: Path | None, above: tuple[Path, ...]) -> str | None:
    if has_surrogate(entry.name):
        return "the name is not UTF-8; rename the file"
    if entry.is_symlink():
        if not path.exists():
            return "is a broken link; fix it, or take it out"
        real = path.resolve()
        if allowed is not None and not real.is_relative_to(allowed):
            return _LINK_OUT
        if real in above:
            return "is a link to a folder that it lies in; take it out"
    if not entry.is_dir() and not entry.is_file():
        return "is not a regular file; take it out"
    return None


def _targets_and_masks(images: Mapping[str, list[Path]]) -> dict[str, _Files]:
    """Shorter stems first, so that `a` is known to be a target when `a_mask` asks."""
    by_stem: dict[str, _Files] = {}
    for stem in sorted(images, key=len):
        owner = by_stem.get(stem.removesuffix("_mask"))
        if owner:
            owner.masks = images[stem]
        else:
            by_stem[stem] = _Files(images[stem])
    return by_stem


def _orphans(paths: list[Path], what: str) -> list[Problem]:
    reason = f"is {what} of its name; add that, rename this one, or take it out"
    return [Problem(printable(path), reason) for path in paths]


def _pairing_problems(stem: str, files: _Files, controlled: bool) -> list[str]:
    shown, reasons = printable(stem), []
    roles = [("targets", files.targets), ("captions", files.captions), ("masks", files.masks)]
    roles += [(f"controls {slot}" if slot else "controls", files.controls[slot]) for slot in sorted(files.controls)]
    for role, paths in roles:
        if len(paths) > 1:
            reasons.append(f"has several {role}: {', '.join(printable(path.name) for path in paths)}; keep one")
    if controlled and not files.controls:
        reasons.append(f"has no control image {CONTROLS}/{shown}.*; add it")
    for slot in range(max(files.controls, default=-1)):
        if slot not in files.controls:
            missing = f"{shown}_control_{slot}" if slot else shown
            reasons.append(f"its control images have a gap: {CONTROLS}/{missing}.* is missing; add it")
    return reasons
