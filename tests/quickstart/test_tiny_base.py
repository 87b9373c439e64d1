"""The tiny base that ships: what its card says is so, it is stock, and its script makes the same again."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline
from safetensors.torch import load_file

from mixres.models.qwen.edit import QwenImageEdit
from mixres.quickstart.data import HELD_OUT_PHOTOGRAPHS, HELD_OUT_SIZES, PROMPTS

REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "src" / "mixres" / "assets" / "tiny_base"
sys.path.append(str(REPOSITORY / "scripts" / "tiny_base"))

from card import shipped  # noqa: E402
from edits import EDITS  # noqa: E402
from photographs import PHOTOGRAPHS, Augmentation, Crops, held_out_crops, psnr  # noqa: E402
from score import score_base  # noqa: E402
from transformer import initial_transformer  # noqa: E402
from vae import train_vae  # noqa: E402

CARD = (BASE / "README.md").read_text(encoding="utf-8")


def test_the_card_names_every_file_and_its_hash() -> None:
    hashes = {
        file.relative_to(BASE).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in shipped(BASE)
    }
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


def test_the_card_and_the_page_list_its_prompts() -> None:
    page = (REPOSITORY / "docs" / "start.md").read_text(encoding="utf-8").replace("`", "")
    for name, edit in EDITS.items():
        for text in (CARD, page):
            assert f"| {name} | {' | '.join(edit.prompts)} |\n" in text


def test_the_folder_is_stock_and_names_no_other_folder() -> None:
    index = json.loads((BASE / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == QwenImageEditPipeline.__name__
    assert {value[0] for value in index.values() if isinstance(value, list)} == {"diffusers", "transformers"}
    assert not [file for file in shipped(BASE) for word in (b"mixres", b"_name_or_path") if word in file.read_bytes()]


def test_every_prompt_is_a_few_tokens() -> None:
    pipeline = QwenImageEdit(str(BASE)).load_encoders(dtype=torch.float32, device="cpu")
    for prompt in PROMPTS:
        assert len(pipeline.tokenizer(prompt).input_ids) <= 6, prompt


@torch.no_grad()
def test_the_vae_reconstructs_photographs_it_has_never_seen() -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(BASE, subfolder="vae", dtype=torch.float32)
    crops = held_out_crops([(size.height, size.width) for size in HELD_OUT_SIZES] * 2, seed=11)
    scores = []
    for crop in crops:
        latents = vae.encode((crop * 2 - 1)[None, :, None]).latent_dist.mode()
        scores.append(psnr((vae.decode(latents).sample[0, :, 0] + 1) / 2, crop))
    assert sum(scores) / len(scores) >= 36


def test_one_seed_makes_one_base() -> None:
    """The first steps of both trainings' own parts; that a training run repeats is the trainer's promise."""
    first, second, other = (
        train_vae(seed, held_out_crops([(64, 64)], 5), trunk_steps=3, steps=3).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    transformers = [initial_transformer(0).state_dict() for _ in range(2)]
    assert all(torch.equal(transformers[0][name], transformers[1][name]) for name in transformers[0])
    crops = [Crops(3, Augmentation()).batch(4, 64, 96) for _ in range(2)]
    assert torch.equal(*crops)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_edits_as_the_card_says() -> None:
    edits = ("unchanged", "brighter", "darker", "red")
    scores = score_base(BASE, edits)
    for score in scores:
        assert score.base >= score.ceiling - 6, score
        (row,) = re.findall(rf"^\| {score.edit} \| (.+) \| (.+) \| (.+) \|$", CARD, re.MULTILINE)
        assert [float(x) for x in row] == pytest.approx([score.copy, score.base, score.ceiling], abs=0.2), score
