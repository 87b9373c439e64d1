"""`inspect` says before a run what the run then does; its page shows every figure of its report."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from mixres import cli
from mixres.config.load import load_config
from mixres.config.problems import leaves
from mixres.data import records
from mixres.geometry import Size
from mixres.inspection.input_preview import chosen, preview_grid
from mixres.inspection.report import page, shown, summary_lines
from mixres.inspection.statistics import histogram
from mixres.models.qwen.family import _text_preview
from mixres.preprocessing.training_data import usable_records
from support.family_cases import CASES, FamilyCase
from support.jobs import Jobs, metrics

Inspect = Callable[..., tuple[int, dict[str, Any]]]
OfCase = Callable[[FamilyCase], Path]


@pytest.fixture
def inspect(small_run: Path, small_cache: Path, tmp_path: Path) -> Inspect:
    """The verb through the command line; its exit code and its report."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        AcceleratorState._reset_state(True)
        folders = [f"cache.cache_dir={small_cache}", f"logging.output_dir={tmp_path / 'run'}"]
        code = cli.main(["inspect", "--config", str(small_run), *folders, *words])
        return code, json.loads((tmp_path / "run" / "reports" / "inspect.json").read_text(encoding="utf-8"))

    return run


def check_against_a_run(report: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    plan, sums = report["plan"], report["plan"]["sums"]["run"]
    assert sums["steps"] == len(lines) == plan["max_train_steps"]
    for name in ("samples", "tokens", "tokens_computed", "microbatches"):
        assert sums[name] == sum(line[name] for line in lines), name
    assert sums["padding_share"] == 1 - sum(line["tokens"] for line in lines) / sums["tokens_computed"]
    assert sum(row["run"] for row in plan["tokens_of_rank"]) == sums["tokens_computed"]
    counts = [line["microbatches"] for line in lines]
    assert (sums["fewest_microbatches"], sums["most_microbatches"]) == (min(counts), max(counts))
    epoch = [line for line in lines if line["epoch"] == 0]
    assert plan["steps_per_epoch"] == len(epoch) == plan["sums"]["epoch"]["steps"]
    assert plan["sums"]["epoch"]["tokens"] == sum(line["tokens"] for line in epoch)


RUNS = {
    "packed": ["batch.layout=packed", "batch.max_tokens=120"],
    "padded, captions dropped": [
        "batch.layout=padded", "data.caption_dropout=0.5", "batch.max_tokens=150", "cache.text=recompute",
    ],
    "problems skipped, others' pictures beside": [
        "data.train={damaged}", "data.regularization={held_out}", "data.held_out=null", "data.on_bad_item=skip",
        "batch.layout=padded", "batch.max_tokens=300", "data.caption_dropout=0.2",
    ],
}  # fmt: skip


@pytest.fixture
def damaged(few_pairs: Path, tmp_path: Path) -> Path:
    """The training pairs, of which one target is cut short and one caption is gone."""
    data = shutil.copytree(few_pairs / "train", tmp_path / "damaged")
    targets = sorted((data / "training_images").glob("*.png"))
    targets[0].write_bytes(targets[0].read_bytes()[:200])
    targets[1].with_suffix(".txt").unlink()
    return data


@pytest.mark.slow
@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_the_run_then_does_what_was_said(
    words: list[str],
    inspect: Inspect,
    tmp_path: Path,
    small_run: Path,
    damaged: Path,
    few_pairs: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "SETTLED_NS", -(10**12))  # the files may be new, of which a scan remembers nothing
    words = [word.format(damaged=damaged, held_out=few_pairs / "held_out") for word in words]
    words = [*words, "sample.every=0", f"cache.cache_dir={tmp_path / 'cache'}"]
    code, report = inspect(*words)
    assert code == 0
    lines = {line[:10].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert {"scan", "data", "tokens", "sizes", "buckets", "plan", "memory", "cache", "report"} <= lines.keys()
    assert f" {report['plan']['sums']['run']['tokens']:,} tokens, " in lines["run"]
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ["scan"], "nothing is encoded"
    AcceleratorState._reset_state(True)
    folder = (f"logging.output_dir={tmp_path / 'run'}",)
    assert cli.main(["--config", str(small_run), *folder, *words]) == 0
    check_against_a_run(report, metrics(tmp_path / "run"))
    assert report["plan"]["sums"]["run"]["most_microbatches"] > 1
    if f"data.train={damaged}" in words:
        assert len(report["left_out"]) == 2 and "2 problems" in lines["left out"]
        assert (report["items"]["training_examples"], report["items"]["of_them_regularization"]) == (11, 3)
    capsys.readouterr()
    assert inspect(*words, "resume=required")[0] == 0
    assert inspect(*words, "train.seed=9")[0] == cli.main(["--config", str(small_run), *folder, *words, "train.seed=9"])
    told, refused = capsys.readouterr().err.splitlines()
    assert told == refused and "train.seed: checkpoint step-" in told
    entries = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert entries < report["cache"]["bytes"] < entries + 6000 * report["cache"]["entries"]
    by_text, own = report["cache"]["bytes_by_text"], "recompute" if "cache.text=recompute" in words else "float32"
    assert by_text["recompute"] < by_text["float8"] < by_text["float32"] and report["cache"]["bytes"] == by_text[own]
    assert (own == "recompute") == ("text" in lines)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_ranks_and_several_controls(
    layout: str, small_run: Path, base_of: OfCase, pairs_of: OfCase, tmp_path: Path
) -> None:
    case = CASES["qwen_image_edit_plus"]
    jobs = Jobs(small_run, tmp_path / "cache", tmp_path)
    words = [
        f"model.pretrained_model_name_or_path={base_of(case)}", f"data.train={pairs_of(case) / 'train'}",
        *case.overrides(), f"batch.layout={layout}", "batch.samples_per_step=3", "data.caption_dropout=0.3",
    ]  # fmt: skip
    assert cli.main(["inspect", "--ranks", "2", *jobs.words("run", *words)]) == 0
    report = json.loads((tmp_path / "run" / "reports" / "inspect.json").read_text(encoding="utf-8"))
    jobs.forked("run", *words, ranks=2)
    assert report["plan"]["ranks"] == 2
    check_against_a_run(report, metrics(tmp_path / "run"))
    assert list(report["tokens"]["per_example"])[2:] == ["target", "control_1", "control_2", "control_3", "all"]


def shown_by(text: str) -> dict[str, str]:
    """What stands in the elements with `data-key`, of a page that is well-formed and fetches and runs nothing."""
    elements = list(ElementTree.fromstring(text).iter())
    tags = {element.tag.rpartition("}")[2] for element in elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed"})
    for name, value in (pair for element in elements for pair in element.items()):
        assert not name.startswith("on")
        assert name not in ("src", "href", "action", "data") or re.match("data:image/(png|webp);base64,", value)
    assert "@import" not in text and "url(" not in text
    pairs = [(key, "".join(element.itertext())) for element in elements if (key := element.get("data-key"))]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def galleries(text: str) -> dict[str, list[tuple[str, list[str | None]]]]:
    """By section, the names under the thumbnails, each with its images; None for one that cannot be read."""
    found: dict[str, list[tuple[str, list[str | None]]]] = {}
    for section in ElementTree.fromstring(text).iter("section"):
        for figure in section.iter("figure"):
            words = list(figure.find("figcaption").itertext())
            images = [element.get("src") for element in figure.find("div")]
            found.setdefault(section.get("id"), []).append((words[-2].strip(), images))
    return found


def check_page(text: str, report: dict[str, Any]) -> None:
    found = shown_by(text)
    assert found.keys() == {".".join(map(str, path)) for path, _ in leaves(report) if path[1:]}
    for path, value in leaves(report):
        if path[1:]:
            cell, figure = found[".".join(map(str, path))], shown(value, str(path[-1]))
            assert cell == figure or cell.startswith(f"{figure} ("), path


def test_the_page_shows_every_figure_and_needs_nothing(inspect: Inspect, tmp_path: Path) -> None:
    code, report = inspect("--measure", "--decode", "--ranks", "3", "data.caption_dropout=0.1", "train.parallel=fsdp2")
    assert code == 0
    assert report["measured"]["fits"] and report["measured"]["low"] <= report["measured"]["seconds"]
    assert report["measured"]["run_seconds"] > report["measured"]["epoch_seconds"] > 0
    notices = " ".join(report["notices"])
    assert "are not in the cache" in notices, "the empty prompts are not"
    assert "the aspect of training_images/005_astronaut.png (56x103 to 64x96) changes by 22.6%" in notices
    text = (tmp_path / "run" / "reports" / "inspect.html").read_text(encoding="utf-8")
    check_page(text, report)
    assert set(re.findall('<section id="(.*?)">', text)) == {key for key, figures in report.items() if figures}
    sheet = (tmp_path / "run" / "reports" / "inputs.png").read_bytes()
    assert base64.b64encode(sheet).decode() in text
    shown_rows = galleries(text)["tokens"]
    assert {name for name, _ in shown_rows} == {row["name"] for row in report["tokens"]["extremes"]}
    assert all(len(images) == 2 and all(images) for _, images in shown_rows), "target and control"
    files = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {"inputs.png", "inspect.html", "inspect.json"}
    assert [row["caption"] for row in report["inputs"]].count("交换红色和蓝色") >= 1, "the picture's font lacks it"
    broken = text.replace('data-key="plan.sums.run.tokens"', "")
    with pytest.raises(AssertionError):
        check_page(broken, report)


@pytest.mark.slow
def test_what_the_cache_holds_stands_beside_what_went_in(inspect: Inspect, tmp_path: Path) -> None:
    code, report = inspect("--decode")
    assert code == 0 and not any("in the cache" in notice for notice in report["notices"])
    with Image.open(tmp_path / "run" / "reports" / "inputs.png") as image:
        decoded = np.asarray(image.convert("RGB"), dtype=float)
    assert decoded.shape[1] == 12 + 5 * 236, "target, control for VAE and text encoder; both from the cache"
    for column in range(5):
        assert decoded[28:, 12 + 236 * column :][:, :224].std() > 5, "an image"


def test_problems_of_the_data_are_told_beside_a_base_that_cannot_be_had(
    small_run: Path, few_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(few_pairs / "train", tmp_path / "data")
    image = min((data / "training_images").glob("*.png"))
    image.write_bytes(b"")
    base, nowhere = tmp_path / "no base", tmp_path / "nowhere"
    words = [f"model.pretrained_model_name_or_path={base}", f"data.train={data}", f"data.held_out={nowhere}"]
    folders = [f"cache.cache_dir={tmp_path / 'cache'}", f"logging.output_dir={tmp_path / 'run'}"]
    assert cli.main(["inspect", "--config", str(small_run), *words, *folders]) == 2
    assert [line.removeprefix("mixres: error: ") for line in capsys.readouterr().err.splitlines()] == [
        f"model.pretrained_model_name_or_path: there is no folder '{base}': correct the path",
        f"{image}: is empty (0 bytes); copy it again",
        f"data.held_out: {nowhere}: no such folder or manifest; correct the path",
    ]


def test_all_problems_are_told_and_the_rest_is_reported(
    inspect: Inspect, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, targets = damaged, sorted((damaged / "training_images").glob("*.png"))
    with Image.open(data / "control_images" / targets[2].name) as image:
        image.resize((128, 128)).save(targets[2])
    words = [f"data.train={data}", "batch.max_tokens=75", "model.lora.target_modules=[to_q,to_qq]"]
    code, report = inspect(*words)
    lines = [line.removeprefix("mixres: error: ") for line in capsys.readouterr().err.splitlines()]
    assert code == 2 and lines == report["faults"]
    wanted = ["to_qq", *(target.name for target in targets[:3])]
    wanted.append("data: 2 problems; 11 of 13 records can be used: fix the data,")
    assert [part for part in wanted if part in " ".join(lines)] == wanted
    over = [line for line in lines if "tokens alone are over batch.max_tokens = 75" in line]
    assert 1 <= len(over) < 8
    assert (report["items"]["training_examples"], report["plan"]["examples"]) == (8, 8 - len(over))
    assert "memory" not in report or report["memory"] is None
    text = (tmp_path / "run" / "reports" / "inspect.html").read_text(encoding="utf-8")
    check_page(text, report)
    without_caption, cut = galleries(text)["faults"]
    assert (cut[0], without_caption[0]) == (f"{targets[0]}", f"{targets[1]}")
    assert (cut[1], len(without_caption[1])) == ([None], 1) and without_caption[1] != [None]
    assert inspect("--ranks", "0")[0] == 2
    assert "--ranks: given 0, allowed: an integer >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_the_sheet_shows_what_the_encoders_get(
    name: str, small_run: Path, base_of: OfCase, pairs_of: OfCase, tmp_path: Path
) -> None:
    """Pixels against what the encoders themselves are called with."""
    case = CASES[name]
    data, family = pairs_of(case) / "train", case.at(base_of(case))
    target = min((data / "training_images").glob("*.png"))
    with Image.open(target) as image:
        Image.new("L", image.size, 255).save(target.with_name(f"{target.stem}_mask.png"))
    words = [f"model.pretrained_model_name_or_path={base_of(case)}", f"data.train={data}", "data.held_out=null"]
    config = load_config(small_run, [*words, *case.overrides(), f"cache.cache_dir={tmp_path}"])
    some = chosen(usable_records(config, family, is_main=False).train)
    assert any(scanned.record.mask for scanned in some)
    columns = 2 + 2 * max(len(scanned.record.controls) for scanned in some)
    assert preview_grid(config, family, some).width == 12 + columns * (224 + 12)
    encoders, preprocessors = family.load_encoders(dtype=torch.float32, device="cpu"), family.load_preprocessors()
    controls = [Image.open(control).convert("RGB") for control in some[0].record.controls]
    sizes = case.sizes(Size(64, 64), controls)
    for image, size in zip(family.vae_controls(preprocessors, controls, sizes), sizes.vae, strict=True):
        preview = np.asarray(family.vae_preview(preprocessors, image, size), dtype=float)
        pixels = encoders.image_processor.preprocess(image, size.height, size.width)[0].permute(1, 2, 0)
        assert preview.shape == (size.height, size.width, 3)
        assert np.abs((pixels.numpy() + 1) * 127.5 - preview).max() <= 0.5 + 1e-4
    for image in family.text_controls(preprocessors, controls, sizes):
        preview = _text_preview(preprocessors, image)
        grid = encoders.processor(text=["<|image_pad|>"], images=[image], return_tensors="pt")["image_grid_thw"][0]
        assert preview.size == (14 * int(grid[2]), 14 * int(grid[1]))
        resized = image.resize(preview.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(resized, dtype=float) - np.asarray(preview, dtype=float)).max() <= 1


def test_lines_need_no_section_as_a_rehearsal_without_data_has_few() -> None:
    assert summary_lines({"notices": ["of the run"]}) == ["notice    of the run"]


def test_the_page_escapes_what_users_write() -> None:
    script = """"><script>alert('&')</script>"""
    report = {"model": {"base": script}, "faults": [f"{script}.png"], "inputs": [{"name": script, "caption": script}]}
    text = page(report, None)
    check_page(text, report)
    assert "<script" not in text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nf4", "bnb_int8"])
def test_neither_weights_nor_cuda_are_needed(inspect: Inspect, method: str, copy_of_base: Path) -> None:
    plain = inspect("model.dtype=bfloat16")[1]
    for weights in copy_of_base.rglob("*.safetensors"):
        weights.unlink()
    base = f"model.pretrained_model_name_or_path={copy_of_base}"
    words = [base, "model.dtype=bfloat16", f"model.quantize={method}"]
    code, report = inspect(*words)
    assert code == 0
    assert (report["tokens"], report["plan"]) == (plain["tokens"], plain["plan"])
    assert report["memory"]["bytes"]["weights"] < plain["memory"]["bytes"]["weights"]
    assert any(f"model.quantize={method} needs a CUDA device" in notice for notice in report["notices"])
    assert inspect("--measure", *words)[0] == 2


def test_bins_lie_between_round_numbers() -> None:
    bins = histogram([140, 527, 300, 300.5])
    assert [(row["from"], row["to"]) for row in bins][:2] == [(100, 150), (150, 200)]
    assert sum(row["count"] for row in bins) == 4
    assert histogram([7, 7]) == [{"from": 7, "to": 8, "count": 2}]
    edges = [0.1 * n for n in range(1, 13)]
    assert sum(row["count"] for row in histogram(edges)) == 12
