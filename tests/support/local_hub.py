"""A Hub of this machine: the endpoints that an upload calls, with faults on request."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import yaml

TOKEN, USER = "hf_of_alice", "alice"
LICENCES = ("apache-2.0", "mit", "other")
CUT, HANG = 0, 1  # faults: the connection ends in the middle of what is sent; no answer comes


@dataclass
class LocalHub:
    """What it holds. `faults`: a part of a path, and the statuses with which its next requests end."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    faults: dict[str, list[int]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    hung: Event = field(default_factory=Event)

    def stored(self, name: str) -> dict[str, bytes]:
        files: dict[str, bytes] = self.repositories[name]["files"]
        return files

    def metadata_problem(self, card: str) -> str | None:
        """A few of the Hub's rules for the metadata of a card."""
        found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else None
        if not isinstance(data, dict):
            return "there is no metadata"
        if data.get("license") not in LICENCES:
            return f'"license" must be one of [{", ".join(LICENCES)}]'
        if data["license"] == "other" and not {"license_name", "license_link"} <= data.keys():
            return '"license_name" and "license_link" are required'
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
            return '"base_model" with value is not valid'
        return None if all(isinstance(tag, str) for tag in data.get("tags", ())) else '"tags" must be strings'


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """It runs within the block."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        data = json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        hub, path = self.hub, self.path
        hub.calls.append(f"{self.command} {path}")
        fault = next((statuses for part, statuses in hub.faults.items() if part in path and statuses), None)
        length = int(self.headers.get("Content-Length", 0))
        if fault and fault[0] == CUT:
            fault.pop(0)
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault and fault[0] == HANG:
            hub.hung.set()
            Event().wait(60)
        elif fault:
            self.answer(fault.pop(0), {"error": "as asked"})
        elif path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            self.answer(200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self.route(path, body)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            self.answer(200, {"name": USER, "type": "user"})
        elif path == "/api/validate-yaml":
            problem = hub.metadata_problem(json.loads(body)["content"])
            self.answer(400 if problem else 200, {"errors": [{"message": problem}] if problem else [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name, private = f"{asked['organization']}/{asked['name']}", asked.get("visibility") == "private"
            new = {"private": private, "files": {}, "commits": 0}
            known = name in hub.repositories
            hub.repositories.setdefault(name, new)
            self.answer(409 if known else 200, {"url": f"{hub.url}/{name}"})
        elif found := re.fullmatch(r"/(?:api/models/)?([\w-]+/[\w-]+)(?:/|\.git/info/)?(.*)", path):
            self.repository(found[1], found[2], body)
        else:
            raise AssertionError(path)

    def repository(self, name: str, call: str, body: bytes) -> None:
        hub, held = self.hub, self.hub.repositories.get(name)
        if held is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif not call:
            self.answer(200, {"id": name, "private": held["private"], "sha": "0" * 40, "siblings": [], "tags": []})
        elif call == "preupload/main":
            modes = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "regular" if file["path"].endswith(".md") else "lfs"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": modes})
        elif call == "lfs/objects/batch":
            objects = []
            for each in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}
                objects.append(each | ({} if each["oid"] in hub.objects else {"actions": upload}))
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif call == "commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    held["files"][value["path"]] = hub.objects[value["oid"]]
            held["commits"] += 1
            self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            raise AssertionError(call)
