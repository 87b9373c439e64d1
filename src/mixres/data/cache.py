"""Samples on disk: one safetensors file each, or in shards of such, found by a key over everything that made it.

Promise: what is read is bit for bit what was written, under the key that was asked for, or `DamagedEntry` is raised
and the file is gone; a kill at any instant leaves no partial entry; equal samples make byte-equal files. Only
safetensors, JSON and the headers of shards are opened. Cost: a write is two fsyncs; a lookup is one `stat`; the first
read of an entry in a process hashes it once (xxh3, several GB/s). In shards a lookup costs no call of the system.

File: tensors `target_latents` (S_target, P), `control_latents_0` (S_control, P), ..., `prompt_embeds` (T, D) and, where
there is a mask, `edit_mask` (S_target,), in their own dtypes; for caption dropout `empty_embeds` (T_empty, D) too.
Where the transformer takes pooled prompts, `pooled_embeds` (W,) and `empty_pooled_embeds` (W,) stand beside them; where
controls stand within the text, `text_before` (controls,), the text tokens before each.
Metadata: one string `mixres`, "<hash of the rest> <JSON>", the JSON with format, key, img_shapes, text_tokens,
has_mask, empty_tokens and `payload`, the hash over all tensors.

Embeddings in 8 bits have scales (T,) beside them, `prompt_embeds_scale` and `empty_embeds_scale`: see `float8`.

What several samples share may lie in entries of their own, which the entry of a sample names in place of its tensors.
`prompts`: for its prompt and, for caption dropout, the empty one, the key of an entry with `prompt_embeds`,
`pooled_embeds` and `text_before`, without img_shapes; or `inline`; or `none`, where no entry holds them. `controls`:
for each control `inline`, or the key of an entry with `target_latents`, which are the control's. Without these two
fields all is inline.

Format 1 is still read, never written. Instead of img_shapes it has the sizes in pixels: `height`, `width`,
`height_control`, `width_control`, `height_control_1`, `width_control_1`, ...; 16 pixels are a token.
"""

import contextlib
import errno
import functools
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from mixres import atomic
from mixres.batch import Sample, TextEmbeds, image_shapes_from_embeddings
from mixres.data.entry_header import FORMAT, MAX_HEADER_BYTES, parse_header, payload_hash
from mixres.data.float8 import from_float8, to_float8
from mixres.data.shard_store import FolderStore, UrlStore
from mixres.data.shards import FOLDER, Shards, member_name
from mixres.errors import UserError, WorkError
from mixres.geometry import Grid, token_count

INDEX = "index.json"
INLINE, NOWHERE = "inline", "none"  # in place of the key of a part: in the entry itself, or in no entry
_TEXTS = ("prompt_embeds", "empty_embeds", "pooled_embeds", "empty_pooled_embeds")  # tensors of a sample's prompts
_KEY = re.compile("[0-9a-f]{32}")
# What reading a file raises that is not what `Cache.write` made. Only the message of a plain ValueError is ours.
_UNFIT = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class DamagedEntry(Exception):  # noqa: N818 - the state, not a mistake of the caller
    """A cache entry is not what was written. It has been removed; the next caching pass makes it again."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}; the entry has been removed and the next caching pass makes it again")
        self.path, self.reason = path, reason


class CacheEntry(NamedTuple):
    """What the plan needs to know of a sample: its lengths."""

    key: str
    img_shapes: tuple[Grid, ...]  # none in the entry of a prompt
    text_tokens: int
    has_mask: bool
    empty_tokens: int = 0  # of the empty prompt; 0 where it is not stored
    prompts: tuple[str, ...] = ()  # where its embeddings are, and those of the empty prompt: a key, INLINE or NOWHERE
    controls: tuple[str, ...] = ()  # where the latents of each control are: a key or INLINE; none: all are inline

    @property
    def parts(self) -> tuple[str, ...]:
        """Keys of the entries that hold the rest of its tensors."""
        return tuple(where for where in self.prompts + self.controls if where not in (INLINE, NOWHERE))

    @property
    def elsewhere(self) -> set[str]:
        """Names of the tensors that its own file does not hold."""
        prompts = zip(self.prompts, (_TEXTS[::2], _TEXTS[1::2]), strict=False)
        names = {name for where, own in prompts if where != INLINE for name in own}
        return names | {f"control_latents_{i}" for i, where in enumerate(self.controls) if where != INLINE}

    @property
    def target_tokens(self) -> int:
        return self.img_shapes[0].tokens

    @property
    def image_tokens(self) -> int:
        """Tokens of the target and all controls."""
        return token_count(self.img_shapes)


class Cache:
    """The entries under `root`, at `root/ab/<key>.safetensors` or in shards in `root/shards`, and an index of lengths.

    The index only saves opening files: it is checked against each file's size, and an entry that it lacks is found by
    its header. Any number of processes may read and write; two that write one key write the same bytes. All entries
    are read, whatever they are; new ones go to shards of `shard_size` bytes, or with 0 to a file each, with
    `float8_text` embeddings in 8 bits. With `remote` all entries are in shards there, and `root` is a folder of this
    machine for what is remembered of them.
    """

    def __init__(
        self, root: Path | str, shard_size: int = 0, *, float8_text: bool = False, remote: UrlStore | None = None
    ) -> None:
        assert shard_size or not remote, "a URL has no single files"
        self.root, self.float8_text, self.remote = Path(root), float8_text, remote
        self.shards = Shards(remote or FolderStore(self.root / FOLDER), shard_size)
        self._index = _read_index(self.root / INDEX)
        self._changed = False
        self._removed: set[str] = set()
        self._verified: set[str] = set()

    def __str__(self) -> str:
        """The folder or URL of the entries."""
        return self.remote.url.removesuffix(f"/{FOLDER}") if self.remote else str(self.root)

    def path(self, key: str) -> Path:
        """Where the entry `key` lies, or would lie, as a file of its own."""
        assert _KEY.fullmatch(key), key
        return self.root / member_name(key)

    def lookup(self, key: str) -> CacheEntry | None:
        """The lengths of entry `key`; None where there is none, or one whose length or header is not as written."""
        if row := self.shards.known(key):
            return _entry_from_shard(key, row)
        path = self.path(key)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            self._forget(key)
            return _entry_from_shard(key, row) if (row := self.shards.find(key)) else None
        entry = _entry_from_row(key, self._index.get(key), size)
        if entry is None:
            entry = _read_header(path, key)
            self._remember(entry, size) if entry else self._forget(key)
        return entry

    def write(
        self, key: str, value: Sample | TextEmbeds, prompts: Sequence[str] = (), controls: Sequence[str] = ()
    ) -> CacheEntry:
        """Store a sample or a prompt; whatever lay under `key` is replaced in one rename.

        `prompts` and `controls`: as in `CacheEntry`; what is not inline is left out.
        In a shard the entry is this process's own until the shard is closed, as `close` does.

        Raises:
            OSError: the disk is full or the folder cannot be written; no part of the entry is left.
        """
        tensors = _tensors(value)
        if isinstance(value, Sample):
            empty = 0 if value.empty_embeds is None else len(value.empty_embeds)
            lengths = len(value.prompt_embeds), value.edit_mask is not None, empty
            entry = CacheEntry(key, value.img_shapes, *lengths, tuple(prompts), tuple(controls))
        else:
            entry = CacheEntry(key, (), len(value.tokens), False)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in entry.elsewhere}
        if self.float8_text:
            tensors = to_float8(tensors)
        self._store(entry, save_tensors(tensors, {"mixres": _description(entry, payload_hash(tensors))}))
        return entry

    def close(self) -> None:
        """Let other processes see what this one has written. Raises as `write`."""
        self.shards.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Close the open shard at the end, however that comes. Raises as `write`."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, UserError, WorkError):  # what ended the block is what to report
                self.close()
            raise
        self.close()

    def copy(self, key: str) -> None:
        """Write a checked entry once more, byte for byte, into the open shard. Raises as `read_entry` and `write`."""
        data, entry, _ = self._checked(key, fresh=True)
        self._store(entry, data)

    def remove(self, sources: Sequence[Path | str]) -> int:
        """Delete files, and shards by name, whose entries lie in other shards too; returns how many.

        Raises:
            OSError: the folder cannot be written.
        """
        for source in sources:
            if isinstance(source, str):
                self.shards.remove(source)
            else:
                source.unlink(missing_ok=True)
                self._forget(source.stem)
        return len(sources)

    def files(self) -> dict[str, Path]:
        """The entries that have a file of their own, by key."""
        found = {path.stem: path for path in self.root.glob("??/*.safetensors")}
        return {key: path for key, path in found.items() if _KEY.fullmatch(key)}

    def unreadable(self) -> list[str]:
        """Shards without an index that can be read: their entries count as missing."""
        return sorted(map(self.shards.store.where, self.shards.unreadable))

    def held(self) -> dict[str, int]:
        """The bytes of every entry that is there, by key."""
        files = {key: path.stat().st_size for key, path in self.files().items()}
        self.shards.refresh()
        return files | self.shards.sizes()

    def read(self, key: str, name: str | None = None) -> Sample:
        """The sample under `key`, called `name` (by default its key): equal samples of other names share an entry.

        Embeddings that no entry holds are (T, 0).

        Raises:
            FileNotFoundError: there is no such entry, or none of a part of it.
            DamagedEntry: a file is not what was written.
        """
        entry, tensors = self.read_entry(key)
        lengths = entry.text_tokens, entry.empty_tokens
        for where, part, tokens in zip(entry.prompts, ("", "empty_"), lengths, strict=False):
            if where != INLINE:
                text = TextEmbeds(torch.empty(tokens, 0)) if where == NOWHERE else self.read_prompt(where)
                tensors[f"{part or 'prompt_'}embeds"] = text.tokens
                if text.pooled is not None:
                    tensors[f"{part}pooled_embeds"] = text.pooled
        for number, where in enumerate(entry.controls):
            if where != INLINE:
                tensors[f"control_latents_{number}"] = self.read_entry(where)[1]["target_latents"]
        return Sample(
            name=name or key,
            target_latents=tensors["target_latents"],
            control_latents=tuple(tensors[name] for name in _latent_names(entry)[1:]),
            img_shapes=entry.img_shapes,
            edit_mask=tensors["edit_mask"] if entry.has_mask else None,
            prompt_embeds=tensors["prompt_embeds"],
            **{text: tensors.get(text) for text in _TEXTS[1:]},
            text_before=tuple(tensors["text_before"].tolist()) if "text_before" in tensors else (),
        )

    def read_prompt(self, key: str) -> TextEmbeds:
        """The prompt whose entry is `key`. Raises as `read_entry`."""
        _, tensors = self.read_entry(key)
        before = tuple(tensors["text_before"].tolist()) if "text_before" in tensors else ()
        return TextEmbeds(tensors["prompt_embeds"], tensors.get("pooled_embeds"), before)

    def read_entry(self, key: str, *, fresh: bool = False) -> tuple[CacheEntry, dict[str, Tensor]]:
        """What the file of `key` alone holds, of a sample or of a prompt. `fresh`: not from a local copy of it.

        Raises:
            FileNotFoundError: there is no such entry.
            DamagedEntry: what is stored is not what was written.
            WorkError: the same, and the folder cannot be written.
        """
        return self._checked(key, fresh)[1:]

    def _checked(self, key: str, fresh: bool = False) -> tuple[bytes, CacheEntry, dict[str, Tensor]]:
        data = self._bytes(key, fresh)
        try:
            return data, *self._parsed(data, key)
        except _UNFIT as error:
            if self.remote and not fresh:  # a local copy, or what came over the wire
                return self._checked(key, fresh=True)
            in_shard = key in self.shards.shard_of
            path = self.shards.where(key) if in_shard else self.path(key)
            reason = str(error) if type(error) is ValueError else "it is no cache entry"
            try:
                self.shards.drop(key) if in_shard else self.path(key).unlink(missing_ok=True)
            except (OSError, UserError, WorkError) as refused:
                why = refused.strerror if isinstance(refused, OSError) else refused
                kept = f"{path}: {reason}, and it cannot be removed ({why})"
                raise WorkError(f"{kept}: make {self} writable and run the same command again") from refused
            self._forget(key)
            raise DamagedEntry(path, reason) from error

    def save_index(self) -> None:
        """Put the lengths of all entries seen by this object, and those other processes saved, into the index file.

        Nothing is written where the file already holds what this object knows, so a full cache may be read-only.

        Raises:
            OSError: the disk is full or the folder cannot be written. All entries are found without an index too.
        """
        if not self._changed:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / ".index.lock"):
            rows = _read_index(self.root / INDEX)
            self._index = {key: row for key, row in rows.items() if key not in self._removed} | self._index
            index = {"format": FORMAT, "entries": dict(sorted(self._index.items()))}
            atomic.write_json(self.root / INDEX, index, indent=None)
        self._changed = False

    def sweep(self, max_age: float = 3600.0) -> int:
        """Delete the temporary files that killed writers left more than `max_age` seconds ago; returns how many."""
        return atomic.sweep((self.root, self.shards.store.scratch, *self.root.glob("??")), max_age)

    def _bytes(self, key: str, fresh: bool = False) -> bytes:
        """Of a shard or a file; another process may be moving it from one to the other."""
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                return self.shards.read(key, fresh=fresh) if self.shards.find(key) else self.path(key).read_bytes()
            self.shards.refresh(again=True)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self}/{member_name(key)}")

    def _store(self, entry: CacheEntry, data: bytes) -> None:
        if self.shards.size:
            self.shards.append(entry.key, data, _note(entry))
            return
        path = self.path(entry.key)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.sync_directory(self.root)
        atomic.write_bytes(path, data)
        self._remember(entry, len(data))

    def _parsed(self, data: bytes, key: str) -> tuple[CacheEntry, dict[str, Tensor]]:
        stated = parse_header(data, len(data), key)
        tensors = load_tensors(data)
        if key not in self._verified:
            if payload_hash(tensors) != stated["payload"]:
                raise ValueError("the checksum of its tensors is wrong")
            self._verified.add(key)
        entry = _entry(key, stated)
        elsewhere = entry.elsewhere
        latents = zip(_latent_names(entry), entry.img_shapes, strict=False)  # the entry of a prompt has no shapes
        if any(len(tensors[name]) != grid.tokens for name, grid in latents if name not in elsewhere):
            raise ValueError("its latents are not of the sizes it states")
        needed = {"prompt_embeds": True, "empty_embeds": entry.empty_tokens, "edit_mask": entry.has_mask}
        if absent := [name for name, has in needed.items() if has and name not in elsewhere and name not in tensors]:
            raise ValueError(f"it has no {absent[0]}")
        return entry, from_float8(tensors)

    def _remember(self, entry: CacheEntry, size: int) -> None:
        self._removed.discard(entry.key)
        shapes = entry.img_shapes or None
        row = [size, entry.text_tokens, entry.has_mask, shapes, entry.empty_tokens, *_places(entry)]
        self._index[entry.key] = row
        self._changed = True

    def _forget(self, key: str) -> None:
        self._changed |= self._index.pop(key, None) is not None
        self._verified.discard(key)
        self._removed.add(key)


def _latent_names(entry: CacheEntry) -> list[str]:
    return ["target_latents", *(f"control_latents_{i}" for i in range(len(entry.img_shapes) - 1))]


def _tensors(value: Sample | TextEmbeds) -> dict[str, Tensor]:
    """The named tensors of an entry, those of a sample checked against its own `img_shapes`."""
    if isinstance(value, Sample):
        latents = (value.target_latents, *value.control_latents)
        assert [grid.tokens for grid in value.img_shapes] == [len(x) for x in latents], value.img_shapes
        assert value.edit_mask is None or value.edit_mask.shape == latents[0].shape[:1], value.edit_mask.shape
        named = {f"control_latents_{i}": x for i, x in enumerate(value.control_latents)}
        fields = {name: getattr(value, name) for name in ("target_latents", "edit_mask", *_TEXTS)}
        named |= {name: tensor for name, tensor in fields.items() if tensor is not None}
        if value.text_before:
            named["text_before"] = torch.tensor(value.text_before)
    else:
        named = {"prompt_embeds": value.tokens} | ({} if value.pooled is None else {"pooled_embeds": value.pooled})
        if value.before:
            named["text_before"] = torch.tensor(value.before)
    # A copy each: safetensors refuses tensors that share memory, as two views of one encoder output do.
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}


def _description(entry: CacheEntry, payload: str) -> str:
    """One string, not several: safetensors writes several metadata strings in no fixed order."""
    stated = {"format": FORMAT, **entry._asdict(), "payload": payload}
    for name in ("prompts", "controls"):
        if not stated[name]:  # as they were written before there were parts
            del stated[name]
    text = json.dumps(stated, sort_keys=True, separators=(",", ":"))
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}"


def _read_header(path: Path, key: str) -> CacheEntry | None:
    try:
        with path.open("rb") as file:
            data = file.read(8)
            if len(data) == 8:
                data += file.read(min(struct.unpack("<Q", data)[0], MAX_HEADER_BYTES))
        return _entry(key, parse_header(data, path.stat().st_size, key))
    except (OSError, *_UNFIT):
        return None


def _entry(key: str, stated: Mapping[str, Any]) -> CacheEntry:
    grids = tuple(Grid(*grid) for grid in image_shapes_from_embeddings({k: [v] for k, v in stated.items()}, 1)[0])
    places = (tuple(stated.get(name, ())) for name in ("prompts", "controls"))
    return CacheEntry(key, grids, stated["text_tokens"], stated["has_mask"], stated.get("empty_tokens", 0), *places)


def _places(entry: CacheEntry) -> list[str]:
    """Those of prompts and controls in one list, as the indexes hold them."""
    return [*entry.prompts, *(f"+{where}" for where in entry.controls)]


def _of_places(places: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inverse of `_places`."""
    if not places:  # as of most entries
        return (), ()
    prompts = tuple(where for where in places if where[0] != "+")
    return prompts, tuple(where[1:] for where in places[len(prompts) :])


def _read_index(path: Path) -> dict[str, Any]:
    """Rows `[size, text_tokens, has_mask, img_shapes, empty_tokens, *places]` by key; none where it cannot be read."""
    try:
        index = json.loads(path.read_bytes())
        return dict(index["entries"]) if index["format"] == FORMAT else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _note(entry: CacheEntry) -> str:
    """The lengths of an entry in the index of a shard: `text_tokens has_mask empty_tokens grids places...`."""
    grids = ",".join("x".join(map(str, grid)) for grid in entry.img_shapes)
    return " ".join((str(entry.text_tokens), str(int(entry.has_mask)), str(entry.empty_tokens), grids, *_places(entry)))


def _entry_from_shard(key: str, row: str) -> CacheEntry:
    _, _, text_tokens, has_mask, empty_tokens, grids, *places = row.split(" ")
    lengths = int(text_tokens), has_mask == "1", int(empty_tokens)
    return CacheEntry(key, _grids(grids), *lengths, *_of_places(places))


@functools.lru_cache(maxsize=2**16)  # many entries have the same
def _grids(text: str) -> tuple[Grid, ...]:
    return tuple(Grid(*map(int, grid.split("x"))) for grid in text.split(",")) if text else ()


def _entry_from_row(key: str, row: Any, size: int) -> CacheEntry | None:
    try:
        indexed_size, text_tokens, has_mask, shapes, empty_tokens, *places = row
        grids = () if shapes is None else tuple(Grid(*map(int, grid)) for grid in shapes)
        lengths = int(text_tokens), bool(has_mask), int(empty_tokens)
        entry = CacheEntry(key, grids, *lengths, *_of_places(places))
        return entry if indexed_size == size and (entry.img_shapes or shapes is None) else None
    except (TypeError, ValueError, IndexError):
        return None


def entry_key(**parts: Any) -> str:
    """32 hex characters over named JSON values and the cache format; a change of any value changes the key.

    Raises:
        TypeError, ValueError: a part has no exact JSON form (a path, a dtype, NaN); hand in its string or digest.
    """
    return xxhash.xxh3_128_hexdigest(_key_text(parts).encode("ascii"))


def entry_keys_of(names: Sequence[str], **parts: Any) -> Callable[..., str]:
    """`entry_key` of the parts `names`, texts or sequences of them, beside others that many entries have alike."""
    holes = {name: f"\0{name}" for name in names}
    pieces = [_key_text(parts | holes)]
    for name in sorted(names):
        pieces += pieces.pop().split(json.dumps(holes[name]))
    first, *rest = pieces
    order = [names.index(name) for name in sorted(names)]

    def key(*values: str | Sequence[str]) -> str:
        text = first
        for number, piece in zip(order, rest, strict=True):
            value = values[number]
            filled = _quoted(value) if isinstance(value, str) else f"[{','.join(map(_quoted, value))}]"
            text += filled + piece
        return xxhash.xxh3_128_hexdigest(text.encode("ascii"))

    return key


def _key_text(parts: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "parts": parts}, sort_keys=True, separators=(",", ":"), allow_nan=False)
