"""A configuration's data -> usable examples, or everything that is wrong with them.

Promise: every problem of files, captions, sizes and prompts, in training and held-out data, is told in one list before
anything is encoded; what is held out is never trained. Cost: the scan; see `mixres.data.scan`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mixres import atomic
from mixres.config.schema import Config
from mixres.console import amount, log
from mixres.data.images import Limits
from mixres.data.records import Problem, printable
from mixres.data.scan import Scan, ScannedRecord, never_trained, scan, split_held_out
from mixres.errors import UserError
from mixres.geometry import Size, control_area, control_scale, target_scale, target_size
from mixres.models.family import AreaRule, Family

BAD_ITEMS = "bad_items.jsonl"
SCAN_MEMO = "scan.json"
SOURCES = ("train", "regularization", "held_out")  # keys of `data`


class _Part(NamedTuple):
    """What is usable of some sources, and what is not."""

    records: list[ScannedRecord]
    problems: list[Problem]
    decoded: int
    unchanged: int
    cut: int  # prompts
    unusable: int  # examples


class ScannedData(NamedTuple):
    """What is usable of a configuration's data, and all that is not."""

    train: list[ScannedRecord]
    held_out: list[ScannedRecord]
    problems: list[Problem]
    decoded: int  # pictures that were decoded,
    unchanged: int  # and those that an earlier scan had decoded
    cut: int  # prompts
    unusable: int  # examples

    @property
    def total(self) -> int:
        """How many there are, usable or not."""
        return len(self.train) + len(self.held_out) + self.unusable

    def summary(self) -> str:
        """The last line of a list of problems."""
        usable = f"{self.total - self.unusable} of {amount(self.total, 'example')} can be used"
        fix = "fix the data, or set data.on_bad_item=skip to go on with those"
        return f"data: {amount(len(self.problems), 'problem')}; {usable}: {fix}"

    def few(self, config: Config) -> str | None:
        """That a step holds more samples than there are, where it does."""
        wanted, count = config.batch.samples_per_step, len(self.train)
        what = "every step is an epoch, and smaller than it should be"
        return (
            f"{amount(count, 'training example')} for batch.samples_per_step={wanted}: {what}"
            if count < wanted
            else None
        )

    def stop(self, config: Config) -> bool:
        """Whether the problems are such that nothing may be trained."""
        return config.data.on_bad_item == "error" and any(not problem.skip for problem in self.problems)

    def share_problem(self, config: Config) -> str | None:
        """What is wrong where a share is to be held out and one side is empty."""
        own = [scanned for scanned in self.train if not scanned.regularization]
        share, count = config.data.held_out, len(own) + len(self.held_out)
        if not isinstance(share, float) or (own and self.held_out):
            return None
        what = "all" if self.held_out else "none"
        return f"data.held_out: {share:g} of {count} examples is {what}; give another share, or a folder"


def usable_records(config: Config, family: Family, *, is_main: bool) -> tuple[list[ScannedRecord], list[ScannedRecord]]:
    """Training examples, those of `data.regularization` last, and held-out ones.

    `is_main`: this process tells what was found and writes `bad_items.jsonl`.

    Raises:
        UserError: sources, sizes or examples are wrong, all of them together; or a share holds out none or all.
    """
    found = scan_records(config, family, is_main=is_main)
    _settle(config, found, is_main)
    if problem := found.share_problem(config):
        raise UserError(problem)
    if is_main:
        tell(found, family.max_prompt_tokens, config.data.background)
        if found.train and (few := found.few(config)):
            log(f"data      {few}")
    return found.train, found.held_out


def scan_records(config: Config, family: Family, *, is_main: bool) -> ScannedData:
    """Training and held-out examples, and the problems of the others, whatever is to be done about them.

    Raises:
        UserError: sources or sizes are wrong, all of them together; or the run folder cannot be written.
    """
    data = config.data
    check_folder(Path(config.logging.output_dir))
    token = family.pixels_per_token()
    _check_sizes(config, family, token)
    parts, missing = [], list[str]()
    for key in SOURCES:
        try:
            parts.append(_usable(config, family, key, token, is_main))
        except UserError as error:
            missing += error.messages
    if missing:
        raise UserError([*dict.fromkeys(missing), *(str(problem) for part in parts for problem in part.problems)])
    own, regularization, held_out = (part.records for part in parts)
    if isinstance(data.held_out, float):
        own, held_out = split_held_out(own, data.held_out, config.train.seed)
    train = [*own, *(scanned._replace(regularization=True) for scanned in regularization)]
    held_out, trained = never_trained(train, held_out)
    unusable = sum(part.unusable for part in parts) + len(trained)
    problems = [problem for part in parts for problem in part.problems] + trained
    decoded, unchanged, cut = (sum(counts) for counts in zip(*(part[2:5] for part in parts), strict=True))
    return ScannedData(train, held_out, problems, decoded, unchanged, cut, unusable)


def _check_sizes(config: Config, family: Family, token: int) -> None:
    problems: list[str] = []
    multiple_of = config.data.resize.target.multiple_of
    if multiple_of % token:
        problems.append(
            f"data.resize.target.multiple_of: {multiple_of} is not a multiple of {token}, the pixels of one token of "
            "this base: give a multiple of that"
        )
    try:
        stated_areas(config, family)
    except UserError as error:
        problems += error.messages
    if problems:
        raise UserError(problems)


def stated_areas(config: Config, family: Family) -> dict[str, AreaRule]:
    """The size rules of control images under the names that the family's functions give them.

    Raises:
        UserError: the family does not have a size that the configuration gives.
    """
    return family.control_areas(**config.data.resize.control.model_dump())


def control_areas(config: Config, family: Family, target: Size) -> dict[str, int]:
    """The sizes of the controls of one target, under the names of `Family.control_areas`."""
    return {name: control_area(rule, target) for name, rule in stated_areas(config, family).items()}


def scan_of(config: Config, key: str, *, is_main: bool, **rules: int) -> Scan:
    """What lies in the sources that `key` of `data` names; `rules`: those of `scan` that only a base can tell."""
    named = getattr(config.data, key)
    return scan(
        named if isinstance(named, tuple) else (),
        key=f"data.{key}",
        limits=image_limits(config),
        empty_caption=config.data.empty_caption,
        progress=is_main,
        memo=Path(config.cache.cache_dir) / SCAN_MEMO,
        **rules,
    )


def _usable(config: Config, family: Family, key: str, token: int, is_main: bool) -> _Part:
    scanned = scan_of(config, key, is_main=is_main, min_side=token)
    fitting, unfit = _fitting(config, family, scanned.records, token)
    problems = [*scanned.problems, *unfit]
    try:
        usable, too_long, cut = _short_enough(config, family, fitting)
    except UserError as error:  # there is no tokenizer
        raise UserError([*error.messages, *map(str, problems)]) from error
    unusable = scanned.unusable + len(scanned.records) - len(usable)
    return _Part(usable, [*problems, *too_long], scanned.decoded, scanned.unchanged, cut, unusable)


def target_size_of(config: Config, scanned: ScannedRecord) -> Size:
    """The size that the example is trained at."""
    rule = config.data.resize.target
    return target_size(
        scanned.target_size, max_pixels=rule.max_pixels, multiple_of=rule.multiple_of, upscale=rule.upscale
    )


def image_limits(config: Config) -> Limits:
    """What a source image may be, for the reading room."""
    data = config.data
    how = data.model_dump(include={"follow_symlinks", "first_frame", "background"})
    return Limits(**how, **data.limits.model_dump())


def _fitting(
    config: Config, family: Family, records: Sequence[ScannedRecord], token: int
) -> tuple[list[ScannedRecord], list[Problem]]:
    """Examples that the family can take, at sizes of whole tokens, and the problems of the others."""
    usable, problems = [], []
    for scanned in records:
        record = scanned.record
        reason = family.record_problem(controls=len(record.controls), prompt=record.prompt)
        found = [Problem(printable(record.target), reason, example=record.name)] if reason else []
        found += _narrowed(config, family, scanned, token)
        problems += found
        if not found:
            usable.append(scanned)
    return usable, problems


def _narrowed(config: Config, family: Family, scanned: ScannedRecord, token: int) -> Iterator[Problem]:
    """Pictures whose size rule leaves a side shorter than a token: whole tokens would stretch them."""
    record, rule, target = scanned.record, config.data.resize.target, scanned.target_size
    scale = target_scale(target, max_pixels=rule.max_pixels, upscale=rule.upscale)
    sizes = [(record.target, target, scale, "data.resize.target.max_pixels")]
    for name, pixels in control_areas(config, family, target_size_of(config, scanned)).items():
        key = f"data.resize.control.{name.removeprefix('control_')}"
        for path, size in zip(record.controls, scanned.control_sizes, strict=True):
            sizes.append((path, size, control_scale(size, area=pixels), key))
    for path, size, scale, key in sizes:
        if min(size) * scale < token:
            resized = f"{size.width * scale:.0f}x{size.height * scale:.0f}"
            of = "" if path is record.target else f" (belongs to {record.name})"
            fix = f"no side may be under {token} pixels: give a larger one"
            reason = f"{size} becomes {resized} by {key}; {fix}{of}"
            yield Problem(printable(path), reason, example=record.name)


def _short_enough(
    config: Config, family: Family, records: Sequence[ScannedRecord]
) -> tuple[list[ScannedRecord], list[Problem], int]:
    """Examples whose prompts fit the text encoder, problems of the others, and how many were cut instead."""
    long, most = family.over_long(scanned.record.prompt for scanned in records), family.max_prompt_tokens
    usable, problems, cut = [], [], 0
    for scanned in records:
        record = scanned.record
        tokens, beginning = long.get(record.prompt, (0, record.prompt))
        if tokens and config.data.long_caption == "error":
            fix = "shorten it, or set data.long_caption=truncate"
            reason = f"the prompt is {tokens} tokens long, more than {most}; {fix}"
            problems.append(Problem(printable(record.target), reason, example=record.name))
            continue
        usable.append(scanned._replace(record=replace(record, prompt=beginning)) if tokens else scanned)
        cut += bool(tokens)
    return usable, problems, cut


def _settle(config: Config, found: ScannedData, is_main: bool) -> None:
    """Stop for problems, all of them together, or list them in the run folder where the configuration says to go on."""
    problems = found.problems
    if found.stop(config):
        raise UserError([*map(str, problems), found.summary()])
    folder = Path(config.logging.output_dir)
    if not is_main:
        return
    if not problems:
        (folder / BAD_ITEMS).unlink(missing_ok=True)  # an earlier run's
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replace(folder / BAD_ITEMS) as tmp, tmp.open("w", encoding="utf-8") as file:
            lines = ({"path": f.path, "reason": f.reason, "example": f.example} for f in problems)
            file.writelines(f"{json.dumps(line)}\n" for line in lines)
        left_out = f"{found.unusable} of {amount(found.total, 'example')}"
        log(f"data      {amount(len(problems), 'problem')}, listed in {folder / BAD_ITEMS}: {left_out} left out")


def tell(found: ScannedData, most_tokens: int, background: str) -> None:
    """What was found, in a few lines."""
    decoded, unchanged = found.decoded, found.unchanged
    pictures = amount(decoded + unchanged, "picture")
    log(f"scan      {pictures}: {decoded} decoded, {unchanged} unchanged since the last scan")
    examples = [*found.train, *found.held_out]
    controls = sum(len(scanned.record.controls) for scanned in examples)
    extra = sum(scanned.regularization for scanned in found.train)
    also, own = f", {extra} regularisation" if extra else "", len(found.train) - extra
    held_out = amount(len(found.held_out), "held-out example")
    log(f"data      {own} training{also} and {held_out} with {amount(controls, 'control')}")
    if flattened := sum(scanned.flattened for scanned in examples):
        log(f"data      {amount(flattened, 'example')} with transparency, which is laid on {background}")
    if several := sum(scanned.first_of_several for scanned in examples):
        log(f"data      {amount(several, 'example')} with several frames or pages in a picture: the first counts")
    if found.cut:
        log(f"data      {amount(found.cut, 'prompt')} cut to {most_tokens} tokens")


def check_folder(folder: Path) -> None:
    """That a run folder is there or can be made, before the work whose results it is to hold.

    Raises:
        UserError: it cannot.
    """
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        reason = None if there.is_dir() else f"{there} is no folder"
        reason = reason or (None if os.access(there, os.W_OK | os.X_OK) else "no permission")
    except OSError as error:  # a name that is too long
        reason = error.strerror
    if reason:
        raise UserError(f"logging.output_dir: {folder} cannot be written: {reason}; name another")
