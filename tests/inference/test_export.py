"""What is exported does what was trained, in diffusers and under ComfyUI's names, or nothing is written."""

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixres import cli
from mixres.config.load import load_config
from mixres.errors import UserError, WorkError
from mixres.geometry import Size
from mixres.inference.artifact import find_base, find_result
from mixres.inference.export import export, make_request, merged_weight, placed
from mixres.models.lora import attach
from mixres.models.lora_file import FILE_NAME, MAGNITUDE, RECIPE_FILE, RECIPE_KEY, read_header
from mixres.models.qwen.layers import LORA_PRESETS
from mixres.models.tensor_files import INDEX, write_tensors
from mixres.training.trainer import train
from support.family_cases import CASES
from support.jobs import longest_file
from support.lora_files import overrides_of, write_lora

OTHERS = [("all", "lokr"), ("attention", "lokr, both"), ("attention+mlp", "lokr, whole"), ("all", "loha")]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run_export(run: Path, out: Path, form: str, *, merge: bool = False, base: Path | None = None) -> Path:
    export(make_request(run=str(run), format=form, merge=merge, out=str(out), base=base and str(base)))
    return out


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def metadata(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return {name: json.loads(text) for name, text in opened.metadata().items() if name != "format"}


def bits(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {n: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist()) for n, t in tensors.items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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


@pytest.fixture(scope="session")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for every linear layer there is."""
    return write_lora(tmp_path_factory.mktemp("lora"), tiny_base, "model.lora.target_modules=[all]")


@pytest.fixture(scope="session")
def split(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a transformer in several files. Read only."""
    base = tmp_path_factory.mktemp("split") / "base"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("transformer"))
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer")
    transformer.save_pretrained(base / "transformer", max_shard_size="1MB")
    (base / "transformer" / "left_over.safetensors").write_bytes(b"never opened")
    return base


# --- Merged ----------------------------------------------------------------------------------------------------------


MERGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoraConfig, {"lora_alpha": 7}),
    "dora": (LoraConfig, {"lora_alpha": 7, "use_dora": True}),
    "loha": (LoHaConfig, {"alpha": 6}),  # peft rounds alpha / r to float32
    "lokr": (LoKrConfig, {"alpha": 7, "decompose_factor": 2}),
    "lokr, both": (LoKrConfig, {"alpha": 7, "decompose_factor": 8, "decompose_both": True}),
}


@pytest.mark.parametrize("kind", MERGED)
def test_the_merged_weight_is_what_layer_and_adapter_compute_with(kind: str) -> None:
    """peft's own layer in float64, neither square nor of alpha = r."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 112, bias=False)).double()
    weight, (config, given) = model[0].weight.detach().clone(), MERGED[kind]
    inject_adapter_in_model(config(r=4 if kind == "loha" else 3, target_modules=["0"], **given), model)
    adapter = {}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data + 0.3 * torch.rand_like(parameter) * parameter.requires_grad
        adapter[name.removeprefix("0.").replace(".default", "")] = parameter.detach()
    if kind == "dora":
        adapter[MAGNITUDE] = adapter.pop(f"{MAGNITUDE}.weight")
    merged = merged_weight(weight, adapter, alpha=given.get("alpha", 7))
    x = torch.randn(4, 80, dtype=torch.float64)
    with torch.no_grad():
        assert apart(x @ merged.T, model(x)) <= 1e-14 < apart(x @ weight.T, model(x))


@pytest.mark.parametrize(
    ("preset", "kind"), [*((preset, kind) for preset in LORA_PRESETS for kind in ("lora", "dora")), *OTHERS]
)
def test_merged_weights_give_the_outputs_of_base_and_adapters(
    tiny_base: Path, tmp_path: Path, preset: str, kind: str
) -> None:
    """Both through the stock pipeline's own loading: the LoRA file, and a pipeline whose transformer is the export."""
    overrides = [f"model.lora.target_modules=[{preset}]", *overrides_of(kind)]
    file = write_lora(tmp_path / "lora", tiny_base, *overrides)
    shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("transformer"))
    folder = run_export(file, tmp_path / "base" / "transformer", "diffusers", merge=True)
    pipeline = stock(tiny_base)
    before = output(pipeline.transformer)
    attach(pipeline, read_header(str(file)))
    trained, merged = output(pipeline.transformer), output(stock(tmp_path / "base").transformer)
    assert apart(trained, before) > 0.01
    assert apart(merged, trained) <= 1e-5
    single = run_export(file, tmp_path / "single.safetensors", "comfyui", merge=True)
    assert bits(stored(single)) == bits(stored(folder))
    recipe = metadata(file)[RECIPE_KEY] | {"merged": True}
    assert metadata(single) == metadata(folder / WEIGHTS) == {RECIPE_KEY: recipe}
    assert json.loads((folder / RECIPE_FILE).read_text()) == recipe
    if kind == "dora":
        with pytest.raises(UserError, match=r"^--format: ComfyUI does not apply the DoRA .*: add --merge$"):
            run_export(file, tmp_path / "comfyui.safetensors", "comfyui")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_rounds_once_to_the_base_and_leaves_all_else_as_it_was(
    tiny_base: Path, lora: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    narrow, wide = (shutil.copytree(tiny_base, tmp_path / name) for name in ("narrow", "wide"))
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer").to(dtype)
    transformer.save_pretrained(narrow / "transformer")
    transformer.float().save_pretrained(wide / "transformer")
    exact = stored(run_export(lora, tmp_path / "exact", "diffusers", merge=True, base=wide))
    rounded = stored(run_export(lora, tmp_path / "rounded", "diffusers", merge=True, base=narrow))
    assert bits(rounded) == bits({name: tensor.to(dtype) for name, tensor in exact.items()})
    before = stored(narrow / "transformer")
    changed = {name for name in before if not torch.equal(before[name], rounded[name])}
    layers = {name.partition(".")[2].partition(".lora_")[0] for name in stored(lora)}
    assert changed == {f"{layer}.weight" for layer in layers}


def test_a_base_in_several_files_stays_in_them(split: Path, lora: Path, tmp_path: Path) -> None:
    whole = run_export(lora, tmp_path / "whole", "diffusers", merge=True)
    parts = run_export(lora, tmp_path / "parts", "diffusers", merge=True, base=split)
    single = run_export(lora, tmp_path / "single.safetensors", "comfyui", merge=True, base=split)
    names = {path.name for path in (split / "transformer").iterdir()} - {"left_over.safetensors"}
    assert len(names) > 4 and {path.name for path in parts.iterdir()} == names | {RECIPE_FILE}
    assert bits(stored(parts)) == bits(stored(whole)) == bits(stored(single))
    loaded = [QwenImageTransformer2DModel.from_pretrained(folder).state_dict() for folder in (whole, parts)]
    assert bits(loaded[0]) == bits(loaded[1])


def test_merged_weights_are_a_result_that_can_be_exported_again_and_sampled_with(lora: Path, tmp_path: Path) -> None:
    folder = run_export(lora, tmp_path / "merged", "diffusers", merge=True)
    single = run_export(folder, tmp_path / "single.safetensors", "comfyui", merge=True)
    assert bits(stored(single)) == bits(stored(folder))
    result = find_result(str(folder), "--lora")  # as `sample` finds it
    assert (result.lora, find_base(result, None, "--base").name) == (None, "qwen_image_edit")
    assert result.areas(Size(512, 512)) == {"control_area": 1024 * 1024}


def test_tensors_are_written_one_by_one_and_the_library_reads_them(tmp_path: Path) -> None:
    """So a model of any size takes the memory of its largest tensor."""
    tensors = {
        "b.odd": torch.randn(3, 7).bfloat16(),
        "a.half": torch.randn(5).half(),
        "c.wide": torch.randn(2, 3, 4).double(),
        "z.strided": torch.randn(4, 4)[:, ::2],
        "number": torch.tensor(1.5),
        "empty": torch.empty(0),
    }
    alive: list[weakref.ref[Tensor]] = []

    def made(name: str) -> Tensor:
        assert not any(reference() is not None for reference in alive)
        tensor = tensors[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    stated = {RECIPE_KEY: json.dumps({"prompt": "交换"})}
    write_tensors(tmp_path / "a", {n: t.to("meta") for n, t in tensors.items()}, made, stated)
    assert bits(load_file(tmp_path / "a")) == bits(tensors)
    assert metadata(tmp_path / "a") == {RECIPE_KEY: {"prompt": "交换"}}


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


def test_what_comfyui_and_diffusers_make_of_the_file_is_what_was_trained(
    tiny_base: Path, lora: Path, tmp_path: Path
) -> None:
    """ComfyUI's sum for each module, alpha / rows of A x B A, on the base's weights: the merged weights."""
    file = run_export(lora, tmp_path / "comfyui.safetensors", "comfyui")
    exported, expected, table = stored(file), stored(tiny_base / "transformer"), comfyui_modules(2)
    assert len(exported) == 3 * len({name.partition(".lora_")[0] for name in stored(lora)})
    for name in [name for name in exported if name.endswith(".alpha")]:
        module, alpha = name.removesuffix(".alpha"), exported[name].item()
        assert alpha == 6
        down, up = (exported[f"{module}.lora_{side}.weight"] for side in "AB")
        layer = module.removeprefix("diffusion_model.")
        assert (len(down), (*up.shape[:1], *down.shape[1:])) == (4, table[layer])
        expected[f"{layer}.weight"] += alpha / len(down) * (up @ down)
    merged = stored(run_export(lora, tmp_path / "merged", "diffusers", merge=True))
    assert max(apart(expected[name], tensor) for name, tensor in merged.items()) <= 1e-6
    outputs = []
    for path in (lora, file):
        pipeline = stock(tiny_base)
        pipeline.load_lora_weights(path)
        outputs.append(output(pipeline.transformer))
    assert apart(outputs[1], outputs[0]) <= 1e-5
    assert metadata(file)[RECIPE_KEY] == metadata(lora)[RECIPE_KEY]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_transformer_has_the_names_and_shapes_of_comfyui(
    case: Any, base_of: Callable[[Any], Path], tmp_path: Path
) -> None:
    file = write_lora(tmp_path, base_of(case))
    exported = stored(run_export(file, tmp_path / "single.safetensors", "comfyui", merge=True))
    expected = {f"{name}.weight": shape for name, shape in comfyui_modules(2).items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in comfyui_modules(2).items() if len(shape) == 2}
    assert shapes(exported) == expected | ({"__index_timestep_zero__": (0,)} if case.zero_cond_t else {})


# --- Real runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_of(small_run: Path, small_cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """The folder of a run with these overrides."""

    def run(*overrides: str) -> Path:
        where = (f"logging.output_dir={tmp_path / 'run'}", f"cache.cache_dir={small_cache}", "data.held_out=null")
        train(load_config(small_run, [*where, *overrides]))
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("kind", ["lora", "lokr", *(pytest.param(k, marks=pytest.mark.slow) for k in ("dora", "loha"))])
def test_run_average_and_checkpoints_make_the_files_of_their_steps(
    run_of: Callable[..., Path], tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    words = ("train.max_train_steps=4", "train.ema_decay=0.5", *overrides_of(kind))
    run = run_of(*words)
    form = "lycoris" if kind in ("lokr", "loha") else "diffusers"
    last, earlier = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 2))
    sources = {run: run, run / "ema": run / "ema", run / FILE_NAME: run, last: run, run / "checkpoints/latest": run}
    for number, (given, file) in enumerate(sources.items()):
        out = run_export(given, tmp_path / f"{number}.safetensors", form)
        assert out.read_bytes() == (file / FILE_NAME).read_bytes()
    assert (run / FILE_NAME).read_bytes() != (run / "ema" / FILE_NAME).read_bytes()

    out = run_export(earlier, tmp_path / "earlier.safetensors", form)
    assert metadata(out)[RECIPE_KEY]["step"] == 2
    first, end = load_file(out), load_file(run / FILE_NAME)
    trained = [name for name in first if not name.endswith(".alpha")]
    assert shapes(first) == shapes(end) and not any(torch.equal(first[name], end[name]) for name in trained)
    pipeline = stock(tiny_base)
    attach(pipeline, read_header(str(out)))
    merged = run_export(earlier, tmp_path / "merged", "diffusers", merge=True)
    assert apart(output(QwenImageTransformer2DModel.from_pretrained(merged)), output(pipeline.transformer)) <= 1e-5

    if kind == "lokr":
        unbroken = (run / FILE_NAME).read_bytes()
        shutil.rmtree(last)
        (run / FILE_NAME).unlink()
        run_of(*words)
        assert (run / FILE_NAME).read_bytes() == unbroken, "resumed from the earlier one"

    frozen = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"\br: \d+", "r: 2", frozen))
    with pytest.raises(UserError, match=r"does not fit the config.yaml of its run: export the run's result"):
        run_export(earlier, tmp_path / "edited.safetensors", form)
    (run / "config.yaml").write_text(frozen)

    weights = last / "trainable.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is damaged \(trainable.safetensors is not what was saved\)"):
        run_export(last, tmp_path / "a.safetensors", form)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_run_that_trained_all_weights_becomes_one_file(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("train.max_train_steps=2", "model.lora=null")
    single = run_export(run, tmp_path / "single.safetensors", "comfyui", merge=True)
    assert bits(stored(single)) == bits(stored(run / "transformer"))
    assert metadata(single)[RECIPE_KEY] == json.loads((run / "transformer" / RECIPE_FILE).read_text())
    for form, merge in (("diffusers", False), ("diffusers", True), ("comfyui", False)):
        with pytest.raises(UserError, match=r"holds all weights, in diffusers' format already: copy it, or write"):
            run_export(run, tmp_path / "out.safetensors", form, merge=merge)
    with pytest.raises(UserError, match="is of a run that trains all weights: name its result"):
        run_export(run / "checkpoints/step-00000002", tmp_path / "out.safetensors", "diffusers")


# --- What is refused, and what is left when something fails ----------------------------------------------------------

LORA, MERGE = ["LORA", "--format", "comfyui"], ["LORA", "--format", "diffusers", "--merge", "--out", "OUT", "--base"]
WRONG = {
    "nothing": ([], ["RUN: not given", "--format: not given", "--out: not given"]),
    "unused base": ([*LORA, "--out", "OUT.safetensors", "--base", "x"], ["--base: has no effect where no LoRA is "]),
    "file": ([*LORA, "--out", "OUT"], ["--out: OUT should be a file whose name ends in .safetensors"]),
    "folder": (["LORA", "--format=diffusers", "--merge", "--out=OUT.safetensors"], ["--out: OUT.safetensors should"]),
    "existing": ([*LORA, "--out", "THERE"], ["--out: THERE exists and is not overwritten"]),
    "below a file": ([*LORA, "--out", "THERE/a.safetensors"], ["--out: THERE cannot be written"]),
    "another program": (["FOREIGN", *LORA[1:], "--out", "OUT.safetensors"], ["RUN: FOREIGN has no recipe"]),
    "quantised": ([*MERGE, "FLOAT8"], ["--base: FLOAT8/transformer cannot be read: img_in.weight is in F8_E4M3, wh"]),
    "damaged": ([*MERGE, "SHORT"], ["--base: SHORT/transformer cannot be read: "]),
    "index": ([*MERGE, "INDEX"], [f"--base: INDEX/transformer cannot be read: {INDEX} does not fit the files"]),
    "shapes": ([*MERGE, "NARROW"], ["--base: the weights in NARROW/transformer do not fit its config.json"]),
}


@pytest.fixture(scope="session")
def places(tiny_base: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words in capitals stand for in `WRONG`."""
    root = tmp_path_factory.mktemp("places")
    bases = {name: shutil.copytree(tiny_base, root / name) for name in ("FLOAT8", "SHORT", "NARROW", "INDEX")}
    listed = {"weight_map": {"img_in.bais": WEIGHTS}}
    (bases["INDEX"] / "transformer" / INDEX).write_text(json.dumps(listed))
    weights = {name: base / "transformer" / WEIGHTS for name, base in bases.items()}
    tensors = load_file(weights["SHORT"])
    weights["SHORT"].write_bytes(weights["SHORT"].read_bytes()[:-1])
    save_file(tensors | {"img_in.weight": tensors["img_in.weight"].to(torch.float8_e4m3fn)}, weights["FLOAT8"])
    save_file(tensors | {"img_in.weight": tensors["img_in.weight"][:, 1:].contiguous()}, weights["NARROW"])
    save_file(load_file(lora), root / "foreign.safetensors", metadata={"format": "pt"})
    (root / "there.safetensors").write_bytes(b"mine")
    files = {"LORA": lora, "FOREIGN": root / "foreign.safetensors", "THERE": root / "there.safetensors"}
    return {**bases, **files, "OUT": root / "new" / "out"}


@pytest.mark.parametrize(("words", "expected"), WRONG.values(), ids=WRONG)
def test_a_request_that_cannot_be_met_leaves_nothing(
    words: list[str], expected: list[str], places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def filled(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, str(path))
        return text

    assert cli.main(["export", *map(filled, words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line, start in zip(lines, expected, strict=False):
        assert line.startswith(f"mixres: error: {filled(start)}"), line
    assert len(lines) >= len(expected)
    assert not places["OUT"].parent.exists() and places["THERE"].read_bytes() == b"mine"


def test_a_lora_whose_base_is_gone_is_exported_but_not_merged(tiny_base: Path, tmp_path: Path) -> None:
    gone = shutil.copytree(tiny_base, tmp_path / "gone")
    file = write_lora(tmp_path / "lora", gone)
    shutil.rmtree(gone)
    run_export(file, tmp_path / "comfyui.safetensors", "comfyui")
    with pytest.raises(UserError, match=r"^--base: not given, and .* names .*/gone': there is no folder"):
        run_export(file, tmp_path / "out", "diffusers", merge=True)


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(tensor.nbytes for tensor in stored(tiny_base / "transformer").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError, match=f"{needed - 1:,} bytes free and {needed:,} are needed: make room"):
        run_export(lora, out, "diffusers", merge=True)
    assert not out.parent.exists()


def test_of_two_exports_to_one_place_the_first_to_end_wins(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    late = placed(out)
    late.__enter__().write_text("late")
    with placed(out) as early:
        early.write_text("early")
    with pytest.raises(WorkError, match="has come to be while this was written"):
        late.__exit__(None, None, None)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(out.name, "early")]


USES = [
    ("diffusers", False, "pipeline.load_lora_weights('{out}')"),
    ("diffusers", True, "load '{out}' by from_pretrained, as the pipeline's transformer"),
    ("comfyui", False, "put it in ComfyUI/models/loras"),
    ("comfyui", True, "put it in ComfyUI/models/diffusion_models"),
]


@pytest.mark.parametrize(("form", "merge", "use"), USES)
def test_a_write_that_fails_leaves_nothing_and_the_next_one_says_what_to_do_with_the_file(
    lora: Path, tmp_path: Path, form: str, merge: bool, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / ("out" if form == "diffusers" and merge else "out.safetensors")
    with longest_file(100_000), pytest.raises(OSError, match="File too large"):
        run_export(lora, out, form, merge=merge)
    assert list(out.parent.iterdir()) == []
    run_export(lora, out, form, merge=merge)
    assert list(out.parent.iterdir()) == [out]
    assert f"use       {use.format(out=out)}" in capsys.readouterr().out.splitlines()
