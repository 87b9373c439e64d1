"""The parts of a run, put together from a configuration."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Qwen2_5_VLForConditionalGeneration

from mixres import __version__
from mixres.assemble import (
    check_early,
    identity_of,
    load_trained,
    loader_of,
    objective_of,
    plan_of,
    recipe,
)
from mixres.config import Config, load_config
from mixres.data.rounding import MOST, rounded, rounding_of
from mixres.errors import UserError
from mixres.geometry import Grid
from mixres.models import qwen_image_edit as family
from mixres.precompute import Encoded, encode_all
from mixres.training.distributed import make_accelerator


class Setup:
    """Configurations over the session's cache."""

    def __init__(self, file: Path, cache: Path) -> None:
        self.file, self.cache = file, cache

    def __call__(self, *overrides: str) -> Config:
        common = [f"cache.cache_dir={self.cache}", "logging.output_dir=/nowhere"]
        return load_config(self.file, [*common, *overrides])


@pytest.fixture(scope="module")
def setup(small_run: Path, small_cache: Path) -> Setup:
    return Setup(small_run, small_cache)


@pytest.fixture(scope="module")
def encoded(setup: Setup) -> Encoded:
    return encode_all(setup(), family, device=torch.device("cpu"))


def accelerator(folder: Path) -> object:
    AcceleratorState._reset_state(True)
    return make_accelerator(mixed_precision="no", report_to="none", folder=folder)


def test_what_is_wrong_with_optimizer_and_targets_is_told_together(setup: Setup) -> None:
    config = setup("optimizer.init_args={lr: 1e-3, speed: 2, beta: 3}", "model.lora.target_modules=[to_q, to_x, to_y]")
    with pytest.raises(UserError) as caught:
        check_early(config, family)
    starts = [message.partition(" ")[0] for message in caught.value.messages]
    expected = ["optimizer.init_args.speed:", "optimizer.init_args.beta:", *["model.lora.target_modules:"] * 2]
    assert starts == expected
    check_early(setup(), family)
    check_early(setup("model.lora=null"), family)
    with pytest.raises(UserError) as caught:
        check_early(setup("model.lora.pretrained_weight=/nowhere", "optimizer.init_args={speed: 2}"), family)
    starts = [message.partition(" ")[0] for message in caught.value.messages]
    assert starts == ["optimizer.init_args.speed:", "model.lora.pretrained_weight:"]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, 2, False])
def test_the_trained_parameters_are_the_optimizers_in_order(
    setup: Setup, tmp_path: Path, lora: bool, checkpointing: bool | int
) -> None:
    words = [f"train.gradient_checkpointing={str(checkpointing).lower()}", *([] if lora else ["model.lora=null"])]
    trained = load_trained(setup(*words), family, accelerator(tmp_path))
    assert trained.transformer.training
    assert trained.transformer.is_gradient_checkpointing == bool(checkpointing)
    held = trained.optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in trained.parameters.values()]
    assert [name for name, p in trained.transformer.named_parameters() if p.requires_grad] == list(trained.parameters)
    assert len(trained.table) == (8 if lora else 0)
    assert trained.optimizer.param_groups[0]["lr"] == 3e-3


def test_no_encoder_lives_beside_the_transformer(setup: Setup, tmp_path: Path) -> None:
    gc.collect()
    kind = Qwen2_5_VLForConditionalGeneration
    before = {id(thing) for thing in gc.get_objects() if type(thing) is kind}
    config = setup(f"cache.cache_dir={tmp_path}")
    encode_all(config, family, device=torch.device("cpu"))
    assert list(tmp_path.glob("??/*.safetensors"))
    load_trained(config, family, accelerator(tmp_path))
    assert {id(thing) for thing in gc.get_objects() if type(thing) is kind} <= before


def test_the_loader_gives_what_the_plan_says(setup: Setup, encoded: Encoded) -> None:
    config = setup()
    plan = plan_of(config, encoded, world_size=1)
    loader = loader_of(config, encoded, plan, rank=0, first=2, workers=0)
    for step in range(2, config.train.max_train_steps):
        for microbatch in plan.step(step).ranks[0]:
            batch = next(loader)
            assert batch.indices == microbatch.indices
            assert batch.names == tuple(encoded.train[i].record.name for i in microbatch.indices)
            assert batch.tokens == sum(encoded.train[i].lengths.total for i in microbatch.indices)
            assert batch.tokens_computed <= config.batch.max_tokens
    assert next(loader, None) is None


def test_a_compiled_runs_rows_are_rounded_and_the_plan_counts_them(setup: Setup, encoded: Encoded) -> None:
    """The data here have four image lengths, which would stay; so they are said to be longer than they are."""
    entries = [item.entry for item in encoded.train]
    longer = [e._replace(img_shapes=(*e.img_shapes, Grid(1, 1, 1 + 9 * n))) for n, e in enumerate(entries)]
    items = [replace(item, entry=entry) for item, entry in zip(encoded.train, longer, strict=True)]
    many = Encoded(encoded.cache, items, [])
    rounding = rounding_of([item.lengths for item in items])
    assert rounding.image > 1
    found = {}
    for compiled in (False, True):
        config = setup("batch.layout=padded", f"train.compile={str(compiled).lower()}")
        plan = plan_of(config, many, world_size=1)
        loader = loader_of(config, many, plan, rank=0, first=0, workers=0)
        batches = [next(loader) for step in range(5) for _ in plan.step(step).ranks[0]]
        found[compiled] = {batch.latents.shape[1] for batch in batches}
        counted = {rounded(item.lengths.image, rounding.image if compiled else 1) for item in items}
        assert {int(length) for length in plan.lengths[:, 1]} == counted
    assert len(found[True]) <= len(counted) <= MOST
    assert all(length % rounding.image == 0 for length in found[True])
    assert any(length % rounding.image for length in found[False])


def test_the_objective_takes_the_bases_own_shift(setup: Setup) -> None:
    objective = objective_of(setup("train.seed=5", "loss.normalization=token"), family)
    assert dict(objective.shift_constants) == {
        "base_seq_len": 256, "max_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9,
    }  # fmt: skip
    assert (objective.seed, objective.dtype, objective.divisor(4, 100)) == (5, torch.float32, 100)
    assert objective_of(setup("model.dtype=float64"), family).dtype == torch.float64


def frozen(setup: Setup, encoded: Encoded, *overrides: str) -> dict[str, object]:
    config = setup(*overrides)
    identity = identity_of(config, plan_of(config, encoded, world_size=1), encoded)
    return {**identity["frozen"], "order": identity["order"]}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.seed=1", {"train.seed", "order"}),
        ("batch.samples_per_step=3", {"batch.samples_per_step", "order"}),
        ("model.lora.r=8", {"model.lora.r"}),
        ("model.lora.lora_alpha=8", {"model.lora.lora_alpha"}),
        ("model.lora.target_modules=to_q", {"model.lora.target_modules"}),
        ("model.lora.use_dora=true", {"model.lora.use_dora"}),
        ("model.lora.pretrained_weight=earlier", {"model.lora.pretrained_weight"}),
        ("model.lora.lora_dropout=0.5", set()),
        ("optimizer.class_path=torch.optim.SGD", {"optimizer.class_path"}),
        ("model.lora=null", {f"model.lora.{name}" for name in ("r", "lora_alpha", "target_modules", "use_dora")}),
        ("train.ema_decay=0.9", {"train.ema_decay"}),
        ("sample.steps=3", set()),
        ("model.dtype=bfloat16", {"model.dtype"}),
        ("model.quantize=int8", {"model.quantize"}),
        ("optimizer.init_args.lr=1", set()),
        ("train.max_train_steps=99", set()),
        ("batch.max_tokens=400", set()),
        ("batch.layout=padded", set()),
        ("data.num_workers=1", set()),
        ("checkpoint.keep=5", set()),
    ],
)
def test_identity_of_are_those_that_make_it_another_run(
    setup: Setup, encoded: Encoded, override: str, changed: set[str]
) -> None:
    before, after = frozen(setup, encoded), frozen(setup, encoded, override)
    assert {key for key in before if before[key] != after[key]} == changed


def test_another_share_of_dropped_captions_is_another_run(setup: Setup, encoded: Encoded) -> None:
    items = [replace(item, entry=item.entry._replace(empty_tokens=3)) for item in encoded.train]
    with_empty = Encoded(encoded.cache, items, encoded.held_out)
    before, after = (frozen(setup, with_empty, f"data.caption_dropout={p}") for p in (0.0, 0.1))
    assert {key for key in before if before[key] != after[key]} == {"data.caption_dropout"}


def test_other_data_are_another_run(setup: Setup, encoded: Encoded) -> None:
    fewer = Encoded(encoded.cache, encoded.train[1:], encoded.held_out)
    without_held_out = Encoded(encoded.cache, encoded.train, [])
    before = frozen(setup, encoded)
    after = frozen(setup, fewer)
    assert {key for key in before if before[key] != after[key]} == {"data.train", "order"}
    assert frozen(setup, without_held_out) == before


def test_a_plan_without_samples_or_room_is_refused(setup: Setup, encoded: Encoded) -> None:
    with pytest.raises(UserError, match="no usable sample"):
        plan_of(setup(), Encoded(encoded.cache, [], []), world_size=1)
    with pytest.raises(UserError, match=r"over batch\.max_tokens = 50") as caught:
        plan_of(setup("batch.max_tokens=50"), encoded, world_size=1)
    assert len(caught.value.messages) == sum(item.lengths.total > 50 for item in encoded.train)


def test_the_recipe_is_what_sampling_needs(setup: Setup, tiny_base: Path) -> None:
    values = recipe(setup(), family, 5)
    assert values == {
        "format": 1,
        "mixres": __version__,
        "family": "qwen_image_edit",
        "base": str(tiny_base),
        "revision": None,
        "quantize": None,
        "r": 4,
        "lora_alpha": 4.0,
        "use_dora": False,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
        "control_area": 4096,
        "step": 5,
    }
