"""What a run has left: a LoRA file or a whole transformer, and what it says of its base.

Promise: everything that sampling and export need to know comes from the result itself; what it says is checked against
the base before a weight is read. Cost: a file's header and a few JSON files of the base; `digest` reads every byte.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import xxhash

from mixres.config.schema import COLOUR
from mixres.data.images import WHITE
from mixres.errors import UserError
from mixres.geometry import Size, control_area
from mixres.models import hub, quantize
from mixres.models.family import AreaRule, Family
from mixres.models.lora import base_problem
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, LoraHeader, read_header
from mixres.models.quantize import Method, check_method
from mixres.models.registry import load_family
from mixres.training.checkpoint import MANIFEST

FORMAT = 1  # of the recipe, see `assemble.recipe`
NOT_QUANTIZED = "null"  # as in the configuration
_TRANSFORMER = "transformer"
_LEAST_AREA, _MAX_AREA = 1024, 2**28  # those of data.resize.control


@dataclass(frozen=True)
class RunResult:
    """Where the trained weights lie and what they were trained as."""

    path: Path  # the LoRA file, or the folder of the transformer
    lora: LoraHeader | None  # None: all weights were trained
    recipe: Mapping[str, Any]

    @property
    def background(self) -> str:
        """The colour under transparent pixels of the images."""
        colour: str = self.recipe.get("background", WHITE)
        return colour

    def digest(self) -> str:
        """xxh3-128 of the LoRA file, or over the names and bytes of the transformer's files."""
        if self.lora:
            return hub.file_digest(self.path)
        parts = [f"{file.name} {hub.file_digest(file)}" for file in sorted(self.path.iterdir())]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Base:
    """The pipeline that the weights belong to."""

    path: str
    revision: str | None
    family: Family
    pixels_per_token: int
    area_rules: Mapping[str, AreaRule]  # of control images, by the names of `Family.control_areas`

    def areas(self, size: Size) -> dict[str, int]:
        """The sizes of the controls of a picture of this size, by the names of `Family.control_areas`."""
        return {name: control_area(rule, size) for name, rule in self.area_rules.items()}


def find_result(given: str, key: str) -> RunResult:
    """The result in `given`: a LoRA file, a transformer's folder, or a folder that holds one of the two.

    `key` names the argument in messages.

    Raises:
        UserError: there is none, or it does not say what it was trained on.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return _checked(_of_lora(given, key), key)
    if (path / RECIPE_FILE).is_file():
        return _checked(_of_transformer(path, key), key)
    has_lora, has_transformer = (path / FILE_NAME).is_file(), (path / _TRANSFORMER).is_dir()
    if has_lora and has_transformer:
        raise UserError(f"{key}: {path} holds both {FILE_NAME} and {_TRANSFORMER}/: name one of the two")
    if has_transformer:
        return _checked(_of_transformer(path / _TRANSFORMER, key), key)
    if has_lora:
        return _checked(_of_lora(given, key), key)
    if (path / MANIFEST).is_file():
        export = f"mixres export {path} --format diffusers --out FILE"
        raise UserError(f"{key}: {path} is a checkpoint, no result: export it first ({export}) and name that file")
    raise UserError(
        f"{key}: {path} holds neither {FILE_NAME} nor {_TRANSFORMER}/: name the folder of a run that has ended "
        "(logging.output_dir), its ema/, or a .safetensors file"
    )


def _of_lora(given: str, key: str) -> RunResult:
    header = read_header(given, key=key)
    return RunResult(header.path, header, header.recipe)


def _of_transformer(folder: Path, key: str) -> RunResult:
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        recipe = None
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder / RECIPE_FILE} cannot be read: {error}; copy it again") from error
    return RunResult(folder, None, recipe)


def _checked(result: RunResult, key: str) -> RunResult:
    recipe: Any = result.recipe
    if recipe is None:
        raise UserError(
            f"{key}: {result.path} does not say what it was trained on, so mixres did not write it: load it in the "
            "stock pipeline"
        )
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        raise UserError(f"{key}: {result.path} was written by another version of mixres: install that one")
    texts = [recipe.get(name) for name in ("family", "base", "mixres")]
    revision = recipe.get("revision")
    if not all(isinstance(text, str) and text for text in texts) or not isinstance(revision, str | None):
        raise UserError(f"{key}: {result.path} does not say its family, base and version in its metadata: train again")
    if not isinstance(result.background, str) or not re.fullmatch(COLOUR, result.background):
        raise UserError(f"{key}: {result.path} names {result.background!r} as its background, no colour: train again")
    stated = {name: recipe[name] for name in ("r", "lora_alpha", "use_dora") if name in recipe}
    own = {name: getattr(result.lora, name) for name in stated} if result.lora else {}
    if result.lora and own != stated:
        raise UserError(f"{key}: {result.path} says of itself {stated}, and its weights are {own}: train again")
    return result


def find_base(result: RunResult, given: str | None, key: str) -> Base:
    """The base of `result`, or the one `given` in its place, checked to be of its family and shape.

    Raises:
        UserError: it cannot be had, or does not fit.
    """
    recipe = result.recipe
    path = recipe["base"] if given is None else given
    revision = recipe.get("revision") if path == recipe["base"] else None
    what = key if given is not None else f"{key}: not given, and {result.path} names {path!r}"
    try:
        family = load_family(None, path, revision=revision)
        problem = _family_problem(family, recipe) or _shape_problem(family, result)
        token = family.pixels_per_token()
    except UserError as error:
        raise renamed(error, what) from error
    if problem:
        raise UserError(f"{what}: {path} does not fit {result.path}: {problem}; name another")
    rules = {name: recipe[name] for name in ("control_area", "text_area") if name in recipe}
    return Base(path, revision, family, token, rules)


def find_quantization(result: RunResult, given: str | None, key: str, device: torch.device) -> Method | None:
    """How the base's weights are to be rounded: as `given`, or else as under the LoRA while it was trained.

    Raises:
        UserError: it is no method, or not one for this device.
    """
    stated = result.recipe.get("quantize") if result.lora else None
    name: Any = given if given is not None else stated or NOT_QUANTIZED
    untold = f"not given, and {result.path} was trained over a base in {name}"
    what = f"{key}: {untold if given is None else f'given {given}'}"
    allowed = (NOT_QUANTIZED, *get_args(Method))
    if name not in allowed:
        raise UserError(f"{what}, allowed: one of {', '.join(allowed)}")
    if name == NOT_QUANTIZED:
        return None
    try:
        check_method(name, device)
    except UserError as error:
        raise renamed(error, what, of=quantize.KEY) from error
    return name  # type: ignore[no-any-return]


def renamed(error: UserError, key: str, *, of: str = hub.KEY) -> UserError:
    """`error` with `key` in the place of the configuration's key that it is `of`, the base unless said otherwise."""
    return UserError([f"{key}: {message.removeprefix(f'{of}: ')}" for message in error.messages])


def _family_problem(family: Family, recipe: Mapping[str, Any]) -> str | None:
    name = family.name
    if name != recipe["family"]:
        return f"it is a {name}, trained was a {recipe['family']}"
    areas = {rule: recipe[rule] for rule in ("control_area", "text_area") if rule in recipe}
    wanted = family.control_areas(family.stock_control_area, None)
    if areas.keys() != wanted.keys() or not all(map(_is_area, areas.values())):
        return f"the metadata gives its control images the areas {areas}, and it has {', '.join(wanted) or 'none'}"
    return None


def _is_area(rule: Any) -> bool:
    return rule == "target" or (type(rule) is int and _LEAST_AREA <= rule <= _MAX_AREA)


def _shape_problem(family: Family, result: RunResult) -> str | None:
    skeleton = family.transformer_skeleton()
    if result.lora:
        return base_problem(skeleton, result.lora)
    try:
        own = json.loads((result.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{result.path / 'config.json'} cannot be read: {error}"
    base = json.loads(json.dumps(dict(skeleton.config), default=str))
    other = [name for name, value in own.items() if not name.startswith("_") and base.get(name) != value]
    return f"{other[0]} of its transformer is {base.get(other[0])}, trained was {own[other[0]]}" if other else None
