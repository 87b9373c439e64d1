"""What is exported does what was trained, in diffusers and under ComfyUI's names, or nothing is written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixres import cli
from mixres.config.load import load_config
from mixres.errors import UserError, WorkError
from mixres.geometry import Size
from mixres.inference.artifact import find_base, find_result
from mixres.inference.export import export, placed, write_checked
from mixres.inference.export_request import make_request
from mixres.inference.tensor_file import Entry
from mixres.models.lora_file import FILE_NAME, RECIPE_FILE, RECIPE_KEY
from mixres.models.qwen.layers import LORA_PRESETS
from mixres.training.trainer import train
from support.family_cases import CASES
from support.lora_files import write_lora


def run_export(run: Path, out: Path, form: str, *, merge: bool = False, base: Path | None = None) -> Path:
    export(make_request(run=str(run), format=form, merge=merge, out=str(out), base=base and str(base)))
    return out


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def bits(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}


def stock(base: Path, **parts: Any) -> Any:
    """The stock pipeline without its encoders, around a transformer that mixres never touched."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
    return QwenImageEditPipeline.from_pretrained(base, **absent, **parts)


@torch.no_grad()
def output(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    velocity: Tensor = transformer(
        hidden_states=torch.randn(1, 24, 64, generator=generator),
        timestep=torch.tensor([0.4]),
        encoder_hidden_states=torch.randn(1, 9, 64, generator=generator),
        img_shapes=[[(1, 4, 3), (1, 3, 4)]],
        return_dict=False,
    )[0]
    return velocity


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module", params=[(preset, dora) for preset in LORA_PRESETS for dora in (False, True)], ids=str)
def adapters(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, bool]:
    """A LoRA file for each preset, and a DoRA."""
    preset, dora = request.param
    overrides = [f"model.lora.target_modules=[{preset}]", f"model.lora.use_dora={str(dora).lower()}"]
    return write_lora(tmp_path_factory.mktemp("lora"), tiny_base, *overrides), dora


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for every linear layer there is."""
    return write_lora(tmp_path_factory.mktemp("lora"), tiny_base, "model.lora.target_modules=[all]")


# --- Merged ----------------------------------------------------------------------------------------------------------


def test_merged_weights_give_the_outputs_of_base_and_adapters(
    tiny_base: Path, adapters: tuple[Path, bool], tmp_path: Path
) -> None:
    """Both through the stock pipeline's own loading: the LoRA file, and a pipeline whose transformer is the export."""
    file, _ = adapters
    shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("transformer"))
    run_export(file, tmp_path / "base" / "transformer", "diffusers", merge=True)
    pipeline = stock(tiny_base)
    before = output(pipeline.transformer)
    pipeline.load_lora_weights(file)
    trained, merged = output(pipeline.transformer), output(stock(tmp_path / "base").transformer)
    assert apart(trained, before) > 0.01
    assert apart(merged, trained) <= 1e-5


def test_one_file_for_comfyui_holds_the_same_weights(adapters: tuple[Path, bool], tmp_path: Path) -> None:
    file, _ = adapters
    folder = run_export(file, tmp_path / "transformer", "diffusers", merge=True)
    single = run_export(file, tmp_path / "single.safetensors", "comfyui", merge=True)
    assert bits(stored(single)) == bits(stored(folder))
    assert metadata(single) == metadata(folder / "diffusion_pytorch_model.safetensors")
    recipe = json.loads(metadata(file)[RECIPE_KEY])
    assert json.loads(metadata(single)[RECIPE_KEY]) == {**recipe, "merged": True}
    assert json.loads((folder / RECIPE_FILE).read_text()) == {**recipe, "merged": True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_rounds_once_to_the_base_and_leaves_all_else_as_it_was(
    tiny_base: Path, lora: Path, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow, wide = (shutil.copytree(tiny_base, tmp_path / name) for name in ("narrow", "wide"))
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer").to(dtype)
    transformer.save_pretrained(narrow / "transformer")
    transformer.float().save_pretrained(wide / "transformer")
    exact = stored(run_export(lora, tmp_path / "exact", "diffusers", merge=True, base=wide))
    capsys.readouterr()
    rounded = stored(run_export(lora, tmp_path / "rounded", "diffusers", merge=True, base=narrow))
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("rounding"))
    assert bits(rounded) == bits({name: tensor.to(dtype) for name, tensor in exact.items()})
    before = stored(narrow / "transformer")
    changed = {name for name in before if not torch.equal(before[name], rounded[name])}
    untrained = {f"transformer_blocks.1.{name}.weight" for name in ("attn.add_q_proj", "attn.to_add_out")}
    untrained |= {f"transformer_blocks.1.txt_mlp.net.{name}.weight" for name in ("0.proj", "2")}
    assert changed == {name for name, t in before.items() if name.endswith("weight") and t.ndim == 2} - untrained
    lost, moved = (
        sum(float((a[n].double() - exact[n].double()).norm()) ** 2 for n in changed) ** 0.5 for a in (rounded, before)
    )
    share = float(told.partition(" of what")[0].rpartition(" ")[2].rstrip("%")) / 100
    assert 0 < share == pytest.approx(lost / moved, abs=6e-5)


def test_a_base_in_several_files_stays_in_them(tiny_base: Path, lora: Path, tmp_path: Path) -> None:
    split = shutil.copytree(tiny_base, tmp_path / "split", ignore=shutil.ignore_patterns("transformer"))
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer")
    transformer.save_pretrained(split / "transformer", max_shard_size="1MB")
    whole = run_export(lora, tmp_path / "whole", "diffusers", merge=True)
    parts = run_export(lora, tmp_path / "parts", "diffusers", merge=True, base=split)
    single = run_export(lora, tmp_path / "single.safetensors", "comfyui", merge=True, base=split)
    names = {path.name for path in (split / "transformer").iterdir()}
    assert len(names) > 4 and {path.name for path in parts.iterdir()} == names | {RECIPE_FILE}
    assert bits(stored(parts)) == bits(stored(whole)) == bits(stored(single))
    loaded = [QwenImageTransformer2DModel.from_pretrained(folder).state_dict() for folder in (whole, parts)]
    assert bits(loaded[0]) == bits(loaded[1])


def test_merged_weights_are_a_result_that_can_be_exported_again_and_sampled_with(lora: Path, tmp_path: Path) -> None:
    folder = run_export(lora, tmp_path / "merged", "diffusers", merge=True)
    single = run_export(folder, tmp_path / "single.safetensors", "comfyui", merge=True)
    assert bits(stored(single)) == bits(stored(folder))
    result = find_result(str(folder), "--lora")  # as `sample` finds it
    assert (result.lora, result.recipe["step"]) == (None, 7)
    assert find_base(result, None, "--base").areas(Size(512, 512)) == {"control_area": 1024 * 1024}


# --- The names of ComfyUI --------------------------------------------------------------------------------------------
# Read in Comfy-Org/ComfyUI, nothing copied: the modules of a Qwen-Image transformer, comfy/ldm/qwen_image/model.py at
# 01f4512bf804 (comfyanonymous/ComfyUI); `diffusion_model.` before each, comfy/lora.py at 17358c8f73b5; lora_A, lora_B
# and alpha, a number, behind it, comfy/weight_adapter/lora.py at 6f98b150e065; the mark of a transformer whose controls
# have the time step 0, comfy/model_detection.py at 0b61ce5baa9e.

WIDTH, TEXT, HEAD = 128, 64, 32  # of the tiny base


def comfyui_modules(blocks: int) -> dict[str, tuple[int, ...]]:
    """The shape of each module's weight; all with two dimensions have a bias too."""
    block: dict[str, tuple[int, ...]] = {
        **{f"{stream}_mod.1": (6 * WIDTH, WIDTH) for stream in ("img", "txt")},
        **{f"{stream}_mlp.net.0.proj": (4 * WIDTH, WIDTH) for stream in ("img", "txt")},
        **{f"{stream}_mlp.net.2": (WIDTH, 4 * WIDTH) for stream in ("img", "txt")},
        **{f"attn.to_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "out.0", "add_out")},
        **{f"attn.add_{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v")},
        **{f"attn.norm_{name}": (HEAD,) for name in ("q", "k", "added_q", "added_k")},
    }
    return {
        "img_in": (WIDTH, 64),
        "txt_in": (WIDTH, TEXT),
        "txt_norm": (TEXT,),
        "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
        "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
        "norm_out.linear": (2 * WIDTH, WIDTH),
        "proj_out": (64, WIDTH),
        **{f"transformer_blocks.{b}.{name}": shape for b in range(blocks) for name, shape in block.items()},
    }


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_a_lora_has_the_names_and_shapes_of_comfyui(adapters: tuple[Path, bool], tmp_path: Path) -> None:
    file, dora = adapters
    if dora:
        with pytest.raises(UserError, match=r"ComfyUI does not apply a DoRA as it was trained, .*: add --merge"):
            run_export(file, tmp_path / "comfyui.safetensors", "comfyui")
        return
    layers = {name.split(".", 1)[1].partition(".lora_")[0] for name in load_file(file)}
    table = comfyui_modules(2)
    assert layers <= {name for name, shape in table.items() if len(shape) == 2}
    exported = stored(run_export(file, tmp_path / "comfyui.safetensors", "comfyui"))
    assert shapes(exported) == {
        f"diffusion_model.{layer}.{part}": shape
        for layer in layers
        for part, shape in (
            ("lora_A.weight", (4, table[layer][1])),
            ("lora_B.weight", (table[layer][0], 4)),
            ("alpha", ()),
        )
    }


def test_comfyui_adds_what_was_trained(tiny_base: Path, lora: Path, tmp_path: Path) -> None:
    """Its sum for each module, alpha / rows of A x B A, on the base's weights: the merged weights."""
    exported = stored(run_export(lora, tmp_path / "comfyui.safetensors", "comfyui"))
    merged = stored(run_export(lora, tmp_path / "merged", "diffusers", merge=True))
    base = stored(tiny_base / "transformer")
    modules = [name.removesuffix(".alpha") for name in exported if name.endswith(".alpha")]
    assert len(modules) == len([name for name, t in merged.items() if not torch.equal(t, base[name])])
    for module in modules:
        down, up, alpha = (exported[f"{module}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        assert (alpha.item() / down.shape[0], alpha.dtype) == (6 / 4, torch.float32)
        name = f"{module.removeprefix('diffusion_model.')}.weight"
        assert apart(base[name] + alpha.item() / down.shape[0] * (up @ down), merged[name]) <= 1e-6


def test_diffusers_takes_the_file_for_comfyui_too(tiny_base: Path, lora: Path, tmp_path: Path) -> None:
    exported = run_export(lora, tmp_path / "comfyui.safetensors", "comfyui")
    outputs = []
    for file in (lora, exported):
        pipeline = stock(tiny_base)
        pipeline.load_lora_weights(file)
        outputs.append(output(pipeline.transformer))
    assert apart(outputs[1], outputs[0]) <= 1e-5
    assert json.loads(metadata(exported)[RECIPE_KEY]) == json.loads(metadata(lora)[RECIPE_KEY])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_transformer_has_the_names_and_shapes_of_comfyui(
    case: Any, base_of: Callable[[Any], Path], tmp_path: Path
) -> None:
    base = base_of(case)
    file = write_lora(tmp_path, base)
    exported = stored(run_export(file, tmp_path / "single.safetensors", "comfyui", merge=True))
    expected = {f"{name}.weight": shape for name, shape in comfyui_modules(2).items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in comfyui_modules(2).items() if len(shape) == 2}
    assert shapes(exported) == expected | ({"__index_timestep_zero__": (0,)} if case.zero_cond_t else {})


# --- Real runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def run(
    small_run: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A run of four steps that has ended, with a checkpoint every second step and an average."""
    folder = tmp_path_factory.mktemp("run")
    overrides = (f"logging.output_dir={folder}", f"cache.cache_dir={small_cache}", "data.held_out=null")
    settings = ("train.max_train_steps=4", "train.ema_decay=0.5", f"model.lora.use_dora={str(request.param).lower()}")
    train(load_config(small_run, [*overrides, *settings]))
    return folder


def test_a_run_its_average_and_its_last_checkpoint_make_the_files_that_the_run_wrote(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "step-00000004"
    for number, (given, file) in enumerate(
        [(run, run), (run / "ema", run / "ema"), (run / FILE_NAME, run), (last, run), (run / "checkpoints/latest", run)]
    ):
        out = run_export(given, tmp_path / f"{number}.safetensors", "diffusers")
        assert out.read_bytes() == (file / FILE_NAME).read_bytes()
    assert (run / FILE_NAME).read_bytes() != (run / "ema" / FILE_NAME).read_bytes()


def test_a_checkpoint_before_the_end_is_a_lora_of_its_step(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = run_export(run / "checkpoints" / "step-00000002", tmp_path / "earlier.safetensors", "diffusers")
    assert json.loads(metadata(out)[RECIPE_KEY])["step"] == 2
    earlier, result = load_file(out), load_file(run / FILE_NAME)
    assert shapes(earlier) == shapes(result)
    assert not any(torch.equal(earlier[name], result[name]) for name in earlier)
    pipeline = stock(tiny_base)
    pipeline.load_lora_weights(out)
    merged = run_export(run / "checkpoints" / "step-00000002", tmp_path / "merged", "diffusers", merge=True)
    assert apart(output(QwenImageTransformer2DModel.from_pretrained(merged)), output(pipeline.transformer)) <= 1e-5


def test_an_unfinished_run_and_a_damaged_checkpoint_are_told(run: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (unfinished / FILE_NAME).unlink()
    newest = unfinished / "checkpoints" / "step-00000004"
    with pytest.raises(UserError, match=f"has no result yet: let its run end, or name its newest checkpoint {newest}"):
        run_export(unfinished, tmp_path / "a.safetensors", "diffusers")
    weights = newest / "trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged \(trainable.safetensors is not what was saved\)"):
        run_export(newest, tmp_path / "a.safetensors", "diffusers")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_run_that_trained_all_weights_becomes_one_file(small_run: Path, small_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = (f"logging.output_dir={folder}", f"cache.cache_dir={small_cache}", "data.held_out=null")
    train(load_config(small_run, [*overrides, "train.max_train_steps=2", "model.lora=null"]))
    single = run_export(folder, tmp_path / "single.safetensors", "comfyui", merge=True)
    assert bits(stored(single)) == bits(stored(folder / "transformer"))
    recipe = json.loads((folder / "transformer" / RECIPE_FILE).read_text())
    assert json.loads(metadata(single)[RECIPE_KEY]) == recipe
    whole, out = folder / "transformer", tmp_path / "out"
    for form, merge, reason in (
        ("diffusers", False, f"RUN: {whole} holds all weights in diffusers' format as it is: copy it"),
        ("diffusers", True, f"RUN: {whole} holds all weights in diffusers' format as it is: copy it"),
        ("comfyui", False, f"--merge: not given, and {whole} holds all weights and no LoRA: add it"),
    ):
        with pytest.raises(UserError) as caught:
            run_export(folder, out if merge else tmp_path / "out.safetensors", form, merge=merge)
        assert caught.value.messages == (reason,)
    with pytest.raises(UserError, match="is of a run that trains all weights: name its result"):
        run_export(folder / "checkpoints" / "step-00000002", tmp_path / "out.safetensors", "diffusers")


# --- What is refused, and what is left when something fails ----------------------------------------------------------


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(["export", *words]) == 2
    return [line.removeprefix("mixres: error: ") for line in capsys.readouterr().err.splitlines()]


def test_all_that_is_wrong_is_told_at_once(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.txt"
    there.write_text("mine")
    assert refused(capsys=capsys) == [
        "RUN: not given; write export RUN, a run folder, one of its checkpoints, or a .safetensors file",
        "--format: not given; write one of diffusers, comfyui",
        "--out: not given; write --out FILE, which ends in .safetensors (a folder for diffusers with --merge)",
    ]
    assert refused(str(tmp_path), "--format", "comfy", "--mrge", capsys=capsys)[:2] == [
        "--mrge: unknown option of export; see export --help; did you mean '--merge'?",
        "--format: given comfy, allowed: one of diffusers, comfyui",
    ]
    lines = refused(str(lora), "--format", "comfyui", "--out", str(there), "--base", "elsewhere", capsys=capsys)
    assert lines == [
        "--base: has no effect where no LoRA is merged into it: leave it out",
        f"--out: {there} is to be a file: let its name end in .safetensors",
        f"--out: {there} is there and would be written over: choose another name, or take it away",
    ]
    assert there.read_text() == "mine"


def test_a_base_that_cannot_be_had_or_does_not_fit_is_told(
    tiny_base: Path, lora: Path, tmp_path: Path, base_of: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    gone = shutil.copytree(tiny_base, tmp_path / "gone")
    file = write_lora(tmp_path / "lora", gone)
    shutil.rmtree(gone)
    merge = ("--format", "diffusers", "--merge", "--out", str(tmp_path / "out"))
    (line,) = refused(str(file), *merge, capsys=capsys)
    assert line.startswith(f"--base: not given, and {file} names '{gone}': there is no folder '{gone}'")
    other = base_of(CASES["qwen_image"])
    (line,) = refused(str(file), *merge, "--base", str(other), capsys=capsys)
    assert line.startswith(f"--base: {other} does not fit {file}: ")
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["img_in.weight"] = tensors["img_in.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, weights)
    (line,) = refused(str(file), *merge, "--base", str(broken), capsys=capsys)
    assert line == (
        f"--base: {broken / 'transformer'} holds F8_E4M3 weights (img_in.weight): name a base of "
        "F64, F32, F16, BF16; name another"
    )
    weights.write_bytes(weights.read_bytes()[:-1])
    (line,) = refused(str(file), *merge, "--base", str(broken), capsys=capsys)
    assert line.startswith(f"--base: {broken / 'transformer'} cannot be read: ")
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_program_is_refused(tiny_base: Path, lora: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(lora), foreign, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^RUN: .*foreign.safetensors does not say what it was trained on"):
        run_export(foreign, tmp_path / "out.safetensors", "comfyui")
    comfyui = run_export(lora, tmp_path / "comfyui.safetensors", "comfyui")
    with pytest.raises(UserError, match="is no LoRA of one rank in diffusers' format"):
        run_export(comfyui, tmp_path / "out.safetensors", "diffusers")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tiny_base: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base whose last tensor is a hole: by its header twice the free space, on the disk no more than before."""
    large = shutil.copytree(tiny_base, tmp_path / "large")
    weights = large / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin, size = len(data) - 8 - length, shutil.disk_usage(tmp_path).free // 2048 * 4096
    head = json.dumps(header | {"hole": {"dtype": "F32", "shape": [size // 4], "data_offsets": [begin, begin + size]}})
    weights.write_bytes(len(head).to_bytes(8, "little") + head.encode() + data[8 + length :])
    os.truncate(weights, 8 + len(head) + begin + size)
    out = tmp_path / "new" / "out"
    words = (str(lora), "--format", "diffusers", "--merge", "--out", str(out), "--base", str(large))
    (line,) = refused(*words, capsys=capsys)
    assert line.startswith(f"--out: {tmp_path} has ")
    assert line.endswith(f" bytes free and {begin + size + 2**24:,} are needed: make room")
    assert not out.parent.exists()


def test_what_does_not_come_back_as_it_was_written_is_an_error(tmp_path: Path) -> None:
    """The first file is damaged while the second one is written, as a failing disk would."""
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"

    def tensor(name: str) -> Tensor:
        if name == "b":
            data = bytearray(first.read_bytes())
            data[-1] ^= 1
            first.write_bytes(data)
        return torch.ones(3)

    files = {first: {"a": Entry("F32", (3,))}, second: {"b": Entry("F32", (3,))}}
    with pytest.raises(WorkError, match=r"1\.safetensors: reading it back gives something else \(a is another\)"):
        write_checked(files, tensor, {"format": "pt"})


def test_what_has_come_to_be_meanwhile_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    def write() -> None:
        with placed(out) as partial:
            partial.write_text("ours")
            out.write_text("theirs")

    with pytest.raises(WorkError, match="has come to be while this was written"):
        write()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(out.name, "theirs")]


def test_two_exports_to_one_place_do_not_meet(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one is refused while the first writes, which ends as if it had been alone."""
    out = tmp_path / "out.safetensors"
    words = (str(lora), "--format", "comfyui", "--out", str(out))
    with placed(out) as partial:
        partial.write_text("first")
        (line,) = refused(*words, capsys=capsys)
        assert line == f"--out: {out} is being written by another export: wait for it, or choose another name"
        run_export(lora, tmp_path / "other.safetensors", "comfyui")
        assert partial.read_text() == "first"
    assert out.read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "out.safetensors"]


@pytest.mark.parametrize(("form", "merge"), [("diffusers", True), ("comfyui", True), ("comfyui", False)])
def test_a_write_that_fails_leaves_nothing(lora: Path, tmp_path: Path, form: str, merge: bool) -> None:
    out = tmp_path / "new" / ("out" if form == "diffusers" else "out.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run_export(lora, out, form, merge=merge)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(out.parent.iterdir()) == []
    run_export(lora, out, form, merge=merge)
    assert list(out.parent.iterdir()) == [out]


KILLED = """
import resource, signal, sys
from mixres import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # one byte more kills the process
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_what_an_export_that_was_killed_left_is_taken_away(lora: Path, tmp_path: Path) -> None:
    """Killed in the middle of its writing; the same command then writes the same bytes as one in peace."""
    out, peace = tmp_path / "killed" / "out.safetensors", tmp_path / "peace.safetensors"
    run_export(lora, peace, "comfyui", merge=True)
    words = ["export", str(lora), "--format", "comfyui", "--merge", "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, timeout=120)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path.name[:12] for path in out.parent.iterdir()] == [".tmp-export-"]
    run_export(lora, out, "comfyui", merge=True)
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == peace.read_bytes()
