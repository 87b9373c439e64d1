"""Prompts counted with the base's own tokenizer: what is over the limit, and where it is cut."""

from pathlib import Path
from unicodedata import normalize

import pytest
from transformers import AutoTokenizer

from mixres.errors import UserError
from mixres.models.qwen.prompts import TOKENIZER_MAX_LENGTH, over_long

LIMIT = 1024


def tokens(base: Path, text: str) -> int:
    return len(AutoTokenizer.from_pretrained(base / "tokenizer")(text, add_special_tokens=False)["input_ids"])


def test_the_limit_is_that_of_the_stock_pipeline(tiny_base: Path) -> None:
    from mixres.models.qwen.edit import QwenImageEdit

    pipeline = QwenImageEdit(str(tiny_base)).load_sampling_pipeline(transformer=None, dtype=None, device="cpu")  # type: ignore[arg-type]
    assert pipeline.tokenizer_max_length == LIMIT == TOKENIZER_MAX_LENGTH


def test_only_what_is_over_the_limit_is_found(tiny_base: Path) -> None:
    exact, over = "a" * LIMIT, "a" * (LIMIT + 1)
    assert over_long(["", "short", exact, over, over], str(tiny_base), most=LIMIT) == {over: (LIMIT + 1, exact)}


@pytest.mark.parametrize("word", ["blue ", "图片，", "👩‍👩‍👧 ", normalize("NFD", "é"), "<|im_end|>"])
def test_what_is_cut_fits_and_is_the_beginning(tiny_base: Path, word: str) -> None:
    text = "x" + word * 1500
    count, cut = over_long([text], str(tiny_base), most=LIMIT)[text]
    assert count == tokens(tiny_base, text) > LIMIT
    assert tokens(tiny_base, cut) <= LIMIT
    assert text.startswith(cut)
    longest = text[: len(cut) + len(word) + 1]
    assert tokens(tiny_base, longest) > LIMIT or longest.rstrip() == cut, "a longer beginning would not fit"


def test_many_bytes_of_few_tokens_are_not_over_the_limit(tiny_base: Path) -> None:
    text = "<|im_end|>" * (LIMIT - 1)
    assert len(text) > LIMIT
    assert over_long([text], str(tiny_base), most=LIMIT) == {}


def test_short_prompts_need_no_tokenizer_and_a_missing_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert over_long(["short"] * 3, str(tmp_path), most=LIMIT) == {}
    with pytest.raises(UserError, match="tokenizer is missing"):
        over_long(["a" * 2000], str(tmp_path), most=LIMIT)
