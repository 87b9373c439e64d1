import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from filelock import FileLock

from mixres import cli
from mixres.errors import WorkError
from mixres.training import trainer
from support.jobs import REPOSITORY, children, environment


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("model: {pretrained_model_name_or_path: base}\ndata: {train: pairs}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("own", [None, *cli.ALLOCATOR_SETTINGS])
def test_segments_of_cuda_memory_grow_unless_the_user_has_set_the_allocator(
    own: str | None, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in cli.ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    seen: dict[str, str] = {}
    monkeypatch.setattr(trainer, "train", lambda config: seen.update(os.environ))
    assert cli.main(["--config", str(config)]) == 0
    found = {name: seen[name] for name in cli.ALLOCATOR_SETTINGS if name in seen}
    assert found == ({own: "max_split_size_mb:128"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


VERBS = ("train", "cache", "inspect", "verify", "bench", "quickstart", "sample", "export", "report", "init")


def under_a_launcher(*arguments: str, rank: str = "0") -> int:
    given = environment() | {"ACCELERATE_MIXED_PRECISION": "no", "RANK": rank}
    return subprocess.run([sys.executable, str(REPOSITORY / "train.py"), *arguments], env=given, check=False).returncode


def test_under_a_launcher_the_run_folder_says_what_was_wrong_too(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--config", str(config), f"logging.output_dir={folder}", "train.sed=1", "train.seed=-1")
    assert cli.main(words) == under_a_launcher(*words, rank="1") == 2
    assert not folder.exists(), "the exit code has said it; other ranks write nothing"
    assert under_a_launcher(*words) == 2
    status = json.loads((folder / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["verb"]) == ("refused", 2, "train")
    assert [line.partition(":")[0] for line in status["reason"].splitlines()] == ["train.sed", "train.seed"]
    (folder / "run_status.json").write_text("of the run that holds the folder")
    with FileLock(folder / ".lock"):
        assert under_a_launcher(*words) == 2
    assert (folder / "run_status.json").read_text() == "of the run that holds the folder"


def maps(pid: int) -> str:
    """What the process has of files in its memory; nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_a_launcher_killed_while_its_process_starts_takes_it_along(config: Path, tmp_path: Path) -> None:
    """Else it would train on, unseen, and hold the folder."""
    words = ("--config", str(config), f"logging.output_dir={tmp_path / 'run'}")
    start = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", start, str(REPOSITORY / "train.py"), *words]
    with subprocess.Popen(command, env=environment() | {"ACCELERATE_MIXED_PRECISION": "no"}) as launcher:
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
    "--data.train=x --config CONFIG --train.seed": [
        f"--data.train: {DASHES} data.train=x",
        f"--train.seed: {DASHES} train.seed=VALUE",
    ],
    "train fast --config CONFIG": ["'fast': not an override"],
    "xyzzy --config CONFIG": [f"xyzzy: unknown verb; {VERB_LIST}"],
    "cahe --config CONFIG": ["cahe: unknown verb; did you mean 'cache'?"],
    "--conf=a": ["--conf=a: unknown option; see --help; did you mean '--config'?", "--config: not given"],
    "export --lora x": ["--lora: unknown option of export", "--format: not given", "--out: not given"],
    "--config": ["argument --config: expected one argument"],
    "--synthetic --config CONFIG": ["--synthetic: is for the verb verify or bench, not for train: leave it out"],
    "quickstart one two": ["quickstart: write one DIR, a folder for the data, or overrides of its keys, or nothing"],
    "quickstart train.seed=-1": ["train.seed: given -1"],
    "init --out CONFIG": ["--out: names the file of a recipe, and NAME is not given: write it"],
    "init quickstrat": ["quickstrat: no recipe has that name; there are: accelerate/multi_gpu, "],
    "init quickstart --out CONFIG": ["CONFIG: exists already: give another name with --out, or move it away"],
    "init quickstart --out CONFIG/x": ["--out CONFIG/x: cannot be written: Not a directory; name another file"],
    "inspect --config quickstrat": [
        "--config quickstrat: cannot be read: No such file or directory; did you mean the recipe 'quickstart'?"
    ],
    "inspect --config no_such": ["--config no_such: cannot be read: No such file or directory; name another file"],
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


CALLS: dict[str, tuple[str, dict[str, object]]] = {
    "train --config CONFIG train.seed=3": ("train", {}),
    "cache train.seed=3 --config CONFIG": ("cache", {}),
    "--config CONFIG cache train.seed=3": ("cache", {}),
    "train.seed=3 --cache --config CONFIG": ("cache", {}),
    "cache --verify --config CONFIG train.seed=3": ("cache", {"verify": True}),
    "cache --device cpu --config CONFIG train.seed=3": ("cache", {"device": "cpu"}),
    "bench --synthetic --config CONFIG train.seed=3": ("bench", {"synthetic": True}),
    "--way packed --seconds 2 bench --way padded --config CONFIG train.seed=3": (
        "bench",
        {"way": ["packed", "padded"], "seconds": 2.0},
    ),
    "inspect --measure train.seed=3 --ranks 3 --config CONFIG": ("inspect", {"measure": True, "ranks": 3}),
    "--ranks 3 inspect --decode train.seed=3 --config CONFIG": ("inspect", {"decode": True, "ranks": 3}),
    "--device-memory 24GiB inspect --rehearse train.seed=3 --config CONFIG": (
        "inspect",
        {"rehearse": True, "device_memory": 24 * 2**30},
    ),
    "quickstart --config CONFIG train.seed=3": ("quickstart", {}),
}


@pytest.mark.parametrize(("words", "call"), CALLS.items(), ids=CALLS)
def test_verbs_get_the_validated_config_and_their_options(
    words: str, call: tuple[str, dict[str, object]], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, dict[str, object], int]] = []
    monkeypatch.setattr(cli, "_call", lambda work, given, **o: ran.append((work, o, given.train.seed)))
    assert cli.main(words.replace("CONFIG", str(config)).split()) == 0
    assert ran == [(cli.WITH_CONFIG[call[0]], call[1], 3)]


FULL = OSError(28, "No space left on device", "cache/index.json")
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed."
ENDS: dict[str, tuple[BaseException, int, str]] = {
    "work": (WorkError("disk full"), 1, "error: disk full"),
    "full disk": (FULL, 1, "error: cache/index.json: cannot be written: No space left on device; make room"),
    "loader": (RuntimeError(KILLED), 1, f"error: data.num_workers: {KILLED} Where memory is short, lower it"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize(("error", "code", "text"), ENDS.values(), ids=ENDS)
def test_how_a_verb_ends(
    error: BaseException, code: int, text: str, config: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "train", Mock(side_effect=error))
    assert cli.main(["--config", str(config)]) == code
    assert capsys.readouterr().err == f"mixres: {text}\n"


@pytest.mark.parametrize("bug", [KeyError("bug"), OSError("bug"), RuntimeError("bug")])
def test_a_bug_comes_out_as_it_is(bug: Exception, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "train", Mock(side_effect=bug))
    with pytest.raises(type(bug), match="bug"):
        cli.main(["--config", str(config)])


def test_a_recipe_is_read_by_its_name_and_written_with_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = REPOSITORY / "configs"
    assert cli.main(["init"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == sorted(str(file.relative_to(configs).with_suffix("")) for file in configs.rglob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    for name in listed:
        assert cli.main(["init", name]) == 0
        written = tmp_path / f"{Path(name).name}.yaml"
        assert written.read_bytes() == (configs / f"{name}.yaml").read_bytes()
        assert str(written.name) in capsys.readouterr().out
    seen: list[Any] = []
    monkeypatch.setattr(trainer, "train", seen.append)
    assert cli.main(["--config", "quickstart"]) == cli.main(["--config", "quickstart.yaml"]) == 0
    assert seen[0] == seen[1]
    Path("quickstart").write_bytes((tmp_path / "quickstart.yaml").read_bytes().replace(b"3e-3", b"3e-4"))
    assert cli.main(["--config", "quickstart"]) == 0
    assert seen[2] != seen[1], "a file of that name is read first"
