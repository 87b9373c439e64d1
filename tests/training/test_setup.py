"""The parts of a run, put together from a configuration."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixres.config.schema import Config
from mixres.data.plan import MAX_LENGTHS, rounded, rounding_of
from mixres.errors import UserError
from mixres.geometry import Grid
from mixres.models.blocks import repeated_blocks
from mixres.preprocessing.fill import CachedData
from mixres.training.setup import (
    build_loader,
    build_objective,
    build_plan,
    check_early,
    load_trained,
    recipe,
    run_identity,
)
from support.family_cases import EVERY_CASE, FamilyCase, with_family
from support.steps import flow_of, microbatch, new_accelerator

Setup = Callable[..., Config]


def test_what_is_wrong_with_tracker_optimizer_and_targets_is_reported_together(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ("optimizer.init_args={lr: 1e-3, speed: 2, beta: 3}", "model.quantize=nf4", "logging.report_to=wandb")
    config = setup(*words, "model.lora.target_modules=[to_q, to_x, to_y]")
    with pytest.raises(UserError) as caught:
        check_early(*with_family(config))
    keys = ["logging.report_to", "optimizer.init_args.speed", "optimizer.init_args.beta", "model.quantize"]
    expected = [*keys, "model.lora.target_modules", "model.lora.target_modules"]
    assert [message.partition(":")[0] for message in caught.value.messages] == expected
    check_early(*with_family(setup("model.lora=null")))
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"^train.shard_size: 6 processes are no groups of 4: give a divisor, or null$"):
        check_early(*with_family(setup("train.parallel=fsdp2", "train.shard_size=4")))
    check_early(*with_family(setup("train.parallel=fsdp2", "train.shard_size=3")))
    with pytest.raises(UserError, match=r"^model.lora.pretrained_weight: "):
        check_early(*with_family(setup("model.lora.pretrained_weight=/nowhere")))


@pytest.mark.parametrize("lora", [True, False])
def test_the_trained_parameters_are_the_optimizers_in_order(setup: Setup, tmp_path: Path, lora: bool) -> None:
    words = ("train.ema_decay=0.05", *([] if lora else ["model.lora=null"]))
    trained = load_trained(*with_family(setup(*words)), new_accelerator(tmp_path))
    assert trained.model is trained.transformer, "one process has nothing to wrap"
    held = trained.optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in trained.parameters.values()]
    assert [name for name, p in trained.transformer.named_parameters() if p.requires_grad] == list(trained.parameters)
    assert len(trained.table) == (8 if lora else 0)
    assert (trained.ema._decay, trained.optimizer.param_groups[0]["lr"]) == (0.05, 3e-3)


@pytest.mark.parametrize(("checkpointing", "calls"), [("true", [2, 2]), ("2", [2, 1]), ("false", [1, 1])])
def test_those_blocks_are_recomputed_that_were_asked_for(
    setup: Setup, encoded: CachedData, tmp_path: Path, checkpointing: str, calls: list[int]
) -> None:
    config = setup(f"train.gradient_checkpointing={checkpointing}")
    transformer = load_trained(*with_family(config), new_accelerator(tmp_path)).transformer
    called: list[object] = []
    for block in repeated_blocks(transformer):
        block.register_forward_pre_hook(lambda block, _: called.append(block))
    batch = next(build_loader(config, encoded, build_plan(config, encoded, world_size=1), rank=0, first=0, workers=0))
    build_objective(*with_family(config)).loss_sum(transformer, batch, 0).backward()  # type: ignore[no-untyped-call]
    assert [called.count(block) for block in repeated_blocks(transformer)] == calls


def test_a_compiled_runs_rows_are_rounded_and_the_plan_counts_them(setup: Setup, encoded: CachedData) -> None:
    """The data here have four image lengths, which would stay; so they are made longer than they are."""
    entries = [item.entry for item in encoded.train]
    longer = [e._replace(img_shapes=(*e.img_shapes, Grid(1, 1, 1 + 9 * n))) for n, e in enumerate(entries)]
    items = [item._replace(entry=entry) for item, entry in zip(encoded.train, longer, strict=True)]
    many = CachedData(encoded.cache, items, [])
    rounding = rounding_of([item.lengths for item in items])
    assert rounding.image > 1
    config = setup("batch.layout=padded", "train.compile=true")
    plan = build_plan(config, many, world_size=1)
    counted = {rounded(item.lengths.image, rounding.image) for item in items}
    assert {int(length) for length in plan.lengths[:, 1]} == counted
    loader = build_loader(config, many, plan, rank=0, first=0, workers=0)
    found = {next(loader).latents.shape[1] for step in range(5) for _ in plan.step(step).ranks[0]}
    assert all(length % rounding.image == 0 for length in found)
    assert len(found) <= len(counted) <= MAX_LENGTHS


def test_guidance_and_steps_of_a_shift_are_refused_where_the_base_takes_none(setup: Setup) -> None:
    with pytest.raises(UserError) as refused:
        check_early(*with_family(setup("model.guidance=1.0", "flow.shift_steps=4")))
    guidance, steps = refused.value.messages
    assert guidance.startswith("model.guidance: the transformer of ") and guidance.endswith(
        " takes no guidance: leave it out"
    )
    assert steps.startswith("flow.shift_steps: the shift of ") and steps.endswith(" not depend on steps: leave it out")


def test_guidance_and_steps_of_a_shift_reach_the_training(setup: Setup, base_of: Callable[[FamilyCase], Path]) -> None:
    """Of a base that takes both: 1 and the pipeline's 50 steps, unless the configuration says otherwise."""
    base = f"model.pretrained_model_name_or_path={base_of(EVERY_CASE['flux2_dev'])}"
    for words, guidance, steps in (([], 1.0, 50), (["model.guidance=3.5", "flow.shift_steps=4"], 3.5, 4)):
        config, family = with_family(setup(base, *words))
        objective = build_objective(config, family)
        assert objective.shift_constants == family.flow_shift(steps)
        given: list[torch.Tensor | None] = []
        recorded = replace(objective, predict_velocity=lambda *call, given=given: given.append(call[-1]))
        batch = microbatch([0, 1])
        recorded.predict(torch.nn.Identity(), batch, flow_of(batch))
        assert given[0] is not None and given[0].tolist() == [guidance] * 2


def moved(one: dict[str, object], other: dict[str, object]) -> set[str]:
    return {key for key in {**one, **other} if one.get(key) != other.get(key)}


def frozen(setup: Setup, encoded: CachedData, *overrides: str) -> dict[str, object]:
    config = setup(*overrides)
    own, regular = ([x.key for x in encoded.train if x.regularization == which] for which in (False, True))
    order = build_plan(config, encoded, world_size=1).order_hash([item.key for item in encoded.train])
    return {**run_identity(*with_family(config), own, regular), "order": order}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.seed=1", {"train.seed", "order"}),
        ("batch.samples_per_step=3", {"batch.samples_per_step", "order"}),
        ("model.lora.r=8", {"model.lora.r"}),
        ("model.lora.lora_alpha=8", {"model.lora.lora_alpha"}),
        ("model.lora.target_modules=to_q", {"model.lora.target_modules"}),
        ("model.lora.use_dora=true", {"model.lora.use_dora"}),
        ("model.adapter=loha model.lora.factor=4", {"model.adapter"}),
        ("model.adapter=lokr", {"model.adapter", "model.lora.factor", "model.lora.decompose_both"}),
        ("model.lora.pretrained_weight=earlier", {"model.lora.pretrained_weight"}),
        ("optimizer.class_path=torch.optim.SGD", {"optimizer.class_path"}),
        ("model.lora=null", {f"model.lora.{name}" for name in ("r", "lora_alpha", "target_modules", "use_dora")}),
        ("train.ema_decay=0.9", {"train.ema_decay"}),
        ("model.dtype=bfloat16", {"model.dtype"}),
        ("model.quantize=int8", {"model.quantize"}),
        ("optimizer.init_args.lr=1 train.max_train_steps=99 batch.max_tokens=400 batch.layout=padded", set()),
        ("sample.steps=3 data.num_workers=1 checkpoint.keep=5 model.lora.lora_dropout=0.5", set()),
    ],
)
def test_frozen_values_are_those_that_make_it_another_run(
    setup: Setup, encoded: CachedData, override: str, changed: set[str]
) -> None:
    assert moved(frozen(setup, encoded), frozen(setup, encoded, *override.split())) == changed


def test_a_base_on_the_hub_is_known_by_its_commit(
    setup: Setup, encoded: CachedData, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its branch may be at another one when the run is resumed, or when the LoRA is sampled."""
    commit, repository = "fedcba9876543210fedcba9876543210fedcba98", tmp_path / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(tiny_base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in ("null", "main", commit):
        given = with_family(setup("model.pretrained_model_name_or_path=me/tiny", f"model.revision={revision}"))
        assert run_identity(*given, [], [])["model.revision"] == recipe(*given, 5)["revision"] == commit
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice").symlink_to(tiny_base.parent)  # a folder that looks like a name of the Hub
    words = (f"model.pretrained_model_name_or_path=alice/{tiny_base.name}", "model.revision=main")
    assert recipe(*with_family(setup(*words)), 5)["revision"] is None


@pytest.fixture(scope="module")
def regularised(encoded: CachedData) -> CachedData:
    """The last three of the training samples as a regularisation set."""
    items = [item._replace(regularization=i >= len(encoded.train) - 3) for i, item in enumerate(encoded.train)]
    return CachedData(encoded.cache, items, encoded.held_out)


REGULAR = ("data.regularization=regular", "loss.prior_loss_weight=0.25")


def test_which_data_are_another_run(setup: Setup, encoded: CachedData, regularised: CachedData) -> None:
    before, regular = frozen(setup, encoded), frozen(setup, regularised, *REGULAR)
    assert moved(before, frozen(setup, CachedData(encoded.cache, encoded.train[1:], []))) == {"data.train", "order"}
    assert moved(before, frozen(setup, CachedData(encoded.cache, encoded.train, []))) == set()
    fewer = CachedData(encoded.cache, regularised.train[:-1], [])
    assert moved(regular, frozen(setup, fewer, *REGULAR)) == {"data.regularization", "order"}
    assert moved(regular, before) == {"data.train", "data.regularization"}
    assert before["data.regularization"] is None
    assert moved(regular, frozen(setup, regularised, REGULAR[0])) == set(), "the weight may change"
    items = [item._replace(entry=item.entry._replace(empty_tokens=3)) for item in encoded.train]
    with_empty = CachedData(encoded.cache, items, encoded.held_out)
    assert moved(before, frozen(setup, with_empty, "data.caption_dropout=0.1")) == {"data.caption_dropout"}


LOSS_SETTINGS = [
    (), ("flow.density=uniform",), ("flow.density=mode",), ("flow.density=mode", "flow.mode_scale=-0.9"),
    ("flow.logit_mean=0.5",), ("flow.logit_std=0.5",), ("flow.shift=none",), ("flow.shift=constant",),
    ("flow.shift=constant", "flow.shift_value=2"), ("loss.weighting=sigma_sqrt",), ("loss.weighting=cosmap",),
    ("loss.normalization=token",), ("data.mask_weight.foreground=5",), ("data.mask_weight.background=3",),
    ("train.seed=1",), REGULAR,
]  # fmt: skip


def test_each_setting_of_noise_and_loss_reaches_the_loss(setup: Setup, regularised: CachedData, tmp_path: Path) -> None:
    """The loss of one batch, real model, objective and loader: each setting by itself is another number."""
    transformer = load_trained(*with_family(setup()), new_accelerator(tmp_path)).transformer
    losses = {}
    for words in LOSS_SETTINGS:
        config = setup("batch.samples_per_step=10", "batch.max_tokens=99999", *words)
        plan = build_plan(config, regularised, world_size=1)
        batch = next(build_loader(config, regularised, plan, rank=0, first=0, workers=0))
        half = torch.arange(len(batch.edit_mask)) % 2
        masked = replace(batch, edit_mask=half.float(), has_mask=(True,) * 10)
        objective = build_objective(*with_family(config))
        with torch.no_grad():
            divisor = objective.divisor(10, sum(batch.target_lengths))
            losses[words] = float(objective.loss(transformer, masked, step=0, divisor=divisor))
    assert objective.shift_constants["max_shift"] == 0.9, "the base's own"
    ordered = sorted(losses.values())
    assert min(b / a for a, b in itertools.pairwise(ordered)) > 1 + 1e-5, losses


def test_a_plan_without_samples_is_refused(setup: Setup, encoded: CachedData) -> None:
    only_regular = [item._replace(regularization=True) for item in encoded.train]
    for samples in ([], only_regular):
        with pytest.raises(UserError, match=r"data.train: there is no usable sample"):
            build_plan(setup(), CachedData(encoded.cache, samples, []), world_size=1)
