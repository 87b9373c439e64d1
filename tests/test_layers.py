"""The house rules that a reader of the source can count on, read from the source itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mixres"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}

LAYERS = {
    "__init__": 0,
    "errors": 0,
    "atomic": 0,
    "geometry": 0,
    "config": 0,
    "config_source": 0,
    "config_faults": 0,
    "config_rules": 0,
    "config_sections": 0,
    "batch": 1,
    "data": 2,
    "models": 2,
    "diffusion": 2,
    "training": 3,
    **dict.fromkeys(
        (
            "assemble",
            "batching",
            "bench",
            "cache_check",
            "caching",
            "consistency",
            "encoding",
            "evaluate",
            "examples",
            "export",
            "export_request",
            "flops",
            "precompute",
            "run_result",
            "sample",
            "sample_request",
            "sample_rows",
            "sampling",
            "synthetic_samples",
            "token_layout",
            "verify",
            "activations",
            "bucketing",
            "charts",
            "input_sheet",
            "inspect_data",
            "inspect_figures",
            "memory_estimate",
            "plan_figures",
            "report",
            "worst_microbatch",
            "workbench",
            "write_result",
        ),
        4,
    ),
    "trainer": 5,
    "demo": 5,
    "demo_results": 5,
    "cli": 6,
    "cli_options": 6,
}

# Where a library may be imported: names of rooms; diffusers' parts are told apart, the longest match counts.
MODELS = {"models", "demo"}
LIBRARIES = {
    "transformers": MODELS,
    "peft": MODELS,
    "diffusers": MODELS,
    "diffusers.optimization": {*MODELS, "training", "diffusion"},
    "diffusers.training_utils": {*MODELS, "training", "diffusion"},
    "accelerate": {room for room, layer in LAYERS.items() if layer >= 3},
    "torch": {room for room, layer in LAYERS.items() if layer >= 1} | {"geometry"},
    "pydantic": {"config", "config_faults", "config_sections"},
    "omegaconf": {"config", "config_source"},
    "yaml": {"config_source"},
    "datasets": {"data"},
}

FOLDERS = {"data", "models", "diffusion", "training"}  # rooms that never import each other within a layer

MAX_FILE, MAX_FUNCTION, MAX_NESTING = 300, 40, 3
LONG_FUNCTIONS = {
    ("trainer.py", "train"): 100,
    ("training/trainer.py", "train"): 100,
}  # the train loop reads in one piece
NESTING = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def room(file: str) -> str:
    """`data/cache.py` and `mixres.data.cache` are in `data`, `batch.py` is a room of its own."""
    return file.partition("/")[0].removesuffix(".py")


def module(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return ".".join(("mixres", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it; what only type checkers read is left out."""
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: -node.level], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_faults(file: str, tree: ast.Module) -> list[str]:
    here, faults = room(file), []
    for name in imports(tree, module(file)):
        if name.startswith("mixres."):
            there = name.split(".")[1]
            if there not in LAYERS:  # `from mixres import __version__`
                there = "__init__"
            # Modules of the top folder may import their neighbours in a layer; that there is no cycle is tested below.
            beside = LAYERS[there] == LAYERS[here] and not {here, there} & FOLDERS
            if there != here and LAYERS[there] >= LAYERS[here] and not beside:
                faults.append(f"{file} ({here}, layer {LAYERS[here]}) imports {name} ({there}, layer {LAYERS[there]})")
        rules = [library for library in LIBRARIES if f"{name}.".startswith(f"{library}.")]
        if rules and here not in LIBRARIES[max(rules, key=len)]:
            faults.append(f"{file} imports {name}, which is for: {', '.join(sorted(LIBRARIES[max(rules, key=len)]))}")
    return faults


def edges() -> dict[str, set[str]]:
    """Which modules of mixres import which, at import time or later."""
    known = {module(file) for file in FILES}
    graph: dict[str, set[str]] = {}
    for file, path in FILES.items():
        found = set()
        for name in imports(ast.parse(path.read_text(encoding="utf-8")), module(file)):
            owner = name if name in known else name.rpartition(".")[0]
            if owner in known - {"mixres"}:
                found.add(owner)
        graph[module(file)] = found
    return graph


def depth(node: ast.AST, level: int = 0) -> int:
    """Levels of control flow inside a node; `elif` is the same level, a nested function starts anew."""
    deepest = level
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If) and len(value) == 1
            deepest = max(deepest, depth(child, level + (isinstance(child, NESTING) and not is_elif)))
    return deepest


def size_faults(file: str, text: str) -> list[str]:
    faults = []
    if text.count("\n") > MAX_FILE:
        faults.append(f"{file}: {text.count(chr(10))} lines, at most {MAX_FILE}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            most = LONG_FUNCTIONS.get((file, node.name), MAX_FUNCTION)
            if lines > most:
                faults.append(f"{file}:{node.lineno} {node.name}: {lines} lines, at most {most}")
            if depth(node) > MAX_NESTING:
                faults.append(f"{file}:{node.lineno} {node.name}: nested {depth(node)} deep, at most {MAX_NESTING}")
    return faults


def test_every_room_has_a_layer() -> None:
    assert {room(file) for file in FILES} <= set(LAYERS)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_and_libraries_stay_in_their_rooms(file: str) -> None:
    assert import_faults(file, ast.parse(FILES[file].read_text(encoding="utf-8"))) == []


def test_no_import_cycle() -> None:
    graph, done = edges(), set[str]()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("file", FILES)
def test_files_functions_and_nesting_stay_small(file: str) -> None:
    assert size_faults(file, FILES[file].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES)
def test_modules_open_with_a_docstring_and_init_files_are_empty(file: str) -> None:
    text = FILES[file].read_text(encoding="utf-8")
    if file == "__init__.py":
        code = [node for node in ast.parse(text).body if not isinstance(node, ast.Expr)]
        assert [ast.unparse(node).partition(" ")[0] for node in code] == ["__version__"]
    elif file.endswith("__init__.py"):
        assert text.strip() == ""
    else:
        assert ast.get_docstring(ast.parse(text)), f"{file} opens without a docstring"


PLANTED = {
    "upwards": ("data/x.py", "from mixres.training.step import a"),
    "sideways": ("data/x.py", "import mixres.models.lora"),
    "sideways_from": ("diffusion/x.py", "from mixres.models import lora"),
    "relative": ("models/x.py", "from ..data import cache"),
    "up_from_a_verb": ("sampling.py", "from mixres.trainer import a"),
    "inside_a_function": ("batch.py", "def f():\n    from mixres.trainer import train"),
    "transformers_in_data": ("data/x.py", "import transformers"),
    "pipelines_in_training": ("training/x.py", "from diffusers import DiffusionPipeline"),
    "accelerate_in_diffusion": ("diffusion/x.py", "from accelerate import Accelerator"),
    "peft_in_trainer": ("trainer.py", "from peft import LoraConfig"),
    "torch_in_config": ("config.py", "import torch.nn"),
    "omegaconf_in_training": ("training/x.py", "import omegaconf"),
}


@pytest.mark.parametrize(("file", "text"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_seen(file: str, text: str) -> None:
    assert len(import_faults(file, ast.parse(text))) == 1


ALLOWED = {
    "down": ("training/x.py", "from mixres.data.cache import Cache"),
    "scheduler": ("training/x.py", "from diffusers.optimization import get_scheduler"),
    "density": ("diffusion/x.py", "import diffusers.training_utils"),
    "type_checking": ("cli.py", "if TYPE_CHECKING:\n    import torch, omegaconf\n    from mixres.config import Config"),
    "version": ("data/x.py", "from mixres import __version__"),
    "lookalike": ("data/x.py", "import torchvision_free, diffusersx"),
}


@pytest.mark.parametrize(("file", "text"), ALLOWED.values(), ids=ALLOWED)
def test_an_allowed_import_passes(file: str, text: str) -> None:
    assert import_faults(file, ast.parse(text)) == []


def test_planted_sizes_are_seen() -> None:
    assert size_faults("x.py", "a = 1\n" * 301) == ["x.py: 301 lines, at most 300"]
    long = "def f():\n" + "    a = 1\n" * 40
    assert size_faults("x.py", long) == ["x.py:1 f: 41 lines, at most 40"]
    assert size_faults("trainer.py", long.replace("def f", "def train")) == []
    deep = "def f():\n for a in b:\n  if a:\n   with a:\n    try: pass\n    finally: pass\n"
    assert size_faults("x.py", deep) == ["x.py:1 f: nested 4 deep, at most 3"]
    flat = "def f():\n if a: pass\n" + "".join(f" elif {name}: pass\n" for name in "bcdef")
    assert size_faults("x.py", flat) == []
