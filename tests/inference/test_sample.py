"""`mixres sample` on every family: the images of the stock pipeline, what they say of themselves, what is refused."""

import base64
import json
import random
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit as stock_edit,
    pipeline_qwenimage_edit_plus as stock_plus,
)
from lycoris import create_lycoris_from_weights
from peft.tuners.lokr.layer import LoKrLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixres import __version__, cli
from mixres.config.load import load_config
from mixres.errors import UserError, WorkError
from mixres.geometry import Size
from mixres.inference import sample_request
from mixres.inference.compare import Comparison, comparison_page
from mixres.inference.sample import sample
from mixres.inference.sample_request import make_request
from mixres.models.hub import file_digest
from mixres.models.lora import attach
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, read_header
from mixres.models.quantize import quantization_config
from mixres.models.qwen.layers import QUANTIZE_EXCLUSIONS
from mixres.training.sample_sheets import save_png
from mixres.training.setup import recipe
from support.family_cases import CASES, FamilyCase
from support.jobs import environment
from support.lora_files import overrides_of, write_lora

PROMPT, NEGATIVE = "swap red and blue", "交换红色和蓝色"
ADAPTERS = {"zero_cond_t": "dora", "qwen_image_edit_plus": "lokr", "qwen_image": "loha"}
SIZE = (96, 64)
CALL = ("--size", "96x64", "--steps", "2", "--seed", "7")


@dataclass(frozen=True)
class Result:
    """A run folder with a LoRA that changes images visibly, its base, and images to be edited."""

    case: FamilyCase
    base: Path
    folder: Path
    images: list[Path]
    kind: str = "lora"  # a row of `KINDS`

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
        if lora and self.kind in ("lokr", "loha"):
            create_lycoris_from_weights(1.0, str(self.folder / FILE_NAME), pipeline.transformer)[0].apply_to()
        elif lora:
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
    """By the name of a row of `CASES`, of which some have another adapter; a LoKr and a LoHa lycoris-lora loads."""
    made: dict[str, Result] = {}

    def trained(name: str) -> Result:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp("run")
            base = base_of(case)
            kind = ADAPTERS.get(name, "lora")
            write_lora(folder, base, *case.overrides(), *overrides_of(kind))
            images = sorted((demo_data / "control_images").glob("*.png"))[1:4]  # none is square
            made[name] = Result(case, base, folder, images, kind)
        return made[name]

    return trained


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in ("zero_cond_t", "qwen_image"))) for name in CASES]
)
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
    names = ["0001-without.png", "0001.png", "compare-0001.html", "compare-0001.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    without, stock = trained.stock_image(trained.stock(lora=False)), trained.stock()
    assert difference(tmp_path / names[0], without) <= 1
    expected = trained.stock_image(stock)
    assert difference(tmp_path / names[1], expected) <= 1
    # The bound means something: each of these is an image farther away.
    others = [without, *(trained.stock_image(stock, **other) for other in ({"seed": 8}, {"prompt": NEGATIVE}))]
    assert min(difference(other, expected) for other in others) > 3
    with Image.open(tmp_path / names[3]) as grid:
        assert grid.width == 12 + (max(trained.case.controls) + 2) * (224 + 12)
        assert grid.text == {"caption-0": PROMPT}


def test_the_image_says_how_it_was_made(edit: Result, tmp_path: Path) -> None:
    """Offloading is not among it: it changes nothing."""
    words = edit.words("--compare", "--guidance", "2.5", "--negative-prompt", NEGATIVE, "--offload")
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    file = edit.folder / FILE_NAME
    settings = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance": 2.5, "seed": 7, "steps": 2, "size": "96x64",
        "restored_size": None, "images": [str(edit.images[0])], "control_area": 112 * 112,
        "control_sizes": ["128x96"], "lora": str(file), "lora_xxh3": file_digest(file),
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


@pytest.mark.slow
def test_transparent_images_lie_on_the_colour_of_the_training(edit: Result, tmp_path: Path) -> None:
    """As if it had been laid on it before; without a word in the result it is white."""
    with Image.open(edit.images[0]) as image:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(tmp_path / "transparent.png")
        for colour, stated in (("white", {}), ("#ff0000", {"background": "#ff0000"})):
            flat = Image.new("RGBA", image.size, colour)
            flat.alpha_composite(image)
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
    made, stock, images = sorted(out.iterdir()), plus.stock(), plus.controls()
    calls: list[tuple[list[Image.Image], dict[str, Any]]] = [
        (images[:1], {}),
        ([images[1], images[0]], {"prompt": NEGATIVE, "width": 64, "height": 96}),
        (images[:1], {"seed": 8}),
    ]
    for path, (given, call) in zip(made, calls, strict=True):
        assert difference(path, plus.stock_image(stock, given, **call)) <= 1
    assert [settings_of(path)["seed"] for path in made] == [7, 7, 8]
    assert difference(made[0], made[2]) > 3


def test_the_same_command_makes_what_is_missing(
    edit: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, beside files of other commands; a complete one makes nothing, another one numbers on."""
    shutil.copyfile(edit.images[0], tmp_path / "a.png")
    file = edit.lines(tmp_path, *({"path_control": "a.png", "seed": seed, "size": "64x48"} for seed in (1, 2, 1)))
    words = ["sample", "--lora", str(edit.folder), "--prompts", file, "--steps", "2", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--compare"]) == 0
    sheets = [path.name for path in (tmp_path / "out").glob("compare-*")]
    assert sorted(sheets) == ["compare-0001.html", "compare-0001.png"]
    made = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    for gone in (["0002.png"], ["0001-without.png", "0003.png", *sheets], sheets[:1], []):
        for name in gone:
            (tmp_path / "out" / name).unlink()
        assert cli.main([*words, "--compare"]) == 0
        assert f"image     {6 - len(set(gone) - set(sheets))} of 6 are there" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == made
    assert cli.main(words) == 0, "the same images without comparison"
    assert cli.main([*words, "--guidance", "2"]) == 0
    new = sorted(path.name for path in (tmp_path / "out").iterdir() if path not in made)
    assert new == ["0004.png", "0005.png", "0006.png"]


def make_blanks(request: Any, *passes: bool) -> None:
    """Images of one colour in place of those that the command would make."""
    for job in request.jobs:
        for trained in passes or request.passes:
            recorded = sample_request.settings_of(request, job, trained)
            save_png(Image.new("RGB", (64, 48)), job.file(trained), mixres=recorded)


def test_the_image_of_another_lora_is_not_taken_for_its_own(edit: Result, tmp_path: Path) -> None:
    """The image without it is the same for both; an interrupted command is finished, whatever it has made."""
    out, loras = tmp_path / "out", [str(edit.folder), str(changed(edit, tmp_path, step=8))]
    out.mkdir()
    for lora, name in zip(loras, ("0001.png", "0002.png"), strict=True):
        request = edit.request(out, lora=lora, compare=True)
        assert [job.path.name for job in request.jobs] == [name]
        make_blanks(request)
        sample(request)
        for left in ((True, False), (True,), (False,)):
            for file in (request.jobs[0].file(trained) for trained in (True, False)):
                file.unlink(missing_ok=True)
            make_blanks(request, *left)
            assert edit.request(out, lora=lora, compare=True).jobs == request.jobs
        make_blanks(request)
        assert edit.request(out, lora=lora).jobs == request.jobs, "the same image without comparison"


def test_a_command_that_has_grown_has_a_new_grid_and_page(edit: Result, tmp_path: Path) -> None:
    shutil.copyfile(edit.images[0], tmp_path / "a.png")
    lines: list[dict[str, Any]] = [{"path_control": "a.png"}, {"path_control": "a.png", "seed": 3}]
    (out := tmp_path / "out").mkdir()
    for own, shown in ((lines[:1], 1), (lines, 2), ([lines[0] | {"path_target": "a.png"}, lines[1]], 2)):
        request = edit.request(out, prompts=edit.lines(tmp_path, *own), size="64x48", compare=True)
        make_blanks(request)
        sample(request)
        with Image.open(out / "compare-0001.png") as grid:
            targets = any("path_target" in line for line in own)
            assert (len(grid.text), grid.width) == (shown, 12 + (3 + targets) * (224 + 12))
        page = (out / "compare-0001.html").read_text()
        assert (page.count("0002.png: LoRA"), "0001.png: target" in page) == (shown - 1, targets)


def test_an_exported_lokr_is_sampled_as_the_file_of_the_run(
    trained_of: Callable[[str], Result], tmp_path: Path
) -> None:
    """It has the recipe alone. Methods that training refuses under a LoKr are refused here too."""
    plus, out = trained_of("qwen_image_edit_plus"), tmp_path / "comfyui.safetensors"
    assert cli.main(["export", str(plus.folder), "--format", "comfyui", "--out", str(out)]) == 0
    layers = []
    for file in (plus.folder / FILE_NAME, out):
        model: Any = plus.case.at(plus.base).load_transformer(dtype=torch.float32, device=torch.device("cpu"))
        attach(SimpleNamespace(transformer=model), read_header(str(file)))
        layers.append({n: (m.scaling["default"], m.get_delta_weight("default")) for n, m in model.named_modules()
                       if isinstance(m, LoKrLayer)})  # fmt: skip
    ours, theirs = layers
    assert ours.keys() == theirs.keys() and ours
    assert all(ours[name][0] == theirs[name][0] and torch.equal(ours[name][1], theirs[name][1]) for name in ours)
    for method in ("nf4", "bnb_int8"):
        reason = refusal(plus, tmp_path / "out", quantize=method)
        assert reason.startswith(f"--quantize: {method} does not fit ") and reason.endswith(": use int8, fp8 or null")


class Page(HTMLParser):
    """What a page holds: its texts, the elements by name, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.elements, self.addresses = list[str](), dict[str, list[dict[str, Any]]](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.setdefault(tag, []).append(dict(attrs))
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def decoded(address: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")


def test_large_images_are_smaller_in_a_page() -> None:
    image = Image.merge("RGB", [Image.linear_gradient("L").resize((2000, 900))] * 3)
    names = {"input": image.resize((64, 32)), "base": image, "LoRA": image.rotate(180)}
    page = Page(comparison_page([Comparison("a.png", names, "b", "c")], "d"))
    small, base, made = (decoded(shown["src"]) for shown in page.elements["img"] if shown["alt"])
    assert (small.size, base.size, made.size) == ((64, 32), (1600, 720), (1600, 720))
    assert difference(small, names["input"]) == 0 and difference(base, image.resize(base.size)) <= 8
    assert difference(base, made) > 200


def test_a_comparison_has_inputs_base_lora_and_target(
    trained_of: Callable[[str], Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grid's columns, and a page of its own with the same images, that no prompt can change."""
    plus, prompt = trained_of("qwen_image_edit_plus"), """</p><script>alert('a')</script>"&amp;'{{ 7 * 7 }}"""
    for number, path in enumerate(plus.images):
        shutil.copyfile(path, tmp_path / f"{number}.png")
    first = {"prompt": prompt, "path_control": "0.png", "path_target": "2.png"}
    rows = (first, {"prompt": NEGATIVE, "path_control": "1.png", "path_control_1": "0.png"})
    call = ["sample", "--lora", str(plus.folder), "--compare", *CALL, "--out", str(out := tmp_path / "out")]
    assert cli.main([*call, "--prompts", plus.lines(tmp_path, *rows)]) == 0
    headings = ["input 1", "input 2", "base", "LoRA", "target"]
    with Image.open(out / "compare-0001.png") as grid:
        assert grid.width == 12 + len(headings) * (224 + 12)
        assert [grid.text[f"caption-{number}"] for number in range(2)] == [prompt, NEGATIVE]
    page = Page((out / "compare-0001.html").read_text())
    assert {prompt, NEGATIVE} <= set(page.texts) and len(page.elements["script"]) == 1
    assert page.addresses and all(text.startswith("data:image/webp;base64,") for text in page.addresses)
    assert "http" not in re.sub("http-equiv", "", (out / "compare-0001.html").read_text().lower())
    shown = [image for image in page.elements["img"] if image["alt"]]
    assert [image["alt"] for image in shown] == [
        f"{file}: {name}"
        for file, own in (("0001.png", ["input 1", *headings[2:]]), ("0002.png", headings[:4])) for name in own
    ]  # fmt: skip
    for image, path in zip(shown, (plus.images[0], out / "0001-without.png", out / "0001.png"), strict=False):
        assert difference(decoded(image["src"]), path) == 0
    assert [one["type"] for one in page.elements["input"]] == ["range"] * 2 and len(page.elements["select"]) == 4
    (tmp_path / "2.png").unlink()
    file = plus.lines(tmp_path, first)
    capsys.readouterr()
    assert cli.main([*call, "--prompts", file]) == 2
    assert "'path_target': 2.png" in capsys.readouterr().err
    assert cli.main([*call[:3], *call[4:], "--prompts", file]) == 0, "only to compare it is opened"


@pytest.mark.slow
def test_a_command_that_is_killed_is_finished_by_the_same_one(edit: Result, tmp_path: Path) -> None:
    shutil.copyfile(edit.images[0], tmp_path / "a.png")
    lines = [{"path_control": "a.png", "seed": seed, "size": "192x160"} for seed in range(4)]
    words = ["sample", "--lora", str(edit.folder), "--prompts", edit.lines(tmp_path, *lines), "--steps", "8"]
    words += ["--batch-tokens", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "train.py", *words, "--out", str(killed)]
    with subprocess.Popen(command, env=environment()) as process:
        while process.poll() is None and not (killed / "0002.png").exists():
            time.sleep(0.01)
        process.kill()
    assert 2 <= len(list(killed.glob("*.png"))) < 4
    for out in (killed, whole):
        assert cli.main([*words, "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in killed.glob("*.png")} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_the_text_encoder_is_gone_before_the_transformer_comes(edit: Result, tmp_path: Path) -> None:
    """Each is loaded once, whatever the number of images; prompts are encoded of those that are to be made."""
    family, seen, order, encoded = edit.case.at(edit.base), list[Any](), list[str](), list[str]()

    def encoders(**named: Any) -> Any:
        order.append("encoders")
        pipeline = family.load_encoders(**named)
        seen.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    def transformer(**named: Any) -> Any:
        order.append("transformer")
        assert {reference() for reference in seen} == {None}
        return family.load_transformer(**named)

    def encode_prompt(encoders: Any, *, prompt: str, **named: Any) -> Any:
        encoded.append(prompt)
        return family.encode_prompt(encoders, prompt=prompt, **named)

    watched = copy(family)
    vars(watched).update(load_encoders=encoders, load_transformer=transformer, encode_prompt=encode_prompt)
    shutil.copyfile(edit.images[0], tmp_path / "a.png")
    file = edit.lines(tmp_path, *({"prompt": word, "path_control": "a.png"} for word in ("red", "blue")))
    request = edit.request(tmp_path / "out", prompts=file, size="64x48", steps="2", compare=True, batch_tokens="1")
    sample(replace(request, family=watched))
    assert (order, encoded) == (["encoders", "transformer"], ["red", "blue"])
    (tmp_path / "out" / "0002.png").unlink()
    sample(replace(request, family=watched))
    assert encoded[2:] == ["blue"]
    (tmp_path / "out" / "0002.png").unlink()
    whole = {"family": watched, "options": request.options.model_copy(update={"batch_tokens": 10**6})}
    sample(replace(request, **whole))
    assert encoded[3:] == ["red", "blue"], "one batch, which is made as it was"


def test_an_image_that_changed_after_the_start_is_one_line(edit: Result, tmp_path: Path) -> None:
    path = shutil.copyfile(edit.images[0], tmp_path / "a.png")
    request = edit.request(tmp_path / "out", image=[str(path)], size="64x48", steps="2")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WorkError, match=r"a\.png: is damaged.*changed after the start: run the command again"):
        sample(request)


@pytest.mark.slow
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
    wider = json.loads((whole / "config.json").read_text()) | {"num_layers": 3}
    (whole / "config.json").write_text(json.dumps(wider))
    with pytest.raises(UserError, match="num_layers of its transformer is 2, trained was 3"):
        given.request(tmp_path / "new")


def test_over_a_quantised_base_the_image_is_that_of_the_stock_pipeline(edit: Result, tmp_path: Path) -> None:
    """Quantised as under the LoRA in training, unless another way is asked for."""
    lora = str(changed(edit, tmp_path, quantize="fp8"))
    for name, options in (("as_trained", {}), ("unrounded", {"quantize": "null"})):
        sample(edit.request(tmp_path / name, lora=lora, size="96x64", steps="2", seed="7", **options))
    as_trained, unrounded = (tmp_path / name / "0001.png" for name in ("as_trained", "unrounded"))
    assert [settings_of(path)["quantize"] for path in (as_trained, unrounded)] == ["fp8", None]
    stock = edit.stock(lora=False)
    stock.transformer = QwenImageTransformer2DModel.from_pretrained(
        edit.base, subfolder="transformer", dtype=torch.float32,
        quantization_config=quantization_config("fp8", QUANTIZE_EXCLUSIONS, dtype=torch.float32, device="cpu"),
    )  # fmt: skip
    stock.load_lora_weights(edit.folder / FILE_NAME)
    expected = edit.stock_image(stock)
    assert difference(as_trained, expected) <= 1 < difference(unrounded, expected)


# --- What is asked for ----------------------------------------------------------------------------------------------


def test_without_a_size_and_controls_it_is_the_stock_pipelines(
    trained_of: Callable[[str], Result], tmp_path: Path
) -> None:
    (job,) = trained_of("qwen_image").request(tmp_path / "out").jobs
    assert job.size == Size(1024, 1024)


def test_images_are_numbered_after_those_that_are_there(edit: Result, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    taken = {"20000.jpg": "0001.png", "0001.png": "0002.png", "0004-without.png": "0005.png"}
    for there, following in (taken | {"compare-0009.png": "0010.png", "9999.png": "10000.png"}).items():
        (out / there).write_bytes(b"mine")
        assert [job.path.name for job in edit.request(out).jobs] == [following]


RUN, IMAGE = ["--lora", "RUN", "--out", "OUT"], ["--lora", "RUN", "--out", "OUT", "--image", "IMAGE", "--prompt", "a"]
WRONG = {
    "nothing": ([], ["--lora: not given", "--out: not given"]),
    "values": (
        [*IMAGE, "--size", "1024", "--steps", "1"],
        ["--size: given 1024, should be WIDTHxHEIGHT", "--steps: given 1, should be greater than or equal to 2"],
    ),
    "no prompt": (RUN, ["--prompt: give either --prompt TEXT or --prompts FILE"]),
    "image": ([*RUN, "--prompts", "x", "--image", "IMAGE"], ["--image: the lines of --prompts name their images"]),
    "file": ([*RUN, "--prompts", "none.jsonl"], ["--prompts: none.jsonl cannot be read"]),
    "no guidance": ([*IMAGE, "--negative-prompt", "b"], ["--negative-prompt: has no effect without guidance"]),
    "empty": ([*RUN, "--prompt", " "], ["--prompt: the prompt is empty"]),
    "twice": ([*IMAGE, "--seed", "1", "--seed", "2"], ["--seed: given twice"]),
    "device": ([*IMAGE, "--device", "toaster"], ["--device: toaster cannot be used: "]),
    "base": ([*IMAGE, "--base", "OUT"], ["--base: there is no folder"]),
    "family": ([*IMAGE, "--base", "OTHER"], ["--base: OTHER does not fit RUN/WEIGHTS: it is a qwen_image, "]),
    "out": ([*IMAGE[:3], "IMAGE", *IMAGE[4:]], ["--out: IMAGE cannot be written; name another folder"]),
    "width": ([*IMAGE, "--base", "NARROW"], ["--base: NARROW does not fit RUN/WEIGHTS: its "]),
    "layers": ([*IMAGE, "--base", "SHORT"], ["--base: SHORT does not fit RUN/WEIGHTS: it has no layer "]),
    "fit": (
        [*RUN, "--image", "DAMAGED", "--image", "IMAGE", "--prompt", "LONG", "--size", "100x64"],
        [
            "--image, --prompt: DAMAGED: is damaged",
            "--image, --prompt: Qwen-Image-Edit takes exactly one control image, there are 2",
            "--image, --prompt: the prompt is 4401 tokens long, more than 1024",
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
    for name, other in (("NARROW", {"num_attention_heads": 2}), ("SHORT", {"num_layers": 1})):
        config = shutil.copytree(edit.base, root / name) / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | other))
    places = {"RUN": edit.folder, "IMAGE": edit.images[0], "OTHER": base_of(CASES["qwen_image"]), "OUT": root / "out"}
    places |= {name: root / name for name in ("NARROW", "SHORT")} | {"DAMAGED": root / "damaged.png"}
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
    return caught.value.messages[0]


def test_all_wrong_lines_of_a_file_are_reported_with_their_numbers(edit: Result, tmp_path: Path) -> None:
    shutil.copyfile(edit.images[0], tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(edit.images[0])
    lines = {
        "'path_control': ../a.png is not below the manifest's folder": {"path_control": "../a.png"},
        "'path_control': link.png is a link out of the manifest's folder; put the": {"path_control": "link.png"},
        "'sed': unknown; correct it": {"path_control": "a.png", "sed": 3},
        "'seed': given True, should be a valid integer": {"path_control": "a.png", "seed": True},
        "'size': 64x1024 has aspect 16.0": {"path_control": "a.png", "size": "64x1024"},
        "its control images have a gap": {"path_control": "a.png", "path_control_2": "a.png"},
        "the line is not a JSON object": 7,
        "Qwen-Image-Edit takes exactly one control image, there are 0": {},
        "'size': 64x100 has a side that is no multiple of 16": {"path_control": "a.png", "size": "64x100"},
    }
    file = edit.lines(tmp_path, *lines.values())
    with pytest.raises(UserError) as caught:
        edit.request(tmp_path / "out", prompts=file)
    for number, (message, start) in enumerate(zip(caught.value.messages, lines, strict=True)):
        assert re.sub(r":'", ": '", message).startswith(f"{file}:{2 * number + 1}: {start}"), message
    both = edit.lines(tmp_path, {"path_control": "none.png", "sed": 3, "seed": -1})
    with pytest.raises(UserError) as caught:
        edit.request(tmp_path / "out", prompts=both)
    assert len(caught.value.messages) == 3, "all that is wrong with one line"


def test_the_base_is_that_of_the_result_or_the_one_given(edit: Result, tmp_path: Path) -> None:
    gone, out = str(changed(edit, tmp_path, base="/gone")), tmp_path / "out"
    reason = refusal(edit, out, lora=gone)
    assert reason.startswith(f"--base: not given, and {gone} names '/gone': there is no folder")
    none = str(changed(edit, tmp_path, text_area=4096))
    assert "gives its control images the areas" in refusal(edit, out, lora=none)
    moved = shutil.copytree(edit.base, tmp_path / "moved")
    assert edit.request(out, lora=gone, base=str(moved)).family.path == str(moved)
    shutil.rmtree(moved / "text_encoder")
    assert refusal(edit, out, base=str(moved)) == f"--base: {moved / 'text_encoder'} is missing: download it"


def changed(run: Result, folder: Path, *, gone: bool = False, **recipe: Any) -> Path:
    """The LoRA of `run` with another recipe."""
    with safe_open(run.folder / FILE_NAME, "pt") as file:
        metadata = file.metadata()
    stated = {} if gone else {"mixres": json.dumps(json.loads(metadata.pop("mixres")) | recipe)}
    path = folder / f"changed-{len(list(folder.iterdir()))}.safetensors"
    save_file(load_file(run.folder / FILE_NAME), path, {k: v for k, v in metadata.items() if k != "mixres"} | stated)
    return path


def test_the_quantisation_must_work_here_and_what_is_merged_is_no_base(
    edit: Result, small_run: Path, tmp_path: Path
) -> None:
    lora = str(changed(edit, tmp_path, quantize="nf4"))
    reason = "was trained with nf4: nf4 is bitsandbytes' and needs a CUDA device"
    assert reason in refusal(edit, tmp_path / "out", lora=lora, device="cpu")
    assert edit.request(tmp_path / "out", lora=lora, device="cpu", quantize="int8").quantize == "int8"
    full = shutil.copytree(edit.base / "transformer", tmp_path / "full")
    stated = recipe(load_config(small_run, edit.case.overrides()), edit.case.at(edit.base), 3)
    (full / RECIPE_FILE).write_text(json.dumps(stated | {"quantize": "int8", "base": str(edit.base)}))
    assert edit.request(tmp_path / "out", lora=str(full)).quantize is None


def test_weights_without_a_recipe_that_can_be_used_are_refused(edit: Result, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"never opened")
    (tmp_path / "empty").mkdir()
    both = shutil.copytree(edit.folder, tmp_path / "both")
    (both / "transformer").mkdir()
    (tmp_path / "bare" / "transformer").mkdir(parents=True)
    reasons: dict[Path, str] = {
        tmp_path / "none": "there is no file",
        tmp_path / "lora.bin": "is not a .safetensors file",
        tmp_path / "empty": "holds neither",
        both: "holds both",
        tmp_path / "bare": "has no recipe of mixres",
        changed(edit, tmp_path, gone=True): "has no recipe of mixres",
        changed(edit, tmp_path, format=2): "was written by another version of mixres",
        changed(edit, tmp_path, family="other"): "was written by another version of mixres",
        changed(edit, tmp_path, base=None): "has a wrong recipe, train again: base: given None",
        changed(edit, tmp_path, background="mauve"): "background: given mauve, should match pattern",
        **{changed(edit, tmp_path, control_area=area): f"control_area: given {area}" for area in (12, 2**40, "big")},
    }
    for path, reason in reasons.items():
        message = refusal(edit, tmp_path / "out", lora=str(path))
        assert message.startswith("--lora: ") and reason in message
