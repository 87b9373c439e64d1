"""What is to be sampled: one prompt with its images, or a file with a JSON object a line.

Promise: every problem of every line is told; no path leads out of the file's folder. Lines use the names of a data
manifest (`prompt`, `path_control`, `path_control_1`, ...), so one of held-out data can be given as it is: its targets
and masks are not opened. `seed` and `size` may stand besides. Cost: one pass, one `stat` a path.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mixres.data.images import BadImageError, Limits, check_size
from mixres.data.manifest import BadRowError, control_keys, file_below, json_rows, key_problems
from mixres.data.records import BadCaptionError, check_caption, printable
from mixres.errors import UserError
from mixres.geometry import Size

LIMITS = Limits()
MAX_SEED = 2**63 - 1
_KEYS = ("prompt", "seed", "size")
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


@dataclass(frozen=True)
class Row:
    """One picture that is asked for; None stands for what the command line or the image decides."""

    prompt: str
    images: tuple[Path, ...]
    seed: int | None = None
    size: Size | None = None
    prompt_at: str = "--prompt"  # for messages
    images_at: str = "--image"
    size_at: str = "--size"


def given_row(prompt: str, images: Sequence[str]) -> Row:
    """The one of the command line.

    Raises:
        UserError: the prompt is no text that can be encoded.
    """
    try:
        return Row(_prompt(prompt), tuple(Path(image).expanduser() for image in images))
    except BadCaptionError as error:
        raise UserError(f"--prompt: {error}; change it") from error


def rows_of(file: Path) -> tuple[list[Row], list[str]]:
    """The rows of `file` in their order, and everything that is wrong with its other lines.

    Raises:
        UserError: it cannot be read.
    """
    rows, problems = [], []
    try:
        lines = list(json_rows(file))
        root = file.parent.resolve()
    except OSError as error:
        raise UserError(
            f"--prompts: {printable(file)} cannot be read: {error.strerror or error}; name another"
        ) from error
    for number, line in lines:
        where = f"{printable(file)}:{number}"
        found = list(_problems(line, file.parent, root))
        problems += [f"{where}: {problem}" for problem in found]
        if not (found or isinstance(line, BadRowError)):
            rows.append(_row(line, file.parent, where))
    if not (rows or problems):
        problems.append(f"--prompts: {printable(file)} has no lines: write one for each picture")
    return rows, problems


def parsed_size(text: Any) -> Size:
    """`WIDTHxHEIGHT`.

    Raises:
        ValueError: it is none, or too large or long.
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError(f"given {text}, allowed: WIDTHxHEIGHT in pixels, such as 1024x768")
    size = Size(int(match[1]), int(match[2]))
    check_size(size, LIMITS)
    return size


def _prompt(text: Any) -> str:
    if not isinstance(text, str):
        raise BadCaptionError(
            "has no prompt; write one" if text is None else "'prompt' is not a string; write it in quotes"
        )
    prompt = check_caption(text)
    if not prompt:
        raise BadCaptionError("the prompt is empty; write one")
    return prompt


def _problems(line: Mapping[str, Any] | BadRowError, folder: Path, root: Path) -> Iterator[str]:
    if isinstance(line, BadRowError):
        yield str(line)
        return
    yield from key_problems(line)
    for key in line:
        if not key.startswith("path") and key not in _KEYS:
            close = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known beside paths: {', '.join(_KEYS)}"
            yield f"unknown key '{printable(key)}'; {hint}"
    for key in control_keys(line):
        try:
            file_below(folder, root, key, line.get(key), fix="put the file itself there")
        except BadRowError as error:
            yield str(error)
    for key, read in (("prompt", _prompt), ("seed", _seed), ("size", parsed_size)):
        try:
            if key == "prompt" or line.get(key) is not None:
                read(line.get(key))
        except (BadCaptionError, BadImageError) as error:
            yield str(error)
        except ValueError as error:
            yield f"'{key}': {error}"


def _row(line: Mapping[str, Any], folder: Path, where: str) -> Row:
    return Row(
        prompt=_prompt(line["prompt"]),
        images=tuple(file_below(folder, None, key, line[key]) for key in control_keys(line)),
        seed=line.get("seed"),
        size=None if line.get("size") is None else parsed_size(line["size"]),
        prompt_at=where,
        images_at=where,
        size_at=f"{where}: 'size'",
    )


def _seed(value: Any) -> None:
    if type(value) is not int or not 0 <= value <= MAX_SEED:
        raise ValueError(f"given {value}, allowed: an integer >= 0 and <= {MAX_SEED}")
