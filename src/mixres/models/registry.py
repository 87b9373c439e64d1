"""Which family serves which pipeline class: the one place that chooses.

Nothing else in mixres compares a family's name.
"""

import sys

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from mixres.errors import UserError
from mixres.models.family import Family
from mixres.models.flux.family import Flux, FluxKontext
from mixres.models.flux2.dev import Flux2Dev
from mixres.models.flux2.family import Flux2Klein
from mixres.models.hub import KEY, pipeline_json
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.qwen.edit_plus import QwenImageEditPlus
from mixres.models.qwen.image import QwenImage
from mixres.models.qwen21.family import QwenImage21
from mixres.models.z_image.family import ZImage

_CLASSES: tuple[type[Family], ...] = (
    QwenImage, QwenImageEdit, QwenImageEditPlus, QwenImage21, Flux2Klein, Flux2Dev, FluxKontext, Flux, ZImage,
)  # fmt: skip
# By `_class_name` in the base's model_index.json. A family's class is called as `load_family` does at its end.
FAMILIES = {family.pipeline_class.__name__: family for family in _CLASSES}


# Pipelines of transformers that are supported otherwise, and what keeps them out.
_NOT_SUPPORTED = {"QwenImageLayeredPipeline": ": a sample has several target images there, and one here"}


def load_family(name: str | None, path: str, *, revision: str | None = None, synthetic: bool = False) -> Family:
    """The family of the pipeline at `path`; `name` (`model.family`) must agree with it where given.

    `synthetic`: of this base only configuration files are needed, and none of a stock base; `load_transformer` fills
    its shape with noise.

    Raises:
        UserError: the pipeline cannot be found, its class is not supported, or `name` is not its family.
    """
    if not sys.stderr.isatty():  # in a log the libraries' bars of what they load would be lines of no news
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    stock = {base: family for family in FAMILIES.values() for base in family.stock_bases}
    family = stock.get(path) if synthetic else None
    pipeline_class = None if family else pipeline_json(path, "model_index.json", revision=revision).get("_class_name")
    if isinstance(pipeline_class, str):
        family = FAMILIES.get(pipeline_class)
    if family is None:
        supported = ", ".join(FAMILIES)
        why = _NOT_SUPPORTED.get(str(pipeline_class), "")
        raise UserError(f"{KEY}: {path!r} is a {pipeline_class!r}, which is not supported{why}; supported: {supported}")
    if name not in (None, family.name):
        raise UserError(
            f"model.family: {name!r} does not fit {path!r}, a {family.pipeline_class.__name__}: "
            f"leave it out, or {family.name}"
        )
    return family(path, revision=revision, synthetic=synthetic)
