"""A folder for the Hub: what its card holds, that nothing of the trainer's machine is in it, and how it gets there."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from mixres import cli
from mixres.config.load import load_config
from mixres.inference.card import fenced, histogram
from mixres.models.lora_file import FILE_NAME, read_header, with_recipe
from mixres.models.registry import FAMILIES
from mixres.training.trainer import train
from support.jobs import environment
from support.local_hub import CUT, HANG, TOKEN, LocalHub, local_hub
from support.lora_files import write_lora

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client itself

PROMPTS = ["交换红色和蓝色", "a: 'quoted' <b>&amp;</b>\n---\n``` and `ticks`"]
GIVEN = ["--license", "apache-2.0", "--trigger", PROMPTS[0], "--trigger", PROMPTS[1]]
SECRET = "of-alice-at-host17"  # stands in every path and name of the machine that trained
NAME = "alice/swap"
KEPT = ("000_astronaut", "001_china")  # what the run regularises with


@pytest.fixture(scope="session")
def run(tiny_base: Path, few_pairs: Path, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a sample grid and settings that name places. Read only."""
    root = tmp_path_factory.mktemp(SECRET)
    base, data = shutil.copytree(tiny_base, root / "base"), shutil.copytree(few_pairs, root / "data")
    for path in [path for path in (data / "train").rglob("*.*") if path.stem in KEPT]:
        kept = data / "kept" / path.relative_to(data / "train")
        kept.parent.mkdir(parents=True, exist_ok=True)
        path.rename(kept)
    earlier = write_lora(root / "earlier", base, "model.lora.target_modules=[all]")
    places = {
        "model.pretrained_model_name_or_path": base, "data.train": data / "train", "data.held_out": data / "held_out",
        "data.regularization": data / "kept", "cache.cache_dir": root / "cache", "logging.output_dir": root / "run",
        "logging.tracker_project_name": SECRET, "model.lora.pretrained_weight": earlier,
    }  # fmt: skip
    words = [f"{key}={path}" for key, path in places.items()]
    lora = ["model.lora.target_modules=[all]", "model.lora.lora_alpha=6", "train.max_train_steps=1"]
    AcceleratorState._reset_state(True)
    train(load_config(small_run, [*words, *lora, "evaluate.every=0"]))
    return root / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub to which this process is logged in; a repeated request waits for nothing."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose servers are not there
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with local_hub() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        yield made


def export(run: Path, out: Path, *words: str) -> int:
    return cli.main(["export", str(run), "--card", "--out", str(out), *words])


def recipe_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return dict(json.loads(opened.metadata()["mixres"]))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- The folder ------------------------------------------------------------------------------------------------------


def test_nothing_of_the_machine_that_trained_is_in_it(run: Path, tmp_path: Path) -> None:
    """Paths stand in configuration, recipe and metadata of the run, and in nothing of the folder."""
    out = tmp_path / "swap"
    assert export(run, out, *GIVEN, "--base", "Qwen/Qwen-Image-Edit") == 0
    assert sorted(files_of(out)) == ["README.md", FILE_NAME, "samples.png", "swap_comfyui.safetensors"]
    assert SECRET in (run / "config.yaml").read_text() and SECRET.encode() in (run / FILE_NAME).read_bytes()
    stems = [path.stem for path in (run.parent / "data").rglob("*.png")]
    for name, data in files_of(out).items():
        hidden = [text for text in (SECRET, str(tmp_path), *stems) if text.encode() in data]
        assert hidden == [], name
    with Image.open(out / "samples.png") as made, Image.open(run / "samples" / "step-00000001.png") as grid:
        assert (made.size, made.info) == (grid.size, {}) and made.tobytes() == grid.tobytes()
    card = (out / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)\n```", card, re.DOTALL)
    settings = yaml.safe_load(block)
    assert settings["model"]["pretrained_model_name_or_path"] == "Qwen/Qwen-Image-Edit"
    assert settings["model"]["lora"]["pretrained_weight"] == "PATH" and settings["train"]["max_train_steps"] == 1
    assert not {"train", "held_out", "regularization"} & settings["data"].keys()
    assert not {"logging", "cache"} & settings.keys()


def test_the_loras_are_those_of_the_run_and_say_so(run: Path, tmp_path: Path) -> None:
    """The same weights under both programs' names; only the base has another name."""
    assert export(run, tmp_path / "swap", *GIVEN, "--base", "Qwen/Qwen-Image-Edit") == 0
    made, alone = tmp_path / "swap", tmp_path / "alone.safetensors"
    assert cli.main(["export", str(run), "--format", "comfyui", "--out", str(alone)]) == 0
    for file, expected in ((made / FILE_NAME, run / FILE_NAME), (made / "swap_comfyui.safetensors", alone)):
        ours, theirs = load_file(file), load_file(expected)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert recipe_of(file) == recipe_of(expected) | {"base": "Qwen/Qwen-Image-Edit"}


def test_a_bare_name_is_a_path_and_the_commit_is_of_its_own_base(run: Path, tmp_path: Path) -> None:
    """A commit of the base that trained is none of another one's."""
    copy = shutil.copytree(run, tmp_path / "copy")
    stated = recipe_of(run / FILE_NAME) | {"base": "alice/qwen", "revision": "a" * 40}
    (copy / FILE_NAME).write_bytes(with_recipe((run / FILE_NAME).read_bytes(), stated))
    values = yaml.safe_load((copy / "config.yaml").read_text())
    values["model"] |= {"pretrained_model_name_or_path": "alice/qwen", "revision": "main"}
    values["model"]["lora"]["pretrained_weight"] = "alice_private.safetensors"
    (copy / "config.yaml").write_text(yaml.safe_dump(values))
    for words, commit, branch in (([], "a" * 40, "main"), (["--base", "Qwen/Qwen-Image-Edit"], None, None)):
        out = tmp_path / f"out{len(words)}"
        assert export(copy, out, "--license", "mit", *words) == 0
        card = (out / "README.md").read_text()
        (block,) = re.findall(r"```yaml\n(.*?)\n```", card, re.DOTALL)
        assert yaml.safe_load(block)["model"]["revision"] == branch and "alice_private" not in card
        assert recipe_of(out / FILE_NAME)["revision"] == commit and ("a" * 40 in card) == bool(commit)


def test_the_card_counts_the_training_set(run: Path, few_pairs: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "swap", *GIVEN) == 0
    card = (tmp_path / "swap" / "README.md").read_text()
    counted = json.loads((run / "training_set.json").read_text())
    pairs = len(list((few_pairs / "train" / "training_images").glob("*.png"))) - len(KEPT)
    assert (counted["samples"], counted["regularization"]) == (pairs, len(KEPT))
    assert sum(counted["sizes"].values()) == pairs > 5
    assert f"| training images | {pairs}, and {len(KEPT)} of regularisation |" in card
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \|$", card, re.MULTILINE)
    assert sum(int(count) for row in rows for count in row[1:]) == pairs
    sizes = {"512x512": 2, "1024x1024": 3, "1024x1040": 1, "1040x1024": 4, "512x500": 5}
    assert histogram(sizes) == [(2**18, [0, 2, 5]), (2**20, [0, 3, 0]), (2**21, [1, 0, 4])]


def test_prompts_are_blocks_that_no_backtick_ends(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "swap", *GIVEN) == 0
    card = ModelCard.load(tmp_path / "swap" / "README.md")
    assert card.data.instance_prompt == PROMPTS[0]
    assert f"```text\n{PROMPTS[0]}\n```" in card.text and f"````text\n{PROMPTS[1]}\n````" in card.text
    assert [fenced(text) for text in ("", "````")] == ["```text\n\n```", "`````text\n````\n`````"]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_cards_of_all_families_are_what_the_hub_takes(family: Any, run: Path, tmp_path: Path) -> None:
    """The client reads its metadata, and writes them back as they were; the Hub's rules as far as they are known here.

    The licence of a base that the Hub does not know has a name and a link.
    """
    base = family.stock_bases[0]
    stated = recipe_of(run / FILE_NAME) | {"family": family.name, "base": base, "revision": "a" * 40}
    file = tmp_path / "lora.safetensors"
    file.write_bytes(with_recipe((run / FILE_NAME).read_bytes(), stated))
    licence = ["--license", "qwen-research", "--license-link", "https://example.org/licence"]
    assert export(file, tmp_path / "swap", *licence, "--trigger", PROMPTS[1]) == 0
    text = (tmp_path / "swap" / "README.md").read_text()
    card = ModelCard.load(tmp_path / "swap" / "README.md")
    assert LocalHub().metadata_problem(text) is None
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() and str(card) == text
    assert (card.data.base_model, card.data.license, card.data.license_name) == (base, "other", "qwen-research")
    assert (card.data.library_name, card.data.instance_prompt) == ("diffusers", PROMPTS[1])
    edits = family.controls[1] != 0
    assert card.data.pipeline_tag == ("image-to-image" if edits else "text-to-image")
    assert ("Image.open" in text) == edits and "undefined" not in text.lower()
    assert {"lora", "mixres", family.name.replace("_", "-")} <= set(card.data.tags)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "README.md", "exec")


def test_a_base_without_a_name_is_left_open_and_each_adapter_has_its_files(
    run: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "swap", "--license", "mit") == 0
    assert "the card names no base, for it was a folder: --base ORG/NAME names it" in capsys.readouterr().out
    assert recipe_of(tmp_path / "swap" / FILE_NAME)["base"] == "BASE"
    assert "base_model" not in ModelCard.load(tmp_path / "swap" / "README.md").data.to_dict()
    dora = write_lora(tmp_path / "dora", tiny_base, "model.lora.use_dora=true")
    assert export(dora, tmp_path / "kept", "--license", "mit") == 0
    assert sorted(files_of(tmp_path / "kept")) == ["README.md", FILE_NAME]
    assert "dora" in ModelCard.load(tmp_path / "kept" / "README.md").data.tags
    lokr = write_lora(tmp_path / "lokr", tiny_base, "model.adapter=lokr", "model.lora.lora_alpha=6")
    assert export(lokr, tmp_path / "kron", "--license", "mit") == 0
    assert sorted(files_of(tmp_path / "kron")) == ["README.md", "kron_comfyui.safetensors", FILE_NAME]
    assert read_header(str(tmp_path / "kron" / FILE_NAME)).adapter == "lokr"
    card = ModelCard.load(tmp_path / "kron" / "README.md")
    assert {"lycoris", "lokr"} <= set(card.data.tags) and "lora" not in card.data.tags
    assert 'network.apply_to()\nnetwork.to("cuda")\n' in card.text and "(W + dW) - W in bfloat16" in card.text
    assert "create_lycoris_from_weights" in card.text and "load_lora_weights" not in card.text
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        compile(block, "README.md", "exec")


# --- The way to the Hub ----------------------------------------------------------------------------------------------


def test_what_is_uploaded_is_listed_first(
    run: Path, hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*GIVEN, "--base", "Qwen/Qwen-Image-Edit", "--push", NAME]
    assert export(run, tmp_path / "swap", *words, "--private") == 0
    assert hub.repositories[NAME]["private"] and hub.stored(NAME) == files_of(tmp_path / "swap")
    listed, _, end = capsys.readouterr().out.partition(f"({'new, private'}), as alice:\n")[2].partition("uploaded")
    assert [line.split(",")[0].strip() for line in listed.splitlines()] == sorted(files_of(tmp_path / "swap"))
    assert f"{hub.url}/{NAME}/commit/" in end
    # What was edited since is uploaded as it is; the repository stays as it was made.
    (tmp_path / "swap" / "README.md").write_text((tmp_path / "swap" / "README.md").read_text() + "\nMore.\n")
    sent = len(hub.calls)
    assert export(run, tmp_path / "swap", *words) == 0
    assert hub.stored(NAME)["README.md"].endswith(b"\nMore.\n") and hub.repositories[NAME]["private"]
    assert not [call for call in hub.calls[sent:] if "/lfs/" in call and call.startswith("PUT")]
    assert "is there already with this LoRA" in (said := capsys.readouterr().out) and "(private), as alice" in said


FAULTS = {
    "login": ({"whoami": [401]}, 2, "--push: the Hub does not accept the login: log in by `hf auth login`"),
    "no right": ({"repos/create": [403]}, 2, "--push: the login may not write to"),
    "server": ({"commit/main": [500]}, 1, f"{NAME}: the upload broke off (Server error '500"),
    "gone": ({"validate-yaml": [502]}, 1, f"{NAME}: the upload broke off"),
    "busy for long": ({"lfs/objects/batch": [503] * 6}, 1, f"{NAME}: the upload broke off (Server error '503"),
    "interrupted": ({"/lfs/": [CUT] * 12}, 1, f"{NAME}: the upload broke off ("),
}


@pytest.mark.parametrize(
    ("faults", "code", "start"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in ("no right", "gone", "busy for long")))
        for name, case in FAULTS.items()
    ],
)
def test_where_an_upload_fails_nothing_is_lost_and_the_same_command_resumes(
    faults: dict[str, list[int]], code: int, start: str, run: Path, hub: LocalHub, tmp_path: Path, capsys: Any
) -> None:
    words = [*GIVEN, "--push", NAME]
    hub.faults = {part: list(statuses) for part, statuses in faults.items()}
    assert export(run, tmp_path / "swap", *words) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixres: ")]
    assert line.startswith(f"mixres: error: {start}")
    made = files_of(tmp_path / "swap")
    assert len(made) == 4 and not hub.repositories.get(NAME, {}).get("commits")
    hub.faults.clear()
    arrived = set(hub.objects)
    sent = len(hub.calls)
    assert export(run, tmp_path / "swap", *words) == 0
    assert hub.stored(NAME) == made == files_of(tmp_path / "swap")
    assert not {call.removeprefix("PUT /lfs/") for call in hub.calls[sent:]} & arrived, "what has arrived stays"


def test_the_client_asks_again_where_a_fault_passes(run: Path, hub: LocalHub, tmp_path: Path) -> None:
    hub.faults = {"preupload": [500, 503], "/lfs/objects": [504], "/lfs/": [CUT, 500]}
    assert export(run, tmp_path / "swap", *GIVEN, "--push", NAME) == 0
    assert hub.stored(NAME) == files_of(tmp_path / "swap") and not any(hub.faults.values())


@pytest.mark.slow
def test_an_upload_that_is_killed_is_finished_by_the_same_command(run: Path, tmp_path: Path) -> None:
    """In processes of their own, which find the Hub and the login in their environment."""
    with local_hub() as hub:
        named = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        words = [str(run), "--card", "--out", str(tmp_path / "swap"), *GIVEN, "--push", NAME]
        command = [sys.executable, "train.py", "export", *words]
        hub.faults = {"commit/main": [HANG] * 10}
        with subprocess.Popen(command, env=environment() | named) as process:
            assert hub.hung.wait(90)
            process.kill()
        arrived, made, sent = set(hub.objects), files_of(tmp_path / "swap"), len(hub.calls)
        assert arrived and hub.stored(NAME) == {}
        hub.faults.clear()
        assert subprocess.run(command, env=environment() | named, check=False).returncode == 0
        assert hub.stored(NAME) == made == files_of(tmp_path / "swap")
        assert not {call.removeprefix("PUT /lfs/") for call in hub.calls[sent:]} & arrived


def test_without_login_with_a_public_repository_or_a_wrong_card_it_is_wrong_input(
    run: Path, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert export(run, tmp_path / "swap", "--push", NAME, *words) == 2
        return capsys.readouterr().err

    assert 'license" must be one of' in refused("--license", "no-licence")
    shutil.rmtree(tmp_path / "swap")
    hub.repositories[NAME] = {"private": False, "files": {}, "commits": 0}
    assert f"--private: {NAME} is there and is public" in refused("--license", "mit", "--private")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "--push: HF_HUB_OFFLINE is set: unset it" in refused("--license", "mit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert "--push: there is no login: log in by `hf auth login`" in refused("--license", "mit")
    assert hub.stored(NAME) == {}


CARD = ["RUN", "--card", "--out", "OUT"]
WRONG = {
    "nothing": (["--card"], ["RUN: not given", "--out: not given", "--license: not given"]),
    "licence": ([*CARD, "--license", "My own"], ["--license: given My own, should match pattern"]),
    "base": ([*CARD, "--license", "mit", "--base", "/a"], ["--base: given /a, should match pattern"]),
    "repository": ([*CARD, "--license", "mit", "--push", "swap"], ["--push: given swap, should match pattern"]),
    "dots": (
        [*CARD, "--license", "mit", "--push", "org/my..lora"],
        ["--push: given org/my..lora, which the Hub"],
    ),
    "private": ([*CARD, "--license", "mit", "--private"], ["--private: is for --push ORG/NAME"]),
    "format": ([*CARD, "--merge", "--format", "comfyui"], ["--format: has no effect", "--merge: has no effect"]),
    "no card": (["RUN", "--license", "mit", "--push", NAME], ["--license: is for --card", "--push: is for --card"]),
    "existing": ([*CARD[:3], "THERE", "--license", "mit", "--push", NAME], ["--out: THERE exists and is not overwri"]),
    "a file": ([*CARD[:3], "OUT.safetensors", "--license", "mit"], ["--out: OUT.safetensors should be a folder"]),
}


@pytest.mark.parametrize(("words", "expected"), WRONG.values(), ids=WRONG)
def test_a_request_that_cannot_be_met_leaves_nothing(
    words: list[str], expected: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    places = {"RUN": run, "OUT": tmp_path / "out", "THERE": tmp_path / "there"}

    def filled(text: str) -> str:
        return re.sub("|".join(places), lambda found: str(places[found[0]]), text)

    given = [filled(word) if word.isupper() or word.startswith("OUT") else word for word in words]
    assert cli.main(["export", *given]) == 2
    for line, start in zip(capsys.readouterr().err.splitlines(), expected, strict=True):
        known = start if start.startswith("RUN: ") else filled(start)
        assert line.startswith(f"mixres: error: {known}"), line
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_run_of_an_earlier_version_has_a_card_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the average of a run, and a file from which no run is known."""
    old = shutil.copytree(run, tmp_path / "old")
    (old / "training_set.json").unlink()
    shutil.rmtree(old / "samples")
    lone = shutil.copyfile(run / FILE_NAME, tmp_path / "lone.safetensors")
    for number, (path, known) in enumerate({old: True, old / "checkpoints" / "latest": True, lone: False}.items()):
        assert export(path, tmp_path / f"{number}", "--license", "mit") == 0
        card = (tmp_path / f"{number}" / "README.md").read_text()
        assert ("<summary>Configuration" in card) == known
        assert "training images" not in card and "samples.png" not in card
    # The file of another program, one of a run that cannot be read beside a file, and one of the run itself.
    (tmp_path / "config.yaml").write_text("port: 8188")
    assert export(lone, tmp_path / "foreign", "--license", "mit") == 0
    assert "without the configuration" not in capsys.readouterr().out
    (tmp_path / "run_status.json").write_text("{}")
    assert export(lone, tmp_path / "unread", "--license", "mit") == 0
    assert f"without the configuration: {tmp_path / 'config.yaml'} cannot be loaded" in capsys.readouterr().out
    (old / "config.yaml").write_text("port: 8188")
    assert export(old, tmp_path / "refused", "--license", "mit") == 2
    assert f"mixres: error: RUN: {old / 'config.yaml'}: port: unknown key" in capsys.readouterr().err
