"""Parts of samples that several entries share: embeddings of a prompt beside its controls, latents of a control.

Promise: a part has an entry of its own only where two entries or more have it, so the cache of other data is as without
parts; a part's key covers everything that it is made of, as a sample's does. Where embeddings depend on the prompt
alone, each prompt is such a part, whoever has it. Cost: two looks at the digests of all records; sizes and hashes for
those records alone that have something in common.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from PIL import ImageColor

from mixres.config.schema import Config
from mixres.data.cache import INLINE, NOWHERE, entry_key
from mixres.data.images import WHITE
from mixres.data.scan import ScannedRecord
from mixres.errors import one_line
from mixres.models.family import Family
from mixres.preprocessing.training_data import control_sizes_of

PROMPT, EMPTY = "prompt", "empty"  # names of the parts that are text; those of controls are their numbers
_SHOWN_CHARACTERS = 60  # of a prompt
Name = str | int


def background_of(config: Config) -> dict[str, Any]:
    """What the key of an image with transparency covers beside its bytes: the colour, unless it is white."""
    colour = ImageColor.getrgb(config.data.background)
    return {} if colour == ImageColor.getrgb(WHITE) else {"background": colour}


class Part(NamedTuple):
    """What the entry of a part holds, as one of the records that have it."""

    scanned: ScannedRecord
    name: Name

    @property
    def prompt(self) -> str:
        """Where the part is text."""
        return self.scanned.record.prompt if self.name == PROMPT else ""

    def title(self, family: Family) -> str:
        """For messages."""
        record = self.scanned.record
        if isinstance(self.name, int):
            return f"the control {record.controls[self.name]}"
        text = f"the prompt {one_line(self.prompt)[:_SHOWN_CHARACTERS]!r}"
        return text if family.prompts_alone or not record.controls else f"{text} of {record.name}"


class Parts:
    """The parts that have entries of their own, by the key of a sample's entry and their names."""

    def __init__(
        self,
        config: Config,
        family: Family,
        stated: Mapping[str, Any],
        records: Mapping[str, ScannedRecord],
        with_empty: Collection[str],
    ) -> None:
        """`stated` is what all keys cover; `records`, one of each entry, by key; `with_empty`: keys with that too."""
        self._config, self._family, self._stated, self._with_empty = config, family, stated, with_empty
        self._texts: dict[str, str] = {}  # keys of the prompts that depend on nothing else
        made = Counter(each for key, scanned in records.items() for each in set(self._made(key, scanned).values()))
        found = {}
        for key, scanned in records.items():
            if common := [name for name, each in self._made(key, scanned).items() if made[each] > 1]:
                found[key] = self.all_of(key, scanned, common)
        count = Counter(part for own in found.values() for part in set(own.values()))  # sizes may differ
        shared = {key: {name: part for name, part in own.items() if count[part] > 1} for key, own in found.items()}
        self._shared = {key: own for key, own in shared.items() if own}

    def of(self, key: str, scanned: ScannedRecord) -> Mapping[Name, str]:
        """Keys of the parts of the entry `key` by name, as it is to be written."""
        return self._lone(key, scanned) | self._shared.get(key, {})

    def named_by(self, records: Mapping[str, ScannedRecord]) -> dict[str, Part]:
        """By key all parts of the entries of these keys, as they are to be written."""
        own = ((scanned, self.of(key, scanned)) for key, scanned in records.items())
        return {part: Part(scanned, name) for scanned, parts in own for name, part in parts.items()}

    def all_of(self, key: str, scanned: ScannedRecord, names: Collection[Name] | None = None) -> dict[Name, str]:
        """The same where all parts have entries, or those with `names`."""
        named = [name for name in self._made(key, scanned) if names is None or name in names]
        sizes = control_sizes_of(self._config, self._family, scanned)
        seen = {**self._stated, **(background_of(self._config) if scanned.flattened else {})}
        keys = self._lone(key, scanned)
        for name in named:
            if isinstance(name, int):
                size = [own[name : name + 1] for own in sizes]
                keys[name] = entry_key(**seen, control=_controls(scanned)[name], sizes=size)
            else:
                made = {"prompt": Part(scanned, name).prompt, "controls": _controls(scanned), "sizes": sizes}
                keys[name] = entry_key(**seen, **self._rounding(), **made)
        return keys

    def places(self, key: str, scanned: ScannedRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """`CacheEntry.prompts` and `controls` of the entry as it is to be written.

        Where all is inline they are empty, so such an entry has the bytes that it had before there were parts.
        """
        own, inline = self.of(key, scanned), NOWHERE if self._config.cache.text == "recompute" else INLINE
        prompts = tuple(own.get(name, inline) for name in self._names(key))
        controls = tuple(own.get(number, INLINE) for number in range(len(scanned.record.controls)))
        return () if {*prompts} == {INLINE} else prompts, () if {*controls} <= {INLINE} else controls

    def _made(self, key: str, scanned: ScannedRecord) -> dict[Name, Any]:
        """By name what each part is made of that may be shared, but for sizes."""
        controls = _controls(scanned)
        made: dict[Name, Any] = dict(enumerate(controls))
        if not (self._family.prompts_alone or self._config.cache.text == "recompute"):
            made |= {name: (Part(scanned, name).prompt, *controls) for name in self._names(key)}
        return made

    def _lone(self, key: str, scanned: ScannedRecord) -> dict[Name, str]:
        """Keys of the prompts, where embeddings depend on them alone."""
        keys: dict[Name, str] = {}
        if self._family.prompts_alone and self._config.cache.text != "recompute":
            for name in self._names(key):
                prompt = Part(scanned, name).prompt
                if prompt not in self._texts:
                    self._texts[prompt] = entry_key(**self._stated, **self._rounding(), prompt_alone=prompt)
                keys[name] = self._texts[prompt]
        return keys

    def _names(self, key: str) -> tuple[str, ...]:
        return (PROMPT, EMPTY) if key in self._with_empty else (PROMPT,)

    def _rounding(self) -> dict[str, str]:
        return {"text": self._config.cache.text} if self._config.cache.text else {}


def _controls(scanned: ScannedRecord) -> tuple[str, ...]:
    """Digests of its controls."""
    return scanned.digests[1 : 1 + len(scanned.record.controls)]
