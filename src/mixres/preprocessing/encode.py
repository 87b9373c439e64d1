"""A scanned record under a configuration: its key, its size on disk, and the encoded sample.

Promise: whatever the encoding of a record depends on is in its key, side by side here; what is stored under a key was
made of the very bytes that the key names. Cost: VAE and text encoder once a record, one more read of its files.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from PIL import ImageColor

from mixres.batch import Sample, TextEmbeds
from mixres.config.schema import Config
from mixres.data.cache import CacheEntry, entry_key, entry_keys_of
from mixres.data.images import WHITE, BadImageError, read_image, read_mask
from mixres.data.records import ReadOnce
from mixres.data.scan import ScannedRecord
from mixres.errors import WorkError
from mixres.models.family import ControlSizes, Family
from mixres.preprocessing.training_data import (
    RecordSizes,
    SizesOf,
    control_sizes_of,
    image_limits,
    target_size_of,
)

# Part of every key. Raise it when the same files and configuration would make other entries: when pixels are read or
# resized differently, and when a new release line of diffusers brings another prompt template.
ENCODING = 2


def entry_keys(
    config: Config, family: Family, records: Sequence[ScannedRecord], *, empty_prompt: bool = False
) -> list[str]:
    """For each record the hash over everything that its entry depends on; `empty_prompt`: the entry holds that too.

    Sizes of controls are in it where they are not those that their areas give: only then does alignment change them.

    Raises:
        UserError: the base's encoders cannot be found.
    """
    encoders = family.encoder_fingerprint(_memo(config))
    colour = ImageColor.getrgb(config.data.background)
    background = {} if colour == ImageColor.getrgb(WHITE) else {"background": colour}
    sizes, keys_of = RecordSizes(config, family), {}

    def make_keys(own: SizesOf, controls: int, flattened: bool) -> Callable[..., str]:
        return entry_keys_of(
            ("files", "prompt"),
            encoding=ENCODING,
            encoders=encoders,
            dtype=config.model.dtype,
            target_size=own.target,
            **own.areas,
            controls=controls,
            **({"empty_prompt": True} if empty_prompt else {}),
            **_text(config),
            **(background if flattened else {}),
            **({} if own.by_area else {"control_sizes": own.controls.vae}),
        )

    keys = []
    for scanned in records:
        own, controls = sizes.of(scanned), len(scanned.record.controls)
        kind = own.target, own.controls, own.by_area, controls, scanned.flattened
        if kind not in keys_of:
            keys_of[kind] = make_keys(own, controls, scanned.flattened)
        keys.append(keys_of[kind](scanned.digests, scanned.record.prompt))
    return keys


def lone_prompts(family: Family, records: Iterable[ScannedRecord], *, empty_prompt: bool) -> list[str]:
    """Each prompt once, for a family that embeds prompts alone; none for others."""
    prompts = dict.fromkeys(scanned.record.prompt for scanned in records) | ({"": None} if empty_prompt else {})
    return list(prompts) if family.prompts_alone else []


def prompt_keys(config: Config, family: Family, prompts: Sequence[str]) -> dict[str, str]:
    """By prompt the key of the entry that holds it.

    Raises:
        UserError: the base's encoders cannot be found.
    """
    if not prompts:
        return {}
    encoders = family.encoder_fingerprint(_memo(config))
    stated = {"encoding": ENCODING, "encoders": encoders, "dtype": config.model.dtype, **_text(config)}
    return {prompt: entry_key(**stated, prompt_alone=prompt) for prompt in prompts}


def _text(config: Config) -> dict[str, str]:
    return {"text": config.cache.text} if config.cache.text else {}


def _memo(config: Config) -> Path:
    return Path(config.cache.cache_dir) / "fingerprints.json"


def entry_bytes(config: Config, family: Family, entries: Mapping[str, CacheEntry]) -> dict[str, int]:
    """The bytes that the files of such entries take, at most."""
    dtype = getattr(torch, config.model.dtype)
    sizes = {}
    for key, entry in entries.items():
        text_tokens = 0 if family.prompts_alone and entry.img_shapes else entry.text_tokens + entry.empty_tokens
        size = partial(
            family.entry_bytes,
            image_tokens=entry.image_tokens,
            mask_tokens=entry.target_tokens if entry.has_mask else 0,
            dtype=dtype,
        )
        sizes[key] = size(text_tokens=text_tokens)
        if config.cache.text:  # a byte a value, and a scale a token
            sizes[key] -= (sizes[key] - size(text_tokens=0)) * (dtype.itemsize - 1) // dtype.itemsize
            sizes[key] += text_tokens * dtype.itemsize
    return sizes


def foreseen_entries(
    config: Config, family: Family, records: Mapping[str, ScannedRecord], with_empty: Collection[str] = ()
) -> dict[str, CacheEntry]:
    """The entry that each record will have once it is encoded, exactly, from sizes and words alone.

    Entries of the keys `with_empty` hold the empty prompt too.

    Raises:
        UserError: the base's tokenizer, processor or configuration cannot be found.
    """
    preprocessors = family.load_preprocessors()
    entries, of = {}, RecordSizes(config, family).of
    for key, scanned in records.items():
        target, sizes = of(scanned).target, of(scanned).controls
        count = partial(family.text_tokens, preprocessors, sizes=sizes)
        entries[key] = CacheEntry(
            key=key,
            img_shapes=family.grids(target, sizes),
            text_tokens=count(prompt=scanned.record.prompt),
            has_mask=scanned.record.mask is not None,
            empty_tokens=count(prompt="") if key in with_empty else 0,
        )
    return entries


def foreseen_prompts(family: Family, keys: Mapping[str, str]) -> dict[str, CacheEntry]:
    """The entry that each prompt will have by its key in `keys`."""
    preprocessors = family.load_preprocessors() if keys else None
    count = partial(family.text_tokens, preprocessors, sizes=ControlSizes())
    return {key: CacheEntry(key, (), count(prompt=prompt), has_mask=False) for prompt, key in keys.items()}


def text_problems(family: Family, records: Mapping[str, ScannedRecord], entries: Mapping[str, CacheEntry]) -> list[str]:
    """Records whose text has more tokens than the transformer has positions for, a message each."""
    return [
        f"{scanned.record.name}: {problem}"
        for key, scanned in records.items()
        if (problem := family.text_problem(entries[key].img_shapes, entries[key].text_tokens))
    ]


def encode_record(
    config: Config,
    family: Family,
    encoders: Any,
    scanned: ScannedRecord,
    *,
    with_empty: bool = False,
    known: Callable[[str], TextEmbeds] | None = None,
) -> Sample:
    """The encoded sample of a record; `with_empty`: with the embeddings of the empty prompt.

    Where the text encoder sees the controls, the empty prompt is another one for each record. Where it sees none,
    `known` gives the embeddings of a prompt.

    Raises:
        WorkError: a file has changed since the scan.
    """
    inputs = encode_inputs(config, family, scanned)
    seen = {name: inputs[name] for name in ("controls", "sizes")}
    text_of = known or (lambda prompt: family.encode_prompt(encoders, prompt=prompt, **seen))
    sample = family.encode(encoders, **inputs, text=text_of(inputs["prompt"]))
    if not with_empty:
        return sample
    empty = text_of("")
    return replace(sample, empty_embeds=empty.tokens, empty_pooled_embeds=empty.pooled)


def encode_inputs(config: Config, family: Family, scanned: ScannedRecord) -> dict[str, Any]:
    """The arguments of the family's `encode` for a record, its images decoded.

    Raises:
        WorkError: a file no longer has the bytes that the scan read and the key is made of.
    """
    limits, record = image_limits(config), scanned.record
    files = [ReadOnce(path) for path in (record.target, *record.controls, *([record.mask] if record.mask else []))]
    again = "has changed since the scan: run the same command again"
    try:
        read = partial(read_image, limits=limits, keep_alpha=family.keeps_alpha)
        target, *controls = (read(path) for path in files[: 1 + len(record.controls)])
        mask = read_mask(files[-1], limits) if record.mask else None
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
        "sizes": control_sizes_of(config, family, scanned),
    }
