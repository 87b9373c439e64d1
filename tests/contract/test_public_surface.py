"""Names, options, exit codes, keys and files that others script against. Additions pass, a loss or a change fails."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contract import record
from support.jobs import REPOSITORY

ADDITIONS_ALLOWED = ("files", "metrics_keys", "evaluation_keys", "status_keys", "config_keys")
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft")
NO_FILE = "/nowhere/at/all"


def missing(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Keys of `wanted` that `found` lacks at the same place."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return [f"{where}: not an object"]
        absent = [f"{where}.{key}" for key in wanted.keys() - found.keys()]
        common = wanted.keys() & found.keys()
        return absent + [line for key in common for line in missing(wanted[key], found[key], f"{where}.{key}")]
    if isinstance(wanted, list) and wanted:
        if not isinstance(found, list) or not found:
            return [f"{where}: not a list, or empty"]
        return missing(wanted[0], found[0], f"{where}[0]")
    return []


def test_public_names_keep_their_signatures(golden: dict[str, Any]) -> None:
    assert record.signatures() == golden["signatures"]


def test_every_config_key_keeps_its_default(golden: dict[str, Any]) -> None:
    found = record.config_defaults()
    assert {key: found.get(key, "is gone") for key in golden["config"]} == golden["config"]


def imported(done: "subprocess.CompletedProcess[str]") -> set[str]:
    return {name.strip().partition(".")[0] for name in re.findall(r"^import time:.*\|(.*)$", done.stderr, re.MULTILINE)}


def train_py(*words: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-X", "importtime", "train.py", *words]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_help_names_the_verbs_and_imports_no_torch() -> None:
    done = train_py("--help")
    assert done.returncode == 0
    assert [verb for verb in record.VERBS if not re.search(rf"\b{verb}\b", done.stdout)] == []
    assert {"--config", "--cache"} <= set(re.findall(r"--[a-z]+", done.stdout))
    assert "argparse" in imported(done)
    assert imported(done).isdisjoint(HEAVY)


@pytest.mark.parametrize("verb", record.VERBS)
def test_a_verb_keeps_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.command(verb, "--help") == 0
    options = re.findall(r"^ +(?:-h, )?(--[a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    assert set(record.VERBS[verb]) - set(options) == set()


WRONG = {
    "nothing": [],
    "no config": ["train"],
    "unknown verb": ["trian", "--config", record.CONFIG],
    "unknown option": ["--config", record.CONFIG, "--quick"],
    "option of another verb": ["train", "--config", record.CONFIG, "--synthetic"],
    "no such file": ["--config", f"{NO_FILE}.yaml"],
    "unknown key": ["--config", record.CONFIG, "train.sed=1"],
    "wrong value": ["--config", record.CONFIG, "train.seed=-1"],
    "no data": ["cache", "--config", record.CONFIG, f"data.train={NO_FILE}"],
    "no base": ["verify", "--config", record.CONFIG, f"model.pretrained_model_name_or_path={NO_FILE}"],
    "sample without a result": ["sample", "--out", "OUT", "--prompt", "p"],
    "sample of none": ["sample", "--lora", NO_FILE, "--out", "OUT", "--prompt", "p"],
    "export of none": ["export", NO_FILE, "--format", "diffusers", "--out", "OUT.safetensors"],
    "export in no format": ["export", "tests/contract/fixtures/lora", "--format", "gguf", "--out", "OUT.safetensors"],
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
def test_wrong_input_ends_with_2_and_says_why(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    assert record.command(*given, *(record.folders(tmp_path) if "--config" in given else ())) == 2
    assert "mixres: error: " in capsys.readouterr().err


def test_wrong_config_through_train_py_imports_no_torch() -> None:
    done = train_py("--config", record.CONFIG, "train.seed=-1")
    assert done.returncode == 2
    assert "pydantic" in imported(done)
    assert imported(done).isdisjoint(HEAVY)


def test_a_failure_at_work_ends_with_1(finished: Path, tmp_path: Path) -> None:
    """The first step throws the weights so far that the second is not finite."""
    words = (f"cache.cache_dir={finished / 'cache'}", record.folders(tmp_path)[1])
    few = ("train.max_skips=0", "optimizer.init_args.lr=1e30", "sample.every=0", "evaluate.every=0")
    assert record.command("train", "--config", record.CONFIG, *words, *few) == 1
    status = json.loads((tmp_path / "run" / "run_status.json").read_bytes())
    assert (status["state"], status["exit_code"]) == ("failed", 1)


@pytest.mark.slow
def test_a_signal_ends_with_75_after_saving(tmp_path: Path) -> None:
    assert record.stopped_run(tmp_path, after=1) == 75
    status = json.loads((tmp_path / "run" / "run_status.json").read_bytes())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}" / "manifest.json").is_file()


def test_the_run_folder(finished: Path, golden: dict[str, Any]) -> None:
    wanted, found = dict(golden["run"]), record.run_folder(finished / "run")
    for name in ADDITIONS_ALLOWED:
        assert set(wanted.pop(name)) - set(found[name]) == set(), name
    for name in ("checkpoint_state", "lora_metadata"):
        assert missing(wanted.pop(name), found[name]) == [], name
    recipe = wanted.pop("lora_recipe")
    assert {key: found["lora_recipe"].get(key, "is gone") for key in recipe} == recipe
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.slow
def test_the_reports(tmp_path: Path, golden: dict[str, Any]) -> None:
    found = record.reports(tmp_path)
    for name, wanted in golden["reports"].items():
        assert missing(wanted, record.shape(found[name]), name) == []
    assert found["verify.json"]["passed"] is True
    assert {"one_by_one", "padded", "packed"} <= {row["name"] for row in found["bench.json"]["rows"]}
    assert (tmp_path / "run" / "reports" / "inspect.html").is_file()
    assert (tmp_path / "run" / "reports" / "verify.png").is_file()
