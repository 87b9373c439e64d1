"""What a run has left: a LoRA file or a full transformer, and the base that its recipe names.

Promise: everything that sampling and export need to know comes from the result itself; it is checked against the base
before a weight is read. Cost: a file's header and a few JSON files of the base.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field

from mixres.config.schema import COLOUR, LYCORIS, TargetSizeConfig
from mixres.data.images import WHITE
from mixres.errors import UserError
from mixres.geometry import Align, Size, aligned_controls, control_area, same_aspect, target_size
from mixres.inference.options import validated
from mixres.models import hub, quantize
from mixres.models.family import ControlSizes, Family
from mixres.models.lora import base_problem
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, LoraHeader, read_header
from mixres.models.quantize import Method, check_method
from mixres.models.registry import FAMILIES, load_family

FORMAT = 1  # of the recipe, see `training.setup.recipe`
TRANSFORMER = "transformer"
_AREA_RULES = ("control_area", "text_area")
_TARGET_SIZE, _ALIGN = "target_size", "control_align"  # keys that earlier recipes lack


_AreaRule = Literal["target"] | Annotated[int, Field(ge=1024, le=2**28, strict=True)]  # as data.resize.control


class _Recipe(BaseModel):
    """The keys of a recipe that are read here."""

    family: str
    base: Annotated[str, Field(min_length=1)]
    control_area: _AreaRule = "target"
    text_area: _AreaRule = "target"
    control_align: Align = "never"
    target_size: TargetSizeConfig = TargetSizeConfig()
    revision: str | None = None
    background: Annotated[str, Field(pattern=COLOUR)] = WHITE
    quantize: Method | None = None


@dataclass(frozen=True)
class RunResult:
    """Where the trained weights are and what they were trained as."""

    path: Path  # the LoRA file, or the folder of the transformer
    lora: LoraHeader | None  # None: all weights were trained
    recipe: Mapping[str, Any]

    @property
    def family(self) -> Family:
        """The family that it names, whose base may be gone."""
        family = next(each for each in FAMILIES.values() if each.name == self.recipe["family"])
        return family(self.recipe["base"], revision=self.recipe.get("revision"))

    @property
    def area_rules(self) -> dict[str, Any]:
        """The rules for the sizes of control images, by the names of `Family.control_areas`."""
        return {name: self.recipe[name] for name in _AREA_RULES if name in self.recipe}

    def areas(self, size: Size) -> dict[str, int]:
        """The areas in pixels of the controls of an image of this size, by the names of `Family.control_areas`."""
        return {name: control_area(rule, size) for name, rule in self.area_rules.items()}

    def trained_size(self, control: Size) -> Size | None:
        """What training would have made of a target of a control's size; None: the recipe does not say."""
        rule = self.recipe.get(_TARGET_SIZE)
        return target_size(control, **rule) if rule else None

    def aligned_size(self, control: Size, size: Size) -> Size | None:
        """`size` if its grid can be that of this control too, else the nearest that can; None: none has to be."""
        multiple_of = self.recipe.get(_TARGET_SIZE, {}).get("multiple_of")
        if self.recipe.get(_ALIGN, "never") == "never" or not multiple_of:
            return None
        if size == self.trained_size(control) or same_aspect(control, size, multiple_of):
            return size
        return target_size(control, max_pixels=math.prod(size), multiple_of=multiple_of, upscale=True)

    def control_sizes(self, size: Size, controls: Sequence[Size], own: bool | None = None) -> ControlSizes:
        """The sizes of the controls of an image of this size, by the rules of the training; `own`: of the record.

        An image of the first control's aspect is taken for a target of its size.
        """
        target = controls[0] if controls and self.aligned_size(controls[0], size) == size else size
        aligned = aligned_controls(self.recipe.get(_ALIGN, "never"), target, controls, own)
        return self.family.control_sizes(size, controls, self.area_rules, aligned)


def find_result(given: str, key: str) -> RunResult:
    """The result in `given`: a LoRA file, a transformer's folder, or a folder that holds one of the two.

    `key` names the argument in messages.

    Raises:
        UserError: there is none, or it has no recipe that can be used.
    """
    path = Path(given).expanduser()
    has_lora, has_transformer = (path / FILE_NAME).is_file(), (path / TRANSFORMER).is_dir()
    if (path / RECIPE_FILE).is_file():
        return _full_transformer(path, key)
    if has_lora and has_transformer:
        raise UserError(f"{key}: {path} holds both {FILE_NAME} and {TRANSFORMER}/: name one of the two")
    if has_transformer:
        return _full_transformer(path / TRANSFORMER, key)
    if has_lora or not path.is_dir():
        header = read_header(given, key=key)
        return _checked(RunResult(header.path, header, header.recipe), key)
    raise UserError(
        f"{key}: {path} holds neither {FILE_NAME} nor {TRANSFORMER}/: name the folder of a run that has ended "
        "(logging.output_dir), its ema/, or a .safetensors file; to sample with a checkpoint, export it first"
    )


def _full_transformer(folder: Path, key: str) -> RunResult:
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recipe = None
    return _checked(RunResult(folder, None, recipe), key)


def _checked(result: RunResult, key: str) -> RunResult:
    recipe: Any = result.recipe
    if recipe is None:
        raise UserError(f"{key}: {result.path} has no recipe of mixres: load it in the stock pipeline")
    names = [family.name for family in FAMILIES.values()]
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT or recipe.get("family") not in names:
        raise UserError(f"{key}: {result.path} was written by another version of mixres: install that one")
    validated(_Recipe, recipe, lambda name: f"{key}: {result.path} has a wrong recipe, train again: {name}")
    return result


def find_base(result: RunResult, given: str | None, key: str) -> Family:
    """The family bound to the base of `result`, or to the one `given` in its place; family and shape are checked.

    Raises:
        UserError: it cannot be found, or does not fit.
    """
    recipe = result.recipe
    path = recipe["base"] if given is None else given
    revision = recipe.get("revision") if path == recipe["base"] else None
    what = key if given is not None else f"{key}: not given, and {result.path} names {path!r}"
    with renamed(what):
        family = load_family(None, path, revision=revision)
        problem = _base_problem(family, result)
    family.background = recipe.get("background", WHITE)
    if problem:
        raise UserError(f"{what}: {path} does not fit {result.path}: {problem}; name another")
    return family


def find_quantization(
    result: RunResult, given: Literal["null"] | Method | None, key: str, device: torch.device
) -> Method | None:
    """How the base is quantised: as `given`, or else as under the LoRA in training.

    Raises:
        UserError: the method does not work on this device, or under these adapters.
    """
    stated: Method | None = result.recipe.get("quantize") if result.lora else None
    method = stated if given is None else None if given == "null" else given
    if method in ("nf4", "bnb_int8") and result.lora and result.lora.adapter in LYCORIS:
        what = f"{method} does not fit {result.path}, a {result.lora.adapter}, which needs weights of their own shape"
        raise UserError(f"{key}: {what}: use int8, fp8 or null")
    if method:
        what = key if given else f"{key}: not given, and {result.path} was trained with {method}"
        with renamed(what, of=quantize.KEY):
            check_method(method, device)
    return method


@contextmanager
def renamed(key: str, *, of: str = hub.KEY) -> Iterator[None]:
    """Messages name `key` in place of the configuration's key `of`, the base unless said otherwise."""
    try:
        yield
    except UserError as error:
        raise UserError([f"{key}: {message.removeprefix(f'{of}: ')}" for message in error.messages]) from error


def _base_problem(family: Family, result: RunResult) -> str | None:
    if family.name != result.recipe["family"]:
        return f"it is a {family.name}, trained was a {result.recipe['family']}"
    areas, expected = result.area_rules, family.control_areas(family.stock_control_area, None)
    if areas.keys() != expected.keys():
        return f"the recipe gives its control images the areas {areas}, and it has {', '.join(expected) or 'none'}"
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
