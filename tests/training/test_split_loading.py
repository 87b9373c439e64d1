"""What two ranks that split a model hold: while they load it, in a step, and when they write it.

Loaded are 1.06 B parameters in five files. Pages of mapped files do not count: the ranks of a machine share them, and
the system takes them back when it needs to. Steps are counted tensor by tensor, on a smaller model.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from support.jobs import REPOSITORY, environment, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LORA, DORA, ALL = "model.lora.target_modules=attention", "model.lora.use_dora=true", "model.lora=null"
ROWS = "train.shard_read=rows"
LOADS = {
    "lora": [LORA],
    "dora": [LORA, DORA],
    "all weights": [ALL],
    "dora, rows": [LORA, DORA, ROWS],
    "lokr, rows": [LORA, "model.adapter=lokr", ROWS],
    "all weights, rows": [ALL, ROWS],
    "old lora": [LORA],
    "old all weights": [ALL],
}
ALL_WITH_AVERAGE = [ALL, "train.ema_decay=0.9"]
STEPS = {  # microbatches, and overrides
    "one": (1, ALL_WITH_AVERAGE),
    "three": (3, ALL_WITH_AVERAGE),
    "lora": (3, ["model.lora.target_modules=all"]),
    "unsynced": (3, ALL_WITH_AVERAGE),
    "cached, whole": (3, [*ALL_WITH_AVERAGE, "train.mixed_precision=no"]),
}


def on_two_ranks(program: str, config: Path, ways: Sequence[Any]) -> list[Mapping[str, Any]]:
    """What a program of `support` finds on each of two ranks."""
    done = subprocess.run(
        [*torchrun(2), str(REPOSITORY / "tests" / "support" / program), str(config), json.dumps(ways)],
        cwd=REPOSITORY, env=environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[Mapping[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def common(base: Path, run: Path) -> list[str]:
    words = ["model.dtype=bfloat16", "train.parallel=fsdp2", "train.mixed_precision=bf16"]
    return [f"model.pretrained_model_name_or_path={base}", f"logging.output_dir={run}", *words]


def write_large(tiny_base: Path, base: Path, **changes: int) -> int:
    """The tiny pipeline with a transformer of the stock shape but for `changes`, bfloat16. Its parameters."""
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("transformer"))
    with torch.device("meta"):
        model: Any = QwenImageTransformer2DModel(**changes)
    torch.nn.Module.to(model, torch.bfloat16)
    model.to_empty(device="cpu")
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(noise.roll(997 * number)[: len(part)])
    model.save_pretrained(base / "transformer", max_shard_size="500MB")
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def large_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("large") / "base"
    assert write_large(tiny_base, base, num_layers=3) > 1e9
    assert len(list((base / "transformer").glob("*.safetensors"))) == 5
    return base


@pytest.fixture(scope="module")
def loads(large_base: Path, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    words = common(large_base, tmp_path_factory.mktemp("run"))
    return on_two_ranks("split_load.py", small_run, [(name, [*words, *more]) for name, more in LOADS.items()])


def fits(found: Mapping[str, Any]) -> bool:
    """Whether the peak was its share and a block, and 15 % for what cannot be helped."""
    return bool(found["peak"] <= 1.15 * (found["share"] + found["block"]))


@pytest.mark.parametrize("way", [name for name in LOADS if not name.startswith("old")])
def test_no_rank_holds_more_than_its_share_and_a_block(loads: list[Mapping[str, Any]], way: str) -> None:
    for rank in loads:
        found = rank[way]
        assert fits(found), found
        assert found["differing"] == []
        assert ("torch.bfloat16" in found["precisions"]) is (not way.startswith("all")), "all weights train in float32"


@pytest.mark.parametrize("way", ["old lora", "old all weights"])
def test_the_whole_model_on_the_device_before_it_is_split_would_be_noticed(
    loads: list[Mapping[str, Any]], way: str
) -> None:
    assert not any(fits(rank[way]) for rank in loads)


@pytest.fixture(scope="module")
def steps(tiny_base: Path, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    """Of a transformer of eight narrow blocks."""
    base = shutil.copytree(tiny_base, tmp_path_factory.mktemp("deep") / "base")
    config = QwenImageTransformer2DModel.load_config(base / "transformer")
    shutil.rmtree(base / "transformer")
    model: Any = QwenImageTransformer2DModel.from_config({**config, "num_layers": 8})
    torch.nn.Module.to(model, torch.bfloat16).save_pretrained(base / "transformer")
    words = [*common(base, tmp_path_factory.mktemp("run")), "train.gradient_checkpointing=true"]
    ways = [(name, count, [*words, *more]) for name, (count, more) in STEPS.items()]
    return on_two_ranks("split_step.py", small_run, ways)


def step_fits(found: Mapping[str, int]) -> bool:
    """Beside weights and state: the gradients of its own rows, and what is gathered and reduced of a few blocks.

    Whole gradients or a second copy of the weights would be eight blocks and more.
    """
    return found["step"] <= found["gradients"] + 4 * found["block"]


def test_a_step_holds_no_whole_gradients_and_no_copy_of_the_weights(steps: list[Mapping[str, Any]]) -> None:
    for rank in steps:
        assert step_fits(rank["one"]) and step_fits(rank["three"]) and step_fits(rank["lora"])
        assert not step_fits(rank["unsynced"]), "gradients are whole until the last microbatch"
        assert not step_fits(rank["cached, whole"]), "autocast keeps a copy of each weight"


def test_average_checkpoint_and_result_hold_a_few_tensors(steps: list[Mapping[str, Any]]) -> None:
    for rank in steps:
        for name, found in rank.items():
            fits = found["average and result"] <= 6 * found["tensor"]
            assert fits is ("whole" not in name), (name, found)
            assert found["checkpoint"] <= found["tensor"]
