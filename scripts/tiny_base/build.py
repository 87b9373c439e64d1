"""Makes the tiny base of the quickstart from nothing: `python scripts/tiny_base/build.py`.

Promise: one seed and one machine give one base, and what ships is what this wrote. An interrupted build resumes.
Cost: under 40 minutes on two cores and 1 GB in build/tiny_base.

1. a VAE whose encoder is written down and whose decoder is trained (vae.py)
2. a text encoder with random words, and a tokenizer that knows the words of the edits
3. crops of freely licensed photographs, each with one of ten edits, in mixed sizes (photographs.py, edits.py)
4. all weights of the transformer (transformer.py) by `train.py --config scripts/tiny_base/recipe.yaml`
5. the base in bfloat16, scored on photographs it never saw, with its model card (card.py)
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from card import write_card
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from edits import EDITS
from photographs import Augmentation, Crops, held_out_crops
from score import score_base, to_image
from tqdm import tqdm
from transformer import initial_transformer
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from vae import train_vae

from mixres.quickstart.data import PROMPTS, TRAIN_SIZES

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.tiny_pipeline import save_pipeline, tiny_text_encoder, tiny_tokenizer

SEED = 0
PAIRS = 5000
REPOSITORY = Path(__file__).parents[2]
WORK = REPOSITORY / "build" / "tiny_base"
ASSET = REPOSITORY / "src" / "mixres" / "assets" / "tiny_base"


def main() -> None:
    torch.set_num_threads(2)
    WORK.mkdir(parents=True, exist_ok=True)
    for folder, write in ((WORK / "vae", _write_vae), (WORK / "start", _write_start), (WORK / "pairs", _write_pairs)):
        if not folder.exists():
            unfinished = folder.with_name(f".tmp-{folder.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            write(unfinished)
            unfinished.rename(folder)
    recipe = Path(__file__).with_name("recipe.yaml").relative_to(REPOSITORY)
    subprocess.run([sys.executable, "train.py", "--config", str(recipe)], cwd=REPOSITORY, check=True)
    _write_asset(ASSET)
    write_card(ASSET, score_base(ASSET), steps=_steps())


def _write_vae(folder: Path) -> None:
    sizes = [(64, 64), (64, 96), (96, 64), (128, 96), (96, 128), (160, 128)] * 2
    train_vae(SEED, held_out_crops(sizes, seed=5)).save_pretrained(folder)


def _write_start(folder: Path) -> None:
    torch.manual_seed(SEED)
    tokenizer = tiny_tokenizer([*PROMPTS, *(prompt for edit in EDITS.values() for prompt in edit.prompts)])
    text_encoder = tiny_text_encoder(tokenizer)
    with torch.no_grad():
        for name, parameter in text_encoder.named_parameters():
            if "language_model" in name and "o_proj" in name:
                # Random attention would mix the words beyond recognition: without it each keeps its own vector.
                parameter.zero_()
    save_pipeline(
        folder,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=AutoencoderKLQwenImage.from_pretrained(WORK / "vae"),
        transformer=initial_transformer(SEED),
    )


def _write_pairs(folder: Path) -> None:
    targets, controls = folder / "training_images", folder / "control_images"
    targets.mkdir(parents=True)
    controls.mkdir()
    crops, draw = Crops(SEED + 1, Augmentation()), random.Random(SEED)
    for number in tqdm(range(PAIRS), desc="pairs", unit="pair"):
        edit, stem = draw.choice(list(EDITS.values())), f"{number:05d}.png"
        size = draw.choice(TRAIN_SIZES)
        control = crops.draw(size.height, size.width)
        to_image(control).save(controls / stem, compress_level=1)
        to_image(edit.apply(control)).save(targets / stem, compress_level=1)
        (targets / stem).with_suffix(".txt").write_text(draw.choice(edit.prompts), encoding="utf-8")


def _write_asset(folder: Path) -> None:
    """The trained pipeline in bfloat16."""
    start = WORK / "start"
    shutil.rmtree(folder, ignore_errors=True)
    save_pipeline(
        folder,
        tokenizer=Qwen2Tokenizer.from_pretrained(start / "tokenizer"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(start / "text_encoder", dtype=torch.bfloat16),
        vae=AutoencoderKLQwenImage.from_pretrained(start / "vae", dtype=torch.bfloat16),
        transformer=QwenImageTransformer2DModel.from_pretrained(WORK / "run" / "transformer", dtype=torch.bfloat16),
    )
    for component in ("vae", "transformer"):
        _forget_folder(folder / component / "config.json")


def _forget_folder(config: Path) -> None:
    """diffusers writes where a component was loaded from, which is another folder on every machine."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _steps() -> int:
    return len((WORK / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
