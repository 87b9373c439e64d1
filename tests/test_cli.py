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


def test_help_is_fast_and_imports_nothing_but_the_standard_library() -> None:
    done = train_py("--help")
    assert done.returncode == 0
    assert "usage: train.py [VERB] --config FILE [key=value ...]" in done.stdout
    assert "train.py sample --lora RUN --out DIR [options]" in done.stdout
    assert "train.py export RUN --format NAME --out FILE [options]" in done.stdout
    assert all(f"  {verb} " in done.stdout for verb in (*cli.VERBS, *cli.OWN_VERBS))
    assert imported(done).isdisjoint(HEAVY)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, check=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(("verb", "first"), [("sample", "[--lora RUN|FILE]"), ("export", "[--format NAME]")])
def test_a_verbs_own_help_is_fast_too_and_names_its_options(verb: str, first: str) -> None:
    done = train_py(verb, "--help")
    assert done.returncode == 0
    assert f"usage: train.py {verb} [-h] {first}" in done.stdout
    shown = [name if name.startswith("-") else value for name, value, _ in cli.OWN_OPTIONS[verb]]
    assert all(word in done.stdout for word in shown)
    assert imported(done).isdisjoint(HEAVY)


def test_version() -> None:
    done = train_py("--version")
    assert (done.returncode, done.stdout) == (0, f"mixres {__version__}\n")


def test_wrong_config_is_told_in_full_before_torch_is_imported(config: Path) -> None:
    done = train_py("--config", str(config), "train.max_grad_nrm=1", "train.seed=x", "batch.layout=packd")
    assert done.returncode == 2
    assert messages(done) == [
        'mixres: error: batch.layout: given "packd", allowed: one of packed, padded',
        'mixres: error: train.seed: given "x", allowed: an integer >= 0 and < 9223372036854775808',
        "mixres: error: train.max_grad_nrm: unknown key; did you mean 'train.max_grad_norm'?",
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
    assert [line.partition(":")[0] for line in status["reason"].splitlines()] == ["train.seed", "train.sed"]
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


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    done = train_py("--config", str(tmp_path / "absent.yaml"))
    assert done.returncode == 2
    (message,) = messages(done)
    assert "absent.yaml: cannot be read: No such file or directory; name another file" in message


ARGUMENTS = {
    "no_config": (["train"], ["--config: not given"]),
    "dashes": (
        ["--data.train=x", "--config", "CONFIG", "--train.seed"],
        [
            "--data.train: unknown option; overrides have no dashes: write data.train=x",
            "--train.seed: unknown option; overrides have no dashes: write train.seed=VALUE",
        ],
    ),
    "no_equals_sign": (
        ["data.train", "pairs", "--config", "CONFIG", "train.seed"],
        [
            "data.train: has no value; put = between them: data.train=pairs",
            "train.seed: has no value; write train.seed=VALUE",
        ],
    ),
    "a_file_without_its_option": (
        ["train", "more.yaml", "--config", "CONFIG"],
        ["more.yaml: is a file, not an override; write --config more.yaml"],
    ),
    "unknown_verb": (["cahe", "--config", "CONFIG"], ["cahe: unknown verb; did you mean 'cache'?"]),
    "unknown_verb_no_config": (
        ["zzz"],
        [
            "zzz: unknown verb; the verbs are: train, cache, inspect, verify, bench, sample, export",
            "--config: not given",
        ],
    ),
    "unknown_option": (
        ["--confg=a"],
        ["--confg=a: unknown option; see --help; did you mean '--config'?", "--config: not given"],
    ),
    "abbreviation": (
        ["--conf=a"],
        ["--conf=a: unknown option; see --help; did you mean '--config'?", "--config: not given"],
    ),
    "own_verb_misspelt": (["sampel", "--config", "CONFIG"], ["sampel: unknown verb; did you mean 'sample'?"]),
    "own_verb_behind": (
        ["--config", "CONFIG", "sample"],
        ["sample: takes no configuration: write it first, then its options, see sample --help"],
    ),
    "own_verb_without_value": (["sample", "--lora"], ["argument --lora: expected one argument; see --help"]),
    "config_without_file": (["--config"], ["argument --config: expected one argument"]),
    "second_word": (["train", "fast", "--config", "CONFIG"], ["'fast': not an override"]),
    "synthetic_train": (["--synthetic", "--config", "CONFIG"], ["--synthetic: is for the verb bench, not for train"]),
    "synthetic_cache": (
        ["bench", "--cache", "--synthetic", "--config", "CONFIG"],
        ["--synthetic: is for the verb bench, not for cache"],
    ),
    "synthetic_verify": (["verify", "--synthetic"], ["--synthetic: is for the verb bench, not for v", "--config: not"]),
    "verify_train": (["--verify", "--config", "CONFIG"], ["--verify: is for the verb cache, not for train"]),
    "measure_bench": (
        ["bench", "--measure", "--config", "CONFIG"],
        ["--measure: is for the verb inspect, not for bench"],
    ),
    "ranks_no_number": (["inspect", "--ranks", "two"], ["argument --ranks: invalid int value: 'two'; see --help"]),
    "both_options": (
        ["cache", "--verify", "--synthetic", "--config", "CONFIG"],
        ["--synthetic: is for the verb bench, not for cache: leave it out"],
    ),
    "all_at_once": (
        ["trian", "a.b=1", "--config", "CONFIG", "train.seed=-1", "--dry"],
        ["--dry: unknown option", "trian: unknown verb", "train.seed: given -1", "a: unknown key"],
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments(
    arguments: list[str], expected: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(config) if word == "CONFIG" else word for word in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"mixres: error: {part}")


def test_no_words_at_all_show_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage: ") and all(f"  {verb} " in shown for verb in (*cli.VERBS, *cli.OWN_VERBS))
    assert shown.splitlines()[-1].startswith("mixres: error: --config: not given; write --config FILE")


CALLS = {
    "default": (["--config", "CONFIG", "train.seed=3"], "train"),
    "train": (["train", "--config", "CONFIG", "train.seed=3"], "train"),
    "cache": (["cache", "train.seed=3", "--config", "CONFIG"], "cache"),
    "cache_option": (["train.seed=3", "--cache", "--config", "CONFIG"], "cache"),
    "verify": (["verify", "--config", "CONFIG", "train.seed=3"], "verify"),
    "bench": (["bench", "--config", "CONFIG", "train.seed=3"], "bench"),
    "inspect": (["inspect", "--config", "CONFIG", "train.seed=3"], "inspect"),
    "config_last": (["train.seed=3", "loss.weighting=none", "--config", "CONFIG"], "train"),
}


@pytest.mark.parametrize(("arguments", "verb"), CALLS.values(), ids=CALLS)
def test_verbs_get_the_validated_config(
    arguments: list[str], verb: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []
    for name in cli.VERBS:
        monkeypatch.setattr(cli, f"_{name}", lambda given, name=name: ran.append((name, given.train.seed)))
    assert cli.main([str(config) if word == "CONFIG" else word for word in arguments]) == 0
    assert ran == [(verb, 3)]


def test_bench_is_told_that_it_is_to_be_synthetic(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    monkeypatch.setattr(cli, "_bench", lambda given, *, synthetic=False: ran.append(synthetic))
    for option in ([], ["--synthetic"]):
        assert cli.main(["bench", *option, "--config", str(config)]) == 0
    assert ran == [False, True]


@pytest.mark.parametrize("verb", ["cache", "--cache"])
def test_cache_is_told_that_it_is_to_verify(verb: str, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    monkeypatch.setattr(cli, "_cache", lambda given, *, verify=False: ran.append(verify))
    for option in ([], ["--verify"]):
        assert cli.main([verb, *option, "--config", str(config)]) == 0
    assert ran == [False, True]


def test_inspect_is_told_its_options(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[dict[str, object]] = []
    monkeypatch.setattr(cli, "_inspect", lambda given, **options: ran.append(options))
    for option in ([], ["--measure", "--ranks", "3"], ["--decode"]):
        assert cli.main(["inspect", *option, "--config", str(config)]) == 0
    assert ran == [{}, {"measure": True, "ranks": 3}, {"decode": True}]


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
