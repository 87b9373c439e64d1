"""A scanned record under a configuration: its key, its size on disk, and the encoded sample.

Promise: whatever the encoding of a record depends on is in its key, side by side here; what is stored under a key was
made of the very bytes that the key names. Cost: VAE and text encoder once a record, one more read of its files.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from PIL import Image

from mixres.batch import Sample, TextEmbeds
from mixres.config.schema import Config
from mixres.data.cache import INLINE, NOWHERE, CacheEntry, entry_keys_of
from mixres.data.images import BadImageError, read_image, read_mask
from mixres.data.records import EditRecord, Picture, ReadOnce
from mixres.data.scan import ScannedRecord
from mixres.errors import WorkError
from mixres.models.family import ControlSizes, Family
from mixres.preprocessing.cache_folder import cache_folder
from mixres.preprocessing.parts import EMPTY, PROMPT, Part, Parts, background_of
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
FINGERPRINTS = "fingerprints.json"  # in the folder of the cache


def entry_keys(
    config: Config,
    family: Family,
    records: Sequence[ScannedRecord],
    *,
    empty_prompt: bool = False,
    encoders: str | None = None,
) -> list[str]:
    """For each record the hash over everything that its entry depends on; `empty_prompt`: the entry holds that too.

    Sizes of controls are in it where they are not those that their areas give: only then does alignment change them.
    `encoders` stands for the fingerprint of the base's, which takes a while: such keys serve to count entries.

    Raises:
        UserError: the base's encoders cannot be found.
    """
    stated = _stated(config, family, encoders)
    background = background_of(config)
    sizes, keys_of = RecordSizes(config, family), {}

    def make_keys(own: SizesOf, controls: int, flattened: bool) -> Callable[..., str]:
        return entry_keys_of(
            ("files", "prompt"),
            **stated,
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


def shared_parts(
    config: Config,
    family: Family,
    records: Mapping[str, ScannedRecord],
    with_empty: Collection[str],
    *,
    encoders: str | None = None,
) -> Parts:
    """The parts that entries of these keys share; `encoders` and Raises as `entry_keys`."""
    return Parts(config, family, _stated(config, family, encoders), records, with_empty)


def _stated(config: Config, family: Family, encoders: str | None) -> dict[str, Any]:
    """What the key of every entry covers."""
    encoders = family.encoder_fingerprint(_memo(config)) if encoders is None else encoders
    return {"encoding": ENCODING, "encoders": encoders, "dtype": config.model.dtype}


def with_text(config: Config, text: Literal["float8", "recompute"] | None) -> Config:
    """The same configuration with this `cache.text`."""
    return config.model_copy(update={"cache": config.cache.model_copy(update={"text": text})})


def _text(config: Config) -> dict[str, str]:
    return {"text": config.cache.text} if config.cache.text else {}


def _memo(config: Config) -> Path:
    return cache_folder(config) / FINGERPRINTS


def entry_bytes(config: Config, family: Family, entries: Mapping[str, CacheEntry]) -> dict[str, int]:
    """The bytes that the files of such entries take, at most."""
    dtype = getattr(torch, config.model.dtype)
    sizes = {}
    for key, entry in entries.items():
        texts = zip((entry.text_tokens, entry.empty_tokens), entry.prompts or (INLINE, INLINE), strict=False)
        text_tokens = sum(tokens for tokens, where in texts if where == INLINE)
        controls = zip(entry.img_shapes[1:], entry.controls, strict=False)
        size = partial(
            family.entry_bytes,
            image_tokens=entry.image_tokens - sum(grid.tokens for grid, where in controls if where != INLINE),
            mask_tokens=entry.target_tokens if entry.has_mask else 0,
            dtype=dtype,
        )
        sizes[key] = size(text_tokens=text_tokens)
        if config.cache.text == "float8":  # a byte a value, and a scale a token
            sizes[key] -= (sizes[key] - size(text_tokens=0)) * (dtype.itemsize - 1) // dtype.itemsize
            sizes[key] += text_tokens * dtype.itemsize
    return sizes


def foreseen_entries(
    config: Config,
    family: Family,
    records: Mapping[str, ScannedRecord],
    with_empty: Collection[str],
    shared: Parts,
    parts: Mapping[str, Part],
) -> dict[str, CacheEntry]:
    """The entry that each of `parts` and each record will have, exactly, from sizes and words alone.

    Entries of the keys `with_empty` hold the empty prompt too. `shared` knows what lies in entries of parts.

    Raises:
        UserError: the base's tokenizer, processor or configuration cannot be found.
    """
    if not (parts or records):
        return {}
    count, of = partial(family.text_tokens, family.load_preprocessors()), RecordSizes(config, family).of
    entries = {}
    for key, part in parts.items():
        own = of(part.scanned)
        if isinstance(part.name, int):
            grid = family.grids(own.target, own.controls)[part.name + 1 : part.name + 2]
            entries[key] = CacheEntry(key, grid, 0, False, prompts=(NOWHERE,))
        else:
            seen = ControlSizes() if family.prompts_alone else own.controls
            entries[key] = CacheEntry(key, (), count(prompt=part.prompt, sizes=seen), has_mask=False)
    for key, scanned in records.items():
        target, sizes = of(scanned).target, of(scanned).controls
        prompts, controls = shared.places(key, scanned)
        entries[key] = CacheEntry(
            key=key,
            img_shapes=family.grids(target, sizes),
            text_tokens=count(prompt=scanned.record.prompt, sizes=sizes),
            has_mask=scanned.record.mask is not None,
            empty_tokens=count(prompt="", sizes=sizes) if key in with_empty else 0,
            prompts=prompts,
            controls=controls,
        )
    return entries


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
    known: Callable[[str], TextEmbeds | None] = lambda name: None,
) -> Sample:
    """The encoded sample of a record; `with_empty`: with the embeddings of the empty prompt.

    Where the text encoder sees the controls, the empty prompt is another one for each record. `known` gives the
    embeddings of a prompt by its name as a part, where they need not be made.

    Raises:
        WorkError: a file has changed since the scan.
    """
    inputs = encode_inputs(config, family, scanned)
    seen = {name: inputs[name] for name in ("controls", "sizes")}

    def text_of(name: str) -> TextEmbeds:
        text = known(name)
        return family.encode_prompt(encoders, prompt=Part(scanned, name).prompt, **seen) if text is None else text

    sample = family.encode(encoders, **inputs, text=text_of(PROMPT))
    if not with_empty:
        return sample
    empty = text_of(EMPTY)
    return replace(sample, empty_embeds=empty.tokens, empty_pooled_embeds=empty.pooled)


def encode_part(config: Config, family: Family, encoders: Any, part: Part) -> Sample | TextEmbeds:
    """What the entry of a part holds. Raises as `encode_record`."""
    scanned, number = part.scanned, part.name
    sizes = control_sizes_of(config, family, scanned)
    if isinstance(number, str):
        seen = text_inputs(config, family, scanned.record, scanned.digests, sizes)
        return family.encode_prompt(encoders, prompt=part.prompt, **seen)
    one, grids = slice(number, number + 1), family.grids(target_size_of(config, scanned), sizes)
    images = control_images(config, family, scanned.record, scanned.digests)[one]
    (latents,) = family.control_latents(encoders, images, ControlSizes(*(own[one] for own in sizes)))
    return Sample(scanned.record.name, latents, (), torch.empty(0, 0), (grids[number + 1],))


def encode_inputs(config: Config, family: Family, scanned: ScannedRecord) -> dict[str, Any]:
    """The arguments of the family's `encode` for a record, its images decoded.

    Raises:
        WorkError: a file no longer has the bytes that the scan read and the key is made of.
    """
    limits, record = image_limits(config), scanned.record
    read = partial(read_image, limits=limits, keep_alpha=family.keeps_alpha)
    mask = partial(read_mask, limits=limits)
    return {
        "name": record.name,
        "target": _decoded(record, record.target, scanned.digests[0], read),
        "target_size": target_size_of(config, scanned),
        "controls": control_images(config, family, record, scanned.digests),
        "prompt": record.prompt,
        "mask": _decoded(record, record.mask, scanned.digests[-1], mask) if record.mask else None,
        "sizes": control_sizes_of(config, family, scanned),
    }


def text_inputs(
    config: Config, family: Family, record: EditRecord, digests: Sequence[str], sizes: ControlSizes
) -> dict[str, Any]:
    """What `Family.encode_prompt` takes of a record beside a prompt; `sizes` are those of its controls.

    Raises as `encode_inputs`. Where embeddings depend on prompts alone, no file is read.
    """
    if family.prompts_alone:
        return {"controls": [], "sizes": ControlSizes()}
    return {"controls": control_images(config, family, record, digests), "sizes": sizes}


def control_images(config: Config, family: Family, record: EditRecord, digests: Sequence[str]) -> list[Image.Image]:
    """The controls of a record, whose files have these `digests` from the second on. Raises as `encode_inputs`."""
    read = partial(read_image, limits=image_limits(config), keep_alpha=family.keeps_alpha)
    pairs = zip(record.controls, digests[1:], strict=False)
    return [_decoded(record, path, digest, read) for path, digest in pairs]


def _decoded(record: EditRecord, path: Picture, digest: str, decode: Callable[[Picture], Image.Image]) -> Image.Image:
    file, again = ReadOnce(path), "has changed since the scan: run the same command again"
    try:
        image, found = decode(file), xxhash.xxh3_128_hexdigest(file.read_bytes())
    except (BadImageError, OSError) as error:
        raise WorkError(f"{record.name}: a file {again} ({error})") from error
    if found != digest:
        raise WorkError(f"{record.name}: {path} {again}")
    return image
