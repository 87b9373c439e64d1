"""Keys of entries -> what these are to hold, by the family's encoders.

Promise: a prompt that is stored is not embedded again, and what the cache does not hold is not made: without embeddings
in it the text encoder is not loaded. Cost: VAE and text encoder once an entry; a control that several samples share is
encoded with each of them, and once more for its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from mixres.batch import Sample, TextEmbeds
from mixres.config.schema import Config
from mixres.data.cache import INLINE, NOWHERE, Cache, CacheEntry, DamagedEntry
from mixres.data.scan import ScannedRecord
from mixres.errors import WorkError
from mixres.models.family import Family
from mixres.preprocessing.encode import encode_part, encode_record
from mixres.preprocessing.parts import EMPTY, Part

# What the entry of a key holds, and where its prompts and controls are.
Encode = Callable[[str], tuple[Sample | TextEmbeds, Sequence[str], Sequence[str]]]


class Encoder:
    """Encodes the entries that are `foreseen`, of `parts` and of `records` by their keys. The encoders are loaded now.

    Raises:
        UserError: the base's encoders cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        cache: Cache,
        foreseen: Mapping[str, CacheEntry],
        records: Mapping[str, ScannedRecord],
        parts: Mapping[str, Part],
        device: torch.device,
    ) -> None:
        self._cache, self._foreseen, self._records, self._parts = cache, foreseen, records, parts
        dtype, text = getattr(torch, config.model.dtype), config.cache.text != "recompute"
        encoders = family.load_encoders(dtype=dtype, device=device, text=text)
        self._encode_part = partial(encode_part, config, family, encoders)
        self._encode_record = partial(encode_record, config, family, encoders)

    def __call__(self, key: str) -> tuple[Sample | TextEmbeds, Sequence[str], Sequence[str]]:
        """What the entry is to hold, and where its prompts and controls are.

        Raises:
            WorkError: a file has changed since the scan, or a stored prompt is damaged.
        """
        entry, part = self._foreseen[key], self._parts.get(key)
        if part:
            return self._encode_part(part), entry.prompts, entry.controls
        known, with_empty = partial(self._known, entry), bool(entry.empty_tokens)
        sample = self._encode_record(self._records[key], with_empty=with_empty, known=known)
        return sample, entry.prompts, entry.controls

    def _known(self, entry: CacheEntry, name: str) -> TextEmbeds | None:
        """As it is stored; None where it is not, or not yet: another rank may be encoding it."""
        empty = name == EMPTY
        where = entry.prompts[empty] if entry.prompts else INLINE
        if where == NOWHERE:
            return TextEmbeds(torch.empty(entry.empty_tokens if empty else entry.text_tokens, 0))
        if where == INLINE or self._cache.lookup(where) is None:
            return None
        try:
            return self._cache.read_prompt(where)
        except DamagedEntry as error:
            raise WorkError(f"{error}: run the same command again") from error
