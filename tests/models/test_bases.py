"""A base: which family it is, what can be wrong with it, each in one line and soon; the fingerprint of its encoders."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixres.errors import UserError
from mixres.models import hub
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.registry import load_family
from support.family_cases import EVERY_CASE as CASES, FamilyCase

KEY = r"^model\.pretrained_model_name_or_path: "
SUPPORTED = (
    "QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImage21Pipeline, Flux2KleinPipeline"
)
SUPPORTED += ", Flux2Pipeline, FluxKontextPipeline, FluxPipeline, ZImagePipeline"
LOADERS: dict[str, Callable[[str], Any]] = {
    "vae": lambda base: QwenImageEdit(base).load_encoders(dtype=torch.float32, device="cpu"),
    "text_encoder": lambda base: QwenImageEdit(base).load_encoders(dtype=torch.float32, device="cpu"),
    "transformer": lambda base: QwenImageEdit(base).load_transformer(dtype=torch.float32, device="cpu"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_pipeline_class_has_its_family(case: FamilyCase, base_of: Callable[[FamilyCase], Path]) -> None:
    base = str(base_of(case))
    found = {type(load_family(None, base)), type(load_family(case.family, base)), type(case.at(base))}
    assert {family.name for family in found} == {case.family}
    for other in ("sana", next(row.family for row in CASES.values() if row.family != case.family)):
        for synthetic in (False, True):
            with pytest.raises(UserError, match=rf"^model\.family: '{other}' does not fit .* or {case.family}$"):
                load_family(other, base, synthetic=synthetic)


@pytest.fixture
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("empty_hub_cache")
@pytest.mark.parametrize("offline", [False, True], ids=["unreachable", "offline"])
def test_weights_that_cannot_be_had_are_one_line_and_soon(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    # Nothing listens there, so the Hub is unreachable on any machine.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    reason = "HF_HUB_OFFLINE is set" if offline else "could not be reached"
    what = r"no configuration or tokenizer \(a few MB\) for 'Qwen/Qwen-Image-Edit'"
    with pytest.raises(UserError, match=f"{KEY}{what}.* {reason}"):
        load_family(None, "Qwen/Qwen-Image-Edit")
    with pytest.raises(UserError, match=f"{KEY}no weights for 'Qwen/Qwen-Image-Edit'"):
        LOADERS["vae"]("Qwen/Qwen-Image-Edit")
    assert time.monotonic() - started < 15


@pytest.mark.usefixtures("empty_hub_cache")
def test_the_tiny_base_is_found_by_its_name_unless_a_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = hub.PACKAGED["mixres/tiny_base"]
    assert hub.pipeline_folder("mixres/tiny_base", ("vae",)) == own
    assert hub.commit("mixres/tiny_base") is None
    shutil.copytree(own, tmp_path / "mixres/tiny_base")
    monkeypatch.chdir(tmp_path)
    assert hub.pipeline_folder("mixres/tiny_base", ("vae",)) == Path("mixres/tiny_base")


@pytest.mark.usefixtures("empty_hub_cache")
@pytest.mark.parametrize("path", ["./no/such", "/no/such", "~/no_such_base", "one/two/three", "C:\\bases\\one"])
def test_a_folder_that_is_not_there_asks_no_hub(path: str) -> None:
    with pytest.raises(UserError, match=f"{KEY}there is no folder"):
        LOADERS["transformer"](path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("other.json", "{}", r"has no model_index\.json"),
        ("model_index.json", "{", r"model_index\.json cannot be read"),
        ("model_index.json", '{"_class_name": "SanaPipeline"}', rf"SanaPipeline.*; supported: {SUPPORTED}$"),
        (
            "model_index.json",
            '{"_class_name": "QwenImageLayeredPipeline"}',
            rf"a sample has several target images there, and one here; supported: {SUPPORTED}$",
        ),
        ("model_index.json", '{"_class_name": ["module", "Class"]}', rf"'Class'.*; supported: {SUPPORTED}$"),
        ("model_index.json", "{}", rf"None.*; supported: {SUPPORTED}$"),
        ("model_index.json", "[]", r"model_index\.json cannot be read \(it holds no JSON object"),
    ],
)
def test_a_folder_without_a_pipeline_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{KEY}.*{problem}"):
        load_family(None, str(tmp_path))


def test_a_transformer_with_positions_of_layers_is_refused(copy_of_base: Path) -> None:
    file = copy_of_base / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_layer3d_rope": True}))
    with pytest.raises(UserError, match=f"{KEY}.*QwenEmbedLayer3DRope.*not supported: a sample has several target"):
        load_family(None, str(copy_of_base)).transformer_skeleton()


def test_all_missing_components_are_named_at_once(copy_of_base: Path) -> None:
    shutil.rmtree(copy_of_base / "text_encoder")
    (copy_of_base / "vae" / "config.json").unlink()
    with pytest.raises(UserError) as raised:
        LOADERS["vae"](str(copy_of_base))
    assert len(raised.value.messages) == 2
    assert "text_encoder is missing" in str(raised.value) and "vae/config.json is missing" in str(raised.value)


@pytest.mark.parametrize("component", LOADERS)
def test_truncated_weights_are_named_and_pickled_ones_refused_unread(
    copy_of_base: Path, tmp_path: Path, component: str
) -> None:
    (weights,) = (copy_of_base / component).glob("*.safetensors")
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    trace = tmp_path / "trace"
    weights.with_name(name).write_bytes(f"cos\nmkdir\n(V{trace}\ntR.".encode())
    LOADERS[component](str(copy_of_base))  # beside safetensors a pickle is left alone
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{KEY}.* cannot be (loaded|read): "):
        LOADERS[component](str(copy_of_base))
    weights.unlink()
    with pytest.raises(UserError, match=rf"pickled weights \({name}\), which are never opened"):
        LOADERS[component](str(copy_of_base))
    assert not trace.exists()


def test_fingerprint_follows_the_bytes_of_the_encoders(
    copy_of_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a memo of what was read, where nothing is read twice."""
    base, memo = str(copy_of_base), tmp_path / "memo.json"
    memo.write_text("not JSON")
    first = QwenImageEdit(base).encoder_fingerprint(memo=memo)
    assert len(first) == 32 and first == QwenImageEdit(base).encoder_fingerprint()
    (copy_of_base / "transformer" / "config.json").write_text("{}")
    (copy_of_base / "vae" / "notes.md").write_text("not read by any loader")
    with monkeypatch.context() as patch:
        patch.delattr("mixres.models.hub.file_digest")
        assert QwenImageEdit(base).encoder_fingerprint(memo=memo) == first

    seen = {first}
    for component in ("vae", "text_encoder", "tokenizer", "processor"):
        for file in sorted((copy_of_base / component).iterdir()):
            if file.suffix == ".md":
                continue
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
            changed = QwenImageEdit(base).encoder_fingerprint(memo=memo)
            assert changed == QwenImageEdit(base).encoder_fingerprint()
            assert changed not in seen, file
            seen.add(changed)
