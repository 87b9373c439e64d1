"""A scanned example under a configuration: its key, its size on disk, and the encoded sample.

Promise: whatever the encoding of an example depends on is in its key, here, side by side; what is stored under a key
was made of the very bytes that the key names. Cost: VAE and text encoder once an example, one more read of its files.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from PIL import ImageColor

from mixres.config.schema import Config
from mixres.data.cache import CacheEntry, entry_key
from mixres.data.images import WHITE, BadImageError, read_image, read_mask
from mixres.data.scan import ScannedRecord
from mixres.errors import WorkError
from mixres.models.family import Family
from mixres.preprocessing.training_data import control_areas, image_limits, target_size_of

# Part of every key. Raise it when the same files and configuration would make other entries: when pixels are read or
# resized differently, and when a new release line of diffusers brings another prompt template.
ENCODING = 2


def entry_keys(
    config: Config, family: Family, records: Sequence[ScannedRecord], *, empty_prompt: bool = False
) -> list[str]:
    """For each record the hash over everything that its entry depends on; `empty_prompt`: it holds that one too.

    Raises:
        UserError: the base's encoders cannot be had.
    """
    memo = Path(config.cache.cache_dir) / "fingerprints.json"
    encoders = family.encoder_fingerprint(memo)
    colour = ImageColor.getrgb(config.data.background)
    background = {} if colour == ImageColor.getrgb(WHITE) else {"background": colour}
    return [
        entry_key(
            encoding=ENCODING,
            encoders=encoders,
            dtype=config.model.dtype,
            target_size=target_size_of(config, scanned),
            **control_areas(config, family, target_size_of(config, scanned)),
            controls=len(scanned.record.controls),
            files=scanned.digests,
            prompt=scanned.record.prompt,
            **({"empty_prompt": True} if empty_prompt else {}),
            **(background if scanned.flattened else {}),
        )
        for scanned in records
    ]


def entry_sizes(
    config: Config, family: Family, missing: Mapping[str, ScannedRecord], with_empty: Collection[str] = ()
) -> dict[str, int]:
    """The bytes that each entry will take; the keys `with_empty` hold the empty prompt too."""
    return entry_bytes(config, family, foreseen_entries(config, family, missing, with_empty))


def entry_bytes(config: Config, family: Family, entries: Mapping[str, CacheEntry]) -> dict[str, int]:
    """The bytes of the files of such entries."""
    return {
        key: family.entry_bytes(
            image_tokens=entry.image_tokens,
            text_tokens=entry.text_tokens + entry.empty_tokens,
            mask_tokens=entry.target_tokens if entry.has_mask else 0,
            dtype=getattr(torch, config.model.dtype),
        )
        for key, entry in entries.items()
    }


def foreseen_entries(
    config: Config, family: Family, records: Mapping[str, ScannedRecord], with_empty: Collection[str] = ()
) -> dict[str, CacheEntry]:
    """What the cache will say of each record once it is encoded, exactly, from sizes and words alone.

    Raises:
        UserError: the base's tokenizer, processor or configuration cannot be had.
    """
    preprocessors = family.load_preprocessors()
    entries = {}
    for key, scanned in records.items():
        target, controls = target_size_of(config, scanned), scanned.control_sizes
        areas = control_areas(config, family, target)
        count = partial(family.text_tokens, preprocessors, controls=controls, areas=areas)
        entries[key] = CacheEntry(
            key=key,
            img_shapes=family.grids(target, controls, areas),
            text_tokens=count(prompt=scanned.record.prompt),
            has_mask=scanned.record.mask is not None,
            empty_tokens=count(prompt="") if key in with_empty else 0,
        )
    return entries


def encode_inputs(config: Config, family: Family, scanned: ScannedRecord) -> dict[str, Any]:
    """What the family's `encode` takes of an example, its pictures decoded.

    Raises:
        WorkError: a file is not the one that the scan saw, whose bytes the key is of.
    """
    limits, record = image_limits(config), scanned.record
    files = (record.target, *record.controls, *([record.mask] if record.mask else []))
    again = "has changed since the scan: run the same command again"
    try:
        target = read_image(record.target, limits)
        controls = [read_image(path, limits) for path in record.controls]
        mask = read_mask(record.mask, limits, scanned.target_size) if record.mask else None
        digests = [xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files]
    except (BadImageError, OSError) as error:
        raise WorkError(f"{record.name}: a file {again} ({error})") from error
    for path, digest, scanned_digest in zip(files, digests, scanned.digests, strict=True):
        if digest != scanned_digest:
            raise WorkError(f"{record.name}: {path} {again}")
    return {
        "name": record.name,
        "target": target,
        "target_size": target_size_of(config, scanned),
        "controls": controls,
        "prompt": record.prompt,
        "mask": mask,
        "areas": control_areas(config, family, target_size_of(config, scanned)),
    }
