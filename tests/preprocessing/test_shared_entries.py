"""Controls, and prompts beside equal controls, have entries of their own where two samples have them, not elsewhere."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mixres import cli
from mixres.batch import Sample
from mixres.data.cache import INLINE, CacheEntry
from mixres.preprocessing.encode import encode_record
from mixres.preprocessing.fill import keyed_records
from support.caching import CONTROLS, Caching
from support.family_cases import with_family
from support.samples import assert_same

DROPOUT = "data.caption_dropout=0.5"
SHARED = "instruction that two share"


@pytest.fixture
def shared(caching: Caching) -> Caching:
    """Three training pairs in a cache of their own: one control for all, of one grid; the first two have one prompt."""
    for target in [*caching.files()[3:], *caching.files(part="held_out")[1:]]:
        for file in caching.pair(target):
            file.unlink()
    first, *others = caching.files()
    for target in (first, *others):
        caching.pair(target)[2].write_bytes(caching.pair(first)[2].read_bytes())
        with Image.open(target) as image, Image.open(first) as size:
            image.resize(size.size).save(target)
    for target in (first, others[0]):
        target.with_suffix(".txt").write_text(SHARED, encoding="utf-8")
    caching.cache = caching.cache / "shared"
    return caching


def expected(caching: Caching, *words: str) -> list[Sample]:
    """Each training sample as it is encoded by itself."""
    config, family = with_family(caching.config(*words))
    found = keyed_records(config, family, is_main=False)
    encoders = family.load_encoders(dtype=torch.float32, device="cpu")
    keys = zip(found.keys, found.train, strict=False)
    return [encode_record(config, family, encoders, s, with_empty=k in found.with_empty) for k, s in keys]


def entries(caching: Caching, *words: str) -> list[CacheEntry]:
    return [sample.entry for sample in caching.encoded(*words).train]


def files(caching: Caching) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in caching.cache.glob("??/*.safetensors")}


def tensors(caching: Caching, key: str) -> set[str]:
    with safe_open(caching.cache / key[:2] / f"{key}.safetensors", "pt") as file:
        return set(file.keys())


def verb(caching: Caching, option: str, *words: str) -> tuple[int, str]:
    code = cli.main(["cache", option, "--config", str(caching.file), *caching.words(), *words])
    return code, caching.output()


def verify(caching: Caching, *words: str) -> tuple[int, str]:
    return verb(caching, "--verify", *words)


def test_what_two_samples_share_is_stored_once_and_read_as_if_it_were_inline(shared: Caching) -> None:
    assert shared(DROPOUT) == (4 + 3, 0), "beside the samples a control, a prompt and the empty one"
    found = entries(shared, DROPOUT)
    (control,) = {where for entry in found for where in entry.controls}
    (empty,) = {entry.prompts[1] for entry in found}
    prompts = [entry.prompts[0] for entry in found]
    assert prompts[0] == prompts[1] != INLINE == prompts[2]
    assert tensors(shared, control) == {"target_latents"} and tensors(shared, empty) == {"prompt_embeds"}
    assert tensors(shared, found[0].key) == {"target_latents"}
    assert tensors(shared, found[2].key) == {"target_latents", "prompt_embeds"}
    wanted = expected(shared, DROPOUT)
    for where in ("files", "shards"):
        for stored, alone in zip(shared.samples(DROPOUT), wanted, strict=True):
            assert_same(stored, alone)
        assert shared(DROPOUT) == (0, 7)
        code, out = verify(shared, DROPOUT)
        assert code == 0 and "7 entries" in out and "more entries there" not in out
        if where == "files":
            assert verb(shared, "--compact", DROPOUT, "cache.shard_gb=1e-4")[0] == 0 and not files(shared)


def test_an_entry_that_names_parts_of_something_else_counts_as_missing(shared: Caching) -> None:
    """One colour by two names is the same; the entries that were there stay."""
    controls = shared.files(CONTROLS)
    for path in controls:
        with Image.open(path) as image:
            image.convert("RGBA").save(path)
    assert shared("data.background=gray")[0] == shared("data.background='#808080'")[1] > 3
    assert verify(shared, "data.background='#808080'")[0] == 0
    cache, first = shared.encoded("data.background=gray").cache, entries(shared, "data.background=gray")[0]
    sample = cache.read(first.key)
    cache.write(first.key, sample, [part[::-1] for part in first.prompts], [part[::-1] for part in first.controls])
    cache.save_index()
    shared.output()
    code, out = verify(shared, "data.background=gray")
    assert code == 1 and "missing, the entry names parts of other files" in out
    assert shared("data.background=gray")[0] == 1
    assert entries(shared, "data.background=gray")[0] == first
    assert_same(shared.samples("data.background=gray")[0], replace(sample, name="sample"))


@pytest.mark.parametrize(
    "words", [["cache.text=float8"], pytest.param(["cache.shard_gb=0.001"], marks=pytest.mark.slow)]
)
def test_parts_in_8_bits_and_in_shards_are_those_of_files(shared: Caching, words: list[str]) -> None:
    plain, own = entries(shared)[0], entries(shared, *words)[0]
    assert len(own.parts) == 2 and own.controls == plain.controls, "latents are the same"
    for stored, alone in zip(shared.samples(*words), expected(shared), strict=True):
        assert torch.equal(stored.control_latents[0], alone.control_latents[0])
        error = (stored.prompt_embeds - alone.prompt_embeds).norm()
        assert error == 0 if "float8" not in str(words) else 0 < error < 0.04 * alone.prompt_embeds.norm()


def test_without_anything_in_common_an_entry_has_the_bytes_of_one_before_there_were_parts(caching: Caching) -> None:
    assert caching(DROPOUT) == (10, 3), "held-out samples have no empty prompt"
    for key in files(caching):
        with safe_open(caching.cache / key[:2] / f"{key}.safetensors", "pt") as file:
            assert not {"prompts", "controls"} & json.loads(file.metadata()["mixres"].split(" ", 1)[1]).keys()


@pytest.mark.slow
def test_an_entry_stays_what_it_is_as_other_records_come_and_go(shared: Caching) -> None:
    _, second, third = shared.files()
    kept = {file: file.read_bytes() for target in (second, third) for file in shared.pair(target)}
    for file in kept:
        file.unlink()
    assert shared() == (2, 0), "with nothing to share it is inline"
    inline = files(shared)
    assert all(entry.parts == () for entry in entries(shared))
    for file, data in kept.items():
        file.write_bytes(data)
    shared.output()
    assert shared() == (2 + 2, 2) and inline.items() < files(shared).items()
    everything = shared.samples()
    # Alone again, beside the first two: what it names is still kept whole, and made again where it is lost.
    for target in (second, shared.files()[0]):
        for file in shared.pair(target):
            file.unlink()
    assert shared() == (0, 2 + 1)
    (entry,) = entries(shared)
    (control,) = entry.parts
    path = shared.cache / control[:2] / f"{control}.safetensors"
    data = path.read_bytes()
    for loss in (b"", data[:-1], data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]):
        path.write_bytes(loss)
        code, out = verify(shared)
        assert code == 1 and re.search(rf"the control .*{CONTROLS}/{third.name}: (missing|damaged), ", out)
        assert shared() == (1, 2) and path.read_bytes() == data
    assert_same(shared.samples()[0], everything[2])
