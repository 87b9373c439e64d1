"""Pairs as tar shards and parquet files, a web server that fails on request, and a local S3 server."""

import http.client
import io
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet

ACCESS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_DEFAULT_REGION": "us-east-1"}


def members_of(pairs: Path) -> dict[str, bytes]:
    """What a shard of a folder of pairs holds, by name."""
    members = {}
    for target in sorted((pairs / "training_images").glob("*.png")):
        members[f"{target.stem}.target.png"] = target.read_bytes()
        members[f"{target.stem}.control.png"] = (pairs / "control_images" / target.name).read_bytes()
        members[f"{target.stem}.txt"] = target.with_suffix(".txt").read_bytes()
    return members


def tar_of(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(pairs: Path, file: Path, *, struct: bool = True, **names: str) -> Path:
    """A parquet file of a folder of pairs, three rows a group; `names`: of columns by role."""
    targets = sorted((pairs / "training_images").glob("*.png"))
    images = {
        "target": [target.read_bytes() for target in targets],
        "control": [(pairs / "control_images" / target.name).read_bytes() for target in targets],
    }
    columns = {
        names.get(role, role): [{"bytes": data, "path": None} for data in values] if struct else values
        for role, values in images.items()
    }
    prompts = {names.get("prompt", "prompt"): [target.with_suffix(".txt").read_text() for target in targets]}
    return write_parquet(file, {**columns, **prompts})


def write_parquet(file: Path, columns: Mapping[str, list[object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), file, row_group_size=3)
    return file


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` in ranges; each of `faults` spoils one request: a status, or "reset", "slow" or "cut".

    With the address of another server, requests are handed on to that, but for those of the methods `refused`.
    """

    daemon_threads = True

    def __init__(self, behind: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.refused = behind.removeprefix("http://"), set[str]()
        self.files: dict[str, bytes] = {}
        self.faults: list[int | str | None] = []
        self.served: list[tuple[str, int]] = []  # method and bytes
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that have gone away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - the names of the base class

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if self.command in self.server.refused:
            fault = 403
        data = self.server.files.get(self.path)
        if fault == "reset":
            self._close()
            return
        if fault == "slow":
            time.sleep(1)
        if self.server.behind and not isinstance(fault, int):
            self._hand_on(body)
            return
        if isinstance(fault, int) or data is None:
            code = {403: "ExpiredToken", 503: "SlowDown"}.get(fault if isinstance(fault, int) else 404, "NoSuchKey")
            body = f"<Error><Code>{code}</Code><Message>As S3 words it.</Message></Error>".encode()
            self._send(fault if isinstance(fault, int) else 404, body, len(body))
            return
        status, part = 200, data
        if given := self.headers.get("Range"):
            first, last = given.removeprefix("bytes=").split("-")
            status, part = 206, data[int(first) : int(last) + 1]
        self._send(status, part[:-1] if fault == "cut" else part, len(part), {"ETag": f'"{hash(data)}"'})

    def _hand_on(self, body: bytes) -> None:
        connection = http.client.HTTPConnection(self.server.behind)
        kept = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, kept)
        answer = connection.getresponse()
        data, length = answer.read(), int(answer.headers.get("Content-Length", 0))
        names = ("ETag", "Content-Type", "Content-Range", "Last-Modified")
        kept = {name: value for name in names if (value := answer.headers[name])}
        self._send(answer.status, data, length, kept)
        connection.close()

    def _close(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _send(self, status: int, body: bytes, length: int, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            if len(body) < length:
                self._close()
        self.server.served.append((self.command, len(body) if self.command == "GET" else 0))


@contextmanager
def faulty_server(behind: str = "") -> Iterator[FaultyServer]:
    server = FaultyServer(behind)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an empty S3 store (moto's) with the bucket `pairs`; it takes any credentials.

    It is a process of its own, so tests may fork, and its time is not theirs.
    """
    import fsspec

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        url = next(line.split()[-1] for line in server.stderr if "Running on" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop it
        try:
            store = fsspec.filesystem("s3", key="testing", secret="testing", endpoint_url=url, skip_instance_cache=True)
            store.mkdir("pairs")
            store.clear_instance_cache()  # fsspec keeps file systems whose address the environment gave
            yield url
        finally:
            server.kill()
            store.clear_instance_cache()
