"""Where embeddings depend on the prompt alone, the cache holds each prompt once, and knows the samples that use it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mixres import cli
from mixres.data.loader import MicrobatchDataset
from mixres.data.plan import Microbatch
from mixres.errors import WorkError
from mixres.preprocessing.encode import encode_record
from mixres.preprocessing.fill import keyed_records
from support.caching import Caching
from support.family_cases import EVERY_CASE, with_family
from support.samples import assert_same

CASE = EVERY_CASE["flux2_klein"]
PROMPT, OTHER = "swap red and blue", "turn it into a sepia photograph"


@pytest.fixture
def words(caching: Caching, base_of: Callable[[object], Path]) -> list[str]:
    """Three records of one prompt and a held-out one of another, in a cache of its own."""
    for target in [*caching.files()[3:], *caching.files(part="held_out")[1:]]:
        for file in caching.pair(target):
            file.unlink()
    for part, prompt in (("train", PROMPT), ("held_out", OTHER)):
        for file in caching.files(part=part, suffix=".txt"):
            file.write_text(prompt, encoding="utf-8")
    caching.cache = caching.cache / "prompts"
    return [f"model.pretrained_model_name_or_path={base_of(CASE)}", *CASE.overrides()]


def entries(caching: Caching) -> dict[str, tuple[int, int, set[str]]]:
    """The inode, which a new file may take over, the time of writing and the tensors of each file."""
    found = {}
    for path in caching.cache.glob("??/*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.stem] = path.stat().st_ino, path.stat().st_mtime_ns, set(file.keys())
    return found


def verify(caching: Caching, words: list[str]) -> tuple[int, str]:
    code = cli.main(["cache", "--verify", "--config", str(caching.file), *caching.words(), *words])
    return code, caching.output()


def test_each_prompt_is_stored_once_and_read_as_it_was_encoded(caching: Caching, words: list[str]) -> None:
    assert caching(*words) == (4 + 2, 0) and caching(*words) == (0, 4 + 2)
    prompts = [key for key, (*_, tensors) in entries(caching).items() if tensors == {"prompt_embeds"}]
    assert len(prompts) == 2
    assert all("prompt_embeds" not in tensors for key, (*_, tensors) in entries(caching).items() if key not in prompts)
    # With caption dropout the empty prompt is one more.
    assert caching(*words, "data.caption_dropout=0.5") == (3 + 1, 1 + 2)
    config, family = with_family(caching.config(*words, "data.caption_dropout=0.5"))
    found = keyed_records(config, family, is_main=False)
    encoders = family.load_encoders(dtype=torch.float32, device="cpu")
    for key, scanned in found.by_key.items():
        alone = encode_record(config, family, encoders, scanned, with_empty=key in found.with_empty)
        assert_same(found.cache.read(key), alone)
    assert len(found.shared.named_by(found.by_key)) == 3


@pytest.mark.parametrize("damage", [pytest.param("gone", marks=pytest.mark.slow), "a bit"])
def test_a_prompt_that_is_damaged_or_missing_is_named_and_made_again_alone(
    caching: Caching, words: list[str], damage: str
) -> None:
    caching(*words)
    found = keyed_records(*with_family(caching.config(*words)), is_main=False)
    (key, *_), before = found.shared.named_by(found.by_key), entries(caching)
    file = caching.cache / key[:2] / f"{key}.safetensors"
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    code, out = verify(caching, words)
    state = "missing" if damage == "gone" else "damaged"
    assert code == 1 and re.search(rf"^cache     the prompt '{PROMPT}': {state}, ", out, re.MULTILINE)
    assert re.search(r"^cache     6 entries .*: 5 valid, ", out, re.MULTILINE)
    assert caching(*words) == (1, 5)
    assert file.read_bytes() == data
    after = entries(caching)
    assert [own for own in before if before[own] != after[own]] == [key], "no sample is encoded again"
    code, out = verify(caching, words)
    assert code == 0 and "more entries there" not in out


def test_a_run_that_meets_a_damaged_prompt_says_what_to_do(caching: Caching, words: list[str]) -> None:
    encoded = caching.encoded(*words)
    (key,) = {sample.entry.prompts for sample in encoded.train}
    path = encoded.cache.path(*key)
    path.write_bytes(path.read_bytes()[:-1])
    dataset = MicrobatchDataset(encoded.cache, [s.key for s in encoded.train], ["a", "b", "c"], "packed")
    stopped = dataset[Microbatch((0, 1, 2), (1.0, 1.0, 1.0))]
    assert isinstance(stopped, WorkError) and str(path) in str(stopped) and "run the same command again" in str(stopped)
