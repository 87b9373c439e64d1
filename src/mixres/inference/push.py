"""A folder to the Hub, with the user's own login.

Promise: what is uploaded is listed first, and nothing else is. Nothing is lost where it fails: the folder stays, the
Hub keeps the files that have arrived, and the same command uploads the rest. Files appear there in one commit. Cost:
the client `huggingface_hub` reads each file twice and sends it once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from mixres import __version__
from mixres.console import log
from mixres.errors import UserError, WorkError

_LOGIN = "log in by `hf auth login`, or set HF_TOKEN to a token that may write"
# What the client raises for a connection, a reply or a disk, beside errors of its own: its HTTP library has changed.
_FAILURES: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, RuntimeError, ValueError)


def push(folder: Path, repository: str, *, private: bool) -> None:
    """Upload the files of `folder` to `repository`, which is made if it is not there.

    Raises:
        UserError: there is no login, it may not write there, the Hub refuses the card, or the repository is public
            where a `private` one is asked for.
        WorkError: the Hub cannot be reached, or the upload broke off.
    """
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name.as_posix(): path for name, path in found.items() if not any(part[0] == "." for part in name.parts)}
    api = HfApi(library_name="mixres", library_version=__version__)
    with _explained(folder, repository):
        user = api.whoami()["name"]
        seen = _visibility(api, repository)
        if private and seen == "public":
            raise UserError(f"--private: {repository} is there and is public: name another, or make it private first")
        new = f"new, {'private' if private else 'public unless the organisation has it otherwise'}"
        log(f"upload    to {api.endpoint}/{repository} ({seen or new}), as {user}:")
        for name, path in files.items():
            log(f"          {name}, {path.stat().st_size:,} bytes")
        if seen is None:
            api.create_repo(repository, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        done = api.create_commit(repository, operations, commit_message="LoRA trained with mixres")
    log(f"uploaded  {done.commit_url}")


def _visibility(api: HfApi, repository: str) -> str | None:
    """None: it is not there."""
    try:
        return "private" if api.repo_info(repository).private else "public"
    except RepositoryNotFoundError:
        return None


@contextmanager
def _explained(folder: Path, repository: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push: there is no login: {_LOGIN}; {folder} is ready") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push: HF_HUB_OFFLINE is set: unset it; {folder} is ready") from error
    except _FAILURES as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            raise UserError(f"--push: the Hub does not accept the login: {_LOGIN}; {folder} is ready") from error
        if status == 403:
            raise UserError(f"--push: the login may not write to {repository}: name another, or {_LOGIN}") from error
        reason = _reason(error)
        if status == 400 or reason.startswith("Invalid metadata"):
            raise UserError(f"--push: the Hub refuses what {folder} holds ({reason}): correct its README.md") from error
        again = f"{folder} stays, and the Hub keeps what has arrived: run the same command again"
        raise WorkError(f"{repository}: the upload broke off ({reason}); {again}") from error


def _reason(error: BaseException) -> str:
    """In one line; that of its cause where it has one, for the client wraps some."""
    shown = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return " ".join(str(shown).split()) or type(shown).__name__
