"""The one place that picks a family: by the pipeline's class, with a sentence where there is none."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixres.errors import UserError
from mixres.models import registry
from mixres.models.hub import pipeline_json
from mixres.models.registry import load_family
from support.family_cases import CASES, FamilyCase


def test_family_is_read_from_the_pipeline_class(tiny_base: Path) -> None:
    for name in (None, "qwen_image_edit"):
        assert load_family(name, str(tiny_base)).name == "qwen_image_edit"
    with pytest.raises(UserError, match=r"^model\.family: 'flux' does not fit"):
        load_family("flux", str(tiny_base))


def test_what_is_loaded_draws_no_bars_into_a_log(tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_family(None, str(tiny_base))
    transformer = loaded.load_transformer(dtype=torch.float32, device="cpu")
    loaded.load_encoders(dtype=torch.float32, device="cpu")
    loaded.load_sampling_pipeline(transformer=transformer, dtype=torch.float32, device="cpu")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("class_name", ["StableDiffusionPipeline", "FluxPipeline", None, ["module", "Class"]])
def test_an_unsupported_pipeline_class_is_named(copy_of_base: Path, class_name: Any) -> None:
    index = pipeline_json(str(copy_of_base), "model_index.json") | {"_class_name": class_name}
    (copy_of_base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as raised:
        load_family(None, str(copy_of_base))
    supported = ", ".join(sorted({case.pipeline_class.__name__ for case in CASES.values()}))
    assert str(class_name) in str(raised.value)
    assert sorted(str(raised.value).rpartition("supported: ")[2].split(", ")) == supported.split(", ")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_pipeline_class_has_its_family(case: FamilyCase, base_of: Callable[[FamilyCase], Path]) -> None:
    base = str(base_of(case))
    found = {type(load_family(None, base)), type(load_family(case.family, base)), type(case.at(base))}
    assert {family.name for family in found} == {case.family}
    other = next(row.family for row in CASES.values() if row.family != case.family)
    with pytest.raises(UserError, match=rf"^model\.family: '{other}' does not fit"):
        load_family(other, base)


def test_nothing_else_asks_for_a_family() -> None:
    """No comparison with a family's name outside the one place that picks it."""
    source = Path(registry.__file__).parents[1]
    names = {case.family for case in CASES.values()}
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.Match) and path.name != "registry.py":
                constants = {getattr(part, "value", None) for part in ast.walk(node)}
                assert not constants & names, path
