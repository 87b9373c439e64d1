"""`cache.text: recompute`: without embeddings in the cache a run is the one that has them, bit for bit."""

import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mixres import cli
from mixres.batch import Batch, TextEmbeds
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.errors import UserError, WorkError
from mixres.models.stock_family import StockFamily
from mixres.preprocessing.fill import CachedData, encode_all
from mixres.preprocessing.live_texts import text_device
from mixres.training.setup import build_loader, build_plan, check_early
from mixres.verification.setup import cached_source
from support.family_cases import EVERY_CASE, FamilyCase, with_family
from support.jobs import LORA, Jobs, metrics
from support.samples import assert_same

RECOMPUTE = "cache.text=recompute"
DROPOUT = "data.caption_dropout=0.5"
CPU = torch.device("cpu")


def batches(config: Config, encoded: CachedData, workers: int) -> Iterator[Batch]:
    plan = build_plan(config, encoded, world_size=1)
    return build_loader(config, encoded, plan, rank=0, first=0, workers=workers)


@pytest.mark.parametrize(
    "name", ["qwen_image_edit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux2_klein", "qwen_image_21"))]
)
def test_batches_and_samples_are_those_of_a_cache_with_embeddings(
    name: str,
    small_run: Path,
    tmp_path: Path,
    base_of: Callable[[FamilyCase], Path],
    pairs_of: Callable[[FamilyCase], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = EVERY_CASE[name].in_a_folder()
    data = pairs_of(case)
    words = (
        f"model.pretrained_model_name_or_path={base_of(case)}", *case.overrides(), DROPOUT, "train.max_train_steps=3",
        f"data.train={data / 'train'}", f"data.held_out={data / 'held_out'}", f"cache.cache_dir={tmp_path}",
        f"logging.output_dir={tmp_path / 'run'}", "batch.max_tokens=2048",
    )  # fmt: skip
    stored, live = (load_config(small_run, [*words, *own]) for own in ((), (RECOMPUTE,)))
    with_text, load = [], StockFamily.load_encoders

    def watched(*args: Any, **words: Any) -> Any:
        pipeline = load(*args, **words)
        with_text.append(pipeline.text_encoder is not None)
        return pipeline

    monkeypatch.setattr(StockFamily, "load_encoders", watched)
    cached, recomputed = (encode_all(*with_family(config), device=CPU) for config in (stored, live))
    assert with_text == [True, False]
    for sample in recomputed.train:
        with safe_open(recomputed.cache.path(sample.key), "pt") as file:
            assert not any("embeds" in tensor for tensor in file.keys())  # noqa: SIM118
    assert recomputed.texts
    there = pickle.loads(pickle.dumps(recomputed.texts))  # as a process that is spawned gets it
    assert there.inputs(recomputed.train[0], "x").keys() == recomputed.texts.inputs(recomputed.train[0], "x").keys()
    family, embedded = recomputed.texts._family, []
    encode_prompt = family.encode_prompt

    def counted(*args: Any, prompt: str, **words: Any) -> TextEmbeds:
        embedded.append(prompt)
        return encode_prompt(*args, prompt=prompt, **words)

    monkeypatch.setattr(family, "encode_prompt", counted)
    loaders = batches(stored, cached, 0), batches(live, recomputed, 2), batches(live, recomputed, 0)
    used = 0
    for one, *others in zip(*loaders, strict=True):
        used += len(one.indices)
        for other in others:
            for field in fields(Batch):
                x, y = getattr(one, field.name), getattr(other, field.name)
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name
    assert embedded.count("") > 0 and len(embedded) == (len({*embedded}) if family.prompts_alone else 2 * used)
    for a, b in zip([*cached.train[:2], *cached.held_out], [*recomputed.train[:2], *recomputed.held_out], strict=True):
        assert_same(cached.read(a), recomputed.read(b))
        assert a.noise_key == b.noise_key and a.key != b.key


def test_a_control_that_changes_while_training_stops_the_run(
    setup: Callable[..., Config], few_pairs: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(few_pairs, tmp_path / "data")
    config = setup(RECOMPUTE, f"data.train={data / 'train'}", f"cache.cache_dir={tmp_path / 'cache'}")
    encoded = encode_all(*with_family(config), device=CPU)
    for control in (data / "train" / "control_images").iterdir():
        control.write_bytes(control.read_bytes() + b" ")
    for workers in (0, 1):
        with pytest.raises(WorkError, match=r"control_images/.* has changed since the scan: run the same command"):
            next(batches(config, encoded, workers))


def test_a_device_that_is_not_there_or_not_used_is_refused(setup: Callable[..., Config]) -> None:
    own = torch.device("cpu")
    assert text_device(setup(RECOMPUTE), own, ranks=2) == own
    assert text_device(setup(RECOMPUTE, "cache.text_device=cpu"), torch.device("meta"), ranks=2) == own
    count = torch.cuda.device_count()
    config = setup(RECOMPUTE, f"cache.text_device=cuda:{count}")
    for check in (lambda: check_early(*with_family(config)), lambda: cached_source(config, own)):
        with pytest.raises(UserError, match=f"cache.text_device: there is no cuda:{count}, this machine has {count}: "):
            check()
    with pytest.raises(UserError, match=r"cache\.text_device: given .*; only recompute runs the text encoder"):
        setup("cache.text_device=cpu")


@pytest.mark.slow
def test_a_run_has_the_losses_images_and_result_of_one_with_stored_embeddings(jobs: Jobs, few_pairs: Path) -> None:
    words = (DROPOUT, f"data.held_out={few_pairs / 'held_out'}", "sample.every=2", "evaluate.every=2",
             "evaluate.sigmas=[0.5]")  # fmt: skip
    stored = jobs.here("stored", *words)
    live = jobs.here("live", *words, RECOMPUTE, "data.num_workers=2", "train.max_train_steps=4")
    jobs.here("live", *words, RECOMPUTE)
    assert metrics(stored) == metrics(live) and len(metrics(stored)) > 5
    for path in stored.glob("samples/*.png"):
        assert (live / "samples" / path.name).read_bytes() == path.read_bytes()
    one, other = load_file(stored / LORA), load_file(live / LORA)
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    with safe_open(live / LORA, "pt") as file:
        assert '"text": "recompute"' in str(file.metadata())
    assert cli.main(["verify", *jobs.words("live", *words, RECOMPUTE)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_of_split_weights_each_embed_their_own(jobs: Jobs, few_pairs: Path) -> None:
    words = (f"data.held_out={few_pairs / 'held_out'}", "evaluate.every=5", "evaluate.sigmas=[0.5]")
    stored = jobs.here("one_stored", *words)
    live = jobs.forked("two_live", *words, RECOMPUTE, "train.parallel=fsdp2", ranks=2)
    pairs = list(zip(metrics(stored), metrics(live), strict=True))
    for name in ("loss", "grad_norm", "eval/loss"):
        losses = [(one[name], two[name]) for one, two in pairs if name in one]
        assert losses and all(two == pytest.approx(one, rel=1e-5) for one, two in losses)
