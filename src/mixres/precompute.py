"""Data on disk -> encoded samples in the cache: scan everything, encode what is missing, let the encoders go.

Promise: all that is wrong with the data is told before anything is encoded; a second run encodes nothing; the
encoders are released before anything else is loaded. Cost: VAE and text encoder once per sample that is new, twice
where caption dropout needs its empty prompt.
"""

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from mixres.batch import Sample
from mixres.config import Config
from mixres.data.cache import Cache, CacheEntry, entry_key
from mixres.data.dataset import ScannedRecord
from mixres.data.images import read_image, read_mask
from mixres.data.plan import Lengths
from mixres.data.records import EditRecord
from mixres.examples import find_examples, image_limits
from mixres.geometry import Size, control_area, target_size
from mixres.models.families import family_module
from mixres.training.progress import say

_POLL_S = 1.0


@dataclass(frozen=True)
class Item:
    """A usable example: its files, the size it is trained at, and its entry in the cache."""

    record: EditRecord
    target_size: Size
    key: str
    entry: CacheEntry

    @property
    def lengths(self) -> Lengths:
        entry = self.entry
        return Lengths(entry.text_tokens, entry.image_tokens, entry.target_tokens, entry.empty_tokens)


@dataclass(frozen=True)
class Encoded:
    """What training reads: the cache, and the examples in it."""

    cache: Cache
    train: list[Item]
    held_out: list[Item]


def run_cache(config: Config) -> None:
    """The verb `cache`: fill it, say what was done.

    Raises:
        UserError: data, base or sizes are wrong; every fault there is.
    """
    encode_all(config, family_of(config), device=_device())


def family_of(config: Config) -> ModuleType:
    """The module of the base's model family.

    Raises:
        UserError: the base cannot be found or is of no family that is known.
    """
    model = config.model
    return family_module(model.family, model.pretrained_model_name_or_path, revision=model.revision)


def encode_all(config: Config, family: ModuleType, *, device: torch.device, rank: int = 0) -> Encoded:
    """Scan training and held-out data and make sure that every example is in the cache; rank 0 encodes, others wait.

    Raises:
        UserError: as `run_cache`.
    """
    cache = Cache(Path(config.cache.cache_dir))
    train, held_out = find_examples(config, family, speak=rank == 0)
    with_empty = config.data.caption_dropout > 0
    train_keys = _keys(config, family, train, with_empty=with_empty)
    keys = [*train_keys, *_keys(config, family, held_out, with_empty=False)]
    wanted = dict(zip(keys, [*train, *held_out], strict=True))
    if rank == 0:
        cache.sweep()
        missing = {key: item for key, item in wanted.items() if cache.lookup(key) is None}
        if missing:
            _encode(config, family, cache, missing, set(train_keys) if with_empty else set(), device)
        cache.save_index()
        found = len(wanted) - len(missing)
        say(f"cache     {len(wanted)} entries in {cache.root}: {len(missing)} encoded, {found} found")
    else:
        while any(cache.lookup(key) is None for key in wanted):
            time.sleep(_POLL_S)
    items = [_item(config, record, key, cache) for key, record in zip(keys, [*train, *held_out], strict=True)]
    return Encoded(cache, items[: len(train)], items[len(train) :])


def _keys(config: Config, family: ModuleType, records: Sequence[ScannedRecord], *, with_empty: bool) -> list[str]:
    """Everything that an entry depends on, for each record; `with_empty`: it holds the empty prompt too."""
    memo = Path(config.cache.cache_dir) / "fingerprints.json"
    encoders = family.encoder_fingerprint(
        config.model.pretrained_model_name_or_path, revision=config.model.revision, memo=memo
    )
    return [
        entry_key(
            encoders=encoders,
            dtype=config.model.dtype,
            target_size=_target_size(config, scanned),
            control_area=_control_area(config, scanned),
            controls=len(scanned.record.controls),
            files=scanned.digests,
            prompt=scanned.record.prompt,
            **({"empty_prompt": True} if with_empty else {}),
        )
        for scanned in records
    ]


def _target_size(config: Config, scanned: ScannedRecord) -> Size:
    rule = config.data.resize.target
    return target_size(
        scanned.target_size, max_pixels=rule.max_pixels, multiple_of=rule.multiple_of, upscale=rule.upscale
    )


def _control_area(config: Config, scanned: ScannedRecord) -> int:
    return control_area(config.data.resize.control.area, _target_size(config, scanned))


def _item(config: Config, scanned: ScannedRecord, key: str, cache: Cache) -> Item:
    entry = cache.lookup(key)
    assert entry is not None, key
    return Item(scanned.record, _target_size(config, scanned), key, entry)


def _encode(
    config: Config,
    family: ModuleType,
    cache: Cache,
    missing: dict[str, ScannedRecord],
    with_empty: set[str],
    device: torch.device,
) -> None:
    model = config.model
    encoders = family.load_encoders(
        model.pretrained_model_name_or_path, revision=model.revision, dtype=getattr(torch, model.dtype), device=device
    )
    for key, scanned in tqdm(missing.items(), desc="encode", unit="sample", disable=None):
        sample = _encode_one(config, family, encoders, scanned, scanned.record.prompt)
        if key in with_empty:  # it sees the sample's own control image, so it is another one for each sample
            empty = _encode_one(config, family, encoders, scanned, "")
            sample = replace(sample, empty_embeds=empty.prompt_embeds)
        cache.write(key, sample)
    del encoders
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _encode_one(config: Config, family: ModuleType, encoders: Any, scanned: ScannedRecord, prompt: str) -> Sample:
    limits, record = image_limits(config), scanned.record
    sample: Sample = family.encode(
        encoders,
        name=record.name,
        target=read_image(record.target, limits),
        target_size=_target_size(config, scanned),
        controls=[read_image(path, limits) for path in record.controls],
        prompt=prompt,
        mask=read_mask(record.mask, limits, scanned.target_size) if record.mask else None,
        control_area=_control_area(config, scanned),
    )
    return sample


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def spread(items: Iterable[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly over their target areas, smallest first."""
    ordered = sorted(items, key=lambda item: (item.entry.target_tokens, item.record.name))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]
