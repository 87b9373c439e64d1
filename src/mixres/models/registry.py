"""Which module serves which pipeline class: the one place that picks a model family.

Promise: nothing else in mixres asks for a family's name. Cost: `model_index.json` is read; the family's module, and
diffusers with it, is imported only once chosen.
"""

import importlib
import sys
from types import ModuleType

from mixres.errors import UserError
from mixres.models.hub import KEY, pipeline_json

_FAMILIES = {
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image_edit",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
}
_MODULES = {"qwen_image": "image", "qwen_image_edit": "edit", "qwen_image_edit_plus": "edit_plus"}


def family_module(name: str | None, path: str, *, revision: str | None = None) -> ModuleType:
    """The module `mixres.models.<family>` for the pipeline at `path`; `name` must agree with it where given.

    Raises:
        UserError: the pipeline cannot be found, its class is not supported, or `name` is another family.
    """
    pipeline_class = pipeline_json(path, "model_index.json", revision=revision).get("_class_name")
    family = _FAMILIES.get(pipeline_class) if isinstance(pipeline_class, str) else None
    if family is None:
        supported = ", ".join(_FAMILIES)
        raise UserError(f"{KEY}: {path!r} is a {pipeline_class!r}, which is not supported; supported: {supported}")
    if name not in (None, family):
        raise UserError(f"model.family: {name!r} does not fit {path!r}, a {pipeline_class}: leave it out, or {family}")
    module = importlib.import_module(f"mixres.models.qwen.{_MODULES[family]}")
    if not sys.stderr.isatty():  # in a log the libraries' bars of what they load would be lines of no news
        for library in ("diffusers", "transformers"):
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    return module
