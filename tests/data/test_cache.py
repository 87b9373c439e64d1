"""What is read is bit for bit what was written, or the entry is gone; no damage and no index changes that."""

import json
import os
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save

from mixres import atomic
from mixres.batch import Sample
from mixres.data.cache import INDEX, Cache, CacheEntry, DamagedEntry, entry_key, entry_keys_of
from mixres.data.entry_header import FORMAT
from mixres.data.float8 import from_float8, to_float8
from mixres.geometry import Grid
from support.samples import assert_same, make_sample, same_bits

KEY, OTHER = entry_key(name="one"), entry_key(name="other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("controls", "mask"), [(0, True), (1, False), (2, True), (11, False)])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, controls: int, mask: bool) -> None:
    grids = (Grid(1, 3, 2), *(Grid(1, 2, 1 + i) for i in range(controls)))
    sample = make_sample(grids, mask=mask, dtype=dtype, empty=0 if mask else 3, pooled=4 * (controls % 2))
    entry = Cache(tmp_path).write(KEY, sample)
    assert entry == CacheEntry(KEY, grids, text_tokens=5, has_mask=mask, empty_tokens=0 if mask else 3)
    assert (entry.target_tokens, entry.image_tokens) == (6, sum(grid.tokens for grid in grids))
    for cache in (Cache(tmp_path), Cache(tmp_path / ".")):
        assert cache.lookup(KEY) == entry
        for _ in range(2):
            assert_same(cache.read(KEY), sample)
    assert cache.read(KEY, name="b.png").name == "b.png"
    whole = cache.path(KEY).read_bytes()
    cache.write(KEY, replace(sample, name="b.png"))
    assert cache.path(KEY).read_bytes() == whole, "equal samples make equal bytes"
    assert all(isinstance(grid, Grid) for grid in cache.read(KEY).img_shapes)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / KEY[:2] / f"{KEY}.safetensors"]
    cache.save_index()
    assert Cache(tmp_path).lookup(KEY) == entry, "by the index, above by the header"


def test_a_prompt_of_its_own_is_joined_with_its_samples(tmp_path: Path) -> None:
    sample, cache = make_sample(mask=True, empty=3, pooled=4), Cache(tmp_path)
    own, empty, twin = (entry_key(prompt=prompt) for prompt in ("own", "empty", "twin"))
    assert cache.write(own, sample.text) == CacheEntry(own, (), 5, False)
    cache.write(empty, sample.without_caption().text)
    entry = cache.write(KEY, sample, [own, empty])
    assert entry == CacheEntry(KEY, sample.img_shapes, 5, True, empty_tokens=3, prompts=(own, empty))
    with safe_open(cache.path(KEY), "pt") as file:
        assert set(file.keys()) == {"target_latents", "control_latents_0", "edit_mask"}
    for saved in (False, True):
        again = Cache(tmp_path)
        assert (again.lookup(KEY), again.lookup(own)) == (entry, CacheEntry(own, (), 5, False)), saved
        assert_same(again.read(KEY), sample)
        assert all(map(same_bits, again.read_prompt(own)[:2], sample.text[:2]))
        cache.save_index()
    # What is wrong with a prompt is said of its entry: that of the sample stays.
    cache.path(own).write_bytes(b"x")
    with pytest.raises(DamagedEntry, match=own):
        Cache(tmp_path).read(KEY)
    with pytest.raises(FileNotFoundError):
        Cache(tmp_path).read(KEY)
    assert Cache(tmp_path).read_entry(KEY)[0] == entry and Cache(tmp_path).lookup(own) is None
    cache.write(twin, replace(sample, empty_embeds=None, empty_pooled_embeds=None), [empty])
    assert same_bits(Cache(tmp_path).read(twin).prompt_embeds, sample.empty_embeds)


def test_special_values_and_odd_tensors_survive(tmp_path: Path) -> None:
    sample = make_sample()
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40]).repeat(12).reshape(8, 6).T
    assert not odd.is_contiguous()
    sample = replace(sample, target_latents=odd, prompt_embeds=torch.zeros(0, 6, requires_grad=True))
    Cache(tmp_path).write(KEY, sample)
    found = Cache(tmp_path).read(KEY)
    assert same_bits(found.target_latents, odd.contiguous())
    assert found.prompt_embeds.shape == (0, 6)
    assert Cache(tmp_path).lookup(KEY) == CacheEntry(KEY, sample.img_shapes, 0, False)
    shared = make_sample((Grid(1, 2, 2), Grid(1, 2, 2)))
    shared = replace(shared, control_latents=(shared.target_latents,))
    Cache(tmp_path).write(OTHER, shared)
    assert_same(Cache(tmp_path).read(OTHER), shared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_text_in_8_bits_is_near_and_all_else_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    sample = make_sample(text=64, text_width=128, empty=3, mask=True, pooled=4, dtype=dtype)
    text = sample.prompt_embeds * torch.logspace(-6, 6, 64, dtype=dtype)[:, None]  # tokens of all sizes
    text[3], text[:, 5] = 0.0, text[:, 5] * 1000  # one without values; and large ones, as text encoders have
    sample = replace(sample, prompt_embeds=text)
    exact, rounded = Cache(tmp_path / "exact"), Cache(tmp_path / "float8", float8_text=True)
    assert rounded.write(KEY, sample) == exact.write(KEY, sample)
    for cache in (rounded, Cache(tmp_path / "float8")):
        read = cache.read(KEY)
        assert_same(replace(read, prompt_embeds=text, empty_embeds=sample.empty_embeds), sample)
        error = (read.prompt_embeds.double() - text.double()).abs()
        bound = torch.maximum(text.double().abs() / 16, text.double().abs().amax(-1, keepdim=True) * 2**-17)
        assert bool((error <= bound).all()) and bool((error > 0).any())
    cache.float8_text = True
    cache.write(OTHER, read)
    assert_same(cache.read(OTHER), read)
    sizes = [cache.path(KEY).stat().st_size for cache in (exact, rounded)]
    saved = 67 * 128 * (dtype.itemsize - 1) - 67 * dtype.itemsize
    assert saved - 300 < sizes[0] - sizes[1] <= saved, "the rest is names in the header"


def test_a_token_that_is_not_finite_stays_so_in_8_bits() -> None:
    text = torch.tensor([[torch.inf, 1000.0], [torch.nan, 2.0], [-torch.inf, 0.0], [0.5, 0.0]], dtype=torch.bfloat16)
    read = from_float8(to_float8({"prompt_embeds": text}))["prompt_embeds"]
    assert read[:3].isnan().all() and torch.equal(read[3], text[3])


def test_any_change_of_a_part_changes_the_key() -> None:
    parts: dict[str, Any] = {"controls": ["d2", "d3"], "prompt": "蓝色", "mask": None, "sizes": {"a": 16, "b": False}}
    changes: list[dict[str, Any]] = [
        {"controls": ["d3", "d2"]}, {"controls": ["d2"]}, {"controls": ["d2d3"]}, {"prompt": "蓝"}, {"mask": ""},
        {"sizes": {"a": 32, "b": False}}, {"sizes": {"a": 16, "b": 0}}, {"new": 1},
    ]  # fmt: skip
    keys = {entry_key(**parts), *(entry_key(**(parts | change)) for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert all(len(key) == 32 for key in keys)
    assert entry_key(**dict(reversed(parts.items()))) == entry_key(**parts), "order is no part of it"
    assert entry_key(a=1) == "11bc9322f272d7ba6fb598b1e5de2857", "keys are the same in every process and release"


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, bytes, Sample]:
    """Path and bytes of an entry of about 800 bytes, and what is in it."""
    sample = make_sample((Grid(1, 1, 2), Grid(1, 1, 1)), text=2, mask=True)
    cache = Cache(tmp_path)
    cache.write(KEY, sample)
    return cache.path(KEY), cache.path(KEY).read_bytes(), sample


def test_no_changed_byte_goes_unseen(tmp_path: Path, stored: tuple[Path, bytes, Sample]) -> None:
    path, whole, sample = stored
    entry = Cache(tmp_path).lookup(KEY)
    unseen = 0
    for place in range(len(whole)):
        for flip in (0x01, 0x80):
            data = bytearray(whole)
            data[place] ^= flip
            path.write_bytes(data)
            assert Cache(tmp_path).lookup(KEY) in (None, entry)
            try:
                assert_same(Cache(tmp_path).read(KEY), sample)
                unseen += 1
            except DamagedEntry:
                assert not path.exists()
    assert unseen == 0


FOREIGN = {
    "an archive": b"PK\x03\x04" + bytes(400),
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "a header of brackets": struct.pack("<Q", 10**5) + b"[" * 10**5,
    "metadata that is a number": struct.pack("<Q", 29) + b'{"__metadata__":{"mixres":5}}',
    "tensors with metadata of somebody else": save({"a": torch.zeros(4, 4)}, {"format": "pt", "mixres": "x"}),
}


def test_another_length_and_a_foreign_file_are_no_entry(tmp_path: Path, stored: tuple[Path, bytes, Sample]) -> None:
    path, whole, _ = stored
    lengths = [*(whole[:length] for length in range(len(whole))), whole + b"\0", whole * 2, bytes(len(whole))]
    for data in [*lengths, *FOREIGN.values()]:
        path.write_bytes(data)
        assert Cache(tmp_path).lookup(KEY) is None
        with pytest.raises(DamagedEntry, match="the next caching pass makes it again"):
            Cache(tmp_path).read(KEY)
        assert not path.exists()


def test_an_absent_entry_and_a_folder_in_its_place(tmp_path: Path) -> None:
    none = Cache(tmp_path / "none")
    assert none.lookup(KEY) is None
    with pytest.raises(FileNotFoundError):
        none.read(KEY)
    assert not none.root.exists(), "looking makes no folder"
    Cache(tmp_path).path(KEY).mkdir(parents=True)
    assert Cache(tmp_path).lookup(KEY) is None


def test_entry_under_another_key_is_refused(tmp_path: Path, stored: tuple[Path, bytes, Sample]) -> None:
    cache = Cache(tmp_path)
    cache.path(OTHER).parent.mkdir()
    cache.path(OTHER).write_bytes(stored[1])
    assert cache.lookup(OTHER) is None
    with pytest.raises(DamagedEntry, match=f"it is entry {KEY} of format {FORMAT}"):
        cache.read(OTHER)
    assert cache.lookup(KEY) is not None


def test_a_damaged_entry_is_gone_until_it_is_written_again(tmp_path: Path, stored: tuple[Path, bytes, Sample]) -> None:
    path, whole, sample = stored
    retyped = whole.replace(b'"BF16"', b'"F16" ')  # the same bits as another type
    damaged = whole[:-1] + bytes([whole[-1] ^ 1])
    for data in (retyped, damaged):
        cache = Cache(tmp_path)
        path.write_bytes(data)
        with pytest.raises(DamagedEntry, match="the checksum of its tensors is wrong") as caught:
            cache.read(KEY)
        assert caught.value.path == path
        assert cache.lookup(KEY) is None
    cache.write(KEY, sample)
    for _ in range(2):
        assert_same(cache.read(KEY), sample)
    assert path.read_bytes() == whole
    path.unlink()
    assert cache.lookup(KEY) is None
    path.write_bytes(damaged)
    with pytest.raises(DamagedEntry):  # a file that comes back is verified again
        cache.read(KEY)


def write_format_1(cache: Cache, sample: Sample, **pixels: Any) -> None:
    """What the module's docstring says of format 1, written down once more."""
    cache.write(KEY, sample)
    path = cache.path(KEY)
    with safe_open(path, "pt") as file:
        stated = json.loads(file.metadata()["mixres"].split(" ", 1)[1])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del stated["img_shapes"]
    text = json.dumps({**stated, "format": 1, **pixels})
    path.write_bytes(save(tensors, {"mixres": f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}"}))


FIRST = {"height": 48, "width": 32}
SECOND = {"height_control": 32, "width_control": 32}
THIRD = {"height_control_1": 16, "width_control_1": 64}
ABSENT = dict.fromkeys(SECOND) | dict.fromkeys(THIRD, 0)


@pytest.mark.parametrize(
    ("controls", "pixels"), [(0, FIRST | ABSENT), (1, FIRST | SECOND), (2, FIRST | SECOND | THIRD)]
)
def test_an_entry_of_format_1_is_the_sample_of_format_2(tmp_path: Path, controls: int, pixels: dict[str, Any]) -> None:
    grids = (Grid(1, 3, 2), Grid(1, 2, 2), Grid(1, 1, 4))[: 1 + controls]
    sample = make_sample(grids, mask=True)
    write_format_1(Cache(tmp_path), sample, **pixels)
    cache = Cache(tmp_path)
    assert cache.lookup(KEY) == CacheEntry(KEY, grids, text_tokens=5, has_mask=True)
    assert_same(cache.read(KEY), sample)
    cache.save_index()
    assert Cache(tmp_path).lookup(KEY) == cache.lookup(KEY)


@pytest.mark.parametrize("pixels", [{}, {"height": 48, "width": 49}, FIRST], ids=str)
def test_sizes_of_format_1_that_are_not_those_of_the_latents_are_damage(tmp_path: Path, pixels: dict[str, int]) -> None:
    write_format_1(Cache(tmp_path), make_sample((Grid(1, 3, 3),)), **pixels)
    with pytest.raises(DamagedEntry):
        Cache(tmp_path).read(KEY)


def fill(root: Path, count: int = 4) -> tuple[Cache, dict[str, CacheEntry]]:
    cache = Cache(root)
    keys = [entry_key(i=i) for i in range(count)]
    samples = [
        make_sample((Grid(1, 1 + i, 2), *[Grid(1, 1, 1)] * (i % 3)), text=i, mask=i % 2 == 0) for i in range(count)
    ]
    return cache, {key: cache.write(key, sample) for key, sample in zip(keys, samples, strict=True)}


def test_index_answers_without_opening_entries(tmp_path: Path) -> None:
    cache, entries = fill(tmp_path)
    cache.save_index()
    for path in map(cache.path, entries):
        path.write_bytes(bytes(path.stat().st_size))
    assert {key: Cache(tmp_path).lookup(key) for key in entries} == entries, "the lengths came from the index"


def test_index_is_never_believed_against_the_file(tmp_path: Path) -> None:
    cache, entries = fill(tmp_path)
    cache.save_index()
    absent, shorter, other = list(entries)[:3]
    cache.path(absent).unlink()
    cache.path(shorter).write_bytes(cache.path(shorter).read_bytes()[:-1])
    bigger = make_sample((Grid(1, 9, 9),))
    Cache(tmp_path).write(other, bigger)
    again = Cache(tmp_path)
    for checked in (cache, again):
        assert [checked.lookup(key) for key in (absent, shorter)] == [None, None]
    assert again.lookup(other) == CacheEntry(other, bigger.img_shapes, 5, False)
    again.save_index()
    assert set(json.loads((tmp_path / INDEX).read_text())["entries"]) == set(entries) - {absent, shorter}


BAD_ROWS: list[Any] = [
    None, 3, [], [1], {}, ["SIZE", 1, True, [[1, 2]], 0], ["SIZE", "x", True, [[1, 2, 3]], 0], ["SIZE", 1, True, [], 0],
    ["SIZE", 5, False, [[1, 3, 2], [1, 2, 2]]], ["SIZE", 5, False, [[1, 3, 2], [1, 2, 2]], None],
]  # fmt: skip
BAD_INDEXES = [
    "", "{", "[]", "null", '{"format": 2}', '{"format": 1, "entries": {"x": 1}}', '{"format": 2, "entries": 3}', "\xff",
    *(json.dumps({"format": FORMAT, "entries": {"KEY": row}}) for row in BAD_ROWS),
]  # fmt: skip


@pytest.mark.parametrize("damage", [*BAD_INDEXES, None], ids=str)
def test_a_damaged_index_costs_time_and_nothing_else(tmp_path: Path, damage: str | None) -> None:
    cache, entries = fill(tmp_path)
    cache.save_index()
    good, first = (tmp_path / INDEX).read_bytes(), next(iter(entries))
    (tmp_path / INDEX).unlink()
    if damage is not None:
        damage = damage.replace('"SIZE"', str(cache.path(first).stat().st_size)).replace("KEY", first)
        (tmp_path / INDEX).write_bytes(damage.encode("latin-1"))
    again = Cache(tmp_path)
    assert {key: again.lookup(key) for key in entries} == entries
    again.save_index()
    assert (tmp_path / INDEX).read_bytes() == good


def test_indexes_of_two_processes_are_joined(tmp_path: Path) -> None:
    first, second = Cache(tmp_path), Cache(tmp_path)
    entries = {KEY: first.write(KEY, make_sample()), OTHER: second.write(OTHER, make_sample(seed=1))}
    first.save_index()
    second.save_index()
    assert set(json.loads((tmp_path / INDEX).read_text())["entries"]) == {KEY, OTHER}
    assert {key: Cache(tmp_path).lookup(key) for key in entries} == entries


def test_sweep_takes_old_temporary_files_only(tmp_path: Path) -> None:
    cache, entries = fill(tmp_path, 1)
    entry = cache.path(next(iter(entries)))
    young = entry.with_name(f"{atomic.TMP_PREFIX}young")
    old = [folder / f"{atomic.TMP_PREFIX}old" for folder in (entry.parent, tmp_path)]
    for path in (young, *old):
        path.write_bytes(b"x")
    for path in (entry, *old):
        os.utime(path, (time.time() - 4000, time.time() - 4000))
    assert cache.sweep() == 2
    assert sorted(entry.parent.iterdir()) == sorted([young, entry])


@pytest.mark.parametrize("prompt", ["a", 'quoted "\\u0000prompt"', "把猫\n\t\x7f\u2028😀", "\0files"])
def test_keys_of_alike_entries_are_those_that_each_has_alone(prompt: str) -> None:
    others: dict[str, Any] = {"controls": 2, "dtype": "float32", "target_size": (64, 48), "zoo": {"b": 1, "a": None}}
    for files in ([], ["00ff"], ["00ff", "aa"]):
        key = entry_keys_of(("prompt", "files"), **others)(prompt, files)
        assert key == entry_key(**others, prompt=prompt, files=files)
