"""What the encoders are given: images after all resizing, and what the cache holds of them.

Promise: each image is made by the function that prepares it for encoding; a decoded one comes from the very latents
that training reads. Cost: decoding and resizing a few records; with `decoded_of` the VAE's decoder once an image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from mixres.config.schema import Config
from mixres.data.cache import Cache
from mixres.data.scan import ScannedRecord
from mixres.geometry import Grid, token_grid
from mixres.models.edit_mask import mask_on_grid
from mixres.models.family import Family
from mixres.preprocessing.encode import encode_inputs, entry_keys
from mixres.preprocessing.fill import evenly
from mixres.training.sample_sheets import Row, contact_sheet

ROWS = 6
Decoded = Sequence[Sequence[Image.Image]]  # of each record target first, then its controls; none where not cached


def chosen(train: Sequence[ScannedRecord]) -> list[ScannedRecord]:
    """A few records, smallest target first; one with a mask is among them where there is one."""
    ordered = sorted(train, key=lambda s: (s.target_size.width * s.target_size.height, s.record.name))
    some = evenly(ordered, ROWS)
    masked = [scanned for scanned in ordered if scanned.record.mask is not None]
    if masked and all(scanned.record.mask is None for scanned in some):
        some[-1] = masked[-1]
    return some


def input_sheet(config: Config, family: Family, some: Sequence[ScannedRecord], decoded: Decoded = ()) -> Image.Image:
    """A row a record: target, its mask on the token grid, each control for VAE and text encoder, and `decoded`."""
    preprocessors = family.load_preprocessors()
    token = family.pixels_per_token()
    given = [_pictures(family, preprocessors, encode_inputs(config, family, scanned), token) for scanned in some]
    headings = dict.fromkeys(heading for pictures in given for heading in pictures)
    columns = sorted(headings, key=_order)
    latents = max(map(len, decoded), default=0)
    cached = ["target, from the cache", *(f"control {number}, from the cache" for number in range(1, latents))]
    rows = []
    for scanned, pictures, back in zip(some, given, decoded or [()] * len(some), strict=True):
        cells = [pictures.get(column) for column in columns] + [*back, *[None] * (latents - len(back))]
        sizes = ", ".join(f"{name} {one.width}x{one.height}" for name, one in pictures.items())
        rows.append(Row(tuple(cells), f"{scanned.record.name}: {scanned.record.prompt}", sizes))
    return contact_sheet((*columns, *cached[:latents]), rows)


def _pictures(family: Family, preprocessors: Any, inputs: dict[str, Any], token: int) -> dict[str, Image.Image]:
    shown = ("target", "target_size", "controls", "areas")
    found = family.previews(preprocessors, **{name: inputs[name] for name in shown})
    if inputs["mask"] is not None:
        found["mask"] = _mask_picture(inputs["mask"], token_grid(inputs["target_size"], token))
    return found


def _order(heading: str) -> tuple[bool, bool, str]:
    return heading != "target", heading != "mask", heading


def _mask_picture(mask: Image.Image, grid: Grid) -> Image.Image:
    shares = (mask_on_grid(mask, grid) * 255).round().byte().reshape(grid.rows, grid.columns)
    return Image.fromarray(shares.numpy()).convert("RGB")


def decoded_of(
    config: Config,
    family: Family,
    some: Sequence[ScannedRecord],
    cache: Cache,
    device: torch.device,
    tell: Callable[[str], None],
) -> list[list[Image.Image]]:
    """Target and controls of each record, none where it is not cached; `tell` gets a line about those that are not.

    Raises:
        UserError: VAE or encoders of the base cannot be had.
    """
    keys = entry_keys(config, family, some, empty_prompt=config.data.caption_dropout > 0)
    missing = sum(cache.lookup(key) is None for key in keys)
    if missing:
        tell(f"{missing} of {len(some)} records of the input preview are not in the cache: run the verb cache first")
    if missing == len(some):
        return []
    pipeline = family.load_sampling_pipeline(
        transformer=None,
        dtype=getattr(torch, config.model.dtype),
        device=device,
    )
    found: list[list[Image.Image]] = []
    for key, scanned in zip(keys, some, strict=True):
        found.append([])
        if cache.lookup(key) is not None:
            sample = cache.read(key, name=scanned.record.name)
            pairs = zip((sample.target_latents, *sample.control_latents), sample.img_shapes, strict=True)
            found[-1] = [family.decode_latents(pipeline, tokens, grid) for tokens, grid in pairs]
    return found
