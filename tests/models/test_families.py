"""The one place that picks a family: by the pipeline's class, with a sentence where there is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixres.errors import UserError
from mixres.models import qwen_image_edit as family
from mixres.models.families import family_module
from mixres.models.pretrained import pipeline_json


def test_family_is_read_from_the_pipeline_class(tiny_base: Path) -> None:
    assert family_module(None, str(tiny_base)) is family
    assert family_module("qwen_image_edit", str(tiny_base)) is family
    with pytest.raises(UserError, match=r"^model\.family: 'flux' does not fit"):
        family_module("flux", str(tiny_base))


@pytest.mark.parametrize("class_name", ["StableDiffusionPipeline", "QwenImagePipeline", None, ["module", "Class"]])
def test_an_unsupported_pipeline_class_is_named(copy_of_base: Path, class_name: Any) -> None:
    index = pipeline_json(str(copy_of_base), "model_index.json") | {"_class_name": class_name}
    (copy_of_base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as raised:
        family_module(None, str(copy_of_base))
    assert str(class_name) in str(raised.value) and "supported: QwenImageEditPipeline" in str(raised.value)
