"""A folder of pairs -> records: `training_images/a.png` with `a.txt`, `control_images/a.png`, more files for more.

Promise: each target is paired with its own files or is named with every reason why not, and so is each picture or
caption that belongs to no target; the order is that of the names. Cost: one listing of the folders, one read a caption.

Names under `training_images/` and `control_images/`, sub-folders included: control `a` first, then `a_control_1`,
`a_control_2`, ...; mask `a_mask` beside its target. Without the folder `control_images/` no example has controls.
Stems are matched exactly, else in Unicode form NFC. Hidden files and files of `SIDE_SUFFIXES` are no part of the data
set.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from mixres.data.images import SUFFIXES
from mixres.data.records import (
    BadCaptionError,
    EditRecord,
    EmptyCaption,
    Problem,
    empty_caption_problem,
    printable,
    read_caption,
)
from mixres.errors import UserError

TARGETS, CONTROLS = "training_images", "control_images"
SIDE_SUFFIXES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".xml", ".log", ".ini", ".db"})
_CONTROL_STEM = re.compile(r"(.+)_control_0*([1-9]\d{0,3})", re.DOTALL)


@dataclass
class _Files:
    """The files of one folder by stem (path without suffix, relative to the folder), and what else was found."""

    images: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Item:
    """A target and all files that claim to belong to it."""

    targets: list[str]
    masks: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    controls: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    misnamed: list[str] = field(default_factory=list)  # files that may be meant to be its control


class _Stems:
    """Target stems, found exactly, else by their NFC form where only one has it."""

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._by_nfc: dict[str, list[str]] = defaultdict(list)
        self.by_case: dict[str, set[str]] = defaultdict(set)

    def add(self, stem: str) -> None:
        nfc = normalize("NFC", stem)
        self._exact.add(stem)
        self._by_nfc[nfc].append(stem)
        self.by_case[nfc.casefold()].add(nfc)

    def find(self, stem: str) -> str | None:
        if stem in self._exact:
            return stem
        found = self._by_nfc.get(normalize("NFC", stem), [])
        return found[0] if len(found) == 1 else None

    def case_twins(self, stem: str) -> list[str]:
        """Target stems that differ from `stem` in case only."""
        nfc = normalize("NFC", stem)
        return sorted(self.by_case.get(nfc.casefold(), set()) - {nfc})


def records_from_folder(
    root: Path, *, follow_symlinks: bool, empty_caption: EmptyCaption
) -> tuple[list[EditRecord], list[Problem]]:
    """All examples under `root`, sorted by name, and all problems.

    Raises:
        UserError: `training_images` is missing or holds no picture, or one of the two folders leads out of `root`.
    """
    _check_folders(root, follow_symlinks)
    targets = _list_files(root, TARGETS, follow_symlinks)
    controlled = (root / CONTROLS).is_dir()
    controls = _list_files(root, CONTROLS, follow_symlinks) if controlled else _Files()
    if not targets.images:
        raise UserError([f"{printable(root / TARGETS)}: holds no picture ({', '.join(sorted(SUFFIXES))}); add some"])
    items, stems = _pair_masks(targets.images)
    problems = targets.problems + controls.problems
    problems += _pair_captions(root, targets.captions, items, stems)
    problems += _pair_controls(root, controls.images, items, stems)
    records = []
    for stem in sorted(items):
        record, found = _record(root, stem, items[stem], stems, empty_caption, controlled=controlled)
        problems += found
        if record and not found:
            records.append(record)
    return records, problems


def _check_folders(root: Path, follow_symlinks: bool) -> None:
    messages = []
    for folder in (root / TARGETS, root / CONTROLS):
        if folder.name == TARGETS and not folder.is_dir():
            messages.append(_no_targets(root))
        elif not follow_symlinks and not folder.resolve().is_relative_to(root.resolve()):
            messages.append(f"{printable(folder)}: is a link out of its data folder; set data.follow_symlinks=true")
    if messages:
        raise UserError(messages)


def _no_targets(root: Path) -> str:
    """What is wrong with a folder that has no `training_images`, as far as its name and what it holds tell."""
    missing = f"{printable(root / TARGETS)}: no such folder"
    if root.name in (TARGETS, CONTROLS) and (root.parent / TARGETS).is_dir():
        return f"{printable(root)}: is one part of a data folder; name the folder above: {printable(root.parent)}"
    if count := sum(path.suffix.lower() in SUFFIXES for path in root.iterdir()):
        where = f"targets and captions to {TARGETS}/, controls to {CONTROLS}/ under their target's name"
        return f"{missing}: make it; move the pictures that {printable(root)} holds itself ({count}): {where}"
    return f"{missing}: make it; data have {TARGETS}/ and, for edits, {CONTROLS}/"


def _list_files(root: Path, folder: str, follow_symlinks: bool) -> _Files:
    files = _Files()
    allowed = None if follow_symlinks else root.resolve()
    for path in _walk(root / folder, allowed, (), files.problems):
        name = path.relative_to(root / folder).as_posix()
        suffix = PurePosixPath(name).suffix
        stem = name.removesuffix(suffix)
        if suffix.lower() in SUFFIXES:
            files.images[stem].append(name)
        elif suffix.lower() == ".txt":
            files.captions[stem].append(name)
        elif suffix.lower() not in SIDE_SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            reason = (
                f"is neither a caption (.txt) nor a picture in a supported format ({known}); convert it, or take it out"
            )
            files.problems.append(Problem(printable(path), reason))
    return files


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
        reason = _entry_problem(entry, path, allowed, above)
        if reason:
            problems.append(Problem(printable(path), reason))
        elif entry.is_dir():
            yield from _walk(path, allowed, above, problems)
        else:
            yield path


def _entry_problem(entry: os.DirEntry[str], path: Path, allowed: Path | None, above: tuple[Path, ...]) -> str | None:
    if not entry.name.isascii() and any("\ud800" <= c <= "\udfff" for c in entry.name):
        return "the name is not UTF-8; rename the file"
    if entry.is_symlink():
        if not path.exists():
            return "is a broken link; fix it, or take it out"
        real = path.resolve()
        if allowed is not None and not real.is_relative_to(allowed):
            return "is a link out of its data folder; set data.follow_symlinks=true"
        if real in above:
            return "is a link to a folder that it lies in; take it out"
    if not entry.is_dir() and not entry.is_file():
        return "is not a regular file; take it out"
    return None


def _pair_masks(images: dict[str, list[str]]) -> tuple[dict[str, _Item], _Stems]:
    """Shorter stems first, so that `a` is known to be a target when `a_mask` asks."""
    items: dict[str, _Item] = {}
    stems = _Stems()
    for stem in sorted(images, key=lambda stem: (len(normalize("NFC", stem)), stem)):
        owner = stems.find(stem.removesuffix("_mask")) if stem.endswith("_mask") else None
        if owner is not None:
            items[owner].masks += images[stem]
        else:
            items[stem] = _Item(images[stem])
            stems.add(stem)
    return items, stems


def _pair_captions(root: Path, captions: dict[str, list[str]], items: dict[str, _Item], stems: _Stems) -> list[Problem]:
    problems = []
    for stem, names in captions.items():
        owner = stems.find(stem)
        if owner is None:
            problems += _orphans(
                root / TARGETS, names, "is a caption without a target picture of its name", stems, stem
            )
        else:
            items[owner].captions += names
    return problems


def _pair_controls(root: Path, images: dict[str, list[str]], items: dict[str, _Item], stems: _Stems) -> list[Problem]:
    problems, strays = [], []
    for stem, names in images.items():
        owner, slot = stems.find(stem), 0
        match = _CONTROL_STEM.fullmatch(stem)
        if owner is None and match:
            owner, slot = stems.find(match[1]), int(match[2])
        if owner is None:
            strays.append(stem)
        else:
            items[owner].controls[slot] += names
    for stem in strays:
        if (meant := _meant(stem, items, stems)) is not None:
            items[meant].misnamed = images[stem]
        else:
            names = images[stem]
            problems += _orphans(root / CONTROLS, names, "is a control image without a target of its name", stems, stem)
    return problems


def _meant(stem: str, items: dict[str, _Item], stems: _Stems) -> str | None:
    """The target without a control whose name this is in other case, or with more behind it (`a_control`, `a-old`)."""
    start = stem.rfind("/") + 1
    shorter = [stem[: start + end.start()] for end in re.finditer(r"[\W_]", stem[start:])][::-1]
    for near in (*stems.case_twins(stem), *shorter):
        owner = stems.find(near)
        if owner is not None and not items[owner].controls and not items[owner].misnamed:
            return owner
    return None


def _orphans(folder: Path, names: Iterable[str], reason: str, stems: _Stems, stem: str) -> list[Problem]:
    twins = ", ".join(map(printable, stems.case_twins(stem)))
    hint = f"; rename it: target '{twins}' differs in case only" if twins else "; add that, or take it out"
    return [Problem(printable(folder / name), reason + hint) for name in names]


def _record(
    root: Path, stem: str, item: _Item, stems: _Stems, empty_caption: EmptyCaption, *, controlled: bool
) -> tuple[EditRecord | None, list[Problem]]:
    target = root / TARGETS / item.targets[0]
    shown = printable(target)
    problems = [Problem(shown, reason) for reason in _pairing_problems(stem, item, stems, controlled)]
    prompt = ""
    if not item.captions:
        problem = empty_caption_problem(shown, f"has no caption file {printable(Path(stem).name)}.txt", empty_caption)
        problems += [problem] if problem else []
    elif len(item.captions) == 1:
        caption = root / TARGETS / item.captions[0]
        try:
            prompt = read_caption(caption)
            problem = (
                None if prompt else empty_caption_problem(printable(caption), "the caption is empty", empty_caption)
            )
        except BadCaptionError as error:
            problem = Problem(printable(caption), str(error))
        problems += [problem] if problem else []
    name = printable(f"{TARGETS}/{item.targets[0]}")
    if problems:
        return None, [problem._replace(example=name) for problem in problems]
    controls = tuple(root / CONTROLS / item.controls[slot][0] for slot in sorted(item.controls))
    mask = root / TARGETS / item.masks[0] if item.masks else None
    return EditRecord(name=name, target=target, controls=controls, prompt=prompt, mask=mask), []


def _pairing_problems(stem: str, item: _Item, stems: _Stems, controlled: bool) -> Iterator[str]:
    twins = stems.case_twins(stem)
    if twins:
        yield f"the name differs only in case from that of '{', '.join(map(printable, twins))}'; rename one"
    claims = [("targets", item.targets), ("captions", item.captions), ("masks", item.masks)]
    for slot in sorted(item.controls):
        claims.append((f"controls {slot}" if slot else "controls", item.controls[slot]))
    for what, names in claims:
        if len(names) > 1:
            yield f"has several {what}: {', '.join(map(printable, names))}; keep one"
    shown = printable(stem)
    if controlled and not item.controls and item.misnamed:
        meant = ", ".join(printable(Path(name).name) for name in item.misnamed)
        yield f"has no control image {CONTROLS}/{shown}.*; {meant} may be meant: rename it"
    elif controlled and not item.controls:
        yield f"has no control image {CONTROLS}/{shown}.*; add it"
    for slot in range(max(item.controls, default=-1)):
        if slot not in item.controls:
            missing = f"{shown}_control_{slot}" if slot else shown
            yield f"its control images have a gap: {CONTROLS}/{missing}.* is missing; add it"
