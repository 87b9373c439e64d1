"""The tiny base that ships: what its card says is so, it is stock, and its script makes the same again."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPipeline
from safetensors.torch import load_file

from mixres.quickstart.data import HELD_OUT_PHOTOGRAPHS

REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "src" / "mixres" / "assets" / "tiny_base"
sys.path.append(str(REPOSITORY / "scripts" / "tiny_base"))

from card import shipped  # noqa: E402
from photographs import PHOTOGRAPHS, held_out_crops  # noqa: E402
from score import score_base  # noqa: E402
from transformer import initial_transformer  # noqa: E402
from vae import train_vae  # noqa: E402

CARD = (BASE / "README.md").read_text(encoding="utf-8")


def test_the_card_names_every_file_and_its_hash() -> None:
    hashes = {str(file.relative_to(BASE)): hashlib.sha256(file.read_bytes()).hexdigest() for file in shipped(BASE)}
    assert dict(reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  .+$", CARD, re.MULTILINE)) == hashes


def test_it_is_small_bfloat16_and_safetensors_alone() -> None:
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) <= 12 * 2**20
    assert {file.suffix for file in shipped(BASE)} <= {".json", ".safetensors", ".jinja", ".txt"}
    for weights in BASE.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}, weights


def test_the_card_names_every_photograph_with_its_licence() -> None:
    for photograph in PHOTOGRAPHS:
        assert photograph.licence.startswith(("public domain", "CC0", "CC BY")), photograph
        assert f"| {photograph.licence} | {photograph.source} |" in CARD
    names, held_out = ({photograph.name for photograph in set_} for set_ in (PHOTOGRAPHS, HELD_OUT_PHOTOGRAPHS))
    assert not names & held_out


def test_the_folder_is_stock_and_names_no_other_folder() -> None:
    index = json.loads((BASE / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == QwenImageEditPipeline.__name__
    assert {value[0] for value in index.values() if isinstance(value, list)} == {"diffusers", "transformers"}
    assert not [file for file in shipped(BASE) for word in (b"mixres", b"_name_or_path") if word in file.read_bytes()]


@pytest.mark.slow
def test_one_seed_makes_one_base() -> None:
    """The first steps of both trainings' own parts; that a training run repeats is the trainer's promise."""
    vae = [train_vae(0, held_out_crops([(64, 64)], 5), trunk_steps=2, steps=2).state_dict() for _ in range(2)]
    for first, second in (vae, [initial_transformer(0).state_dict() for _ in range(2)]):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_edits_as_the_card_says() -> None:
    edits = ("unchanged", "brighter", "darker", "red")
    scores = score_base(BASE, edits)
    for score in scores:
        assert score.base >= score.ceiling - 6, score
        (row,) = re.findall(rf"^\| {score.edit} \| (.+) \| (.+) \| (.+) \|$", CARD, re.MULTILINE)
        assert [float(x) for x in row] == pytest.approx([score.copy, score.base, score.ceiling], abs=0.2), score
