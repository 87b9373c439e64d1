"""The model card of the tiny base: what it is, what it learnt from, how good it is, and what its files hash to."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from edits import EDITS
from photographs import PHOTOGRAPHS, WEIGHTS
from safetensors.torch import load_file
from score import Score

from mixres import atomic

_TEXT = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
---

# The tiny base of the mixres quickstart

A `QwenImageEditPipeline` that edits photographs on two CPU cores: the architecture of Qwen/Qwen-Image-Edit with a
transformer of {transformer:.2f} million parameters, a VAE of {vae:.2f} million (4 x 4 pixels a latent cell, so that a
token is 8 x 8 pixels) and a text encoder of {text_encoder:.2f} million with random weights. It is for trying mixres
and testing it. It knows ten edits of colour and sharpness, in English and Chinese, on images with sides of about 64
to 224 pixels, and nothing else.

## Prompts

| edit | prompt | in Chinese |
|---|---|---|
{prompts}

Its answer to any other prompt is arbitrary. A LoRA teaches it other edits; edits of colour work best.

## How it was made

`python scripts/tiny_base/build.py` makes it from nothing, in under 40 minutes on two cores. The VAE's encoder is a
principal component analysis and its decoder is trained. Then `train.py --config scripts/tiny_base/recipe.yaml` trains
all weights of the transformer for {steps:,} steps of 16 samples in mixed sizes. One seed and one machine give one
base; other processors round differently. One such build wrote the bytes of this folder:

```
{hashes}
```

## Held-out photographs

Mean PSNR in dB over one crop of each of eight sizes, from two photographs: 8 steps of the stock pipeline, without
guidance. The base has seen neither these sizes nor these photographs.

| edit | copied input | this base | VAE's reconstruction |
|---|---|---|---|
{scores}

## Training photographs

| photograph | fraction of crops | licence | source |
|---|---|---|---|
{photographs}

Cropped, resized and recoloured. They come inside scikit-image and scikit-learn.
"""


def write_card(folder: Path, scores: Sequence[Score], *, steps: int) -> None:
    """Writes README.md into the finished base."""
    total = sum(WEIGHTS.values())
    rows = {
        "prompts": "\n".join(f"| {name} | {' | '.join(edit.prompts)} |" for name, edit in EDITS.items()),
        "hashes": "\n".join(f"{_sha256(file)}  {file.relative_to(folder).as_posix()}" for file in shipped(folder)),
        "scores": "\n".join(f"| {s.edit} | {s.copy:.1f} | {s.base:.1f} | {s.ceiling:.1f} |" for s in scores),
        "photographs": "\n".join(
            f"| {p.name} | {WEIGHTS[p.name] / total:.0%} | {p.licence} | {p.source} |" for p in PHOTOGRAPHS
        ),
    }
    sizes = {name: _parameters(folder / name) / 1e6 for name in ("transformer", "vae", "text_encoder")}
    atomic.write_text(folder / "README.md", _TEXT.format(steps=steps, **rows, **sizes))


def shipped(folder: Path) -> list[Path]:
    """Every file but the card."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "README.md")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _parameters(folder: Path) -> int:
    return sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
