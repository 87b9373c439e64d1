"""What the encoders are given: images after all resizing, and what the cache holds of them.

Promise: each image is made by the function that prepares it for encoding; a decoded one comes from the very latents
that training reads. Cost: decoding and resizing a few records; with `decoded_of` the VAE's decoder once an image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from mixres.config.schema import Config
from mixres.data.scan import ScannedRecord
from mixres.geometry import token_grid
from mixres.models.edit_mask import mask_on_grid
from mixres.models.family import Family
from mixres.preprocessing.cache_folder import open_cache
from mixres.preprocessing.encode import encode_inputs, entry_keys
from mixres.preprocessing.fill import evenly
from mixres.training.distributed import dist_env
from mixres.training.sample_sheets import Row, image_grid

ROWS = 6
Images = dict[str, Image.Image]  # by the heading of their column


def chosen(train: Sequence[ScannedRecord]) -> list[ScannedRecord]:
    """A few records, smallest target first; one with a mask is among them where there is one."""
    ordered = sorted(train, key=lambda s: (s.target_size.width * s.target_size.height, s.record.name))
    some = evenly(ordered, ROWS)
    masked = [scanned for scanned in ordered if scanned.record.mask is not None]
    if masked and all(scanned.record.mask is None for scanned in some):
        some[-1] = masked[-1]
    return some


def preview_grid(
    config: Config, family: Family, some: Sequence[ScannedRecord], decoded: Sequence[Images] = ()
) -> Image.Image:
    """A row a record: target, its mask on the token grid, each control for VAE and text encoder, and `decoded`."""
    preprocessors = family.load_preprocessors()
    given = [_images(family, preprocessors, encode_inputs(config, family, scanned)) for scanned in some]
    headings = {heading for images in given for heading in images}
    columns = sorted(headings, key=lambda heading: (heading != "target", heading != "mask", heading))
    columns += dict.fromkeys(heading for images in decoded for heading in images)
    rows = []
    for scanned, images, cached in zip(some, given, decoded or [Images()] * len(some), strict=True):
        cells = tuple((images | cached).get(column) for column in columns)
        sizes = ", ".join(f"{heading} {image.width}x{image.height}" for heading, image in images.items())
        rows.append(Row(cells, f"{scanned.record.name}: {scanned.record.prompt}", sizes))
    return image_grid(columns, rows)


def _images(family: Family, preprocessors: Any, inputs: dict[str, Any]) -> Images:
    shown = ("target", "target_size", "controls", "sizes")
    found = family.previews(preprocessors, **{name: inputs[name] for name in shown})
    if inputs["mask"] is not None:
        grid = token_grid(inputs["target_size"], family.pixels_per_token())
        coverage = (mask_on_grid(inputs["mask"], grid) * 255).round().byte().reshape(grid.rows, grid.columns)
        found["mask"] = Image.fromarray(coverage.numpy()).convert("RGB")
    return found


def decoded_of(
    config: Config, family: Family, some: Sequence[ScannedRecord], tell: Callable[[str], None]
) -> list[Images]:
    """Target and controls of each record, none where it is not cached; `tell` gets a line about those that are not.

    Raises:
        UserError: VAE or encoders of the base cannot be had.
    """
    cache = open_cache(config)
    keys = entry_keys(config, family, some, empty_prompt=config.data.caption_dropout > 0)
    entries = [cache.lookup(key) for key in keys]
    whole = [entry is not None and all(map(cache.lookup, entry.parts)) for entry in entries]
    missing = whole.count(False)
    if missing:
        tell(f"{missing} of {len(some)} records of the input preview are not in the cache: run the verb cache first")
    if missing == len(some):
        return []
    dtype = getattr(torch, config.model.dtype)
    pipeline = family.load_sampling_pipeline(transformer=None, dtype=dtype, device=dist_env().device)
    found = []
    for key, scanned, is_whole in zip(keys, some, whole, strict=True):
        found.append(Images())
        if is_whole:
            sample = cache.read(key, name=scanned.record.name)
            latents = (sample.target_latents, *sample.control_latents)
            for number, (tokens, grid) in enumerate(zip(latents, sample.img_shapes, strict=True)):
                heading = f"control {number}" if number else "target"
                found[-1][f"{heading}, from the cache"] = family.decode_latents(pipeline, tokens, grid)
    return found
