"""What Qwen-Image-2.1 has of its own: transparency, controls within the text, sizes that its text encoder takes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope
from PIL import Image

from mixres.config.load import load_config
from mixres.data.cache import Cache
from mixres.data.images import Limits, read_image
from mixres.errors import UserError
from mixres.geometry import Grid, Size
from mixres.models.family import ControlSizes
from mixres.models.qwen21.family import QwenImage21
from mixres.models.qwen21.layout import TABLE, positions
from mixres.models.registry import load_family
from mixres.preprocessing.fill import family_of, run_cache
from mixres.training.denoising import image_inputs, make_images
from mixres.training.sample_sheets import Row, image_grid
from support.family_cases import EVERY_CASE, PROMPTS

CASE = EVERY_CASE["qwen_image_21"]
SIZES = (Size(128, 64), Size(64, 96))


def cut_out(size: Size, seed: int) -> Image.Image:
    """Noise of which half is transparent, and colours under it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size.height, size.width, 4), dtype=np.uint8)
    pixels[:, : size.width // 2, 3] = 0
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def base(base_of: Callable[[Any], Path]) -> Path:
    return base_of(CASE)


@pytest.mark.parametrize("controls", [0, 2])
@pytest.mark.parametrize("guidance", [None, 4.0])
def test_a_cached_sample_makes_the_stock_image_byte_for_byte(
    base: Path, tmp_path: Path, controls: int, guidance: float | None
) -> None:
    """Through the cache, without the rows at image slots; transparent controls at other sizes than the target's."""
    family, dtype = CASE.at(base), torch.float32
    encoders, stock = family.load_encoders(dtype=dtype, device="cpu"), CASE.load_stock(base, dtype)
    given = [cut_out(size, seed) for seed, size in enumerate(SIZES[:controls])]
    sizes, size = ControlSizes(SIZES[:controls], SIZES[:controls]), Size(96, 64)
    target = {"target": cut_out(size, 7), "target_size": size, "controls": given, "sizes": sizes}
    sample = family.encode(encoders, name="a", prompt=PROMPTS[0], **target)
    cache = Cache(tmp_path)
    cache.write("0" * 32, sample)
    cached = cache.read("0" * 32)
    assert cached.text_before == sample.text_before and len(sample.text_before) == controls
    negative = family.encode_prompt(encoders, controls=given, prompt=PROMPTS[1], sizes=sizes)
    assert negative.before == sample.text_before
    transformer = family.load_transformer(dtype=dtype, device="cpu")
    sampling = family.load_sampling_pipeline(transformer=transformer, dtype=dtype, device="cpu")
    led = {} if guidance is None else {"negative": negative, "guidance": guidance}
    inputs = image_inputs(family, sampling, controls=given, text=cached.text, size=size, sizes=sizes, seed=5, **led)
    (made,) = make_images(family, sampling, [inputs], steps=3)
    words = {} if guidance is None else {"negative_prompt": PROMPTS[1], "true_cfg_scale": guidance}
    resized = iter([SIZES[0], *SIZES])
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.qwenimage21.pipeline_qwenimage21.calculate_dimensions"
        patch.setattr(module, lambda area, ratio: (*next(resized), None))
        expected = stock(
            prompt=PROMPTS[0], image=given or None, width=size.width, height=size.height, num_inference_steps=3,
            generator=torch.Generator().manual_seed(5), **words,
        ).images[0]  # fmt: skip
    assert made.mode == "RGBA" and np.array_equal(np.asarray(made), np.asarray(expected))


def test_transparency_reaches_the_vae_and_only_white_the_text_encoder(base: Path, tmp_path: Path) -> None:
    """Colours under it, too, which the VAE sees; the text encoder sees white there."""
    family, size = CASE.at(base), Size(64, 64)
    encoders, sizes = family.load_encoders(dtype=torch.float32, device="cpu"), ControlSizes((size,), (size,))
    image = cut_out(size, 0)
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", limits=Limits(), keep_alpha=True)
    assert np.array_equal(np.asarray(read), np.asarray(image))
    assert read_image(tmp_path / "a.png", limits=Limits()).mode == "RGB"
    hidden = np.asarray(image).copy()
    hidden[:, :32, :3] = 0  # other colours where nothing is to be seen
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    texts, latents = [], []
    for one in (image, Image.fromarray(hidden), opaque):
        texts.append(family.encode_prompt(encoders, controls=[one], prompt="x", sizes=sizes).tokens)
        latents.append(family.encode_image(encoders, one, size))
    assert torch.equal(texts[0], texts[1]) and (texts[0] - texts[2]).norm() < 0.1 * texts[0].norm()
    assert not torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])
    shown = family.previews(encoders, target=image, target_size=size, controls=[image], sizes=sizes)
    assert {name: preview.mode for name, preview in shown.items()} == {
        "target": "RGBA", "control 1, VAE": "RGBA", "control 1, text encoder": "RGB",
    }  # fmt: skip
    assert np.asarray(shown["control 1, text encoder"])[:, :32].min() == 255
    family.background = "#204060"  # for the text encoder alone
    on_blue = family.previews(encoders, target=image, target_size=size, controls=[image], sizes=sizes)
    assert np.array_equal(on_blue["control 1, VAE"], shown["control 1, VAE"])
    assert np.array_equal(on_blue["control 1, text encoder"].getpixel((0, 0)), (0x20, 0x40, 0x60))


def test_a_grid_shows_transparency_on_a_checkerboard() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    cell = np.asarray(image_grid(["a"], [Row((clear,), "", "")]))[28 : 28 + 224, 12 : 12 + 224]
    assert set(np.unique(cell)) == {204, 255} and (cell[0, 0] != cell[0, 8]).all() and (cell[0, 0] == cell[8, 8]).all()


@pytest.mark.parametrize("shapes", [[(1, 4, 6)], [(1, 4, 6), (1, 2, 8), (1, 6, 2)]])
def test_positions_are_those_of_the_stock_model(shapes: list[tuple[int, int, int]]) -> None:
    runs = [3, 0, 5][-len(shapes) :]
    rope, grids = QwenImage21Rope(10000, [8, 12, 12]), [Grid(*shape) for shape in shapes]
    is_image = [
        value
        for run, grid in zip(runs, [*grids[1:], grids[0]], strict=True)
        for value in [False] * run + [True] * grid.tokens
    ]
    mask = torch.tensor(is_image)
    stock = rope([*shapes[1:], shapes[0]], mask, torch.device("cpu"))
    places = torch.cat(positions(grids, runs))
    table = [rope.freqs[axis][places[:, axis]] for axis in range(3)]
    assert torch.equal(torch.cat(table, -1), stock)


def test_controls_that_the_text_encoder_would_resize_are_refused_at_the_scan(
    base: Path, small_run: Path, pairs_of: Callable[[Any], Path], tmp_path: Path
) -> None:
    """Before anything is encoded, and by the encoding itself; what else the base does not take beside them."""
    strict = shutil.copytree(base, tmp_path / "base")
    file = strict / "processor" / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["size"]["shortest_edge"] = 65_536  # as the real one
    file.write_text(json.dumps(config))
    words = [f"model.pretrained_model_name_or_path={strict}", f"data.train={pairs_of(CASE) / 'train'}"]
    words += ["data.held_out=null", "data.resize.target.multiple_of=32", "data.resize.control.align=never"]
    words += [f"cache.cache_dir={tmp_path / 'cache'}", f"logging.output_dir={tmp_path / 'run'}"]
    reason = r"a control becomes 64x64, 4096 pixels, and the text encoder takes 65536 to 16777216: change data\.resize"
    for line, change in {
        rf"training_images/\S+: {reason}\.control\.area": "data.resize.control.area=4096",
        "data.resize.target.multiple_of: 48 is not a multiple of 32": "data.resize.target.multiple_of=48",
        "data.resize.control.text_area: Qwen-Image-2.1 shows": "data.resize.control.text_area=4096",
    }.items():
        with pytest.raises(UserError, match=line):
            run_cache(load_config(small_run, [*words, change]))
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]
    encoders = CASE.at(strict).load_encoders(dtype=torch.float32, device="cpu")
    size = Size(64, 64)
    with pytest.raises(UserError, match=reason):
        CASE.at(strict).encode_prompt(
            encoders, controls=[cut_out(size, 0)], prompt="x", sizes=ControlSizes((size,), (size,))
        )


def test_the_licence_is_named_once_at_a_run_s_start(
    base: Path, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family_of(load_config(small_run, [f"model.pretrained_model_name_or_path={base}"]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "LICENSE" in line]
    assert "not for commercial use" in line


def test_the_shape_of_the_stock_base_is_known_without_a_file() -> None:
    family = load_family(None, QwenImage21.stock_bases[0], synthetic=True)
    model = family.transformer_skeleton()
    assert len(model.transformer_blocks) == 32 and round(model.num_parameters() / 1e9, 2) == 7.12
    assert family.token_widths() == (64, 4096) and family.pixels_per_token() == 16 and family.size_multiple() == 32
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]

    def covered(patterns: tuple[str, ...]) -> list[str]:
        return [name for name in linear if any(name == p or name.endswith(f".{p}") for p in patterns)]

    assert all(covered((pattern,)) for patterns in QwenImage21.lora_presets.values() for pattern in patterns)
    assert covered(QwenImage21.lora_presets["all"]) == linear


def test_text_beyond_the_positions_is_refused() -> None:
    grids = [Grid(1, 64, 64), Grid(1, 32, 48)]
    room = TABLE - 1 - 48
    assert QwenImage21("").text_problem(grids, room) is None
    assert f"{room + 1} text tokens are more than the {room}" in str(QwenImage21("").text_problem(grids, room + 1))
