import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from mixres import __version__, cli
from mixres.errors import WorkError
from support.jobs import children

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "pydantic", "omegaconf", "yaml", "numpy", "diffusers", "transformers", "accelerate", "peft", "PIL",
         "jinja2")  # fmt: skip


def train_py(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("model: {pretrained_model_name_or_path: base}\ndata: {train: pairs}\n", encoding="utf-8")
    return path


VERBS = ("train", "cache", "inspect", "verify", "bench", "quickstart", "sample", "export")


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)], ids=lambda verb: "".join(verb) or "none")
def test_help_names_verbs_and_options_and_imports_nothing_but_the_standard_library(verb: tuple[str, ...]) -> None:
    done = train_py(*verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: train.py {verb[0] if verb else '[VERB] --config FILE [key=value ...]'}")
    whole, known = cli.parsers()
    assert all(f"\n    {name}" in whole.format_help() for name in known) and tuple(known) == VERBS
    parser = known[verb[0]] if verb else whole
    assert all(option in done.stdout for option in parser._option_string_actions)
    assert imported(done).isdisjoint(HEAVY)


def test_version() -> None:
    done = train_py("--version")
    assert (done.returncode, done.stdout) == (0, f"mixres {__version__}\n")


def test_wrong_config_is_reported_in_full_before_torch_is_imported(config: Path) -> None:
    done = train_py("--config", str(config), "train.max_grad_nrm=1", "train.seed=x", "batch.layout=packd")
    assert done.returncode == 2
    assert messages(done) == [
        "mixres: error: train.max_grad_nrm: unknown key; did you mean 'train.max_grad_norm'?",
        "mixres: error: batch.layout: given \"packd\", should be 'packed' or 'padded'",
        'mixres: error: train.seed: given "x", should be a valid integer',
    ]
    assert imported(done).isdisjoint({"torch", "diffusers", "transformers", "accelerate", "peft"})
    assert "pydantic" in imported(done)  # the reading of import times does see what is imported


def under_a_launcher(*arguments: str, rank: str = "0") -> int:
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no", "RANK": rank}
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], env=environment, check=False).returncode


def test_under_a_launcher_the_run_folder_says_what_was_wrong_too(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--config", str(config), f"logging.output_dir={folder}", "train.sed=1", "train.seed=-1")
    assert train_py(*words).returncode == under_a_launcher(*words, rank="1") == 2
    assert not folder.exists(), "the exit code has said it; other ranks write nothing"
    assert under_a_launcher(*words) == 2
    status = json.loads((folder / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["verb"]) == ("refused", 2, "train")
    assert [line.partition(":")[0] for line in status["reason"].splitlines()] == ["train.sed", "train.seed"]
    (folder / "run_status.json").write_text("of the run that holds the folder")
    with FileLock(folder / ".lock"):
        assert under_a_launcher(*words) == 2
    assert (folder / "run_status.json").read_text() == "of the run that holds the folder"


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


def maps(pid: int) -> str:
    """What the process has of files in its memory; nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_a_launcher_killed_while_its_process_starts_takes_it_along(config: Path, tmp_path: Path) -> None:
    """Else it would train on, unseen, and hold the folder."""
    words = ("--config", str(config), f"logging.output_dir={tmp_path / 'run'}")
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LAUNCHER, str(ROOT / "train.py"), *words]
    with subprocess.Popen(command, env=environment) as launcher:
        while not (started := children(launcher.pid)) or "libtorch" not in maps(started[0]):
            assert launcher.poll() is None
            time.sleep(0.001)
        launcher.kill()
    while maps(started[0]):
        time.sleep(0.01)
    assert not (tmp_path / "run").exists(), "it had not come to its folder"


DASHES = "unknown option; overrides have no dashes: write"
VERB_LIST = "the verbs are: " + ", ".join(VERBS)
ARGUMENTS = {
    "train": ["--config: not given; write --config FILE"],
    "--data.train=x --config CONFIG --train.seed": [
        f"--data.train: {DASHES} data.train=x",
        f"--train.seed: {DASHES} train.seed=VALUE",
    ],
    "train more.yaml --config CONFIG": ["more.yaml: is a file, not an override; write --config more.yaml"],
    "train fast --config CONFIG": ["'fast': not an override"],
    "cahe --config CONFIG": [f"cahe: unknown verb; did you mean 'cache'?; {VERB_LIST}"],
    "zzz": [f"zzz: unknown verb; {VERB_LIST}", "--config: not given"],
    "--confg=a": ["--confg=a: unknown option; see --help; did you mean '--config'?", "--config: not given"],
    "--conf=a": ["--conf=a: unknown option; see --help; did you mean '--config'?", "--config: not given"],
    "--config CONFIG export": [
        "--config: unknown option of export; see export --help",
        "--format: not given",
        "--out: not given",
        "RUN: CONFIG is not a .safetensors file",
    ],
    "sample --lora": ["argument --lora: expected one argument; see --help"],
    "sample --seed x": ["argument --seed: invalid int value: 'x'"],
    "--config": ["argument --config: expected one argument"],
    "--synthetic --config CONFIG": ["--synthetic: is for the verb bench, not for train: leave it out"],
    "bench --cache --synthetic --config CONFIG": ["--synthetic: is for the verb bench, not for cache"],
    "--verify --config CONFIG": ["--verify: is for the verb cache, not for train"],
    "inspect --ranks two": ["argument --ranks: invalid int value: 'two'; see --help"],
    "quickstart": ["quickstart: write DIR, a folder for the data, or --config FILE"],
    "quickstart DIR DIR": ["quickstart: write DIR"],
    "trian a.b=1 --config CONFIG train.seed=-1 --dry": [
        "--dry: unknown option",
        "trian: unknown verb",
        "a: unknown key",
        "train.seed: given -1",
    ],
}


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS.items(), ids=ARGUMENTS)
def test_wrong_arguments(arguments: str, expected: list[str], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.replace("CONFIG", str(config)).split()) == 2
    lines = sorted(capsys.readouterr().err.splitlines())
    for line, part in zip(lines, sorted(expected), strict=True):
        assert line.startswith(f"mixres: error: {part.replace('CONFIG', str(config))}")


def test_no_words_at_all_show_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage: ") and all(f"\n    {verb}" in shown for verb in VERBS)
    assert shown.splitlines()[-1].startswith("mixres: error: --config: not given")


CALLS: dict[str, tuple[str, dict[str, object]]] = {
    "--config CONFIG train.seed=3": ("train", {}),
    "train.seed=3 loss.weighting=none --config CONFIG": ("train", {}),
    "train --config CONFIG train.seed=3": ("train", {}),
    "cache train.seed=3 --config CONFIG": ("cache", {}),
    "--config CONFIG cache train.seed=3": ("cache", {}),
    "train.seed=3 --cache --config CONFIG": ("cache", {}),
    "--cache --verify --config CONFIG train.seed=3": ("cache", {"verify": True}),
    "cache --verify --config CONFIG train.seed=3": ("cache", {"verify": True}),
    "verify --config CONFIG train.seed=3": ("verify", {}),
    "bench --config CONFIG train.seed=3": ("bench", {}),
    "bench --synthetic --config CONFIG train.seed=3": ("bench", {"synthetic": True}),
    "inspect --measure train.seed=3 --ranks 3 --config CONFIG": ("inspect", {"measure": True, "ranks": 3}),
    "--ranks 3 inspect --decode train.seed=3 --config CONFIG": ("inspect", {"decode": True, "ranks": 3}),
    "quickstart --config CONFIG train.seed=3": ("quickstart", {}),
}


@pytest.mark.parametrize(("words", "call"), CALLS.items(), ids=CALLS)
def test_verbs_get_the_validated_config_and_their_options(
    words: str, call: tuple[str, dict[str, object]], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, dict[str, object], int]] = []
    for name in VERBS[:6]:
        monkeypatch.setattr(cli, f"_{name}", lambda given, name=name, **o: ran.append((name, o, given.train.seed)))
    assert cli.main(words.replace("CONFIG", str(config)).split()) == 0
    assert ran == [(*call, 3)]


ENDS = {
    "work": (WorkError("disk full"), 1, "mixres: error: disk full\n"),
    "full disk": (
        OSError(28, "No space left on device", "cache/index.json"),
        1,
        "mixres: error: cache/index.json: cannot be written: No space left on device; make room\n",
    ),
    "loader": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        1,
        "mixres: error: data.num_workers: DataLoader worker (pid 7) is killed by signal: Killed. Where memory is "
        "short, lower it\n",
    ),
    "interrupt": (KeyboardInterrupt(), 130, "mixres: interrupted\n"),
}


@pytest.mark.parametrize(("error", "code", "text"), ENDS.values(), ids=ENDS)
def test_how_a_verb_ends(
    error: BaseException,
    code: int,
    text: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_train", fail)
    assert cli.main(["--config", str(config)]) == code
    assert capsys.readouterr().err == text


def test_a_bug_comes_out_as_it_is(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_train", lambda _: {}["bug"])
    with pytest.raises(KeyError):
        cli.main(["--config", str(config)])
