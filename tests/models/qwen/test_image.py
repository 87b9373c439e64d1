"""What is Qwen-Image's own: no controls, prompts that are never cut; `test_every_family.py` holds the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixres.errors import UserError
from mixres.geometry import Size
from mixres.models.qwen.image import QwenImage
from mixres.models.qwen.prompts import TOKENIZER_MAX_LENGTH
from support.family_cases import CASES

SQUARE = Size(64, 64)


@pytest.fixture(scope="module")
def encoders(base_of: Callable[[Any], Path]) -> Any:
    return QwenImage(str(base_of(CASES["qwen_image"]))).load_encoders(dtype=torch.float32, device="cpu")


def encode(encoders: Any, controls: int, prompt: str) -> torch.Tensor:
    image = Image.new("RGB", SQUARE)
    return (
        QwenImage("")
        .encode(encoders, name="b.png", target=image, target_size=SQUARE, controls=[image] * controls, prompt=prompt)
        .prompt_embeds
    )


def test_a_long_prompt_is_whole(encoders: Any) -> None:
    """The stock call cuts at 512 tokens unless it is told otherwise, and at 1024 always; see `max_prompt_tokens`."""
    embeds = encode(encoders, 0, "z" * 700)
    assert 700 <= len(embeds) <= 710
    stock, mask = encoders.encode_prompt(prompt="z" * 700, max_sequence_length=1024)
    assert mask is None
    assert torch.equal(embeds, stock[0])


def test_the_longest_prompt_is_the_longest_that_the_stock_pipeline_leaves_whole(encoders: Any) -> None:
    """It counts what its template has behind the prompt too."""
    most = QwenImage("").max_prompt_tokens
    assert len(encode(encoders, 0, "z" * most)) == TOKENIZER_MAX_LENGTH
    whole, longer = ("z" * count + "y" for count in (most - 1, most))
    end = encode(encoders, 0, "z" * (most - 8) + "y")
    assert len(end) == TOKENIZER_MAX_LENGTH - 7
    ids = [encoders.tokenizer(encoders.prompt_template_encode.format(text)).input_ids for text in (whole, longer)]
    kept = [len(tokens) - encoders.prompt_template_encode_start_idx for tokens in ids]
    assert kept == [TOKENIZER_MAX_LENGTH, TOKENIZER_MAX_LENGTH + 1]


def test_controls_are_refused_by_name(encoders: Any) -> None:
    with pytest.raises(UserError, match=r"^b.png: Qwen-Image takes no control images, there are 1"):
        encode(encoders, 1, "x")


def test_sizes_of_controls_are_refused() -> None:
    assert QwenImage("").control_areas(1024 * 1024, None) == {}
    with pytest.raises(UserError) as caught:
        QwenImage("").control_areas(4096, 2048)
    assert [message.partition(":")[0] for message in caught.value.messages] == [
        "data.resize.control.area",
        "data.resize.control.text_area",
    ]
