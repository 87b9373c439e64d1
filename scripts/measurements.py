"""Measure what the pages state of exactness, speed, adapters, merges and memory: a file in docs/results for each.

    make quickstart                                             # data for all but `memory`, a LoRA for `merge`
    OMP_NUM_THREADS=1 python scripts/measurements.py [NAME...]  # of those in `MEASURED`; all by default
    python scripts/page_numbers.py                              # the pages, from the results

`bench` takes some ten minutes of one core, `adapters` and `cache_cost` a minute: they want an idle machine. `memory`
takes five minutes of processor time, the others less than one. No weights are downloaded, and no GPU is needed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
from mixres.verification.setup import machine, versions  # noqa: E402

RESULTS, QUICKSTART = REPOSITORY / "docs" / "results", REPOSITORY / "configs" / "quickstart.yaml"
BUDGETS, CACHE_ROUNDS = (8192, 2048), 7
SIDE, TOKENS, ROUNDS = 3072, 1024, 9  # of one layer: Qwen-Image's width, an image of 512 x 512
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "lokr": {"adapter": "lokr", "factor": 8},
    "lokr_whole": {"adapter": "lokr", "factor": 8, "r": 4096},
    "loha": {"adapter": "loha"},
}
# By the name on the page: keys of configs/qwen_image_edit_lora.yaml, and ranks.
EDIT = "batch.max_tokens=9600"  # one sample of 1024 x 1024 with its control
FULL = ("model.lora=null", "train.parallel=fsdp2", EDIT)
MEMORY: dict[str, tuple[tuple[str, ...], int]] = {
    "bfloat16": ((EDIT,), 1),
    "blocks_20": ((EDIT, "train.offload.blocks=20"), 1),
    "blocks_2": ((EDIT, "train.offload.blocks=2"), 1),
    "blocks_2_activations": ((EDIT, "train.offload.blocks=2", "train.offload.activations=true"), 1),
    "int8": ((EDIT, "model.quantize=int8"), 1),
    "int8_blocks_2": ((EDIT, "model.quantize=int8", "train.offload.blocks=2"), 1),
    "int8_blocks_2_activations": (
        (EDIT, "model.quantize=int8", "train.offload.blocks=2", "train.offload.activations=true"), 1,
    ),
    "full_8": (FULL, 8),
    "full_8_offload": ((*FULL, "train.cpu_offload=true"), 8),
    "full_64": (FULL, 64),
}  # fmt: skip


def report(verb: str, *overrides: str) -> Any:
    """What `train.py verb` writes of the quickstart with these keys."""
    run = REPOSITORY / "build" / "measurements"
    command = [sys.executable, "train.py", verb, "--config", str(QUICKSTART), f"logging.output_dir={run}", *overrides]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return json.loads((run / "reports" / f"{verb}.json").read_text(encoding="utf-8"))


def verify() -> dict[str, Any]:
    """A batch against its samples alone, in both precisions."""
    write("verify_bfloat16", report("verify", "model.dtype=bfloat16", "cache.cache_dir=build/measurements/cache"))
    return {"verify": report("verify")}


def bench() -> dict[str, Any]:
    """The ways to batch the same samples, under two budgets."""
    return {"bench": {str(tokens): report("bench", f"batch.max_tokens={tokens}") for tokens in BUDGETS}}


def adapters() -> dict[str, Any]:
    """Processor time of one layer with an adapter, forward and backward, over the same layer without; in turns."""
    from peft.tuners.lycoris_utils import LycorisLayer

    from mixres.models.lora import add_lora

    x, steps = torch.randn(TOKENS, SIDE), {"none": Layer()}
    for name, given in ADAPTERS.items():
        steps[name] = Layer()
        settings: dict[str, Any] = {"r": 16, "lora_alpha": 16, "lora_dropout": 0, "factor": 8, **given}
        add_lora(steps[name], target_modules=["0"], untrained=(), seed=0, **settings)
    stock = steps["lokr_of_peft"] = Layer()
    add_lora(stock, target_modules=["0"], untrained=(), seed=0, adapter="lokr", r=16, lora_alpha=16, lora_dropout=0,
             factor=8)  # fmt: skip
    own = next(module for module in stock.modules() if isinstance(module, LycorisLayer))
    del own.forward  # the class's own
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, model in steps.items():
            began = time.process_time()
            model(x.requires_grad_()).sum().backward()
            seconds[name].append(time.process_time() - began)
    ratios = {
        name: statistics.median(a / b for a, b in zip(own[1:], seconds["none"][1:], strict=True))
        for name, own in seconds.items()
    }
    return {"adapter_cost": {"side": SIDE, "tokens": TOKENS, "rounds": ROUNDS, "ratio": ratios}}


class Layer(nn.Sequential, PeftAdapterMixin):  # type: ignore[misc]
    """One linear layer, which takes adapters as a model of diffusers does."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(SIDE, SIDE, bias=False))
        self.requires_grad_(False)


def cache_cost() -> dict[str, Any]:
    """Samples a second into the cache over the bare encoders', and reading a step's samples over the step; in turns."""
    from mixres.config.load import load_config
    from mixres.data.cache import Cache
    from mixres.preprocessing.encode import encode_inputs, encode_record
    from mixres.preprocessing.fill import keyed_records
    from mixres.verification.bench import make_work, seconds_of
    from mixres.verification.setup import cached_source, one_process, set_up

    os.chdir(REPOSITORY)
    config = load_config(QUICKSTART, ["logging.output_dir=build/measurements"])
    accelerator = one_process(config, "bench")
    family, source = cached_source(config, accelerator.device)
    found = keyed_records(config, family, is_main=True)
    records = dict(zip(found.keys[-16:], found.held_out[-16:], strict=True))
    (step,) = make_work(config, source, 1)["packed"]
    read = [source.encoded.train[index].key for part in step.plan.ranks[0] for index in part.indices]
    setup = set_up(config, family, accelerator)
    encoders = family.load_encoders(dtype=torch.float32, device="cpu")
    inputs = [encode_inputs(config, family, record) for record in records.values()]

    def encode_alone() -> None:
        for own in inputs:
            seen = {name: own[name] for name in ("prompt", "controls", "sizes")}
            family.encode(encoders, **own, text=family.encode_prompt(encoders, **seen))

    def encode_and_write(cache: Cache) -> None:
        for key, record in records.items():
            cache.write(key, encode_record(config, family, encoders, record))

    def read_all(cache: Cache) -> None:
        for key in read:
            cache.read(key)

    ratios: dict[str, list[float]] = {"encoding": [], "first_read": [], "read": []}
    for _ in range(CACHE_ROUNDS + 1):
        cache = Cache(found.cache.root)
        alone, stepped = clocked(encode_alone), seconds_of(setup, step)
        with tempfile.TemporaryDirectory(dir=found.cache.root.parent) as folder:
            ratios["encoding"].append(alone / clocked(partial(encode_and_write, Cache(Path(folder)))))
        for name in ("first_read", "read"):
            ratios[name].append(clocked(partial(read_all, cache)) / stepped)
    spreads = {
        name: {"ratio": statistics.median(own[1:]), "low": min(own[1:]), "high": max(own[1:])}
        for name, own in ratios.items()
    }
    return {"cache_cost": {"rounds": CACHE_ROUNDS, "samples": len(records), **spreads}}


def clocked(work: Callable[[], None]) -> float:
    """Seconds of it."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def merge() -> dict[str, Any]:
    """What rounding merged weights to bfloat16 costs, of the quickstart's LoRA: in weights and in outputs."""
    from mixres.inference.artifact import find_base, find_result
    from mixres.inference.export import merged_weight
    from mixres.models.lora_file import layer_tensors

    result = find_result(str(REPOSITORY / "build" / "quickstart" / "run"), "--lora")
    assert result.lora
    tensors = layer_tensors(result.lora, result.lora.path.read_bytes())
    model = find_base(result, None, "--base").load_transformer(dtype=torch.bfloat16, device="cpu").eval().float()
    base, outputs = {name: own.clone() for name, own in model.state_dict().items()}, {}
    exact = {
        f"{name}.weight": merged_weight(base[f"{name}.weight"], adapter, alpha=result.lora.lora_alpha)
        for name, adapter in tensors.items()
    }
    rounded = {name: weight.bfloat16().float() for name, weight in exact.items()}
    for name, weights in {"base": {}, "exact": exact, "rounded": rounded}.items():
        model.load_state_dict(base | weights)
        outputs[name] = [output(model, seed) for seed in range(5)]

    def norm(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in exact))

    errors = [
        float((rounded - exact).norm() / (exact - base).norm())
        for base, exact, rounded in zip(outputs["base"], outputs["exact"], outputs["rounded"], strict=True)
    ]
    return {"merge": {"weights": norm(rounded, exact) / norm(exact, base), "outputs": errors}}


def output(transformer: Any, seed: int) -> Tensor:
    """Of the Qwen transformer of the tiny base, on random latents and embeddings."""
    draw, config = torch.Generator().manual_seed(seed), transformer.config
    velocity: Tensor = transformer(
        hidden_states=torch.randn(1, 192, config.in_channels, generator=draw),
        timestep=torch.rand(1, generator=draw),
        encoder_hidden_states=torch.randn(1, 24, config.joint_attention_dim, generator=draw),
        img_shapes=[[(1, 12, 8), (1, 8, 12)]],
        return_dict=False,
    )[0]
    return velocity


def memory() -> dict[str, Any]:
    """Rehearsals of Qwen-Image-Edit, one sample a microbatch; each is written as it is done."""
    from mixres.config.load import load_config
    from mixres.inspection.fitting import rehearse_quickly
    from mixres.models.registry import load_family
    from mixres.verification.synthetic import largest_microbatch

    results = RESULTS / "memory.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.exists() else {}
    for name, (keys, ranks) in MEMORY.items():
        if name in rows:
            continue
        config = load_config(REPOSITORY / "configs" / "qwen_image_edit_lora.yaml", keys)
        family = load_family(config.model.family, config.model.pretrained_model_name_or_path, synthetic=True)
        samples = largest_microbatch(config, family)
        assert len(samples) == 1
        found = rehearse_quickly(config, family, samples, ranks=ranks, microbatches=2)
        kept = {key: found[key] for key in ("peak_bytes", "peak_phase", "host_bytes")}
        rows[name] = {"keys": keys, "ranks": ranks, **kept}
        write("memory", {"rows": rows})
    return {}


MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "verify": verify, "bench": bench, "cache_cost": cache_cost, "adapters": adapters, "merge": merge, "memory": memory,
}  # fmt: skip


def write(name: str, found: Any) -> None:
    """Into docs/results, with where and when."""
    stated = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "load": round(os.getloadavg()[0], 1)}
    text = json.dumps({**stated, "machine": machine(torch.device("cpu")), "versions": versions(), **found}, indent=1)
    (RESULTS / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *MEASURED], metavar="NAME")
    for name in parser.parse_args().names or MEASURED:
        for file, found in MEASURED[name]().items():
            write(file, found)


if __name__ == "__main__":
    main()
