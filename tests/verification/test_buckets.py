"""`bench --against buckets`: the arithmetic of three trainers, and one trainer that all arms share."""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from mixres import cli
from mixres.config.load import load_config
from mixres.data.plan import Lengths, Plan
from mixres.geometry import Size
from mixres.preprocessing.fill import family_of, keyed_records
from mixres.verification.against_buckets import ARMS, TIMED_STEPS, _begun, _same_for_all, spread_places
from mixres.verification.bucket_data import Bucketed, BucketPlan, OneByOnePlan, fit_records, write_copies
from mixres.verification.bucket_rules import RULES, Fit
from support.pairs import PHOTO

WIDE, TALL, SMALL = Size(1920, 1080), Size(1080, 1920), Size(300, 200)
# By hand, at 1024 x 1024 and each trainer's own steps for Qwen-Image: what the image is scaled to, and its bucket.
BY_HAND = {
    "simpletuner": (
        64,
        {  # aspect 1.78: 1024 * sqrt(1.78) = 1366.2 and 1024 / sqrt(1.78) = 767.5, to the nearest 64
            WIDE: Fit(Size(1365, 768), Size(1344, 768)),
            TALL: Fit(Size(768, 1365), Size(768, 1344)),  # aspect 0.56: 766.3 and 1368.4
            SMALL: Fit(Size(1280, 853), Size(1280, 832)),  # 832 * 1.5 = 1248 is 32 short: + 32 and + 21
            Size(700, 700): Fit(Size(1024, 1024), Size(1024, 1024)),
        },
    ),
    "musubi_tuner": (
        16,
        {  # 1048576 // 768 = 1365, 1360 of it: 1360 / 768 = 1.771 is nearest to 1.778; 1080 * 1360 / 1920 is too low
            WIDE: Fit(Size(1365, 768), Size(1360, 768)),
            TALL: Fit(Size(768, 1365), Size(768, 1360)),
            SMALL: Fit(Size(1248, 832), Size(1248, 832)),  # 1048576 // 832 = 1260, 1248 of it
        },
    ),
    "ai_toolkit": (
        32,
        {  # 1365.3 / 32 = 42.7 and 768 / 32 = 24: 43 x 24 steps are over the area, 42 x 24 are not
            WIDE: Fit(Size(1366, 768), Size(1344, 768)),
            TALL: Fit(Size(768, 1366), Size(768, 1344)),
            SMALL: Fit(Size(320, 214), Size(320, 192)),  # 9.4 x 6.25 steps: 10 x 6 are nearest to 60000 pixels
        },
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_arithmetic_is_that_of_the_trainers(name: str) -> None:
    step, wanted = BY_HAND[name]
    assert dict(zip(wanted, RULES[name].fits(list(wanted), 1024, step), strict=True)) == wanted


@pytest.mark.parametrize("name", RULES)
def test_a_bucket_is_covered_and_a_size_of_its_own_stays(name: str) -> None:
    rng = np.random.default_rng(3)
    sizes = [Size(*map(int, pair)) for pair in rng.integers(64, 400, (200, 2))]
    for size, fit in zip(sizes, RULES[name].fits(sizes, 128, 8), strict=True):
        assert fit.bucket.width % 8 == fit.bucket.height % 8 == 0 and 0 <= fit.cropped < 0.5, size
        assert all(scaled >= side for scaled, side in zip(fit.scaled, fit.bucket, strict=True)), size
    square = Size(128, 128)
    assert RULES[name].fits([square], 128, 8) == [Fit(square, square)]


@pytest.mark.parametrize("name", RULES)
def test_targets_and_controls_are_cropped_alike(name: str, small_run: Path, small_cache: Path, tmp_path: Path) -> None:
    """The middle is kept: a mark there stays, and the same picture gives the same pixels as target and as control."""
    for folder in ("training_images", "control_images"):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
    for stem, size in (("a", (90, 60)), ("b", (64, 101)), ("c", (71, 66))):
        image = PHOTO.resize(size)
        image.paste((255, 0, 0), (size[0] // 2 - 8, size[1] // 2 - 8, size[0] // 2 + 8, size[1] // 2 + 8))
        image.save(tmp_path / "pairs" / "training_images" / f"{stem}.png")
        (tmp_path / "pairs" / "training_images" / f"{stem}.txt").write_text("p")
        image.save(tmp_path / "pairs" / "control_images" / f"{stem}.png")
    words = [f"data.train={tmp_path / 'pairs'}", "data.held_out=null", f"cache.cache_dir={small_cache}"]
    config = load_config(small_run, [*words, f"logging.output_dir={tmp_path / 'run'}"])
    family = family_of(config)
    records = keyed_records(config, family, is_main=False).train
    bucketed = fit_records(config, family, RULES[name], records)
    manifest = write_copies(config, family, bucketed, records, tmp_path / "copies")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len(rows) == 3 * bucketed.copies == (3 if name == "musubi_tuner" else 12)
    for row, fit in zip(rows, bucketed.fits, strict=False):
        files = (manifest.parent / row[key] for key in ("path_target", "path_control"))
        target, control = (np.asarray(Image.open(file)) for file in files)
        assert target.shape == (fit.bucket.height, fit.bucket.width, 3) and np.array_equal(target, control)
        assert target[fit.bucket.height // 2, fit.bucket.width // 2].tolist() == [255, 0, 0]


BUCKETS = [Size(64, 64)] * 5 + [Size(96, 64)] * 3 + [Size(64, 96)]
SPLIT = {"simpletuner": [4, 4, 4, 4], "musubi_tuner": [4, 1, 3, 1], "ai_toolkit": [4, 4, 4, 4]}


@pytest.mark.parametrize("name", RULES)
def test_an_epoch_holds_every_sample_one_bucket_a_step(name: str) -> None:
    rule = RULES[name]
    bucketed = Bucketed(rule, [Fit(bucket, bucket) for bucket in BUCKETS], 4)
    figures = bucketed.figures(BUCKETS)
    assert (figures["buckets"], figures["short_buckets"], figures["batches"], figures["dropped"]) == (3, 2, 4, 0)
    assert figures["repeated"] == (0 if rule.fill == "none" else 7) and figures["cropped"] == 0
    lengths = [Lengths(5, 12, 6)] * len(BUCKETS) * bucketed.copies
    plan = BucketPlan(
        lengths, buckets=BUCKETS, fill=rule.fill, fixed_batches=rule.fixed_batches, names=["x"] * len(lengths),
        seed=1, samples_per_step=4, max_tokens=99, layout="packed",
    )  # fmt: skip
    assert plan.steps_per_epoch == 4
    together = []
    for epoch in range(3):
        steps = [plan.step(step) for step in range(4 * epoch, 4 * epoch + 4)]
        held = [[index % len(BUCKETS) for index in step.indices] for step in steps]
        assert sorted(map(len, held)) == sorted(SPLIT[name])
        assert {index for step in held for index in step} == set(range(len(BUCKETS)))
        assert all(len({BUCKETS[index] for index in step}) == 1 for step in held)
        assert all(len(set(step.indices)) == step.samples for step in steps), "each time with its own noise"
        assert {step.epoch for step in steps} == {epoch}
        together.append(Counter(tuple(sorted(step)) for step in held))
    assert (together[0] == together[1] == together[2]) == rule.fixed_batches
    alone = [step for step in held if set(step) == {8}]
    assert len(alone) == 1 and len(alone[0]) == (1 if rule.fill == "none" else 4)


def test_one_bucket_is_the_plan_of_mixres() -> None:
    named: Any = {"names": ["x"] * 10, "seed": 1, "samples_per_step": 4, "max_tokens": 99, "layout": "packed"}
    lengths = [Lengths(5, 12, 6)] * 10
    bucket = partial(BucketPlan, buckets=[Size(64, 64)] * 10, fill="none", fixed_batches=False)
    own, one, alone = (kind(lengths, **named) for kind in (Plan, bucket, OneByOnePlan))
    for step in range(7):
        assert one.step(step) == own.step(step)
        assert alone.step(step).indices == own.step(step).indices
        assert [part.indices for part in alone.step(step).ranks[0]] == [
            (index,) for part in own.step(step).ranks[0] for index in part.indices
        ]


def test_reports_of_other_settings_are_kept_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of hours is never deleted, whatever is asked for next."""
    path = tmp_path / "buckets.json"
    ours, others = ({"identity": name, "runs": [{"arm": "mixed", "seed": seed}]} for seed, name in enumerate("ab"))
    fresh = [{**report, "runs": []} for report in (ours, others)]
    assert _begun(path, fresh[0]) == fresh[0]
    path.write_text(json.dumps(ours), encoding="utf-8")
    path.with_suffix(".png").write_bytes(b"plot")
    assert _begun(path, fresh[0]) == ours and not capsys.readouterr().out
    assert _begun(path, fresh[1]) == fresh[1] and not path.exists()
    aside = tmp_path / "buckets" / "a"
    assert (aside / "buckets.png").read_bytes() == b"plot"
    assert capsys.readouterr().out.strip() == f"kept      1 run with other settings or data: {aside}"
    path.write_text(json.dumps(others), encoding="utf-8")
    assert _begun(path, fresh[0]) == ours == json.loads(path.read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "buckets" / "b" / "buckets.json").read_text(encoding="utf-8")) == others


@pytest.mark.parametrize(("steps", "warmup"), [(40, 1), (100, 50), (2000, 50), (1, 0)])
def test_a_warm_up_fits_the_steps(small_run: Path, capsys: pytest.CaptureFixture[str], steps: int, warmup: int) -> None:
    words = ["train.max_train_steps=2000", "lr_scheduler.warmup_steps=50", "lr_scheduler.scheduler_type=cosine"]
    found = _same_for_all(load_config(small_run, words), steps)
    assert (found.lr_scheduler.warmup_steps, found.train.max_train_steps) == (warmup, steps)
    assert ("too few for lr_scheduler.warmup_steps = 50" in capsys.readouterr().out) == (warmup < 50)


def test_timed_steps_are_spread_over_the_epoch() -> None:
    assert spread_places(7, TIMED_STEPS) == list(range(7))
    for count in (12, 13, 47, 1000):
        places = spread_places(count, 12)
        assert len(set(places)) == 12 and places[0] < count / 12 and places[-1] >= count - 1 - count / 12
        assert sum(places) / 12 == pytest.approx((count - 1) / 2, abs=1)


def bench(small_run: Path, *words: str) -> int:
    AcceleratorState._reset_state(True)
    return cli.main(["bench", "--config", str(small_run), *words])


@pytest.mark.slow
def test_arms_on_images_of_one_size_are_one_training(
    small_run: Path, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an epoch of one bucket of the images' own size; a second call only reports."""
    for part, count in (("train", 8), ("held_out", 2)):
        for folder in ("training_images", "control_images"):
            (tmp_path / part / folder).mkdir(parents=True)
        for number in range(count):
            left = 3 * number + (20 if part == "held_out" else 0)
            for folder in ("training_images", "control_images"):
                image = PHOTO.resize((140, 100)).crop((left, 10, left + 64, 74))
                image.rotate(90 * number).save(tmp_path / part / folder / f"{number}.png")
            (tmp_path / part / "training_images" / f"{number}.txt").write_text("p")
    words = [f"data.{part}={tmp_path / part}" for part in ("train", "held_out")]
    words += [f"cache.cache_dir={small_cache}", f"logging.output_dir={tmp_path / 'run'}", "--against", "buckets"]
    words += ["data.resize.control.area=target"]
    assert bench(small_run, *words, "--steps", "2") == 0
    path = tmp_path / "run" / "reports" / "buckets.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    runs = {run["arm"]: run for run in report["runs"]}
    assert list(report["times"]) == list(runs) == list(ARMS)
    for arm, run in runs.items():
        exact = arm != "one_by_one"
        for key in ("samples", "different", "tokens"):
            assert run[key] == runs["mixed"][key], (arm, key)
        for key in ("eval", "images"):
            found, wanted = ({name: value or 0.0 for name, value in of[key].items()} for of in (run, runs["mixed"]))
            assert found == (wanted if exact else pytest.approx(wanted, rel=1e-3)), (arm, key)
        assert run["train_loss"] == pytest.approx(runs["mixed"]["train_loss"], rel=0 if exact else 1e-3), arm
        times = report["times"][arm]
        assert 0 < times["low"] <= times["ratio"] <= times["high"] and times["steps"] == times["epoch_steps"] == 2
        assert times["tokens"] * run["samples"] == run["tokens"], "an epoch was trained"
    assert runs["mixed"]["images"]["psnr"] > 0 and runs["mixed"]["eval"]["loss"] > 0
    for figures in report["buckets"].values():
        assert (figures["buckets"], figures["cropped"], figures["repeated"], figures["mean_batch"]) == (1, 0, 0, 4)
    assert (path.parent / "buckets.png").is_file()
    assert "up to 0.6 MB of images" in (out := capsys.readouterr().out) and "10 steps of training in 5 runs" in out
    assert bench(small_run, *words, "--steps", "2") == 0
    assert json.loads(path.read_text(encoding="utf-8"))["runs"] == report["runs"]
    printed = capsys.readouterr().out
    assert "\narm  " not in printed and all(f"\n{arm} " in printed for arm in ARMS)


REFUSED = {
    "an option of the timing": (["--against", "buckets", "--way", "packed"], "--way: is not for --against"),
    "seeds without it": (["--seeds", "2"], "--seeds: is for --against buckets"),
    "no steps": (["--against", "buckets", "--steps", "0"], "--steps: given 0, allowed: 1 and more"),
    "a fraction": (["--against", "buckets", "data.held_out=0.5"], "name a folder or manifest, or null"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert bench(small_run, f"logging.output_dir={tmp_path / 'run'}", *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mixres: error: ") and message in line


def test_a_plot_that_cannot_be_drawn_is_told_before_the_training(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [f"logging.output_dir={tmp_path / 'run'}", "--against", "buckets"]
    assert bench(small_run, *words) == 2
    wanted = "--against: its plot needs 'matplotlib', which is not installed: pip install 'mixres[demo]'"
    assert capsys.readouterr().err == f"mixres: error: {wanted}\n"
