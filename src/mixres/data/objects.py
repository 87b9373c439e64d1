"""Files that are read in ranges: local ones, and objects in a store behind a URL, through fsspec.

Promise: bytes come from the object that was listed, as many as were asked for, or an error names it and the remedy; a
message never holds a user, a password or a query string. Cost: a request a range. Over HTTP a failed one is repeated
`TRIES` times with growing pauses; the libraries of the other stores do so by themselves. The objects of a cache are
written through `asked` too.
"""

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from stat import S_IFREG, S_ISDIR, S_ISREG
from typing import Any

import xxhash

from mixres.data.records import EmbeddedStatus, Status, printable
from mixres.errors import Problems, UserError, WorkError, without_secrets

SCHEMES = ("s3", "gs", "hf", "https", "http", "memory")
# By scheme the package and the extra that has it; hf and memory need none of their own.
EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "https": ("aiohttp", "http"), "http": ("aiohttp", "http")}
CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
    "https": "~/.netrc",
    "http": "~/.netrc",
}
TRIES, PAUSE_S = 5, 0.5
ASKED_AT_ONCE = 16
TIMEOUT_S = 60.0  # without a byte
_VERSIONS = ("ETag", "etag", "blob_id", "created")  # another one: other bytes
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class StoredObject:
    """One file or object, in the state in which it was listed."""

    url: str  # or a local path
    status: EmbeddedStatus

    def __str__(self) -> str:
        return self.url

    @property
    def size(self) -> int:
        return self.status.st_size

    @cached_property
    def state(self) -> str:
        """As `state_text` has it of what lies in it, without its size."""
        return state_text(self.url, self.status).partition(" ")[2]

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, which is not among them.

        Raises:
            WorkError: they cannot be had, or there are fewer: the object has changed.
        """
        if start == end:
            return b""
        try:
            data: bytes = asked(self.url, lambda files: files.cat_file(self.url, start=start, end=end))
        except FileNotFoundError:
            data = b""
        except UserError as error:
            raise WorkError(str(error)) from error
        if len(data) != end - start:
            raise WorkError(
                f"{printable(self)}: has changed since it was listed, or its server serves no ranges "
                f"({end - start} bytes were asked for, {len(data)} came): run the same command again"
            )
        return data

    def open(self) -> "Ranges":
        """A file of it, which reads no more than it is asked for."""
        return Ranges(self)


class Ranges(io.RawIOBase):
    """A file whose every read is a range of a `StoredObject`."""

    def __init__(self, stored: StoredObject) -> None:
        super().__init__()
        self._stored, self._at = stored, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._stored.size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stored.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._stored.size)
        count = max(end - self._at, 0)
        if count:
            buffer[:count] = self._stored.read(self._at, end)
        self._at += count
        return count


def is_url(source: str) -> bool:
    """Whether a source is named by a URL instead of a path."""
    return "://" in source


def state_text(path: object, status: Status) -> str:
    """A file and its state; the same text: the same bytes."""
    where = str(path)
    where = where if where.startswith("/") or is_url(where) else f"{Path.cwd()}/{where}"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {where}"


def find_objects(source: str) -> list[StoredObject]:
    """What a path or URL names, by name: itself, `{000..011}` counted up, or what fits a glob (`*`, `?`, `[`).

    Raises:
        UserError: nothing is there, or it may not be read; or a package for this kind of URL is not installed.
        WorkError: the store cannot be reached.
    """
    urls = [*_counted_up(source)]
    if len(urls) == 1 or not is_url(source):
        return [stored for url in urls for stored in _listed(url)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:  # a request each, which takes longer than its work
        return [stored for found in pool.map(_listed, urls) for stored in found]


def asked(url: str, call: Callable[[Any], Any], doing: str = "read") -> Any:
    """What `call` returns of the file system of `url`.

    Raises:
        FileNotFoundError: there is no such object.
        UserError: it may not be done; or a package for this kind of URL is not installed.
        WorkError: the store cannot be reached, or refuses for another reason.
    """
    filesystem = _filesystem(url)
    try:
        return _tried(url, lambda: call(filesystem))
    except Exception as error:  # each store has errors of its own
        reason, of_user = _reason(url, error, doing)
        if isinstance(error, FileNotFoundError) and of_user:
            raise
        raise (UserError if of_user else WorkError)(f"{printable(url)}: {reason}") from error


def sizes_under(url: str) -> dict[str, int]:
    """The bytes of the objects in the folder `url` as it is now, by name; none where there is no such folder.

    Raises:
        UserError, WorkError: as `asked`; or there is no such bucket.
    """

    def listing(files: Any) -> Any:
        files.invalidate_cache()
        return files.ls(url, detail=True)

    try:
        infos = asked(url, listing)
    except FileNotFoundError as error:
        bucket = "/".join(url.split("/")[:3])
        try:
            if url.startswith(("s3:", "gs:")):
                with suppress(UserError):  # who may list a folder need not be allowed to list all
                    asked(bucket, lambda files: files.ls(bucket))
        except FileNotFoundError:
            raise UserError(f"{printable(bucket)}: there is no such bucket; create it, or correct its name") from error
        return {}
    return {info["name"].rpartition("/")[2]: info["size"] for info in infos if info["type"] == "file"}


def _counted_up(source: str) -> Iterator[str]:
    if match := _BRACES.search(source):
        first, last = match.groups()
        if int(first) > int(last):
            raise UserError(f"{printable(source)}: {match[0]} counts down: write {{{last}..{first}}}")
        for number in range(int(first), int(last) + 1):
            yield from _counted_up(f"{source[: match.start()]}{number:0{len(first)}d}{source[match.end() :]}")
    else:
        yield source


def _listed(url: str) -> list[StoredObject]:
    if not is_url(url):
        return _listed_files(url)
    filesystem = _filesystem(url)
    is_glob = any(sign in url for sign in "*?[")
    try:
        if is_glob:
            infos = _tried(url, lambda: filesystem.glob(url, detail=True))
        else:
            infos = {url: _tried(url, lambda: filesystem.info(url))}
        files = [(path, info) for path, info in sorted(infos.items()) if info.get("type", "file") == "file"]
        if is_glob and url.lower().startswith("http"):  # a listing over HTTP has names alone
            files = [(path, _tried(url, lambda path=path: filesystem.info(path))) for path, _ in files]
        found = [_stored(url if path == url else _address(url, path), info) for path, info in files]
    except Exception as error:  # each store has errors of its own
        reason, of_user = _reason(url, error)
        raise (UserError if of_user else WorkError)(f"{printable(url)}: {reason}") from error
    if not found:
        raise UserError(f"{printable(url)}: names no file; correct it")
    return found


def _listed_files(source: str) -> list[StoredObject]:
    """The files that a path or a glob names; a link is the file that it leads to."""
    paths = [source]
    if any(sign in source for sign in "*?[") and not Path(source).exists():
        paths = sorted(_filesystem(source).glob(source))
    wrong = Problems()
    found = [stored for path in paths if (stored := wrong.collect(_stored_file, path))]
    wrong.raise_if_any()
    if not found:
        raise UserError(f"{printable(source)}: names no file; correct it")
    return found


def _stored_file(path: str) -> StoredObject | None:
    """None for a folder."""
    try:
        there = Path(path).stat()
    except OSError as error:
        broken = isinstance(error, FileNotFoundError) and Path(path).is_symlink()
        raise UserError(
            f"{printable(path)}: " + ("is a link that leads nowhere; correct it" if broken else _reason(path, error)[0])
        ) from error
    if S_ISDIR(there.st_mode):
        return None
    if not S_ISREG(there.st_mode):
        raise UserError(f"{printable(path)}: is no regular file; take it out")
    if not os.access(path, os.R_OK):
        raise UserError(f"{printable(path)}: {_reason(path, PermissionError())[0]}")
    names = ("st_mode", "st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    return StoredObject(path, EmbeddedStatus(*(getattr(there, name) for name in names)))


def _address(url: str, path: str) -> str:
    """The path that a glob gave, with the scheme of the URL if it has none."""
    return path if is_url(path) else f"{url.partition('://')[0]}://{path.lstrip('/')}"


def _stored(url: str, info: dict[str, Any]) -> StoredObject:
    if info.get("size") is None:
        raise OSError("the server does not state its size")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    # Without a version the time decides, as it does for files; without either nothing may be remembered.
    changed_ns = 0 if version else _time_ns(info)
    return StoredObject(
        url, EmbeddedStatus(S_IFREG, info["size"], changed_ns, changed_ns, xxhash.xxh3_64_intdigest(version.encode()))
    )


def _time_ns(info: dict[str, Any]) -> int:
    try:
        return int(parsedate_to_datetime(info["Last-Modified"]).timestamp() * 1e9)
    except (KeyError, TypeError, ValueError):
        return time.time_ns()


def _filesystem(url: str) -> Any:
    """The file system of a URL; fsspec keeps one of each kind.

    Raises:
        UserError: the kind is not known, or its package is not installed.
    """
    import fsspec  # here, so that a run on local folders does not wait for it

    scheme = url.partition("://")[0].lower() if is_url(url) else "file"
    if scheme not in (*SCHEMES, "file"):
        shown = without_secrets(printable(url))
        raise UserError(f"{shown}: is no URL that is read; write one of: {', '.join(SCHEMES)}")
    options = {}
    try:
        if scheme in ("https", "http"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
            headers = {"Accept-Encoding": "identity"}  # ranges are those of the object itself
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True, "headers": headers}}
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        package, extra = EXTRAS[scheme]
        fix = f"pip install 'mixres[{extra}]'"
        raise UserError(f"{printable(url)}: '{package}' is not installed, which reads {scheme}://: {fix}") from None


def _tried(url: str, call: Any) -> Any:
    """What the call returns; over HTTP one that failed on its way is repeated."""
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            last = attempt == TRIES - 1 or not url.startswith("http")
            if last or _reason(url, error)[1]:
                raise
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _reason(url: str, error: BaseException, doing: str = "read") -> tuple[str, bool]:
    """Why an object cannot be read or written, with the remedy; and whether that is for the user to correct."""
    chain = [error]
    while (cause := chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    codes = [getattr(part, "status", getattr(getattr(part, "response", None), "status_code", None)) for part in chain]
    status = next((code for code in codes if isinstance(code, int)), 0)
    refused = any("Credentials" in type(part).__name__ or str(part).startswith("Forbidden") for part in chain)
    scheme = url.partition("://")[0] if is_url(url) else "file"
    if status in (401, 403) or refused or isinstance(error, PermissionError):
        if scheme not in CREDENTIALS:
            return f"may not be {doing}: access is refused; change its permissions", True
        renew = f"renew the credentials ({CREDENTIALS[scheme]})"
        return f"may not be {doing}: access is refused, or credentials are missing or have expired; {renew}", True
    # fsspec calls every HTTP request for the size of an object that fails a missing file.
    missing = isinstance(error, FileNotFoundError | IsADirectoryError)
    if missing and (status == 404 or not chain[1:] or not scheme.startswith("http")):
        return f"there is no such {'file' if scheme == 'file' else 'object'}; correct it", True
    what = without_secrets(" ".join(str(chain[-1]).split())) or type(chain[-1]).__name__
    tries = f" after {TRIES} tries" if url.startswith("http") else ""
    return f"cannot be {doing}{tries}: {what}; look at the network and the store, and run the same command again", False
