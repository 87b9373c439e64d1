"""The page of a run while it trains, for a browser on the same machine.

Promise: it listens on 127.0.0.1 alone, answers only what is asked of it by that name, reads only what lies in the run
folder (no link leads out), and writes nothing. Cost: the page is made anew when somebody looks and the run has moved.
"""

import errno
import mimetypes
import os
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import xxhash

from mixres.console import log
from mixres.errors import UserError, one_line
from mixres.report.run import read_status, state_of
from mixres.training.run_folder import METRICS, STATUS

HOST, PORT = "127.0.0.1", 8765
_SHOWN = {".png", ".jpg", ".webp", ".json", ".jsonl", ".yaml", ".txt", ".md", ".html"}  # the others are saved to disk
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: 'self'; frame-ancestors 'none'"


class Service(ThreadingHTTPServer):
    """Serves `folder`, and at `/` what `page` returns.

    Raises:
        UserError: the port is in use, or none that this user may take.
    """

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it would share a port that is in use

    def __init__(self, folder: Path, port: int, page: Callable[[], bytes]) -> None:
        self.folder, self.page = folder.resolve(), page
        self._made, self._state, self._lock = b"", "", threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is in use" if used else "cannot be taken"
            raise UserError(f"--port: {port} {reason} on {HOST}: give another, or 0 for any that is free") from error

    def fresh(self) -> tuple[bytes, str]:
        """The page of the run as it is now, and what tells it from another."""
        with self._lock:
            if (state := self._seen()) != self._state:
                self._made, self._state = self.page(), state
            return self._made, self._state

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where a browser has left before its answer was complete."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def _seen(self) -> str:
        found: list[object] = [state_of(self.folder, read_status(self.folder))]
        for name in (STATUS, METRICS, "samples", "checkpoints", "reports", "."):
            try:
                status = (self.folder / name).stat()
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                found.append(None)
        return xxhash.xxh3_64_hexdigest(repr(found).encode())

    def inside(self, address: str) -> Path | None:
        """The file of the run folder at this address, if there is one."""
        name = os.fsdecode(unquote_to_bytes(urlsplit(address).path.lstrip("/")))
        if "\0" in name:
            return None
        try:
            path = (self.folder / name).resolve()
            return path if path.is_relative_to(self.folder) and path.is_file() else None
        except (OSError, ValueError):
            return None


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: Service
    server_version, sys_version = "mixres", ""
    timeout = 30

    def do_GET(self) -> None:
        """The page, a file, or why not."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            # Another site's name may have been pointed at this address, to read what is here (DNS rebinding).
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, f"ask for http://{HOST}:{port}/")
        elif urlsplit(self.path).path == "/":
            self._send_page()
        elif path := self.server.inside(self.path):
            self._send_file(path)
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "no such file in the run folder")

    do_HEAD = do_GET  # noqa: N815 - the base class asks for this name

    def _send_page(self) -> None:
        body, state = self.server.fresh()
        same = self.headers.get("If-None-Match") == f'"{state}"'
        self._begin(HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK, "text/html; charset=utf-8", len(body))
        self.send_header("ETag", f'"{state}"')
        script = "script-src 'unsafe-inline'; connect-src 'self'"
        self.send_header("Content-Security-Policy", f"{_POLICY}; {script}")
        self.end_headers()
        if not same and self.command == "GET":
            self.wfile.write(body)

    def _send_file(self, path: Path) -> None:
        kind = mimetypes.guess_type(path.name)[0] if path.suffix in _SHOWN else None
        if path.suffix in (".jsonl", ".yaml", ".md"):
            kind = "text/plain"
        try:
            file = path.open("rb")
        except OSError:
            self.send_error(HTTPStatus.FORBIDDEN, "cannot be read")
            return
        with file:
            charset = "; charset=utf-8" if (kind or "").startswith("text/") else ""
            length = os.fstat(file.fileno()).st_size
            self._begin(HTTPStatus.OK, f"{kind or 'application/octet-stream'}{charset}", length)
            self.send_header("Content-Security-Policy", f"{_POLICY}; sandbox")  # whatever a file holds, it runs nothing
            self.end_headers()
            if self.command == "GET":
                while length and (data := file.read(min(length, 2**20))):  # what grows meanwhile was not announced
                    self.wfile.write(data)
                    length -= len(data)

    def _begin(self, status: HTTPStatus, kind: str, length: int) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                   "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer"}  # fmt: skip
        if status == HTTPStatus.OK:
            headers["Content-Length"] = str(length)
        for name, value in headers.items():
            self.send_header(name, value)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a browser that looks every few seconds is no news."""


def serve_run(folder: Path, port: int | None, page: Callable[[], bytes]) -> None:
    """Serve until Ctrl-C, which is how it is meant to end.

    Raises:
        UserError: the port cannot be taken.
    """
    with Service(folder, PORT if port is None else port, page) as service:
        log(f"report    http://{HOST}:{service.server_address[1]}/ shows {one_line(str(folder))}; Ctrl-C ends it")
        try:
            service.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log("report    ended")
