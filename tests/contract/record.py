"""What others rely on, observed: the tests of this folder compare it with `golden.json`, which this script writes.

From the root of the repository, with one thread:

    PYTHONPATH=tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m contract.record

It writes `golden.json` and `fixtures/{run,cache,lora,sample.png}` anew. That changes the contract: do it only where a
change of the public surface or of the numbers is wanted, and say so in the commit.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from mixres.cli import main
from mixres.config.load import dump_config, load_config
from mixres.data.plan import Lengths, Plan
from support.jobs import LORA, REPOSITORY, Jobs

GOLDEN, FIXTURES = Path(__file__).with_name("golden.json"), Path(__file__).with_name("fixtures")
CONFIG = "tests/contract/fixtures/run.yaml"  # relative to REPOSITORY, the working directory of every run
PUBLIC = {
    "mixres.models.qwen_multi_resolution_patch": [
        "patch_qwen_model_for_multi_resolution",
        "patch_qwen_forward_for_multi_resolution",
        "apply_rotary_emb_qwen_batched",
        "QwenDoubleStreamAttnProcessor2_0_MultiRes",
        "QwenDoubleStreamAttnProcessor2_0_MultiRes.__call__",
    ],
    "mixres.models.flux2_multi_resolution_patch": ["patch_flux2_model_for_multi_resolution"],
    "mixres.models.flux_multi_resolution_patch": ["patch_flux_model_for_multi_resolution"],
    "mixres.models.z_image_multi_resolution_patch": ["patch_z_image_model_for_multi_resolution"],
    "mixres.batch": ["extract_batch_field", "image_shapes_from_embeddings"],
}
VERBS = {
    "train": ["--config"],
    "cache": ["--config", "--verify", "--device"],
    "inspect": ["--config", "--decode", "--device-memory", "--measure", "--ranks", "--rehearse"],
    "verify": ["--config", "--synthetic"],
    "bench": ["--config", "--synthetic", "--way", "--steps", "--seconds", "--peak-tflops", "--against", "--seeds"],
    "sample": [
        *("--lora", "--image", "--prompt", "--prompts", "--out", "--size", "--steps", "--seed", "--guidance"),
        *("--negative-prompt", "--compare", "--base", "--device", "--dtype", "--quantize", "--offload"),
    ],
    "report": ["--serve", "--port"],
    "init": ["--out"],
    "export": [
        *("--format", "--merge", "--out", "--base"),
        *("--card", "--license", "--license-link", "--trigger", "--push", "--private"),
    ],
}
RECIPES = ("qwen_image_edit_lora", "qwen_image_edit_plus_lora", "qwen_image_lora")
TOLERANCE, TOLERANCE_ELSEWHERE = 1e-6, 1e-5  # of losses and gradient norms, relative


def signatures() -> dict[str, str]:
    found = {}
    for module, names in PUBLIC.items():
        for name in names:
            value: Any = import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
            # Where a private class of an annotation lives may change.
            found[f"{module}.{name}"] = re.sub(r"\bmixres\.[a-z_.]+\.", "", str(inspect.signature(value)))
    return found


def config_defaults() -> dict[str, Any]:
    """Every key by its dotted name, with the value it has where only the required ones are given."""
    least = load_config(Path(os.devnull), ["model.pretrained_model_name_or_path=BASE", "data.train=DATA"])
    return flat(yaml.safe_load(dump_config(least)))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def plans() -> dict[str, dict[str, str]]:
    """Hashes of each recipe's plan over fixed lengths; `split` is who goes with whom in the first forty steps."""
    draw = np.random.Generator(np.random.Philox(key=7))
    rows = [tuple(int(n) for n in draw.integers((8, 64, 64, 8), (1025, 4097, 4097, 20))) for _ in range(97)]
    lengths = [Lengths(text, target + control, target, empty) for text, target, control, empty in rows]
    names = [f"{index:032x}" for index in range(len(lengths))]
    found = {}
    for recipe in RECIPES:
        config = load_config(REPOSITORY / "configs" / f"{recipe}.yaml")
        for layout in ("packed", "padded"):
            for ranks, dropout in ((1, 0.0), (3, 0.2)):
                plan = Plan(
                    lengths,
                    names=names,
                    seed=config.train.seed,
                    samples_per_step=config.batch.samples_per_step,
                    max_tokens=config.batch.max_tokens,
                    layout=layout,
                    world_size=ranks,
                    caption_dropout=dropout,
                )
                steps = [plan.step(number) for number in range(40)]
                split = [
                    [step.epoch, step.target_tokens]
                    + [[[m.indices, m.weights, sorted(m.dropped)] for m in rank] for rank in step.ranks]
                    for step in steps
                ]
                found[f"{recipe} {layout} {ranks} ranks"] = {
                    "order_hash": plan.order_hash(names),
                    "plan_hash": plan.plan_hash(names),
                    "split": hashlib.sha256(json.dumps(split).encode()).hexdigest(),
                }
    return found


def machine() -> str:
    """What the last bits of a number depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def command(*words: str) -> int:
    """The exit code of `train.py` with these words, in this process."""
    AcceleratorState._reset_state(True)
    try:
        return main(words)
    except SystemExit as end:  # of --help
        return int(end.code or 0)


def folders(root: Path) -> tuple[str, str]:
    return f"cache.cache_dir={root / 'cache'}", f"logging.output_dir={root / 'run'}"


def shape(value: Any) -> Any:
    """The keys of a JSON value without what they hold; a list by its first element."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return None


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def entries(cache: Path) -> list[str]:
    return sorted(path.relative_to(cache).as_posix() for path in cache.glob("??/*.safetensors"))


def lora_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return {key: json.loads(text) if text.startswith("{") else text for key, text in metadata.items()}


def contents(path: Path) -> dict[str, Any]:
    """Names, shapes and types of a file's tensors, and a hash over their bytes."""
    tensors = dict(sorted(load_file(path).items()))
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    described = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    return {"tensors": described, "bytes": digest.hexdigest()}


def run_folder(run: Path) -> dict[str, Any]:
    """What a finished run has left."""
    lines = json_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    status = json.loads((run / "run_status.json").read_text(encoding="utf-8"))
    metadata = lora_metadata(run / LORA)
    return {
        "files": sorted(
            path.relative_to(run).as_posix()
            for path in run.rglob("*")
            if path.is_file() and not path.is_relative_to(run / "checkpoints" / "latest")
            if not path.name.startswith(".")
        ),
        "latest": (run / "checkpoints" / "latest").readlink().name,
        "metrics_keys": sorted(steps[0]),
        "evaluation_keys": sorted(evaluations[0]),
        "status_keys": sorted(status),
        "status": {key: status[key] for key in ("state", "exit_code", "reason", "verb", "step", "max_train_steps")},
        "config_keys": sorted(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))),
        "checkpoint_state": shape(json.loads((run / "checkpoints" / "latest" / "state.json").read_bytes())),
        "lora_metadata": shape(metadata),
        "lora_recipe": {key: value for key, value in metadata["mixres"].items() if key != "mixres"},
    }


def numbers(root: Path) -> dict[str, Any]:
    """Which samples were encoded, and what the run computed with them."""
    lines = json_lines(root / "run" / "metrics.jsonl")
    return {
        "machine": machine(),
        "entries": entries(root / "cache"),
        "lora_sha256": hashlib.sha256((root / "run" / LORA).read_bytes()).hexdigest(),
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
    }


def reports(root: Path) -> dict[str, Any]:
    """`inspect`, `verify` and `bench`; the last on samples of its own, so small that its rounds take seconds.

    In float64 `verify` does not hang on how a machine rounds; its entries are others, hence a cache of their own.
    """
    given = ("--config", CONFIG, *folders(root))
    tiny = ("batch.samples_per_step=1", "data.resize.target.max_pixels=256", "model.lora.target_modules=[to_q]")
    assert command("inspect", *given) == 0
    assert command("verify", *given, "model.dtype=float64") == 0
    assert command("bench", "--synthetic", "--seconds", "1", *given, *tiny) == 0
    names = ("inspect.json", "verify.json", "bench.json")
    return {name: json.loads((root / "run" / "reports" / name).read_bytes()) for name in names}


def exported(lora: Path, name: str, out: Path) -> dict[str, Any]:
    assert command("export", str(lora), "--format", name, "--out", str(out)) == 0
    return contents(out)


def sampled(lora: Path, out: Path) -> Image.Image:
    """One picture, made with the stock pipeline and the LoRA."""
    control = FIXTURES / "pairs" / "held_out" / "control_images" / "055_astronaut.png"
    how = ("--size", "64x48", "--steps", "2", "--seed", "3", "--device", "cpu", "--dtype", "float32")
    words = ("--lora", str(lora), "--image", str(control), "--prompt", "swap red and blue", "--out", str(out))
    assert command("sample", *words, *how) == 0
    (picture,) = out.glob("*.png")
    return Image.open(picture)


def stopped_run(root: Path, *, after: int) -> int:
    """The run in a process of its own, sent SIGTERM when `after` steps are done; its exit code."""
    log = root / "run" / "metrics.jsonl"
    with Jobs(Path(CONFIG), root / "cache", root, common=()).started("run") as process:
        while not log.exists() or log.read_text(encoding="utf-8").count('"loss"') < after:
            assert process.poll() is None, "the run ended before it was stopped"
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)


def assert_same_metrics(found: Sequence[Mapping[str, Any]], golden: Mapping[str, Any]) -> None:
    """The last bits are a matter of the machine: where it is the recorded one, nothing may differ."""
    wanted = golden["metrics"]
    known = {key for line in wanted for key in line} - {"step"}
    found = [line for line in found if known & line.keys()]  # lines of newer metrics do not count
    near = TOLERANCE if machine() == golden["machine"] else TOLERANCE_ELSEWHERE
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, recorded in zip(found, wanted, strict=True):
        assert {key: line.get(key, "is gone") for key in recorded} == pytest.approx(recorded, rel=near, abs=0)


def assert_same_lora(path: Path, golden: Mapping[str, Any]) -> None:
    recorded = FIXTURES / "lora" / LORA
    if machine() == golden["machine"]:
        assert contents(path) == contents(recorded)
    stated, wanted_recipe = (lora_metadata(file)["mixres"] for file in (path, recorded))
    assert {key: stated.get(key, "is gone") for key in wanted_recipe} == wanted_recipe
    found, wanted = load_file(path), load_file(recorded)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def record() -> None:
    torch.set_num_threads(1)
    os.chdir(REPOSITORY)
    # Relative folders: a path of this machine must stand neither in the checkpoint nor in the status.
    root, stopped = Path("build/contract"), Path("build/contract/stopped")
    shutil.rmtree(root, ignore_errors=True)
    stopped.mkdir(parents=True)
    assert command("--config", CONFIG, *folders(root)) == 0
    golden = {
        "signatures": signatures(),
        "config": config_defaults(),
        "plans": plans(),
        "run": run_folder(root / "run"),
        "numbers": numbers(root),
        "comfyui": exported(root / "run", "comfyui", root / "comfyui.safetensors"),
        "reports": {name: shape(report) for name, report in reports(root / "reports").items()},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sampled(root / "run", root / "picture").save(FIXTURES / "sample.png")
    shutil.copyfile(root / "run" / LORA, FIXTURES / "lora" / LORA)
    shutil.copytree(root / "cache", stopped / "cache")
    assert stopped_run(stopped, after=1) == 75
    status_file = stopped / "run" / "run_status.json"
    status = json.loads(status_file.read_text(encoding="utf-8"))
    assert status["step"] < status["max_train_steps"], "it was stopped too late: run this once more"
    status_file.write_text(json.dumps({**status, "host": "recorded", "pid": 1}, indent=2), encoding="utf-8")
    # Memos of paths and times are of this machine alone.
    unwanted = shutil.ignore_patterns(".*", "scan", "fingerprints.json", "reports", "samples")
    for name in ("run", "cache"):
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
        shutil.copytree(stopped / name, FIXTURES / name, symlinks=True, ignore=unwanted)
    leaked = [p for p in FIXTURES.rglob("*") if p.is_file() and os.fsencode(REPOSITORY) in p.read_bytes()]
    assert not leaked, leaked


if __name__ == "__main__":
    record()
