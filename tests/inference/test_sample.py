"""`mixres sample` on every family: the images of the stock pipeline, what they say of themselves, what is refused."""

import json
import random
import re
import shutil
import weakref
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixres import __version__, cli
from mixres.config.load import load_config
from mixres.errors import UserError
from mixres.inference.sample import make_request, sample
from mixres.models.hub import file_digest
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE
from mixres.preprocessing.fill import encode_all, spread
from mixres.training.checkpoint import MANIFEST
from mixres.training.sample_sheets import ROWS, Row, image_grid
from mixres.training.setup import recipe
from mixres.training.trainer import train
from support.family_cases import CASES, FamilyCase, with_family
from support.lora_files import write_lora

PROMPT, NEGATIVE = "swap red and blue", "交换红色和蓝色"
SIZE = (96, 64)
CALL = ("--size", "96x64", "--steps", "2", "--seed", "7")


@dataclass(frozen=True)
class Result:
    """A run folder with a LoRA that changes images visibly, its base, and images to be edited."""

    case: FamilyCase
    base: Path
    folder: Path
    images: list[Path]

    def words(self, *more: str) -> list[str]:
        images = [word for path in self.images[: max(self.case.controls)] for word in ("--image", str(path))]
        return ["sample", "--lora", str(self.folder), *images, "--prompt", PROMPT, *CALL, *more]

    def request(self, out: Path, **given: Any) -> Any:
        images = [str(path) for path in self.images[: max(self.case.controls)]]
        own = {} if "prompts" in given else {"prompt": PROMPT, "image": images}
        return make_request(**{"lora": str(self.folder), "out": str(out), **own, **given})

    @staticmethod
    def lines(folder: Path, *lines: Any) -> str:
        """A prompts file in `folder`; lines that name no prompt get one."""
        text = [json.dumps({"prompt": PROMPT} | line if isinstance(line, dict) else line) for line in lines]
        (folder / "lines.jsonl").write_text("\n\n".join(text))
        return str(folder / "lines.jsonl")

    def stock(self, lora: bool = True) -> Any:
        pipeline = self.case.load_stock(self.base, torch.float32)
        if lora:
            pipeline.load_lora_weights(self.folder / FILE_NAME)
        return pipeline

    def controls(self) -> list[Image.Image]:
        return [Image.open(path).convert("RGB") for path in self.images[: max(self.case.controls)]]

    def stock_image(self, pipeline: Any, images: list[Image.Image] | None = None, **call: Any) -> Image.Image:
        images = self.controls() if images is None else images
        given = {"prompt": PROMPT, "true_cfg_scale": 1.0, "width": SIZE[0], "height": SIZE[1]} | call
        noise = torch.Generator().manual_seed(given.pop("seed", 7))
        with self.case.stock_areas(self.case.areas):
            made = pipeline(**self.case.call(images), num_inference_steps=2, generator=noise, **given)
        image: Image.Image = made.images[0]
        return image


@pytest.fixture(scope="session")
def trained_of(
    base_of: Callable[[FamilyCase], Path], demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Result]:
    """By the name of a row of `CASES`; the LoRA is a DoRA for one of them."""
    made: dict[str, Result] = {}

    def trained(name: str) -> Result:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp("run")
            base = base_of(case)
            words = (*case.overrides(), f"model.lora.use_dora={str(case.zero_cond_t).lower()}")
            write_lora(folder, base, *words)
            images = sorted((demo_data / "control_images").glob("*.png"))[1:4]  # none is square
            made[name] = Result(case, base, folder, images)
        return made[name]

    return trained


@pytest.fixture(params=CASES)
def trained(request: pytest.FixtureRequest, trained_of: Callable[[str], Result]) -> Result:
    return trained_of(request.param)


@pytest.fixture
def edit(trained_of: Callable[[str], Result]) -> Result:
    return trained_of("qwen_image_edit")


def difference(a: Image.Image | Path, b: Image.Image | Path) -> int:
    one, other = (np.asarray(Image.open(x) if isinstance(x, Path) else x).astype(int) for x in (a, b))
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def settings_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return dict(json.loads(image.text["mixres"]))


# --- Images --------------------------------------------------------------------------------------------------------


def test_the_image_is_the_stock_pipelines_with_the_lora(trained: Result, tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), stock_edit.calculate_dimensions, stock_plus.VAE_IMAGE_SIZE
    assert cli.main([*trained.words("--compare"), "--out", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), stock_edit.calculate_dimensions, stock_plus.VAE_IMAGE_SIZE) == before[1:]
    names = ["0001-without.png", "0001.png", "compare-0001.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    without, stock = trained.stock_image(trained.stock(lora=False)), trained.stock()
    assert difference(tmp_path / names[0], without) <= 1
    expected = trained.stock_image(stock)
    assert difference(tmp_path / names[1], expected) <= 1
    # The bound means something: each of these is an image farther away.
    others = [without, *(trained.stock_image(stock, **other) for other in ({"seed": 8}, {"prompt": NEGATIVE}))]
    assert min(difference(other, expected) for other in others) > 3
    with Image.open(tmp_path / names[2]) as grid:
        assert grid.width == 12 + (max(trained.case.controls) + 2) * (224 + 12)
        assert grid.text == {"caption-0": PROMPT}


def test_the_image_says_how_it_was_made(edit: Result, tmp_path: Path) -> None:
    words = edit.words("--compare", "--guidance", "2.5", "--negative-prompt", NEGATIVE)
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    file = edit.folder / FILE_NAME
    settings = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance": 2.5, "seed": 7, "steps": 2, "size": "96x64",
        "images": [str(edit.images[0])], "control_area": 112 * 112, "lora": str(file), "lora_xxh3": file_digest(file),
        "base": str(edit.base), "revision": None, "dtype": "float32", "quantize": None,
        "mixres": __version__,
    }  # fmt: skip
    assert settings_of(tmp_path / "0001.png") == settings
    assert settings_of(tmp_path / "0001-without.png") == settings | {"lora": None, "lora_xxh3": None}
    stock = edit.stock()
    expected = edit.stock_image(stock, negative_prompt=NEGATIVE, true_cfg_scale=2.5)
    assert difference(tmp_path / "0001.png", expected) <= 1
    for other in ({"true_cfg_scale": 1.0}, {"negative_prompt": " ", "true_cfg_scale": 2.5}):
        assert difference(edit.stock_image(stock, **other), expected) > 1


def test_transparent_images_lie_on_the_colour_of_the_training(edit: Result, tmp_path: Path) -> None:
    """As if it had been laid on it before; without a word in the result it is white."""
    with Image.open(edit.images[0]) as image:
        transparent = image.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(tmp_path / "transparent.png")
    for colour, stated in (("white", {}), ("#ff0000", {"background": "#ff0000"})):
        flat = Image.new("RGBA", transparent.size, colour)
        flat.alpha_composite(transparent)
        flat.convert("RGB").save(tmp_path / f"{colour}.png")
        file = edit.lines(tmp_path, *({"path_control": f"{name}.png"} for name in ("transparent", colour)))
        lora = str(changed(edit, tmp_path, **stated))
        sample(edit.request(tmp_path / colour, prompts=file, lora=lora, size="96x64", steps="2"))
        assert difference(tmp_path / colour / "0001.png", tmp_path / colour / "0002.png") == 0
    assert difference(tmp_path / "white" / "0001.png", tmp_path / "#ff0000" / "0001.png") > 0


def test_lines_of_a_file_are_images_of_their_own(trained_of: Callable[[str], Result], tmp_path: Path) -> None:
    plus = trained_of("qwen_image_edit_plus")
    for number, path in enumerate(plus.images):
        shutil.copyfile(path, tmp_path / f"{number}.png")
    file = plus.lines(
        tmp_path,
        {"path_control": "0.png", "path_target": "never/opened.png"},
        {"prompt": f" {NEGATIVE}\n", "path_control": "1.png", "path_control_1": "0.png", "size": "64x96"},
        {"path_control": "0.png", "seed": 8, "path_mask": None},
    )
    out = tmp_path / "out"
    assert cli.main(["sample", "--lora", str(plus.folder), "--prompts", file, "--out", str(out), *CALL]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0001.png", "0002.png", "0003.png"]
    stock, images = plus.stock(), plus.controls()
    calls = [
        (images[:1], {}),
        ([images[1], images[0]], {"prompt": NEGATIVE, "width": 64, "height": 96}),
        (images[:1], {"seed": 8}),
    ]
    for number, (given, call) in enumerate(calls, start=1):
        assert difference(out / f"{number:04d}.png", plus.stock_image(stock, given, **call)) <= 1
    assert [settings_of(out / f"{n:04d}.png")["seed"] for n in (1, 2, 3)] == [7, 7, 8]
    assert difference(out / "0001.png", out / "0003.png") > 3


def test_the_text_encoder_is_gone_before_the_transformer_comes(edit: Result, tmp_path: Path) -> None:
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

    watched = copy(family)
    vars(watched).update(load_encoders=encoders, load_transformer=transformer)
    shutil.copyfile(edit.images[0], tmp_path / "a.png")
    file = edit.lines(tmp_path, *({"prompt": word, "path_control": "a.png"} for word in ("red", "blue")))
    request = edit.request(tmp_path / "out", prompts=file, size="64x48", steps="2")
    sample(replace(request, family=watched))
    assert order == ["encoders", "transformer"], "each is loaded once, whatever the number of images"
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_transformer_trained_as_a_whole_is_sampled_beside_its_base(
    edit: Result, small_run: Path, tmp_path: Path
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
    without = edit.stock_image(stock)
    assert difference(tmp_path / "out" / "0001-without.png", without) <= 1
    stock.transformer.load_state_dict(transformer.state_dict())
    expected = edit.stock_image(stock)
    assert difference(tmp_path / "out" / "0001.png", expected) <= 1
    assert difference(without, expected) > 3
    assert len(settings_of(tmp_path / "out" / "0001.png")["lora_xxh3"]) == 32
    wider = json.loads((whole / "config.json").read_text()) | {"num_layers": 3}
    (whole / "config.json").write_text(json.dumps(wider))
    with pytest.raises(UserError, match="num_layers of its transformer is 2, trained was 3"):
        given.request(tmp_path / "new")


def test_over_a_quantised_base_the_image_is_that_of_the_runs_own_grid(
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
    methods = [settings_of(path / "0001.png")["quantize"] for path in (made, made / "unrounded")]
    assert methods == ["fp8", None]

    def cell(grid: Image.Image) -> Image.Image:
        return grid.crop((12 + 2 * 236, 28, 12 + 2 * 236 + 224, 28 + 100))

    expected = cell(Image.open(run / "samples" / "step-00000001.png"))
    shown = []
    for path in (made, made / "unrounded"):
        with Image.open(path / "0001.png") as image:
            shown.append(cell(image_grid(["", "", ""], [Row((None, None, image.convert("RGB")), "", "")])))
    assert difference(shown[0], expected) <= 1 < difference(shown[1], expected)


# --- What is asked for ----------------------------------------------------------------------------------------------


def test_without_a_size_it_is_the_stock_pipelines(trained: Result, tmp_path: Path) -> None:
    (job,) = trained.request(tmp_path / "out").jobs
    if not max(trained.case.controls):
        assert job.size == (1024, 1024)
        return
    last = trained.controls()[-1]
    assert job.size == stock_plus.calculate_dimensions(1024 * 1024, last.width / last.height)
    assert job.size[0] != job.size[1]


def test_what_is_trained_is_found_by_file_folder_and_average(edit: Result, tmp_path: Path) -> None:
    average = shutil.copytree(edit.folder, tmp_path / "run" / "ema")
    for given in (edit.folder / FILE_NAME, edit.folder, average):
        request = edit.request(tmp_path / "out", lora=str(given))
        assert request.result.path == (given if given.is_file() else given / FILE_NAME)
        assert (request.family.path, request.result.area_rules) == (str(edit.base), {"control_area": 112 * 112})
    moved = shutil.copytree(edit.base, tmp_path / "moved")
    assert edit.request(tmp_path / "out", base=str(moved)).family.path == str(moved)


def test_images_are_numbered_after_those_that_are_there(edit: Result, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [job.path.name for job in edit.request(out).jobs] == ["0001.png"]
    out.mkdir()
    taken = {"0001.png": "0002.png", "0004-without.png": "0005.png", "compare-0009.png": "0010.png"}
    for there, following in taken.items():
        (out / there).write_bytes(b"mine")
        assert [job.path.name for job in edit.request(out).jobs] == [following]
    (out / "20000.jpg").touch()
    (out / "9999.png").touch()
    shutil.copyfile(edit.images[0], tmp_path / "x.png")
    many = edit.request(out, prompts=edit.lines(tmp_path, *[{"path_control": "x.png"}] * 2))
    assert [job.path.name for job in many.jobs] == ["10000.png", "10001.png"]


RUN, IMAGE = ["--lora", "RUN", "--out", "OUT"], ["--lora", "RUN", "--out", "OUT", "--image", "IMAGE", "--prompt", "a"]
WRONG = {
    "nothing": ([], ["--lora: not given", "--out: not given"]),
    "values": (
        [*IMAGE, "--size", "1024", "--steps", "1", "--seed", "-1", "--guidance", "0.5", "--dtype", "float16"],
        [
            "--size: given 1024, should be WIDTHxHEIGHT",
            "--steps: given 1, should be greater than or equal to 2",
            "--seed: given -1, should be greater than or equal to 0",
            "--guidance: given 0.5, should be greater than or equal to 1",
            "--dtype: given float16, should be 'bfloat16' or 'float32'",
        ],
    ),
    "no prompt": (RUN, ["--prompt: give either --prompt TEXT or --prompts FILE"]),
    "both": ([*RUN, "--prompt", "a", "--prompts", "x"], ["--prompt: give either --prompt TEXT or --prompts FILE"]),
    "image": ([*RUN, "--prompts", "x", "--image", "IMAGE"], ["--image: the lines of --prompts name their images"]),
    "file": ([*RUN, "--prompts", "none.jsonl"], ["--prompts: none.jsonl cannot be read"]),
    "no guidance": ([*IMAGE, "--negative-prompt", "b"], ["--negative-prompt: has no effect without guidance"]),
    "empty": ([*RUN, "--prompt", " "], ["--prompt: the prompt is empty"]),
    "twice": ([*IMAGE, "--seed", "1", "--seed", "2"], ["--seed: given twice"]),
    "unknown": ([*IMAGE, "--stepz=3"], ["--stepz=3: unknown option of sample; see sample --help; did you mean '--st"]),
    "device": ([*IMAGE, "--device", "toaster"], ["--device: toaster cannot be used: "]),
    "int4": ([*IMAGE, "--quantize", "int4"], ["--quantize: given int4, should be 'null', 'int8', 'fp8', 'nf4' or"]),
    "nf4": ([*IMAGE, "--quantize", "nf4", "--device", "cpu"], ["--quantize: nf4 is bitsandbytes' and needs a CUDA de"]),
    "base": ([*IMAGE, "--base", "OUT"], ["--base: there is no folder"]),
    "family": ([*IMAGE, "--base", "OTHER"], ["--base: OTHER does not fit RUN/WEIGHTS: it is a qwen_image, "]),
    "width": ([*IMAGE, "--base", "NARROW"], ["--base: NARROW does not fit RUN/WEIGHTS: its "]),
    "layers": ([*IMAGE, "--base", "SHORT"], ["--base: SHORT does not fit RUN/WEIGHTS: it has no layer "]),
    "fit": (
        [*RUN, "--image", "DAMAGED", "--image", "ANIMATED", "--prompt", "LONG", "--size", "100x64"],
        [
            "--image: DAMAGED: is damaged",
            "--image: ANIMATED: has 2 frames",
            "--image: Qwen-Image-Edit takes exactly one control image, there are 2",
            "--prompt: the prompt contains <|image_pad|>",
            "--prompt: the prompt is 4401 tokens long, more than 1024",
            "--size: 100x64 has a side that is no multiple of 16, the pixels of a token: write 96x64",
        ],
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def places(
    trained_of: Callable[[str], Result], base_of: Callable[[FamilyCase], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What the words in capitals stand for in `WRONG`."""
    edit, root = trained_of("qwen_image_edit"), tmp_path_factory.mktemp("places")
    (root / "damaged.png").write_bytes(edit.images[0].read_bytes()[:200])
    frames = [Image.new("L", (32, 32), shade) for shade in (0, 255)]
    frames[0].save(root / "animated.gif", save_all=True, append_images=frames[1:])
    for name, other in (("NARROW", {"num_attention_heads": 2}), ("SHORT", {"num_layers": 1})):
        config = shutil.copytree(edit.base, root / name) / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | other))
    places = {"RUN": edit.folder, "IMAGE": edit.images[0], "OTHER": base_of(CASES["qwen_image"]), "OUT": root / "out"}
    places |= {"DAMAGED": root / "damaged.png", "ANIMATED": root / "animated.gif"}
    places |= {name: root / name for name in ("NARROW", "SHORT")}
    return {"WEIGHTS": FILE_NAME, "LONG": f"<|image_pad|> {'word ' * 1100}"} | {k: str(v) for k, v in places.items()}


@pytest.mark.parametrize(("words", "expected"), WRONG.values(), ids=WRONG)
def test_a_request_that_cannot_be_met_is_refused(
    words: list[str], expected: list[str], places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", *(places.get(word, word) for word in words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line, start in zip(lines, expected, strict=True):
        for name in re.findall(r"[A-Z]{3,}", start):
            start = start.replace(name, places.get(name, name))
        assert line.startswith(f"mixres: error: {start}")
    assert not Path(places["OUT"]).exists(), "a refused request leaves nothing behind"


def refusal(run: Result, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        sample(run.request(out, **options))
    (message,) = caught.value.messages
    return message


def test_a_folder_that_cannot_be_written_and_an_incomplete_base_are_refused(edit: Result, tmp_path: Path) -> None:
    taken, base = tmp_path / "taken", shutil.copytree(edit.base, tmp_path / "base")
    taken.write_bytes(b"mine")
    assert refusal(edit, taken).startswith(f"--out: {taken} cannot be written: ")
    assert taken.read_bytes() == b"mine"
    shutil.rmtree(base / "text_encoder")
    assert refusal(edit, tmp_path / "out", base=str(base)) == f"--base: {base / 'text_encoder'} is missing: download it"


def test_all_wrong_lines_of_a_file_are_reported_with_their_numbers(edit: Result, tmp_path: Path) -> None:
    outside, folder = shutil.copyfile(edit.images[0], tmp_path / "outside.png"), tmp_path / "data"
    folder.mkdir()
    shutil.copyfile(edit.images[0], folder / "a.png")
    (folder / "link.png").symlink_to(outside)
    lines = {
        "'path_control': ../outside.png is not below the manifest's folder": {"path_control": "../outside.png"},
        "'path_control': link.png is a link out of the manifest's folder; put the": {"path_control": "link.png"},
        f"'path_control': {outside} is not below the manifest's folder": {"path_control": str(outside)},
        "'sed': unknown; did you mean 'seed'?": {"path_control": "a.png", "sed": 3},
        "'prompt': given None, should be a valid string": {"path_control": "a.png", "prompt": None},
        "'seed': given True, should be a valid integer": {"path_control": "a.png", "seed": True},
        "'size': given 64, should be WIDTHxHEIGHT": {"path_control": "a.png", "size": "64"},
        "'size': 64x1024 has aspect 16.0": {"path_control": "a.png", "size": "64x1024"},
        "its control images have a gap": {"path_control": "a.png", "path_control_2": "a.png"},
        "the line is not a JSON object": 7,
        "Qwen-Image-Edit takes exactly one control image, there are 0": {},
        "'size': 64x100 has a side that is no multiple of 16": {"path_control": "a.png", "size": "64x100"},
    }
    file = edit.lines(folder, *lines.values())
    with pytest.raises(UserError) as caught:
        edit.request(tmp_path / "out", prompts=file)
    for number, (message, start) in enumerate(zip(caught.value.messages, lines, strict=True)):
        assert re.sub(r":'", ": '", message).startswith(f"{file}:{2 * number + 1}: {start}"), message
    both = edit.lines(folder, {"path_control": "none.png", "sed": 3, "seed": -1})
    with pytest.raises(UserError) as caught:
        edit.request(tmp_path / "out", prompts=both)
    assert len(caught.value.messages) == 3, "all that is wrong with one line"


def test_the_base_is_that_of_the_result_or_the_one_given(
    edit: Result, trained_of: Callable[[str], Result], tmp_path: Path
) -> None:
    gone = str(changed(edit, tmp_path, base="/gone"))
    reason = refusal(edit, tmp_path / "out", lora=gone)
    assert reason.startswith(f"--base: not given, and {gone} names '/gone': there is no folder")
    assert edit.request(tmp_path / "out", lora=gone, base=str(edit.base)).family.path == str(edit.base)
    plain = trained_of("qwen_image")
    lora = str(changed(plain, tmp_path, control_area=4096))
    assert "the areas {'control_area': 4096}, and it has none" in refusal(plain, tmp_path / "out", lora=lora)


def changed(run: Result, folder: Path, *, gone: bool = False, **recipe: Any) -> Path:
    """The LoRA of `run` with another recipe."""
    with safe_open(run.folder / FILE_NAME, "pt") as file:
        metadata = file.metadata()
    stated = {} if gone else {"mixres": json.dumps(json.loads(metadata.pop("mixres")) | recipe)}
    path = folder / f"changed-{len(list(folder.iterdir()))}.safetensors"
    save_file(load_file(run.folder / FILE_NAME), path, {k: v for k, v in metadata.items() if k != "mixres"} | stated)
    return path


def test_the_base_is_quantised_as_under_the_lora_or_as_asked_for(edit: Result, small_run: Path, tmp_path: Path) -> None:
    def method(stated: str | None, **options: Any) -> str | None:
        lora = str(changed(edit, tmp_path, quantize=stated))
        quantize: str | None = edit.request(tmp_path / "out", lora=lora, device="cpu", **options).quantize
        return quantize

    assert [method("int8"), method(None), method("nf4", quantize="null")] == ["int8", None, None]
    assert [method(None, quantize="fp8"), method("fp8", quantize="int8")] == ["fp8", "int8"]
    with pytest.raises(UserError, match=r"^--quantize: not given, and .* was trained with nf4: nf4 is bitsandbytes'"):
        method("nf4")
    full = shutil.copytree(edit.base / "transformer", tmp_path / "full")
    stated = recipe(load_config(small_run, edit.case.overrides()), edit.case.at(edit.base), 3)
    stated |= {"quantize": "int8", "merged": True, "base": str(edit.base)}
    (full / RECIPE_FILE).write_text(json.dumps(stated))
    assert edit.request(tmp_path / "out", lora=str(full)).quantize is None, "what has been merged is no base"


def test_weights_without_a_recipe_that_can_be_used_are_refused(edit: Result, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"never opened")
    (tmp_path / "empty").mkdir()
    (tmp_path / "step-00000100").mkdir()
    (tmp_path / "step-00000100" / MANIFEST).write_text("{}")
    both = shutil.copytree(edit.folder, tmp_path / "both")
    (both / "transformer").mkdir()
    (tmp_path / "bare" / "transformer").mkdir(parents=True)
    reasons: dict[Path, str] = {
        tmp_path / "none": "there is no file",
        tmp_path / "lora.bin": "is not a .safetensors file",
        tmp_path / "empty": "holds neither",
        tmp_path / "step-00000100": "is a checkpoint, no result: export it first (mixres export ",
        both: "holds both",
        tmp_path / "bare": "has no recipe of mixres",
        changed(edit, tmp_path, gone=True): "has no recipe of mixres",
        changed(edit, tmp_path, format=2): "was written by another version of mixres",
        changed(edit, tmp_path, family="flux"): "was written by another version of mixres",
        changed(edit, tmp_path, base=None): "has a wrong recipe, train again: base: given None",
        changed(edit, tmp_path, background="mauve"): "background: given mauve, should match pattern",
        **{changed(edit, tmp_path, control_area=area): f"control_area: given {area}" for area in (12, 2**40, "big")},
    }
    for path, reason in reasons.items():
        with pytest.raises(UserError) as caught:
            edit.request(tmp_path / "out", lora=str(path))
        message = caught.value.messages[0]
        assert message.startswith("--lora: ") and reason in message
