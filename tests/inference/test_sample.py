"""`mixres sample` on every family: the pictures of the stock pipeline, what they say of themselves, what is refused."""

import json
import random
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit as stock_edit,
    pipeline_qwenimage_edit_plus as stock_plus,
)
from PIL import Image

from mixres import __version__, cli
from mixres.config.load import load_config
from mixres.errors import UserError
from mixres.inference.sample import sample
from mixres.inference.sample_request import make_request
from mixres.models.hub import file_digest
from mixres.models.lora import add_lora, fill_adapters, trainable_parameters
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, lora_file
from mixres.preprocessing.fill import encode_all, spread
from mixres.training.checkpoint import MANIFEST
from mixres.training.sample_sheets import ROWS, Row, contact_sheet
from mixres.training.setup import recipe
from mixres.training.trainer import train
from support.family_cases import CASES, FamilyCase, with_family

PROMPT, NEGATIVE = "swap red and blue", "交换红色和蓝色"
SIZE = (96, 64)
CALL = ("--size", "96x64", "--steps", "2", "--seed", "7")


@dataclass(frozen=True)
class TrainState:
    """A run folder with a LoRA that changes pictures visibly, its base, and images to be edited."""

    case: FamilyCase
    base: Path
    folder: Path
    images: list[Path]

    def words(self, *more: str, count: int | None = None) -> list[str]:
        count = max(self.case.controls) if count is None else count
        images = [word for path in self.images[:count] for word in ("--image", str(path))]
        return ["sample", "--lora", str(self.folder), *images, "--prompt", PROMPT, *CALL, *more]

    def request(self, out: Path, **options: Any) -> Any:
        given = {"lora": str(self.folder), "prompt": PROMPT, "out": str(out)} | options
        if "prompts" not in given:
            given.setdefault("image", [str(path) for path in self.images[: max(self.case.controls)]])
        return make_request(**{name: value for name, value in given.items() if value is not None})

    def stock(self, lora: bool = True) -> Any:
        pipeline = self.case.load_stock(self.base, torch.float32)
        if lora:
            pipeline.load_lora_weights(self.folder / FILE_NAME)
        return pipeline

    def pictures(self, count: int | None = None) -> list[Image.Image]:
        paths = self.images[: max(self.case.controls) if count is None else count]
        return [Image.open(path).convert("RGB") for path in paths]

    def stock_picture(self, pipeline: Any, images: list[Image.Image] | None = None, **call: Any) -> Image.Image:
        images = self.pictures() if images is None else images
        given = {"prompt": PROMPT, "true_cfg_scale": 1.0, "width": SIZE[0], "height": SIZE[1]} | call
        noise = torch.Generator().manual_seed(given.pop("seed", 7))
        with self.case.stock_areas(self.case.areas):
            made = pipeline(**self.case.call(images), num_inference_steps=2, generator=noise, **given)
        picture: Image.Image = made.images[0]
        return picture


@pytest.fixture(scope="module")
def trained_of(
    base_of: Callable[[FamilyCase], Path],
    small_run: Path,
    demo_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], TrainState]:
    """By the name of a row of `CASES`; the LoRA is a DoRA for one of them."""
    made: dict[str, TrainState] = {}

    def trained(name: str) -> TrainState:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp("run")
            base = base_of(case)
            words = [f"model.pretrained_model_name_or_path={base}", *case.overrides()]
            config = load_config(small_run, [*words, f"model.lora.use_dora={str(case.zero_cond_t).lower()}"])
            assert config.model.lora is not None
            transformer = case.at(base).load_transformer(dtype=torch.float32, device="cpu")
            untrained = case.at("").untrained_modules(transformer)
            settings, presets = config.model.lora.model_dump(), case.at(base).lora_presets
            add_lora(transformer, **settings, untrained=untrained, seed=1, presets=presets)
            parameters = trainable_parameters(transformer)
            fill_adapters(parameters, seed=2)
            for key, parameter in parameters.items():
                parameter.data *= 10.0 if ".lora_B." in key else 1.0
            said = recipe(config, case.at(base), 5)
            (folder / FILE_NAME).write_bytes(lora_file(parameters, transformer, said))
            images = sorted((demo_data / "control_images").glob("*.png"))[1:4]  # none is square
            made[name] = TrainState(case, base, folder, images)
        return made[name]

    return trained


@pytest.fixture(params=CASES)
def trained(request: pytest.FixtureRequest, trained_of: Callable[[str], TrainState]) -> TrainState:
    return trained_of(request.param)


@pytest.fixture
def edit(trained_of: Callable[[str], TrainState]) -> TrainState:
    return trained_of("qwen_image_edit")


def difference(a: Image.Image | Path, b: Image.Image | Path) -> int:
    one, other = (np.asarray(Image.open(x) if isinstance(x, Path) else x).astype(int) for x in (a, b))
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def said(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return dict(json.loads(picture.text["mixres"]))


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> list[str]:
    assert cli.main(words) == 2
    return [line.removeprefix("mixres: error: ") for line in capsys.readouterr().err.splitlines()]


# --- Pictures ------------------------------------------------------------------------------------------------------


def test_the_picture_is_the_stock_pipelines_with_the_lora(trained: TrainState, tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), stock_edit.calculate_dimensions, stock_plus.VAE_IMAGE_SIZE
    assert cli.main([*trained.words("--compare"), "--out", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), stock_edit.calculate_dimensions, stock_plus.VAE_IMAGE_SIZE) == before[1:]
    names = ["0001-without.png", "0001.png", "compare-0001.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    without, stock = trained.stock_picture(trained.stock(lora=False)), trained.stock()
    assert difference(tmp_path / names[0], without) <= 1
    expected = trained.stock_picture(stock)
    assert difference(tmp_path / names[1], expected) <= 1
    # The bound means something: each of these is a picture farther away.
    others = [without, *(trained.stock_picture(stock, **other) for other in ({"seed": 8}, {"prompt": NEGATIVE}))]
    assert min(difference(other, expected) for other in others) > 3
    with Image.open(tmp_path / names[2]) as sheet:
        assert sheet.width == 12 + (max(trained.case.controls) + 2) * (224 + 12)
        assert sheet.text == {"caption-0": PROMPT}


def test_the_picture_says_how_it_was_made(edit: TrainState, tmp_path: Path) -> None:
    words = edit.words("--compare", "--guidance", "2.5", "--negative-prompt", NEGATIVE)
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    file = edit.folder / FILE_NAME
    settings = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance": 2.5, "seed": 7, "steps": 2, "size": "96x64",
        "images": [str(edit.images[0])], "control_area": 112 * 112, "lora": str(file), "lora_xxh3": file_digest(file),
        "base": str(edit.base), "revision": None, "dtype": "float32", "quantize": None,
        "mixres": __version__,
    }  # fmt: skip
    assert said(tmp_path / "0001.png") == settings
    assert said(tmp_path / "0001-without.png") == settings | {"lora": None, "lora_xxh3": None}
    stock = edit.stock()
    expected = edit.stock_picture(stock, negative_prompt=NEGATIVE, true_cfg_scale=2.5)
    assert difference(tmp_path / "0001.png", expected) <= 1
    for other in ({"true_cfg_scale": 1.0}, {"negative_prompt": " ", "true_cfg_scale": 2.5}):
        assert difference(edit.stock_picture(stock, **other), expected) > 1


def test_transparent_images_lie_on_the_colour_of_the_training(edit: TrainState, tmp_path: Path) -> None:
    """As if it had been laid on it before; without a word in the result it is white."""
    (path,), colour = edit.images[:1], "#ff0000"
    with Image.open(path) as image:
        seethrough = image.convert("RGBA")
    seethrough.putalpha(Image.linear_gradient("L").resize(seethrough.size))
    seethrough.save(tmp_path / "seethrough.png")
    for name, background in (("white", None), ("red", colour)):
        flat = Image.new("RGBA", seethrough.size, background or "white")
        flat.alpha_composite(seethrough)
        flat.convert("RGB").save(tmp_path / f"{name}.png")
        lora = str(changed(edit, tmp_path, **({"background": background} if background else {})))
        images = [tmp_path / "seethrough.png", tmp_path / f"{name}.png"]
        for image, out in zip(images, ("a", "b"), strict=True):
            sample(edit.request(tmp_path / name / out, image=[str(image)], lora=lora, size="96x64", steps="2"))
        a, b = (np.asarray(Image.open(tmp_path / name / out / "0001.png")) for out in ("a", "b"))
        assert np.array_equal(a, b), name
    red, white = (np.asarray(Image.open(tmp_path / name / "a/0001.png")) for name in ("red", "white"))
    assert not np.array_equal(red, white)


def test_lines_of_a_file_are_pictures_of_their_own(trained_of: Callable[[str], TrainState], tmp_path: Path) -> None:
    plus = trained_of("qwen_image_edit_plus")
    for number, path in enumerate(plus.images):
        shutil.copyfile(path, tmp_path / f"{number}.png")
    lines = [
        {"prompt": PROMPT, "path_control": "0.png", "path_target": "never/opened.png"},
        {"prompt": f" {NEGATIVE}\n", "path_control": "1.png", "path_control_1": "0.png", "size": "64x96"},
        {"prompt": PROMPT, "path_control": "0.png", "seed": 8, "path_mask": None},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    out = tmp_path / "out"
    assert cli.main(["sample", "--lora", str(plus.folder), "--prompts", str(file), "--out", str(out), *CALL]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0001.png", "0002.png", "0003.png"]
    stock, images = plus.stock(), plus.pictures()
    calls = [
        (images[:1], {}),
        ([images[1], images[0]], {"prompt": NEGATIVE, "width": 64, "height": 96}),
        (images[:1], {"seed": 8}),
    ]
    for number, (given, call) in enumerate(calls, start=1):
        assert difference(out / f"{number:04d}.png", plus.stock_picture(stock, given, **call)) <= 1
    assert [said(out / f"{n:04d}.png")["seed"] for n in (1, 2, 3)] == [7, 7, 8]
    assert difference(out / "0001.png", out / "0003.png") > 3


def test_the_text_encoder_is_gone_before_the_transformer_comes(edit: TrainState, tmp_path: Path) -> None:
    family, seen, order = edit.case.at(edit.base), list[Any](), list[str]()

    def encoders(*arguments: Any, **named: Any) -> Any:
        order.append("encoders")
        pipeline = family.load_encoders(*arguments, **named)
        seen.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    def transformer(*arguments: Any, **named: Any) -> Any:
        order.append("transformer")
        assert [reference() for reference in seen] == [None]
        return family.load_transformer(*arguments, **named)

    functions = {name: getattr(family, name) for name in ("encode_prompt", "load_sampling_pipeline", "sample_image")}
    watched = SimpleNamespace(**functions, load_encoders=encoders, load_transformer=transformer)
    prompts = tmp_path / "two.jsonl"
    shutil.copyfile(edit.images[0], tmp_path / "a.png")
    prompts.write_text("".join(f'{{"prompt": "{word}", "path_control": "a.png"}}\n' for word in ("red", "blue")))
    request = edit.request(tmp_path / "out", prompt=None, prompts=str(prompts), size="64x48", steps="2")
    sample(replace(request, base=replace(request.base, family=watched)))
    assert order == ["encoders", "transformer"], "each is loaded once, whatever the number of pictures"
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_transformer_trained_as_a_whole_is_sampled_beside_its_base(
    edit: TrainState, small_run: Path, tmp_path: Path
) -> None:
    words = [f"model.pretrained_model_name_or_path={edit.base}", "model.lora=null", *edit.case.overrides()]
    config, whole = load_config(small_run, words), tmp_path / "run" / "transformer"
    transformer = QwenImageTransformer2DModel.from_pretrained(edit.base, subfolder="transformer", dtype=torch.float32)
    with torch.no_grad():
        transformer.proj_out.weight *= 0.5
    transformer.save_pretrained(whole)
    (whole / RECIPE_FILE).write_text(json.dumps(recipe(config, edit.case.at(edit.base), 3)))
    given = replace(edit, folder=tmp_path / "run")
    assert cli.main([*given.words("--compare"), "--out", str(tmp_path / "out")]) == 0
    stock = edit.stock(lora=False)
    without = edit.stock_picture(stock)
    assert difference(tmp_path / "out" / "0001-without.png", without) <= 1
    stock.transformer.load_state_dict(transformer.state_dict())
    expected = edit.stock_picture(stock)
    assert difference(tmp_path / "out" / "0001.png", expected) <= 1
    assert difference(without, expected) > 3
    assert len(said(tmp_path / "out" / "0001.png")["lora_xxh3"]) == 32
    wider = json.loads((whole / "config.json").read_text()) | {"num_layers": 3}
    (whole / "config.json").write_text(json.dumps(wider))
    with pytest.raises(UserError, match="num_layers of its transformer is 2, trained was 3"):
        given.request(tmp_path / "new")


def test_over_a_quantised_base_the_picture_is_that_of_the_runs_own_sheet(
    small_run: Path, small_cache: Path, tmp_path: Path
) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    words = [f"cache.cache_dir={small_cache}", f"logging.output_dir={run}", "model.quantize=fp8", "sample.every=1"]
    config = load_config(small_run, [*words, "train.max_train_steps=1", "train.seed=7"])
    AcceleratorState._reset_state(True)
    train(config)
    item = spread(encode_all(*with_family(config), device=torch.device("cpu")).held_out, ROWS)[0]
    command = [
        "sample", "--lora", str(run), "--image", str(item.record.controls[0]), "--prompt", item.record.prompt,
        "--size", str(item.target_size), "--steps", str(config.sample.steps), "--seed", "7",
    ]  # fmt: skip
    assert cli.main([*command, "--out", str(made)]) == 0
    assert cli.main([*command, "--out", str(made / "unrounded"), "--quantize", "null"]) == 0
    methods = [said(path / "0001.png")["quantize"] for path in (made, made / "unrounded")]
    assert methods == ["fp8", None]

    def cell(sheet: Image.Image) -> Image.Image:
        return sheet.crop((12 + 2 * 236, 28, 12 + 2 * 236 + 224, 28 + 100))

    expected = cell(Image.open(run / "samples" / "step-00000001.png"))
    shown = []
    for path in (made, made / "unrounded"):
        with Image.open(path / "0001.png") as picture:
            shown.append(cell(contact_sheet(["", "", ""], [Row((None, None, picture.convert("RGB")), "", "")])))
    assert difference(shown[0], expected) <= 1 < difference(shown[1], expected)


# --- What is asked for ----------------------------------------------------------------------------------------------


def test_without_a_size_it_is_the_stock_pipelines(trained: TrainState, tmp_path: Path) -> None:
    (wanted,) = trained.request(tmp_path / "out").wanted
    if not max(trained.case.controls):
        assert wanted.size == (1024, 1024)
        return
    last = trained.pictures()[-1]
    assert wanted.size == stock_plus.calculate_dimensions(1024 * 1024, last.width / last.height)
    assert wanted.size[0] != wanted.size[1]


def test_what_is_trained_is_found_by_file_folder_and_average(edit: TrainState, tmp_path: Path) -> None:
    average = shutil.copytree(edit.folder, tmp_path / "run" / "ema")
    for given in (edit.folder / FILE_NAME, edit.folder, average):
        request = edit.request(tmp_path / "out", lora=str(given))
        assert request.result.path == (given if given.is_file() else given / FILE_NAME)
        assert (request.base.path, request.base.area_rules) == (str(edit.base), {"control_area": 112 * 112})
    moved = shutil.copytree(edit.base, tmp_path / "moved")
    assert edit.request(tmp_path / "out", base=str(moved)).base.path == str(moved)


def test_everything_wrong_is_told_at_once(edit: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, animated = tmp_path / "damaged.png", tmp_path / "animated.gif"
    damaged.write_bytes(edit.images[0].read_bytes()[:200])
    frames = [Image.new("L", (32, 32), shade) for shade in (0, 255)]
    frames[0].save(animated, save_all=True, append_images=frames[1:])
    taken = tmp_path / "out"
    taken.write_bytes(b"mine")
    words = [
        "sample", "--lora", str(edit.folder), "--image", str(damaged), "--image", str(animated), "--out", str(taken),
        "--prompt", f"<|image_pad|> {'word ' * 1100}", "--size", "100x64", "--steps", "1", "--seed", "-1",
        "--guidance", "0.5", "--device", "toaster", "--dtype", "float16", "--stepz", "3",
    ]  # fmt: skip
    lines = refused(capsys, words)
    expected = (
        "--stepz: unknown option of sample; see sample --help; did you mean '--steps'?",
        "3: unknown option of sample",
        "--device: toaster cannot be used: ",
        "--steps: given 1, allowed: an integer >= 2 and <= 1000",
        "--seed: given -1, allowed: an integer >= 0",
        "--guidance: given 0.5, allowed: a number >= 1.0",
        "--dtype: given float16, allowed: one of bfloat16, float32",
        f"--image: {damaged}: is damaged",
        f"--image: {animated}: has 2 frames",
        "--image: Qwen-Image-Edit takes exactly one control image, there are 2",
        "--prompt: the prompt contains <|image_pad|>",
        "--size: 100x64 has a side that is no multiple of 16, the pixels of a token: write 96x64",
        "--prompt: the prompt is 4401 tokens long, more than 1024",
        f"--out: {taken} is no folder: choose another",
    )
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start), (line, start)
    assert taken.read_bytes() == b"mine"


def test_pictures_are_numbered_on_behind_those_that_are_there(edit: TrainState, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [one.path.name for one in edit.request(out).wanted] == ["0001.png"]
    out.mkdir()
    for there, following in (
        ("0001.png", "0002.png"),
        ("0004-without.png", "0005.png"),
        ("compare-0009.png", "0010.png"),
    ):
        (out / there).write_bytes(b"mine")
        assert [one.path.name for one in edit.request(out).wanted] == [following]
    (out / "20000.jpg").touch()
    (out / "9999.png").touch()
    (tmp_path / "two.jsonl").write_text('{"prompt": "a", "path_control": "x.png"}\n' * 2)
    shutil.copyfile(edit.images[0], tmp_path / "x.png")
    many = edit.request(out, prompts=str(tmp_path / "two.jsonl"), prompt=None)
    assert [one.path.name for one in many.wanted] == ["10000.png", "10001.png"]


def test_wrong_lines_of_a_file_are_told_with_their_numbers(edit: TrainState, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    shutil.copyfile(edit.images[0], outside)
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copyfile(edit.images[0], folder / "a.png")
    (folder / "link.png").symlink_to(outside)
    lines: list[Any] = [
        {"prompt": "red", "path_control": "../outside.png"},
        {"prompt": "red", "path_control": "link.png"},
        {"prompt": "red", "path_control": str(outside)},
        {"path_control": "a.png", "sed": 3},
        {"prompt": "red", "path_control": "a.png", "seed": True, "size": "64"},
        {"prompt": "red", "path_control": "a.png", "size": "64x1024"},
        {"prompt": "red", "path_control": "a.png", "size": "64x100"},
        {"prompt": "red", "path_control": "a.png", "path_control_2": "a.png"},
        {"prompt": "red"},
        7,
    ]
    file = folder / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError) as caught:
        edit.request(tmp_path / "out", prompt=None, prompts=str(file))
    expected = (
        (1, "'path_control': ../outside.png is not below the manifest's folder"),
        (2, "'path_control': link.png is a link out of the manifest's folder; put the file itself there"),
        (3, "is not below the manifest's folder"),
        (4, "unknown key 'sed'; did you mean 'seed'?"),
        (4, "has no prompt"),
        (5, "'seed': given True, allowed: an integer >= 0"),
        (5, "'size': given 64, allowed: WIDTHxHEIGHT"),
        (6, "64x1024 has aspect 16.0"),
        (8, "its control images have a gap"),
        (10, "the line is not a JSON object"),
        (9, "Qwen-Image-Edit takes exactly one control image, there are 0"),
        (7, "'size': 64x100 has a side that is no multiple of 16"),
    )
    for message, (number, part) in zip(caught.value.messages, expected, strict=True):
        assert message.startswith(f"{file}:{number}: ") and part in message, message


FEW = {
    "nothing": ([], ["--lora: not given", "--out: not given", "--prompt: not given"]),
    "both": (
        ["--lora", "RUN", "--out", "OUT", "--prompt", "a", "--prompts", "none.jsonl", "--image", "a.png"],
        ["--prompt: given with --prompts", "--image: given with --prompts", "--prompts: none.jsonl cannot be read"],
    ),
    "twice": (["--lora", "RUN", "--seed", "1", "--seed", "2"], ["--seed: given twice"]),
    "no_guidance": (
        ["--lora", "RUN", "--out", "OUT", "--image", "IMAGE", "--prompt", "a", "--negative-prompt", "b"],
        ["--negative-prompt: has no effect without guidance"],
    ),
    "empty": (["--lora", "RUN", "--out", "OUT", "--prompt", " "], ["--prompt: the prompt is empty"]),
    "out": (
        ["--lora", "RUN", "--out", "IMAGE", "--image", "IMAGE", "--prompt", "a"],
        ["--out: "],
    ),
    "config": (["--lora", "RUN", "--config", "a.yaml", "--out", "OUT"], ["--config: unknown option of sample"]),
}


@pytest.mark.parametrize(("words", "expected"), FEW.values(), ids=FEW)
def test_options_that_do_not_fit_together(
    words: list[str], expected: list[str], edit: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stands_for = {"RUN": str(edit.folder), "OUT": str(tmp_path / "out"), "IMAGE": str(edit.images[0])}
    lines = refused(capsys, ["sample", *(stands_for.get(word, word) for word in words)])
    for line, start in zip(lines, expected, strict=False):
        assert line.startswith(start)
    assert len(lines) >= len(expected)
    assert not (tmp_path / "out").exists(), "a refused request leaves nothing behind"


def test_a_base_that_does_not_fit_is_refused(trained_of: Callable[[str], TrainState], tmp_path: Path) -> None:
    edit, plus, plain = (trained_of(name) for name in ("qwen_image_edit", "qwen_image_edit_plus", "qwen_image"))

    def reason(run: TrainState, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            run.request(tmp_path / "out", **options)
        (message,) = caught.value.messages
        return message

    assert "it is a qwen_image_edit, trained was a qwen_image_edit_plus" in reason(plus, base=str(edit.base))
    assert reason(edit, base=str(tmp_path / "none")).startswith("--base: there is no folder")
    other = shutil.copytree(edit.base, tmp_path / "other")
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    assert "the adapter's 128 x 128" in reason(edit, base=str(other))
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    assert "it has no layer transformer_blocks.1." in reason(edit, base=str(other))
    gone = changed(edit, tmp_path, base="/gone")
    assert reason(edit, lora=str(gone)).startswith(f"--base: not given, and {gone} names '/gone': there is no folder")
    assert edit.request(tmp_path / "out", lora=str(gone), base=str(edit.base)).base.path == str(edit.base)
    assert "has none" in reason(plain, lora=str(changed(plain, tmp_path, control_area=4096)), image=[])
    for area in (12, 2**40, "big", None):
        assert "gives its control images the areas" in reason(
            edit, lora=str(changed(edit, tmp_path, control_area=area))
        )


def changed(run: TrainState, folder: Path, **recipe: Any) -> Path:
    """The LoRA of `run` with other words about itself."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(run.folder / FILE_NAME, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if recipe == {"gone": True}:
        del metadata["mixres"]
    else:
        metadata["mixres"] = json.dumps(json.loads(metadata["mixres"]) | recipe)
    path = folder / f"changed-{len(list(folder.iterdir()))}.safetensors"
    save_file(tensors, path, metadata)
    return path


def test_how_the_base_is_rounded_is_as_under_the_lora_or_as_asked_for(
    edit: TrainState, small_run: Path, tmp_path: Path
) -> None:
    def method(stated: str | None, **options: Any) -> str | None:
        request = edit.request(tmp_path / "out", lora=str(changed(edit, tmp_path, quantize=stated)), **options)
        return str(request.quantize) if request.quantize else None

    assert [method("int8"), method(None), method("nf4", quantize="null")] == ["int8", None, None]
    assert [method(None, quantize="fp8"), method("fp8", quantize="int8")] == ["fp8", "int8"]
    for stated, options, reason in (
        (None, {"quantize": "int4"}, r"^--quantize: given int4, allowed: one of null, int8, fp8, nf4, bnb_int8$"),
        ("int4", {}, r"^--quantize: not given, and .* was trained over a base in int4, allowed: one of null, int8,"),
        ("nf4", {}, r"^--quantize: not given, and .* was trained over a base in nf4: nf4 is .* or null$"),
        (
            None,
            {"quantize": "nf4"},
            r"^--quantize: given nf4: nf4 is bitsandbytes' and needs a CUDA device, .*, or null$",
        ),
    ):
        with pytest.raises(UserError, match=reason):
            method(stated, **options)
    whole = tmp_path / "whole"
    shutil.copytree(edit.base / "transformer", whole)
    said_of_it = recipe(load_config(small_run, edit.case.overrides()), edit.case.at(edit.base), 3) | {
        "quantize": "int8"
    }
    (whole / RECIPE_FILE).write_text(json.dumps(said_of_it | {"merged": True, "base": str(edit.base)}))
    assert edit.request(tmp_path / "out", lora=str(whole)).quantize is None, "what has been merged is no base"


def test_a_part_of_the_base_that_is_missing_is_told_as_the_bases(edit: TrainState, tmp_path: Path) -> None:
    base = shutil.copytree(edit.base, tmp_path / "base")
    shutil.rmtree(base / "text_encoder")
    with pytest.raises(UserError, match=f"^--base: {base / 'text_encoder'} is missing: download it$"):
        sample(edit.request(tmp_path / "out", base=str(base)))


def test_weights_that_do_not_say_what_they_are_of_are_refused(edit: TrainState, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"never opened")
    (tmp_path / "empty").mkdir()
    (tmp_path / "step-00000100").mkdir()
    (tmp_path / "step-00000100" / MANIFEST).write_text("{}")
    both = shutil.copytree(edit.folder, tmp_path / "both")
    (both / "transformer").mkdir()
    (tmp_path / "bare" / "transformer").mkdir(parents=True)
    reasons = {
        tmp_path / "none": "there is no file",
        tmp_path / "lora.bin": "is not a .safetensors file",
        tmp_path / "empty": "holds neither",
        tmp_path / "step-00000100": "is a checkpoint, no result: export it first (mixres export ",
        both: "holds both",
        tmp_path / "bare": "does not say what it was trained on",
        changed(edit, tmp_path, gone=True): "does not say what it was trained on",
        changed(edit, tmp_path, format=2): "was written by another version of mixres",
        changed(edit, tmp_path, family=None): "does not say its family, base and version",
        changed(edit, tmp_path, background="mauve"): "names 'mauve' as its background, no colour: train again",
        changed(edit, tmp_path, background=7): "names 7 as its background",
        changed(edit, tmp_path, r=8): "and its weights are {'r': 4",
    }
    for path, reason in reasons.items():
        with pytest.raises(UserError) as caught:
            edit.request(tmp_path / "out", lora=str(path))
        (message,) = caught.value.messages
        assert message.startswith("--lora: ") and reason in message
