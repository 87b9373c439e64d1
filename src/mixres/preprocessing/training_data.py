"""A configuration's data -> usable examples, or everything that is wrong with them.

Promise: every fault of files, captions, sizes and prompts, in training and held-out data, is told in one list before
anything is encoded; what is held out is never trained. Cost: the scan; see `mixres.data.scan`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from mixres import atomic
from mixres.config.config import Config
from mixres.console import amount, say
from mixres.data.images import Limits
from mixres.data.records import Fault, printable
from mixres.data.scan import Scan, ScannedRecord, never_trained, scan, split_held_out
from mixres.errors import UserError
from mixres.geometry import Size, control_area, control_scale, target_scale, target_size
from mixres.models.qwen.prompts import over_long
from mixres.training.run_folder import check_folder

BAD_ITEMS = "bad_items.jsonl"
SCAN_MEMO = "scan.json"
SOURCES = ("train", "regularization", "held_out")  # keys of `data`


class _Part(NamedTuple):
    """What is usable of some sources, and what is not."""

    records: list[ScannedRecord]
    faults: list[Fault]
    decoded: int
    unchanged: int
    cut: int  # prompts
    unusable: int  # examples


class Found(NamedTuple):
    """What is usable of a configuration's data, and all that is not."""

    train: list[ScannedRecord]
    held_out: list[ScannedRecord]
    faults: list[Fault]
    decoded: int  # pictures that were decoded,
    unchanged: int  # and those that an earlier scan had decoded
    cut: int  # prompts
    unusable: int  # examples

    @property
    def examples(self) -> int:
        """How many there are, usable or not."""
        return len(self.train) + len(self.held_out) + self.unusable

    def summary(self) -> str:
        """The last line of a list of faults."""
        usable = f"{self.examples - self.unusable} of {amount(self.examples, 'example')} can be used"
        mend = "mend the data, or set data.on_bad_item=skip to go on with those"
        return f"data: {amount(len(self.faults), 'fault')}; {usable}: {mend}"

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
        """Whether the faults are such that nothing may be trained."""
        return config.data.on_bad_item == "error" and any(not fault.skip for fault in self.faults)

    def share_fault(self, config: Config) -> str | None:
        """What is wrong where a share is to be held out and one side is empty."""
        own = [scanned for scanned in self.train if not scanned.regularization]
        share, count = config.data.held_out, len(own) + len(self.held_out)
        if not isinstance(share, float) or (own and self.held_out):
            return None
        what = "all" if self.held_out else "none"
        return f"data.held_out: {share:g} of {count} examples is {what}; give another share, or a folder"


def find_examples(
    config: Config, family: ModuleType, *, speak: bool
) -> tuple[list[ScannedRecord], list[ScannedRecord]]:
    """Training examples, those of `data.regularization` last, and held-out ones.

    `speak`: this process tells what was found and writes `bad_items.jsonl`.

    Raises:
        UserError: sources, sizes or examples are wrong, all of them together; or a share holds out none or all.
    """
    found = look_for_examples(config, family, speak=speak)
    _settle(config, found, speak)
    if fault := found.share_fault(config):
        raise UserError(fault)
    if speak:
        tell(found, family.MOST_PROMPT_TOKENS, config.data.background)
        if found.train and (few := found.few(config)):
            say(f"data      {few}")
    return found.train, found.held_out


def look_for_examples(config: Config, family: ModuleType, *, speak: bool) -> Found:
    """Training and held-out examples, and the faults of the others, whatever is to be done about them.

    Raises:
        UserError: sources or sizes are wrong, all of them together; or the run folder cannot be written.
    """
    data, model = config.data, config.model
    check_folder(Path(config.logging.output_dir))
    token = family.pixels_per_token(model.pretrained_model_name_or_path, revision=model.revision)
    _check_sizes(config, family, token)
    parts, missing = [], list[str]()
    for key in SOURCES:
        try:
            parts.append(_usable(config, family, key, token, speak))
        except UserError as error:
            missing += error.messages
    if missing:
        raise UserError([*dict.fromkeys(missing), *(str(fault) for part in parts for fault in part.faults)])
    own, regularization, held_out = (part.records for part in parts)
    if isinstance(data.held_out, float):
        own, held_out = split_held_out(own, data.held_out, config.train.seed)
    train = [*own, *(scanned._replace(regularization=True) for scanned in regularization)]
    held_out, trained = never_trained(train, held_out)
    unusable = sum(part.unusable for part in parts) + len(trained)
    faults = [fault for part in parts for fault in part.faults] + trained
    decoded, unchanged, cut = (sum(counts) for counts in zip(*(part[2:5] for part in parts), strict=True))
    return Found(train, held_out, faults, decoded, unchanged, cut, unusable)


def _check_sizes(config: Config, family: ModuleType, token: int) -> None:
    faults: list[str] = []
    multiple_of = config.data.resize.target.multiple_of
    if multiple_of % token:
        faults.append(
            f"data.resize.target.multiple_of: {multiple_of} is not a multiple of {token}, the pixels of one token of "
            "this base: give a multiple of that"
        )
    try:
        stated_areas(config, family)
    except UserError as error:
        faults += error.messages
    if faults:
        raise UserError(faults)


def stated_areas(config: Config, family: ModuleType) -> dict[str, int | Literal["target"]]:
    """The size rules of control images under the names that the family's functions give them.

    Raises:
        UserError: the family does not have a size that the configuration gives.
    """
    rules: dict[str, int | Literal["target"]] = family.control_areas(**config.data.resize.control.model_dump())
    return rules


def control_areas(config: Config, family: ModuleType, target: Size) -> dict[str, int]:
    """The sizes of the controls of one target, as keyword arguments of the family's functions."""
    return {name: control_area(rule, target) for name, rule in stated_areas(config, family).items()}


def scan_of(config: Config, key: str, *, speak: bool, **rules: int) -> Scan:
    """What lies in the sources that `key` of `data` names; `rules`: those of `scan` that only a base can tell."""
    named = getattr(config.data, key)
    return scan(
        named if isinstance(named, tuple) else (),
        key=f"data.{key}",
        limits=image_limits(config),
        empty_caption=config.data.empty_caption,
        progress=speak,
        memo=Path(config.cache.cache_dir) / SCAN_MEMO,
        **rules,
    )


def _usable(config: Config, family: ModuleType, key: str, token: int, speak: bool) -> _Part:
    scanned = scan_of(config, key, speak=speak, min_side=token)
    fitting, unfit = _fitting(config, family, scanned.records, token)
    faults = [*scanned.faults, *unfit]
    try:
        usable, too_long, cut = _short_enough(config, family, fitting)
    except UserError as error:  # there is no tokenizer
        raise UserError([*error.messages, *map(str, faults)]) from error
    unusable = scanned.unusable + len(scanned.records) - len(usable)
    return _Part(usable, [*faults, *too_long], scanned.decoded, scanned.unchanged, cut, unusable)


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
    config: Config, family: ModuleType, records: Sequence[ScannedRecord], token: int
) -> tuple[list[ScannedRecord], list[Fault]]:
    """Examples that the family can take, at sizes of whole tokens, and the faults of the others."""
    usable, faults = [], []
    for scanned in records:
        record = scanned.record
        reason = family.example_fault(controls=len(record.controls), prompt=record.prompt)
        found = [Fault(printable(record.target), reason, example=record.name)] if reason else []
        found += _narrowed(config, family, scanned, token)
        faults += found
        if not found:
            usable.append(scanned)
    return usable, faults


def _narrowed(config: Config, family: ModuleType, scanned: ScannedRecord, token: int) -> Iterator[Fault]:
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
            mend = f"no side may be under {token} pixels: give a larger one"
            reason = f"{size} becomes {resized} by {key}; {mend}{of}"
            yield Fault(printable(path), reason, example=record.name)


def _short_enough(
    config: Config, family: ModuleType, records: Sequence[ScannedRecord]
) -> tuple[list[ScannedRecord], list[Fault], int]:
    """Examples whose prompts fit the text encoder, faults of the others, and how many were cut instead."""
    model = config.model
    prompts = (scanned.record.prompt for scanned in records)
    most: int = family.MOST_PROMPT_TOKENS
    long = over_long(prompts, model.pretrained_model_name_or_path, most=most, revision=model.revision)
    usable, faults, cut = [], [], 0
    for scanned in records:
        record = scanned.record
        tokens, beginning = long.get(record.prompt, (0, record.prompt))
        if tokens and config.data.long_caption == "error":
            mend = "shorten it, or set data.long_caption=truncate"
            reason = f"the prompt is {tokens} tokens long, more than {most}; {mend}"
            faults.append(Fault(printable(record.target), reason, example=record.name))
            continue
        usable.append(scanned._replace(record=replace(record, prompt=beginning)) if tokens else scanned)
        cut += bool(tokens)
    return usable, faults, cut


def _settle(config: Config, found: Found, speak: bool) -> None:
    """Stop for faults, all of them together, or list them in the run folder where the configuration says to go on."""
    faults = found.faults
    if found.stop(config):
        raise UserError([*map(str, faults), found.summary()])
    folder = Path(config.logging.output_dir)
    if not speak:
        return
    if not faults:
        (folder / BAD_ITEMS).unlink(missing_ok=True)  # an earlier run's
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replace(folder / BAD_ITEMS) as tmp, tmp.open("w", encoding="utf-8") as file:
            lines = ({"path": f.path, "reason": f.reason, "example": f.example} for f in faults)
            file.writelines(f"{json.dumps(line)}\n" for line in lines)
        left_out = f"{found.unusable} of {amount(found.examples, 'example')}"
        say(f"data      {amount(len(faults), 'fault')}, listed in {folder / BAD_ITEMS}: {left_out} left out")


def tell(found: Found, most_tokens: int, background: str) -> None:
    """What was found, in a few lines."""
    decoded, unchanged = found.decoded, found.unchanged
    pictures = amount(decoded + unchanged, "picture")
    say(f"scan      {pictures}: {decoded} decoded, {unchanged} unchanged since the last scan")
    examples = [*found.train, *found.held_out]
    controls = sum(len(scanned.record.controls) for scanned in examples)
    extra = sum(scanned.regularization for scanned in found.train)
    also, own = f", {extra} regularisation" if extra else "", len(found.train) - extra
    held_out = amount(len(found.held_out), "held-out example")
    say(f"data      {own} training{also} and {held_out} with {amount(controls, 'control')}")
    if flattened := sum(scanned.flattened for scanned in examples):
        say(f"data      {amount(flattened, 'example')} with transparency, which is laid on {background}")
    if several := sum(scanned.first_of_several for scanned in examples):
        say(f"data      {amount(several, 'example')} with several frames or pages in a picture: the first counts")
    if found.cut:
        say(f"data      {amount(found.cut, 'prompt')} cut to {most_tokens} tokens")
