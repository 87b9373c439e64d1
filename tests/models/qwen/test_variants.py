"""What is a variant's own: sizes of controls, length of prompts, configuration; `test_every_family.py` has the rest."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import torch
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit as stock_edit,
    pipeline_qwenimage_edit_plus as stock_plus,
)
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLProcessor

from mixres.errors import UserError
from mixres.geometry import Size, control_size
from mixres.models.family import ControlSizes
from mixres.models.prompt_length import over_long
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.qwen.edit_plus import QwenImageEditPlus
from mixres.models.qwen.family import STOCK_CONTROL_AREA, TOKENIZER_MAX_LENGTH, QwenFamily
from mixres.models.qwen.image import QwenImage
from mixres.models.qwen.processor import QwenImageTextProcessor, load_processor, torchvision_imports
from support.family_cases import CASES

AREA, TEXT_AREA = 128 * 128, 2048
SIZES = (Size(640, 427), Size(37, 211), Size(300, 300), Size(8000, 1000))


def test_the_stock_areas_are_the_pipelines_own() -> None:
    areas = QwenImageEditPlus("").control_areas(STOCK_CONTROL_AREA, None)
    assert areas == {"control_area": stock_plus.VAE_IMAGE_SIZE, "text_area": stock_plus.CONDITION_IMAGE_SIZE}
    for stock, area in ((stock_edit, STOCK_CONTROL_AREA), *((stock_plus, area) for area in areas.values())):
        for size in SIZES:
            assert stock.calculate_dimensions(area, size.width / size.height)[:2] == control_size(size, area=area)


@pytest.mark.parametrize("family", [QwenImageEdit(""), QwenImageEditPlus("")])
def test_other_areas_hold_and_no_side_is_zero(family: QwenFamily) -> None:
    areas = {"control_area": AREA, "text_area": TEXT_AREA}
    sizes = family.control_sizes(Size(64, 64), (*SIZES, Size(9000, 3)), areas)
    assert sizes.vae == tuple(control_size(size, area=AREA) for size in (*SIZES, Size(9000, 3)))
    assert min(min(size) for size in (*sizes.vae, *sizes.text)) == 32


def test_sizes_of_controls_that_a_variant_does_not_have_are_refused() -> None:
    assert QwenImage("").control_areas(STOCK_CONTROL_AREA, None) == {}
    for family, lines in ((QwenImage(""), ["area", "text_area"]), (QwenImageEdit(""), ["text_area"])):
        with pytest.raises(UserError) as caught:
            family.control_areas(AREA, TEXT_AREA)
        keys = [message.partition(":")[0] for message in caught.value.messages]
        assert keys == [f"data.resize.control.{line}" for line in lines]


def tokens(base: Path, text: str) -> int:
    return len(AutoTokenizer.from_pretrained(base / "tokenizer")(text, add_special_tokens=False)["input_ids"])


def test_only_what_is_over_the_limit_is_found(tiny_base: Path) -> None:
    limit, base = TOKENIZER_MAX_LENGTH, str(tiny_base)
    exact, over, many_bytes = "a" * limit, "a" * (limit + 1), "<|im_end|>" * (limit - 1)
    assert over_long(["", "short", exact, over, over, many_bytes], base, limit=limit) == {over: (limit + 1, exact)}
    pipeline = QwenImageEdit(base).load_sampling_pipeline(transformer=None, dtype=torch.float32, device="cpu")
    assert pipeline.tokenizer_max_length == limit == QwenImageEdit("").max_prompt_tokens


@pytest.mark.parametrize("word", ["blue ", "图片，", "👩‍👩‍👧 ", normalize("NFD", "é"), "<|im_end|>"])
def test_what_is_cut_fits_and_is_the_beginning(tiny_base: Path, word: str) -> None:
    text, limit = "x" + word * 1500, TOKENIZER_MAX_LENGTH
    count, cut = over_long([text], str(tiny_base), limit=limit)[text]
    assert count == tokens(tiny_base, text) > limit
    assert tokens(tiny_base, cut) <= limit
    assert text.startswith(cut)
    longest = text[: len(cut) + len(word) + 1]
    assert tokens(tiny_base, longest) > limit or longest.rstrip() == cut, "a longer beginning would not fit"


def test_text_to_image_cuts_no_prompt_of_up_to_its_limit(base_of: Callable[[Any], Path]) -> None:
    """The stock call cuts at 512 tokens by default and at 1024 always, those of the template behind the prompt too."""
    encoders = QwenImage(str(base_of(CASES["qwen_image"]))).load_encoders(dtype=torch.float32, device="cpu")
    most = QwenImage("").max_prompt_tokens
    stock, mask = encoders.encode_prompt(prompt="z" * 700, max_sequence_length=1024)
    encode = partial(QwenImage("").encode_prompt, encoders, controls=[], sizes=ControlSizes())
    embeds = {count: encode(prompt="z" * count).tokens for count in (700, most)}
    assert mask is None and torch.equal(embeds[700], stock[0])
    assert 700 <= len(embeds[700]) <= 710
    assert len(embeds[most]) == TOKENIZER_MAX_LENGTH
    for count, kept in ((most, TOKENIZER_MAX_LENGTH), (most + 1, TOKENIZER_MAX_LENGTH + 1)):
        ids = encoders.tokenizer(encoders.prompt_template_encode.format("z" * (count - 1) + "y")).input_ids
        assert len(ids) - encoders.prompt_template_encode_start_idx == kept


def test_sizes_and_shift_come_from_the_configuration(tiny_base: Path, copy_of_base: Path) -> None:
    assert QwenImageEdit(str(tiny_base)).pixels_per_token() == 16
    shift = QwenImageEdit(str(tiny_base)).flow_shift()
    assert shift == {"base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    assert stock_edit.calculate_shift(256, **shift) == pytest.approx(0.5)
    (copy_of_base / "scheduler" / "scheduler_config.json").write_text("{}")
    defaults = QwenImageEdit(str(copy_of_base)).flow_shift()
    for count in (64, 4096):
        assert stock_edit.calculate_shift(count, **defaults) == stock_edit.calculate_shift(count)


@pytest.mark.parametrize("older", [False, True])
def test_the_processor_is_the_stock_one_or_its_parts(copy_of_base: Path, older: bool) -> None:
    """What `Qwen2VLProcessor.from_pretrained` reads, part by part: the whole of it needs torchvision.

    Older: Qwen/Qwen-Image-Edit keeps the image processor in `preprocessor_config.json`.
    """
    folder = copy_of_base / "processor"
    if older:
        config = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        (folder / "processor_config.json").unlink()
        (folder / "preprocessor_config.json").write_text(json.dumps(config["image_processor"]), encoding="utf-8")
    ours = load_processor(folder)
    assert isinstance(ours, Qwen2VLProcessor if torchvision_imports() else QwenImageTextProcessor)
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == ours.image_processor.to_dict()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == ours.tokenizer.get_vocab()
