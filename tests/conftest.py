"""Fixtures that several packages share: the tiny base pipelines and the demo's data, written once a session."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixres.cli import CHATTY

for name in CHATTY:  # as the command line does, and before anything imports diffusers
    logging.getLogger(name).setLevel(logging.ERROR)
sys.path.insert(0, str(Path(__file__).parent))  # for `family_cases` and `jobs`, the real runs that several files start


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tensors here are too small for two, which wait for each other; `make test` takes a process a core instead."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mixres quickstart` writes."""
    from mixres.quickstart.data import write_demo

    root = tmp_path_factory.mktemp("demo")
    write_demo(root)
    return root


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen-Image-Edit pipeline on disk, in the stock layout. Read only."""
    from mixres.quickstart.data import PROMPTS
    from support.tiny_pipeline import write_tiny_pipeline

    base = tmp_path_factory.mktemp("base") / "base"
    write_tiny_pipeline(base, PROMPTS)
    return base


@pytest.fixture(scope="session")
def base_of(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """The tiny random base of a row of `family_cases.CASES`, written when it is first asked for. Read only."""
    from support.family_cases import CASES

    written = {(CASES["qwen_image_edit"].pipeline_class, False): tiny_base}

    def base(case: Any) -> Path:
        kind = case.pipeline_class, case.zero_cond_t
        if kind not in written:
            written[kind] = tmp_path_factory.mktemp("family") / "base"
            case.write(written[kind])
        return written[kind]

    return base


@pytest.fixture(scope="session")
def demo_data(demo_root: Path) -> Path:
    """The demo's training folder: `training_images/` with captions, `control_images/`. Read only."""
    return demo_root / "train"


@pytest.fixture
def copy_of_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny pipeline once more, to be damaged."""
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture(scope="session")
def few_pairs(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` with the first ten pairs of the demo and `held_out` with three, for runs of seconds. Read only."""
    root = tmp_path_factory.mktemp("few")
    for part, count in (("train", 10), ("held_out", 3)):
        for target in sorted((demo_root / part / "training_images").glob("*.png"))[:count]:
            for file in (target, target.with_suffix(".txt"), demo_root / part / "control_images" / target.name):
                copy = root / part / file.parent.name / file.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    return root


@pytest.fixture(scope="session")
def pairs_of(few_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """`few_pairs` with as many control images as the samples of a row of `family_cases.CASES` have, in turn."""

    def pairs(case: Any) -> Path:
        root = tmp_path_factory.mktemp("pairs")
        for part in ("train", "held_out"):
            shutil.copytree(few_pairs / part / "training_images", root / part / "training_images")
            controls = sorted((few_pairs / part / "control_images").glob("*.png")) if max(case.controls) else []
            for number, control in enumerate(controls):
                for slot in range(case.controls[number % len(case.controls)]):
                    name = f"{control.stem}_control_{slot}.png" if slot else control.name
                    copy = root / part / "control_images" / name
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(controls[(number + slot) % len(controls)], copy)
        return root

    return pairs


@pytest.fixture(scope="session")
def small_run(tiny_base: Path, few_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a run of seconds; a test adds `cache.cache_dir` and `logging.output_dir`."""
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(
        f"""
model: {{pretrained_model_name_or_path: {tiny_base}, dtype: float32, lora: {{r: 4, lora_alpha: 4}}}}
data:
  train: {few_pairs / "train"}
  held_out: {few_pairs / "held_out"}
  num_workers: 0
  resize: {{target: {{max_pixels: 16384}}, control: {{area: 4096}}}}
batch: {{samples_per_step: 4, max_tokens: 512}}
optimizer: {{init_args: {{lr: 3e-3}}}}
train: {{max_train_steps: 5, gradient_checkpointing: false, mixed_precision: "no"}}
checkpoint: {{every: 2}}
sample: {{every: 3, steps: 2}}
""",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="session")
def filled_cache(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entries of `small_run` and no others. Read only: copy it to count what a pass encodes."""
    from mixres.config.load import load_config
    from mixres.preprocessing.fill import run_cache

    root = tmp_path_factory.mktemp("cache")
    run_cache(load_config(small_run, [f"cache.cache_dir={root}", f"logging.output_dir={root / 'none'}"]))
    return root


@pytest.fixture(scope="session")
def small_cache(filled_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `small_run`, filled, for all tests. Entries may be added, none taken away."""
    return shutil.copytree(filled_cache, tmp_path_factory.mktemp("shared") / "cache")
