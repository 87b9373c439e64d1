"""Where a pretrained pipeline's files are: a folder, or a snapshot of the Hugging Face Hub.

Promise: only safetensors, JSON and tokenizer text are ever fetched or opened, so that no file of a base model can run
code; what is missing is reported at once, one line each. Cost: one request to the Hub per process for a
base that is not a folder, a listing of a few folders otherwise; `fingerprint` reads every weight byte once per change.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from mixres import atomic
from mixres.errors import UserError

KEY = "model.pretrained_model_name_or_path"
_OPENED = (".safetensors", ".json", ".txt", ".jinja")  # tokenizer text: merges.txt
# Bases that ship with mixres, by the name that stands for them in a configuration.
PACKAGED = {"mixres/tiny_base": Path(__file__).parents[1] / "assets" / "tiny_base"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "processor", "scheduler")
_CONFIGS = ("*/config.json", "*/scheduler_config.json")


def pipeline_folder(path: str, components: Sequence[str], *, revision: str | None = None) -> Path:
    """Folder of the pipeline `path` (a folder, or a Hub repository at `revision`) with `components` checked.

    A component is a subfolder, such as `vae`: its `config.json` and safetensors weights must be there where it has
    weights at all (tokenizer, processor and scheduler have none).

    Raises:
        UserError: the folder or repository, or a component's files, cannot be had. One line each.
    """
    folder = _locate(path, revision, tuple(f"{component}/*{end}" for component in components for end in _OPENED))
    problems = [problem for component in components if (problem := _component_problem(folder / component))]
    if problems:
        raise UserError([f"{KEY}: {problem}" for problem in problems])
    return folder


def pipeline_json(path: str, name: str, *, revision: str | None = None) -> dict[str, Any]:
    """One JSON object of a pipeline, such as `vae/config.json`; no weights are fetched.

    Raises:
        UserError: the pipeline or the file is missing, or is no JSON object.
    """
    file = _locate(path, revision, _CONFIGS) / name
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        problem = f"{file} cannot be read ({error}): give {path!r} the files of a diffusers pipeline"
        raise UserError(f"{KEY}: {problem}") from error
    return value


def commit(path: str, *, revision: str | None = None) -> str | None:
    """The commit of the Hub's repository `path` that this process reads; None for a folder.

    Raises:
        UserError: the pipeline cannot be had.
    """
    folder = _locate(path, revision, _CONFIGS)
    return None if _local(path).is_dir() else folder.name


def fingerprint(
    path: str, components: Sequence[str], *, revision: str | None = None, memo: Path | None = None, salt: str = ""
) -> str:
    """xxh3-128 over the names and bytes of all files of `components` and `salt`, 32 hex characters.

    `memo` is a JSON file that keeps digests by path, size and times of change, so that gigabytes of weights are read
    once and not at every start. A memo that cannot be read is made anew.

    Raises:
        UserError: as `pipeline_folder`.
    """
    folder = pipeline_folder(path, components, revision=revision)
    known = _read_memo(memo)
    files = [file for component in components for file in sorted((folder / component).rglob("*"))]
    parts = [f"salt {salt}"]
    digests: dict[str, str] = {}
    for file in files:
        if file.suffix not in _OPENED or not file.is_file():
            continue
        stat = file.stat()
        # The time of change too: programs that copy files set the time of modification back, nobody sets this one.
        entry = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
        digests[entry] = known.get(entry) or file_digest(file)
        parts.append(f"{file.relative_to(folder).as_posix()} {digests[entry]}")
    if memo is not None and not digests.items() <= known.items():
        with suppress(OSError):  # a full or read-only disk: the memo only saves time
            memo.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_json(memo, known | digests)
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def _locate(path: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    folder = _local(path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{KEY}: {path!r} has no model_index.json, so it is no diffusers pipeline folder: name one")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise UserError(f"{KEY}: there is no folder {path!r}: correct the path")
    return _snapshot(path, revision, ("model_index.json", *patterns))


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else PACKAGED.get(path, folder)


@functools.lru_cache(maxsize=32)  # one process asks the Hub once, and sees one commit even if the branch moves
def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns), etag_timeout=10))
    except HFValidationError as error:
        reason = f"it is no name of a Hugging Face Hub repository either ({str(error).splitlines()[0]}): correct it"
    except RevisionNotFoundError:
        reason = f"the Hugging Face Hub has no revision {revision!r} of it: correct model.revision"
    except RepositoryNotFoundError:  # a gated one too
        reason = "the Hugging Face Hub has none of that name that you may read: correct the name, or `hf auth login`"
    except OSError as error:
        reason = f"the Hugging Face Hub could not be reached ({type(error).__name__}): connect, or name a local folder"
        if is_offline_mode():
            reason = "HF_HUB_OFFLINE is set while the Hub's local cache does not hold it: unset it, or name a folder"
    light = ("model_index.json", *_CONFIGS)
    small = all(pattern in light or pattern.partition("/")[0] in _WITHOUT_WEIGHTS for pattern in patterns)
    what = "no configuration or tokenizer (a few MB)" if small else "no weights"
    raise UserError(f"{KEY}: {what} for {repository!r}: there is no such folder here, and {reason}")


def _component_problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder} is missing: download it"
    if folder.name in _WITHOUT_WEIGHTS:
        return None
    if not (folder / "config.json").is_file():
        return f"{folder / 'config.json'} is missing: download it"
    if any(folder.glob("*.safetensors")):
        return None
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return f"{folder} holds pickled weights ({pickled[0]}), which are never opened: convert them to safetensors"
    return f"{folder} holds no .safetensors weights: download them"


def _read_memo(memo: Path | None) -> dict[str, str]:
    if memo is None:
        return {}
    try:
        return dict(json.loads(memo.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def file_digest(file: Path) -> str:
    """xxh3-128 over the file's bytes, 32 hex characters."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
