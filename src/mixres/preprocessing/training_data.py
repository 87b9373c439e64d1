"""A configuration's data -> usable records, or everything that is wrong with them.

Promise: every problem of files, captions, sizes and prompts, in training and held-out data, is reported in one list
before anything is encoded; what is held out is never trained. Cost: the scan; see `mixres.data.scan`.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mixres import atomic
from mixres.config.schema import Config
from mixres.console import amount, log
from mixres.data.decode import Share
from mixres.data.images import Limits
from mixres.data.records import Picture, Problem, printable
from mixres.data.scan import ALONE, Scan, ScannedRecord, never_trained, scan, split_held_out
from mixres.errors import Problems, UserError
from mixres.geometry import Align, Size, aligned_controls, control_area, control_scale, target_scale, target_size
from mixres.models.family import AreaRule, ControlSizes, Family
from mixres.preprocessing.cache_folder import cache_folder

BAD_ITEMS = "bad_items.jsonl"
_MOST_SIZES = 2**16  # that are kept at once
SCAN_MEMO = "scan"
SOURCES = ("train", "regularization", "held_out")  # keys of `data`


class Summary(NamedTuple):
    """What is reported of a configuration's data."""

    train: int  # records, those of `data.regularization` among them
    regularization: int
    held_out: int
    controls: int  # of all records
    masks: bool  # whether a training record has one
    flattened: int
    several: int  # records with several frames or pages in an image
    decoded: int  # as in `ScannedData`, as are the others
    unchanged: int
    cut: int
    unusable: int
    problems: list[Problem]

    @property
    def total(self) -> int:
        """How many records there are, usable or not."""
        return self.train + self.held_out + self.unusable

    def few(self, config: Config) -> str | None:
        """A notice where a step has more samples than there are."""
        wanted, count = config.batch.samples_per_step, self.train
        if count >= wanted:
            return None
        what = "every step is an epoch, and smaller than it should be"
        return f"{amount(count, 'training record')} for batch.samples_per_step={wanted}: {what}"

    def idle(self, config: Config) -> str | None:
        """A notice where keys are set that change nothing in this run."""
        keys = config.idle_keys(masks=self.masks)
        return f"set, but without effect here: {', '.join(keys)}" if keys else None


@dataclass
class ScannedData:
    """What is usable of a configuration's data, and what is not."""

    train: list[ScannedRecord] = field(default_factory=list)  # those of `data.regularization` last
    held_out: list[ScannedRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    decoded: int = 0  # images that were decoded,
    unchanged: int = 0  # and those that an earlier scan had decoded
    cut: int = 0  # prompts
    unusable: int = 0  # records

    @property
    def summary(self) -> "Summary":
        records = [*self.train, *self.held_out]
        return Summary(
            train=len(self.train),
            regularization=sum(scanned.regularization for scanned in self.train),
            held_out=len(self.held_out),
            controls=sum(len(scanned.record.controls) for scanned in records),
            masks=any(scanned.record.mask for scanned in self.train),
            flattened=sum(scanned.flattened for scanned in records),
            several=sum(scanned.first_of_several for scanned in records),
            decoded=self.decoded,
            unchanged=self.unchanged,
            cut=self.cut,
            unusable=self.unusable,
            problems=self.problems,
        )

    def stop(self, config: Config) -> bool:
        """Whether the problems are such that nothing may be trained."""
        return config.data.on_bad_item == "error" and any(not problem.skip for problem in self.problems)

    def refusals(self, config: Config) -> list[str]:
        """Why nothing may be trained: problems, or a fraction that holds out none or all."""
        lines = []
        if self.stop(config):
            there, total = len(self.train) + len(self.held_out), self.summary.total
            usable = f"{there} of {amount(total, 'record')} can be used"
            fix = "fix the data, or set data.on_bad_item=skip to leave the others out"
            lines = [*map(str, self.problems), f"data: {amount(len(self.problems), 'problem')}; {usable}: {fix}"]
        own, fraction = sum(not scanned.regularization for scanned in self.train), config.data.held_out
        if isinstance(fraction, float) and not (own and self.held_out):
            share = f"{fraction:g} of {own + len(self.held_out)} records is {'all' if self.held_out else 'none'}"
            lines.append(f"data.held_out: {share}; give another fraction, or a folder")
        return lines


def usable_records(config: Config, family: Family, *, is_main: bool, share: Share = ALONE) -> ScannedData:
    """Training records, those of `data.regularization` last, and held-out ones.

    `is_main`: this process reports what was found and writes `bad_items.jsonl`. `share`: of the images that it decodes
    before those of other processes.

    Raises:
        UserError: sources, sizes or records are wrong, all of them together; or a fraction holds out none or all.
    """
    found = scan_records(config, family, is_main=is_main, share=share)
    if lines := found.refusals(config):
        raise UserError(lines)  # by every rank: a launcher ends the others as soon as one has ended
    if is_main:
        report(config, family, found.summary)
    return found


def report(config: Config, family: Family, found: Summary) -> None:
    """Log what was found, and write the problems that do not stop the run into the run folder."""
    _list_problems(config, found)
    tell(found, family, config.data.background)
    for notice in filter(None, (found.few(config), found.idle(config))):
        log(f"data      {notice}")


def scan_records(config: Config, family: Family, *, is_main: bool, share: Share = ALONE) -> ScannedData:
    """Training and held-out records, and the problems of the others, whatever is to be done about them.

    Raises:
        UserError: sources or sizes are wrong, all of them together; or the run folder cannot be written.
    """
    check_folder(Path(config.logging.output_dir))
    token = family.pixels_per_token()
    _check_sizes(config, family, token)
    found, problems = ScannedData(), Problems()
    how = {"is_main": is_main, "share": share, "min_side": token}
    parts = {key: problems.collect(_scan_source, config, family, key, found, **how) for key in SOURCES}
    if problems.lines:
        problems.add(*map(str, found.problems))
    problems.raise_if_any()
    train, regularization, held_out = (part or [] for part in parts.values())
    if isinstance(config.data.held_out, float):
        train, held_out = split_held_out(train, config.data.held_out, config.train.seed)
    found.train = [*train, *(scanned._replace(regularization=True) for scanned in regularization)]
    found.held_out, trained = never_trained(found.train, held_out)
    found.problems += trained
    found.unusable += len(trained)
    return found


def _scan_source(config: Config, family: Family, key: str, found: ScannedData, **how: Any) -> list[ScannedRecord]:
    """The usable records of one key of `data`, scanned as `scan_of` does; problems and counts are added to `found`.

    Raises:
        UserError: a source cannot be read, or the base has no tokenizer.
    """
    source = scan_of(config, key, **how)
    found.problems += source.problems
    found.decoded += source.decoded
    found.unchanged += source.unchanged
    long, usable = family.over_long(scanned.record.prompt for scanned in source.records), []
    sizes = RecordSizes(config, family)
    for scanned in source.records:
        tokens, beginning = long[scanned.record.prompt] if long and scanned.record.prompt in long else (0, "")
        unfit = _unfit(sizes, scanned)
        if tokens and config.data.long_caption == "error":
            fix = "shorten it, or set data.long_caption=truncate"
            reason = f"the prompt is {tokens} tokens long, more than {family.max_prompt_tokens}; {fix}"
            unfit.append(_problem(scanned, scanned.record.target, reason))
        found.problems += unfit
        if not unfit:
            if tokens:
                scanned = scanned._replace(record=scanned.record._replace(prompt=beginning))
                found.cut += 1
            usable.append(scanned)
    found.unusable += source.unusable + len(source.records) - len(usable)
    return usable


def scan_of(config: Config, key: str, *, is_main: bool, share: Share = ALONE, **rules: int) -> Scan:
    """Scan the sources that `key` of `data` names; `rules`: arguments of `scan` that only a base can give.

    Raises:
        UserError: a source cannot be read.
    """
    named = getattr(config.data, key)
    return scan(
        named if isinstance(named, tuple) else (),
        key=f"data.{key}",
        limits=image_limits(config),
        empty_caption=config.data.empty_caption,
        columns=config.data.columns,
        progress=is_main,
        memo=cache_folder(config) / SCAN_MEMO,
        share=share,
        **rules,
    )


def image_limits(config: Config) -> Limits:
    """What a source image may be, for `mixres.data.images`."""
    data = config.data
    how = data.model_dump(include={"follow_symlinks", "first_frame", "background"})
    return Limits(**how, **data.limits.model_dump())


def _unfit(sizes: "RecordSizes", scanned: ScannedRecord) -> list[Problem]:
    """Why the family cannot take a record, and images whose size rule leaves a side shorter than a token."""
    record, own, problems = scanned.record, sizes.of(scanned), []
    reason = sizes.family.record_problem(controls=len(record.controls), prompt=record.prompt)
    if reason := reason or own.problem:
        problems.append(_problem(scanned, record.target, reason))
    for number, text in own.too_small:
        owner = f" (belongs to {record.name})" if number else ""
        problems.append(_problem(scanned, (record.target, *record.controls)[number], f"{text}{owner}"))
    return problems


def _problem(scanned: ScannedRecord, path: Picture, reason: str) -> Problem:
    return Problem(printable(path), reason, example=scanned.record.name)


def _check_sizes(config: Config, family: Family, token: int) -> None:
    problems, multiple_of, step = Problems(), config.data.resize.target.multiple_of, family.size_multiple()
    if multiple_of % step:
        of = "the pixels of one token of this base" if step == token else "as the sides of this base's images are"
        problems.add(
            f"data.resize.target.multiple_of: {multiple_of} is not a multiple of {step}, {of}: give a multiple of that"
        )
    problems.collect(stated_areas, config, family)
    if family.controls == (0, 0) and config.data.resize.control.align != "auto":
        problems.add(f"data.resize.control.align: {family.name} takes no control images: leave it out")
    problems.raise_if_any()


def stated_areas(config: Config, family: Family) -> dict[str, AreaRule]:
    """The size rules of control images under the names that the family's functions give them.

    Raises:
        UserError: the family does not have a size that the configuration gives.
    """
    return family.control_areas(**config.data.resize.control.model_dump(exclude={"align"}))


def control_rules(config: Config, family: Family) -> dict[str, AreaRule | Align]:
    """What a result records of the sizes of its controls, none for a family that takes no controls."""
    areas = stated_areas(config, family)
    return {**areas, "control_align": config.data.resize.control.align} if areas else {}


class SizesOf(NamedTuple):
    """The sizes at which a record is encoded, trained and sampled, and what is wrong with them."""

    target: Size
    areas: dict[str, int]  # of its controls, under the names of `Family.control_areas`
    controls: ControlSizes
    by_area: bool  # whether the controls have the sizes that their areas give
    problem: str | None
    too_small: tuple[tuple[int, str], ...]  # images that the size rule leaves a side shorter than a token, by number


class RecordSizes:
    """The sizes of records under a configuration; those of files of equal sizes are computed once."""

    def __init__(self, config: Config, family: Family) -> None:
        self.config, self.family, self._token = config, family, family.pixels_per_token()
        self._rules = stated_areas(config, family)
        self._found: dict[tuple[Any, ...], SizesOf] = {}

    def of(self, scanned: ScannedRecord) -> SizesOf:
        """Those of one record."""
        files = scanned.target_size, scanned.control_sizes, scanned.record.align_control
        found = self._found.get(files)
        if found is None:
            if len(self._found) == _MOST_SIZES:
                self._found.clear()
            found = self._found[files] = self._sizes(*files)
        return found

    def _sizes(self, target: Size, controls: tuple[Size, ...], own: bool | None) -> SizesOf:
        rule, at = self.config.data.resize, target_size(target, **self.config.data.resize.target.model_dump())
        same = aligned_controls(rule.control.align, target, controls, own)
        taken = () if self.family.record_problem(controls=len(controls), prompt="") else controls
        plain = self.family.control_sizes(at, taken, self._rules)
        sizes = self.family.control_sizes(at, taken, self._rules, same[: len(taken)])
        areas = {name: control_area(area, at) for name, area in self._rules.items()}
        scale = target_scale(target, max_pixels=rule.target.max_pixels, upscale=rule.target.upscale)
        resized = [(0, target, scale, "data.resize.target.max_pixels")]
        for name, pixels in areas.items():
            key = f"data.resize.control.{name.removeprefix('control_')}"
            for number, (size, is_same) in enumerate(zip(controls, same, strict=True), 1):
                if not (is_same and name == "control_area"):
                    resized.append((number, size, control_scale(size, area=pixels), key))
        return SizesOf(at, areas, sizes, sizes == plain, self.family.sizes_problem(sizes), (*self._too_small(resized),))

    def _too_small(self, resized: Iterable[tuple[int, Size, float, str]]) -> Iterator[tuple[int, str]]:
        """Such an image would be stretched to whole tokens."""
        for number, size, scale, key in resized:
            if min(size) * scale < self._token:
                made = f"{size.width * scale:.0f}x{size.height * scale:.0f}"
                fix = f"no side may be under {self._token} pixels: give a larger one"
                yield number, f"{size} becomes {made} by {key}; {fix}"


def control_sizes_of(config: Config, family: Family, scanned: ScannedRecord) -> ControlSizes:
    """The sizes at which a record's controls are encoded, trained and sampled."""
    return RecordSizes(config, family).of(scanned).controls


def target_size_of(config: Config, scanned: ScannedRecord) -> Size:
    """The size that the target is trained at."""
    return target_size(scanned.target_size, **config.data.resize.target.model_dump())


def _list_problems(config: Config, found: Summary) -> None:
    """Write the problems that do not stop the run into the run folder; without any, remove an earlier run's list."""
    file = Path(config.logging.output_dir) / BAD_ITEMS
    if not found.problems:
        file.unlink(missing_ok=True)
        return
    lines = ({"path": problem.path, "reason": problem.reason, "example": problem.example} for problem in found.problems)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file, "".join(f"{json.dumps(line)}\n" for line in lines))
    left_out = f"{found.unusable} of {amount(found.total, 'record')}"
    log(f"data      {amount(len(found.problems), 'problem')}, listed in {file}: {left_out} left out")


def tell(found: Summary, family: Family, background: str) -> None:
    """Log what was found, in a few lines."""
    images = amount(found.decoded + found.unchanged, "image")
    log(f"scan      {images}: {found.decoded} decoded, {found.unchanged} unchanged since the last scan")
    also = f", {found.regularization} regularisation" if found.regularization else ""
    held_out, controls = amount(found.held_out, "held-out record"), amount(found.controls, "control")
    log(f"data      {found.train - found.regularization} training{also} and {held_out} with {controls}")
    if found.flattened:
        kept = "kept, and for the text encoder " if family.keeps_alpha else ""
        log(f"data      {amount(found.flattened, 'record')} with transparency, which is {kept}laid on {background}")
    if found.several:
        log(f"data      {amount(found.several, 'record')} with several frames or pages in an image: the first is used")
    if found.cut:
        log(f"data      {amount(found.cut, 'prompt')} cut to {family.max_prompt_tokens} tokens")


def check_folder(folder: Path, *, key: str = "logging.output_dir") -> None:
    """Check that a folder can be written, before the work whose results it is to hold; `key` names it in messages.

    Raises:
        UserError: it cannot.
    """
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:  # a name that is too long
        writable = False
    if not writable:
        raise UserError(f"{key}: {folder} cannot be written; name another folder")
