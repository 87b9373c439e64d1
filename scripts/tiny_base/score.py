"""What the tiny base makes of photographs it has never seen, through the stock pipeline.

Cost: about a minute on two cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from edits import EDITS, Edit
from photographs import held_out_crops
from PIL import Image
from torch import Tensor

from mixres.geometry import Size
from mixres.models.family import ControlSizes
from mixres.models.qwen.edit import QwenImageEdit
from mixres.quickstart.data import HELD_OUT_SIZES
from mixres.quickstart.results import psnr
from mixres.training.denoising import image_inputs, make_images

STEPS = 8
SEED = 7


@dataclass(frozen=True)
class Score:
    """Mean PSNR in dB over held-out crops: the copied input, the base's image, the VAE's reconstruction."""

    edit: str
    copy: float
    base: float
    ceiling: float


def score_base(base: Path, edits: Sequence[str] = tuple(EDITS)) -> list[Score]:
    """One score an edit, each over one crop of every held-out size."""
    encoders = QwenImageEdit(str(base)).load_encoders(dtype=torch.float32, device="cpu")
    transformer = QwenImageEdit(str(base)).load_transformer(dtype=torch.float32, device="cpu")
    sampling = QwenImageEdit(str(base)).load_sampling_pipeline(
        transformer=transformer, dtype=torch.float32, device="cpu"
    )
    crops = held_out_crops([(size.height, size.width) for size in HELD_OUT_SIZES], SEED)
    scores = []
    for name in edits:
        rows = [_score(QwenImageEdit(str(base)), encoders, sampling, EDITS[name], crop) for crop in crops]
        scores.append(Score(name, *(round(sum(column) / len(rows), 2) for column in zip(*rows, strict=True))))
    return scores


def _score(family: QwenImageEdit, encoders: object, sampling: object, edit: Edit, crop: Tensor) -> list[float]:
    control, target = to_image(crop), to_image(edit.apply(crop))
    size = Size(*target.size)
    aligned = ControlSizes((size,), (size,))
    sample = family.encode(
        encoders,
        name="crop",
        target=target,
        target_size=size,
        controls=[control],
        prompt=edit.prompts[0],
        sizes=aligned,
    )
    given = image_inputs(family, sampling, controls=[control], text=sample.text, size=size, sizes=aligned, seed=SEED)
    (image,) = make_images(family, sampling, [given], steps=STEPS)
    ceiling = family.decode_latents(sampling, sample.target_latents, sample.img_shapes[0])
    return [psnr(shown, target) for shown in (control, image, ceiling)]


def to_image(image: Tensor) -> Image.Image:
    """`(3, H, W)` in [0, 1], clipped, as 8 bits."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
