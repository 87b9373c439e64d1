"""Mixed batches against buckets, one by one: docs/results/buckets.json, its plots, and the block of docs/buckets.md.

    python scripts/bucket_benchmark.py            # train what the results lack, then draw the plots
    python scripts/bucket_benchmark.py --plots    # the plots alone, from docs/results/buckets.json
    python scripts/page_numbers.py                # the pages, from the results

Takes some 30 minutes of one core. Each run is written as it is done: the same command resumes. Two data sets are made
of the quickstart's photographs: its own, and `border`, few pairs of many sizes whose edit is at the border too. Delete
build/buckets and docs/results/buckets.json to train all of them anew.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
from mixres.geometry import Size  # noqa: E402
from mixres.quickstart import data  # noqa: E402

BUILD, RESULTS = REPOSITORY / "build" / "buckets", REPOSITORY / "docs" / "results" / "buckets.json"
IMAGES = REPOSITORY / "docs" / "images"
SETS, STEPS, SEEDS = ("quickstart", "border"), 100, 3
FRAME, GREEN, YELLOW = 8, (30, 170, 40), (240, 220, 20)
SETTINGS = (
    "model.pretrained_model_name_or_path=src/mixres/assets/tiny_base",
    "batch.samples_per_step=4",
    "data.resize.target.multiple_of=8",  # one token of the tiny base
    "sample.steps=8",
    "evaluate.sigmas=[0.3, 0.7]",
)


def framed(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image under a frame of one token's width."""
    made = Image.new("RGB", image.size, colour)
    made.paste(image.crop((FRAME, FRAME, image.width - FRAME, image.height - FRAME)), (FRAME, FRAME))
    return made


def write_border_pairs(folder: Path, photographs: Sequence[data.Photograph], count: int, seed: int) -> None:
    """Pairs of sizes of their own: a green frame becomes yellow, and red and blue are swapped within it."""
    rng, images = random.Random(seed), [photograph.read() for photograph in photographs]
    for name in ("training_images", "control_images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = images[index % len(images)]
        size = Size(0, 1)
        while max(size) > 2.5 * min(size) or size.width * size.height > 128**2:
            size = Size(rng.randint(64, 176), rng.randint(64, 176))
        zoom = rng.uniform(1, min(2.5, image.width / size.width, image.height / size.height))
        left, top = (rng.uniform(0, whole - zoom * part) for whole, part in zip(image.size, size, strict=True))
        box = (left, top, left + zoom * size.width, top + zoom * size.height)
        made = image.resize(size, Image.Resampling.LANCZOS, box=box)
        swapped = Image.fromarray(np.ascontiguousarray(np.asarray(made)[..., ::-1]))
        scale = rng.uniform(1.1, 1.8)
        control = framed(made, GREEN).resize([round(scale * side) for side in size], Image.Resampling.NEAREST)
        framed(swapped, YELLOW).save(folder / "training_images" / f"{index:03d}.png")
        control.save(folder / "control_images" / f"{index:03d}.png")
        caption = folder / "training_images" / f"{index:03d}.txt"
        caption.write_text("green frame to yellow, swap red and blue\n", encoding="utf-8")


def at_a_megapixel() -> dict[str, Any]:
    """What the three rules would make of files ten times as large, with their own steps in pixels and 1024 x 1024."""
    from mixres.verification.bucket_data import Bucketed
    from mixres.verification.bucket_rules import RULES

    found: dict[str, Any] = {}
    for name in SETS:
        files = sorted((BUILD / name / "train" / "training_images").glob("*.png"))
        sizes = [Size(*(10 * side for side in Image.open(file).size)) for file in files]
        found[name] = {}
        for rule_name, rule in RULES.items():
            fits = rule.fits(sizes, 1024, 16 * rule.step_tokens)
            found[name][rule_name] = Bucketed(rule, fits, 4).figures(sizes)
    return found


def train_all() -> None:
    """Train what is missing; every run ends in docs/results/buckets.json."""
    from mixres.config.load import load_config
    from mixres.verification.against_buckets import ARMS, against_buckets

    os.chdir(REPOSITORY)
    data.write_demo(BUILD / "quickstart")
    write_border_pairs(BUILD / "border" / "train", data.TRAIN_PHOTOGRAPHS, 24, 3)
    write_border_pairs(BUILD / "border" / "held_out", data.HELD_OUT_PHOTOGRAPHS, 12, 4)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found["megapixel"] = at_a_megapixel()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    # One by one trains what mixed batches train, to the rounding: last.
    calls = [(seeds, ARMS[:-1]) for seeds in range(1, SEEDS + 1)] + [(SEEDS, ARMS)]
    for seeds, arms in calls:
        for name in SETS:
            folder = BUILD / name
            report = folder / "run" / "reports" / "buckets.json"
            if name in found and not report.exists():
                report.parent.mkdir(parents=True)
                report.write_text(json.dumps(found[name]), encoding="utf-8")
            words = [f"data.{part}={folder / part}" for part in ("train", "held_out")]
            words += [f"cache.cache_dir={BUILD / 'cache'}", f"logging.output_dir={folder / 'run'}", *SETTINGS]
            config = load_config(REPOSITORY / "configs" / "quickstart.yaml", words)
            against_buckets(config, steps=STEPS, seeds=seeds, trained=arms, timed_steps=sys.maxsize)
            found = json.loads(RESULTS.read_text(encoding="utf-8"))  # others may have added to it
            found[name] = json.loads(report.read_text(encoding="utf-8"))
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


NAMES = {"mixed": "mixed (mixres)", "simpletuner": "buckets of SimpleTuner", "musubi_tuner": "buckets of musubi-tuner",
         "ai_toolkit": "buckets of ai-toolkit", "one_by_one": "one by one"}  # fmt: skip
TITLES = {"quickstart": "The quickstart's pairs", "border": "Few pairs of many sizes, edited at the border"}
PSNR = ("images", "psnr")


def differences(report: Mapping[str, Any], arm: str, *path: str) -> list[float]:
    """Of one figure, `arm` less `mixed`, for each seed that both have."""
    values: dict[str, dict[int, float]] = {"mixed": {}, arm: {}}
    for run in report["runs"]:
        if run["arm"] in values:
            value: Any = run
            for name in path:
                value = value[name]
            values[run["arm"]][run["seed"]] = value
    return [values[arm][seed] - values["mixed"][seed] for seed in values[arm].keys() & values["mixed"].keys()]


def spread(found: tuple[float, float, float] | None, digits: int) -> str:
    """Mean, and lowest to highest."""
    return "-" if found is None else "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*found, d=digits)


def plural(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds != 1)}"


def result_table(report: Mapping[str, Any]) -> list[str]:
    """A row an arm."""
    from mixres.verification.against_buckets import ARMS, over_seeds

    bands = sorted({key for run in report["runs"] for key in run["images"] if key.removeprefix("psnr_").isdigit()})
    heads = ["", "held-out PSNR, dB", *(f"band {band.removeprefix('psnr_')}" for band in bands), "outermost token",
             "held-out loss", "drift, px", "samples seen", "runs"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in ARMS:
        own = [spread(over_seeds(report, arm, *PSNR), 2)]
        own += [spread(over_seeds(report, arm, "images", band), 2) for band in bands]
        own += [spread(over_seeds(report, arm, "images", "psnr_border"), 2)]
        own += [
            spread(over_seeds(report, arm, "eval", "loss"), 4),
            spread(over_seeds(report, arm, "images", "drift_px"), 2),
        ]
        seen = over_seeds(report, arm, "samples")
        own += [f"{seen[0]:.0f}" if seen else "-", str(sum(run["arm"] == arm for run in report["runs"]))]
        lines.append(f"| {NAMES[arm]} | " + " | ".join(own) + " |")
    return lines


def cost_table(report: Mapping[str, Any]) -> list[str]:
    """What each arm does to the images, and what it costs."""
    heads = ("", "buckets", "area cropped: mean, most", "images cropped", "repeated an epoch", "mean batch",
              "tokens a sample", f"{report['clock']} a sample, ms")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, time in report["times"].items():
        own = report["buckets"].get(arm)
        ms = f"{1000 * time['seconds']:.1f}"
        if own:
            cells = [str(own["buckets"]), f"{own['cropped_mean']:.1%}, {own['cropped_most']:.1%}",
                     f"{own['cropped']} of {report['samples']}", str(own["repeated"]),
                     f"{own['mean_batch']:.2f}"]  # fmt: skip
        else:
            cells = ["none", "0", "0", "0", "1" if arm == "one_by_one" else str(report["samples_per_step"])]
        lines.append(f"| {NAMES[arm]} | " + " | ".join([*cells, f"{time['tokens']:.0f}", ms]) + " |")
    return lines


def timing(report: Mapping[str, Any]) -> str:
    """What the times are of, in words."""
    timed = [(own["steps"], own["epoch_steps"]) for own in report["times"].values()]
    part = "every step" if all(steps == epoch for steps, epoch in timed) else "some steps"
    return (
        f"Times are of {part} of an epoch, {min(timed)[0]} to {max(timed)[0]} by arm: the median of "
        f"{report['timed_rounds']} rounds. Tokens are of the whole epoch."
    )


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """In words, what the seeds show of each arm against `mixed`: better or worse in every seed, or neither."""
    from mixres.verification.against_buckets import ARMS

    lines = []
    for arm in ARMS[1:]:
        psnr, ratio = differences(report, arm, *PSNR), report["times"][arm]
        if not psnr:
            continue
        mean, low, high = sum(psnr) / len(psnr), min(psnr), max(psnr)
        if max(abs(low), abs(high)) < 0.05:
            found = "as good in every seed"
        elif low > 0:
            found = "better in every seed"
        elif high < 0:
            found = "worse in every seed"
        else:
            found = "better in some seeds and worse in others"
        lines.append(
            f"- {NAMES[arm]}: {found}{_fewer(report, arm)}, {mean:+.2f} dB ({low:+.2f} to {high:+.2f}, "
            f"{plural(len(psnr))}) against mixed batches; a sample takes {ratio['ratio']:.2f} x ({ratio['low']:.2f} to "
            f"{ratio['high']:.2f}) the {report['clock']}."
        )
    return lines


def _fewer(report: Mapping[str, Any], arm: str) -> str:
    """A remark where an arm's steps hold fewer samples than those of the others."""
    own = [run["samples"] for run in report["runs"] if run["arm"] == arm]
    most = max(run["samples"] for run in report["runs"])
    return f" (from {own[0]} samples, where mixed has {most})" if own and own[0] < most else ""


def block(found: Mapping[str, Any]) -> str:
    """Everything on the page that has a number of the results in it, in Markdown."""
    lines = []
    for name in (name for name in SETS if name in found):
        report = found[name]
        seeds, runs = len({run["seed"] for run in report["runs"]}), len(report["runs"])
        wanted = SEEDS * len(report["times"])
        missing = "" if runs == wanted else f" Not complete: {runs} of {wanted} runs are done."
        lines += [
            f"### {TITLES[name]}", "",
            f"{report['samples']} pairs, {report['held_out']} held out, {report['steps']} steps of "
            f"{report['samples_per_step']} samples, {plural(seeds)}. In brackets the lowest and highest seed."
            f"{missing}", "",
            *result_table(report), "", *verdicts(report), "",
            f"![Held-out PSNR and time a sample of each arm](images/buckets_{name}.png)", "",
            *cost_table(report), "", timing(report), "",
        ]  # fmt: skip
    if "megapixel" in found:
        heads = ("", "data", "buckets", "area cropped: mean, most", "repeated an epoch", "mean batch")
        lines += [
            "### The same rules at a megapixel", "",
            "Arithmetic alone, nothing was trained: files ten times as large, 1024 x 1024, each trainer's own steps of "
            "64, 16 and 32 pixels, batches of 4. Finer steps crop less, and leave more buckets with less in them.", "",
            "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
            *(f"| {NAMES[rule]} | {name} | {own['buckets']} | {own['cropped_mean']:.1%}, {own['cropped_most']:.1%} | "
              f"{own['repeated']} | {own['mean_batch']:.2f} |"
              for name in SETS for rule, own in found["megapixel"][name].items()), "",
        ]  # fmt: skip
    if "simpletuner" in found:
        rows = found["simpletuner"]["rows"]
        buckets, sizes = (sum(row[key] for row in rows) for key in ("same_bucket", "same_size"))
        short = sum(found[name]["buckets"]["simpletuner"]["short_buckets"] for name in SETS if name in found)
        crops = ", ".join(
            f"{row['cropped_ours']} and {row['cropped_theirs']} of {row['images']} ({row['data']}, {row['setting']})"
            for row in rows
        )
        lines += [
            "### Against SimpleTuner's own code", "",
            f"SimpleTuner {found['simpletuner']['version']}, asked for the sizes of these files as trained and as at a "
            f"megapixel, gives {buckets} of {sum(row['images'] for row in rows)} the same bucket as the rule here, and "
            f"{sizes} the same size before the crop. Images that lose a row or column, here and there: {crops}. "
            f"{short} buckets of the trained sets hold fewer images than a batch; without "
            "`--allow_dataset_oversubscription` it refuses such data. Its sampler was read, not run.", "",
        ]  # fmt: skip
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true", help="train nothing")
    given = parser.parse_args()
    if not given.plots:
        train_all()
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    from mixres.verification.against_buckets import plot

    for name in (name for name in SETS if name in found):
        plot([(TITLES[name], found[name])], IMAGES / f"buckets_{name}.png")


if __name__ == "__main__":
    main()
