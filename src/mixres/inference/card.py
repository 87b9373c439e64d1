"""A folder for the Hub: the LoRA by the names of diffusers and of ComfyUI, a model card, the run's last sample grid.

Promise: no path of the machine that trained stands in it: those of the recipe are replaced, in the card and in the
metadata of the LoRA, and the sections of the configuration that name places are left out. Sizes of the training set are
counted without a file name. Cost: the LoRA in memory, a few files of the run.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not listed
from PIL import Image
from pydantic import AfterValidator, BaseModel, Field

from mixres import __version__
from mixres.config.load import FROZEN, load_run_config, public_config
from mixres.config.schema import LYCORIS, Adapter
from mixres.console import log
from mixres.errors import UserError
from mixres.inference.artifact import RunResult
from mixres.models.lora_file import FILE_NAME
from mixres.training.result import TRAINING_SET
from mixres.training.run_folder import STATUS

CARD, GRID = "README.md", "samples.png"
CHECKPOINTS = "checkpoints"  # of a run, in its folder
_LABELS: dict[Adapter, str] = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
UNNAMED = "BASE"  # stands for a base that has no name on the Hub
_TEMPLATE = Path(__file__).with_name("card.md.j2")
_PLACES = ("cache", "checkpoint", "logging", "resume", "resume_allow_changes")  # of the trainer's machine and its runs
_DATA = ("train", "held_out", "regularization")
_LOCAL = re.compile(r"[/\\~]|\$\{")


_REPOSITORY = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$"


def _checked_repository(name: str) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"given {name}, which the Hub does not take: correct it. {error}") from error
    return name


_Repository = Annotated[str, Field(pattern=_REPOSITORY), AfterValidator(_checked_repository)]


class CardOptions(BaseModel):
    """Those of `export --card`."""

    run: str
    out: Path
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]
    license_link: Annotated[str, Field(pattern=r"^(https?://\S+|[\w.-]+)$")] | None = None
    base: _Repository | None = None
    trigger: list[Annotated[str, Field(min_length=1)]] = []
    push: _Repository | None = None
    private: bool = False


@dataclass(frozen=True)
class Card:
    """What a card is written of."""

    asked: CardOptions
    result: RunResult
    run: Path | None  # the folder of the run; None where only the LoRA file is there

    @property
    def base(self) -> str:
        """The base by its name on the Hub."""
        recipe = self.result.recipe
        own = recipe["base"]
        # Of a base on the Hub the commit is recorded; a folder may look like a name.
        named = own in self.result.family.stock_bases or (recipe.get("revision") and re.match(_REPOSITORY, own))
        return self.asked.base or (own if named else UNNAMED)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the published LoRA records of its training."""
        own = self.result.recipe
        other = {} if self.base == own["base"] else {"revision": None}  # it was of that repository
        return {**_without_paths(own), "base": self.base, **other}

    @property
    def names(self) -> dict[str, str]:
        """By format the name of the file; a DoRA has none for ComfyUI, which would apply it in another way."""
        native = "lycoris" if self.kind in LYCORIS else "diffusers"
        own = f"{self.asked.out.expanduser().name}_comfyui.safetensors"
        return {native: FILE_NAME, **({} if self.kind == "dora" else {"comfyui": own})}

    @property
    def kind(self) -> Adapter:
        """That of the adapters."""
        assert self.result.lora is not None
        return self.result.lora.adapter

    def write(self, folder: Path) -> None:
        """Model card and sample grid; the LoRA is there already."""
        grid = self._last_grid()
        if grid:
            (folder / GRID).write_bytes(grid)
        settings = self._settings()
        family, asked = self.result.family, self.asked
        named: dict[str, Any] = {"license": asked.license}
        if asked.license_link:
            named = {"license": "other", "license_name": asked.license, "license_link": asked.license_link}
        if self.base != UNNAMED:
            named["base_model"] = self.base
        if asked.trigger:
            named["instance_prompt"] = asked.trigger[0]
        kinds = ["lycoris" if self.kind in LYCORIS else "lora", *([self.kind] if self.kind != "lora" else [])]
        tags = ["diffusers", *kinds, family.name.replace("_", "-"), "mixres"]
        kind = "text-to-image" if family.controls[1] == 0 else "image-to-image"
        data = ModelCardData(**named, library_name="diffusers", pipeline_tag=kind, tags=tags)
        samples = self._training_set()
        card = ModelCard.from_template(
            data,
            template_path=str(_TEMPLATE),
            title=asked.push or asked.out.expanduser().name,
            base=self.base,
            is_named=self.base != UNNAMED,
            repository=asked.push,
            names=self.names,
            label=_LABELS[self.kind],
            recipe=self.recipe,
            size=self.recipe.get("target_size"),
            family=family,
            grid=GRID if grid else None,
            triggers=[fenced(prompt) for prompt in asked.trigger],
            samples=samples,
            histogram=histogram(samples["sizes"]) if samples else [],
            settings=settings and fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "yaml"),
            version=__version__,
        )
        card.save(folder / CARD)

    def _settings(self) -> dict[str, Any] | None:
        """The configuration of the run, without what concerns its machine alone."""
        if self.run is None:
            return None
        values = public_config(load_run_config(self.run))
        for name in _PLACES:
            values.pop(name, None)
        for name in _DATA:
            if not isinstance(values["data"].get(name), float):  # a fraction names no place
                values["data"].pop(name, None)
        values = _without_paths(values)
        values["model"]["pretrained_model_name_or_path"] = self.base
        if self.base != self.result.recipe["base"]:
            values["model"]["revision"] = None
        if (lora := values["model"]["lora"]) and lora["pretrained_weight"]:
            lora["pretrained_weight"] = "PATH"  # perhaps a bare name
        return dict(values)

    def _training_set(self) -> dict[str, Any] | None:
        """How many samples there were, and of which sizes; None for a run of an earlier version."""
        if self.run is None or not (self.run / TRAINING_SET).is_file():
            return None
        try:
            return dict(json.loads((self.run / TRAINING_SET).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"RUN: {self.run / TRAINING_SET} cannot be read ({error}): remove it") from error

    def _last_grid(self) -> bytes | None:
        """The newest sample grid up to the step of the weights, without its metadata, as a PNG."""
        grids = sorted((self.run / "samples").glob("step-*.png")) if self.run else []
        last = f"step-{self.result.recipe.get('step', 0):08d}.png"
        grids = [grid for grid in grids if grid.name <= last]
        if not grids:
            return None
        file = BytesIO()
        with Image.open(grids[-1]) as image:
            image.convert("RGB").save(file, format="PNG")
        return file.getvalue()


def run_folder(path: Path, result: RunResult) -> Path | None:
    """The folder of the run that has left `path`: its own, or one above an average, a checkpoint or a file."""
    for folder in (path, *path.resolve().parents[:2]):
        # The mark of a run: other programs have a config.yaml too.
        if not (folder / FROZEN).is_file() or not any((folder / mark).exists() for mark in (STATUS, CHECKPOINTS)):
            continue
        try:
            base = load_run_config(folder).model.pretrained_model_name_or_path
        except UserError as error:
            if folder == path:
                raise UserError([f"RUN: {folder / FROZEN}: {message}" for message in error.messages]) from error
            log(f"card      without the configuration: {folder / FROZEN} cannot be loaded ({error.messages[0]})")
            return None
        return folder if base == result.recipe["base"] else None
    return None


def histogram(sizes: Mapping[str, int]) -> list[tuple[int, list[int]]]:
    """Of images by their sizes, `WIDTHxHEIGHT`: up to so many pixels, how many are upright, square and wide."""
    rows: dict[int, list[int]] = {}
    for size, count in sizes.items():
        width, height = map(int, size.split("x"))
        row = rows.setdefault(1 << (width * height - 1).bit_length(), [0, 0, 0])
        row[(width > height) - (width < height) + 1] += count
    return sorted(rows.items())


def fenced(text: str, language: str = "text") -> str:
    """A block of code in Markdown that no backtick in the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _without_paths(value: Any) -> Any:
    """The value with `PATH` for each text in it that may be a path, or a reference to the environment."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return "PATH" if isinstance(value, str) and _LOCAL.search(value) else value
