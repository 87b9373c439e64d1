"""What the page of defaults says of mixres is what the recipes and the code say."""

import re
from pathlib import Path

import pytest

from mixres.config.load import load_config
from mixres.diffusion.flow_matching import resolution_shift
from mixres.inference.sample import NEGATIVE_PROMPT

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "defaults.md").read_text(encoding="utf-8")


def row(name: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("recipe", ["qwen_image_edit_lora", "qwen_image_edit_plus_lora", "qwen_image_lora"])
def test_the_column_of_mixres_is_its_recipes(recipe: str) -> None:
    config = load_config(REPOSITORY / "configs" / f"{recipe}.yaml")
    lora, optimizer = config.model.lora, config.optimizer
    assert lora is not None
    assert row("optimizer")[0] == optimizer.class_path.rpartition(".")[2]
    assert float(row("learning rate")[0]) == optimizer.init_args["lr"]
    assert float(row("weight decay")[0]) == optimizer.init_args["weight_decay"]
    assert int(row("warm-up steps")[0]) == config.lr_scheduler.warmup_steps
    assert float(row("gradient norm")[0]) == config.train.max_grad_norm
    assert row("rank / alpha")[0] == f"{lora.r} / {lora.lora_alpha:g}"
    assert int(row("samples a step")[0]) == config.batch.samples_per_step
    assert int(row("steps")[0]) == config.train.max_train_steps
    assert (config.data.resize.target.max_pixels, config.data.resize.target.upscale) == (1024 * 1024, False)
    assert float(row("caption dropout")[0]) == config.data.caption_dropout
    assert (config.flow.density, config.flow.shift) == ("logit_normal", "resolution")
    assert (config.flow.logit_mean, config.flow.logit_std, config.loss.weighting) == (0, 1, "none")
    assert int(row("mixres, samples of a run")[0]) == config.sample.steps == int(row("`mixres sample`")[0])
    assert f'`"{NEGATIVE_PROMPT}"` with guidance' == row("`mixres sample`")[2]


def test_the_shifts_are_those_of_the_formula() -> None:
    constants = {"base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    sides = [int(cell.partition(" ")[0]) for cell in row("target")]
    assert [int(cell) for cell in row("tokens")] == [(side // 16) ** 2 for side in sides]
    factors = [resolution_shift(int(cell), constants) for cell in row("tokens")]
    assert row("factor") == [f"{factor:.2f}" for factor in factors]
