"""The entries that a cache will hold and their bytes, for each choice of `cache.text`, before anything is encoded."""

from typing import Any

from mixres.config.schema import Config
from mixres.data.cache import NOWHERE
from mixres.models.family import Family
from mixres.preprocessing.encode import entry_bytes, entry_keys, foreseen_entries, shared_parts, with_text
from mixres.preprocessing.training_data import ScannedData


class FutureCache:
    """Of a configuration whose cache is empty. Keys are of no base: to digest its weights takes a while."""

    def __init__(self, config: Config, family: Family, found: ScannedData) -> None:
        self._config, self._family, plain = config, family, with_text(config, None)
        dropout = config.data.caption_dropout > 0
        self.train = entry_keys(plain, family, found.train, empty_prompt=dropout, encoders="")
        keys = self.train + entry_keys(plain, family, found.held_out, encoders="")
        self.records = dict(zip(keys, [*found.train, *found.held_out], strict=True))
        with_empty = frozenset(self.train if dropout else ())
        shared = shared_parts(plain, family, self.records, with_empty, encoders="")
        parts = shared.named_by(self.records)
        self.entries = foreseen_entries(plain, family, self.records, with_empty, shared, parts)

    def figures(self) -> dict[str, Any]:
        """What `inspect.json` holds."""
        textless = {
            key: entry._replace(prompts=(NOWHERE, NOWHERE)) for key, entry in self.entries.items() if entry.img_shapes
        }
        sizes = {
            config.cache.text: entry_bytes(config, self._family, entries)
            for config, entries in (
                (with_text(self._config, None), self.entries),
                (with_text(self._config, "float8"), self.entries),
                (with_text(self._config, "recompute"), textless),
            )
        }
        own, name = sizes[self._config.cache.text], self._config.model.dtype
        by_text = {text or name: sum(found.values()) for text, found in sizes.items()}
        return {"entries": len(own), "bytes": sum(own.values()), "bytes_by_text": by_text}
