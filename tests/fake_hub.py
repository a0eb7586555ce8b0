"""A hub in a thread: as much of its HTTP interface as huggingface_hub needs to make a repository, fill it and read it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test_0123456789"


class FakeHub(ThreadingHTTPServer):
    """`repos`: name → file → bytes; `private`: name → bool; `commits`: their messages; `requests`: (method, path).
    What a path in `refused` contains is answered with 403, and the sender's own headers in the message."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.stored: dict[str, bytes] = {}
        self.refused: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def _large(name: str) -> bool:
    return name.endswith((".safetensors", ".png"))


def _oid(name: str, content: bytes) -> str:
    blob = content if _large(name) else b"blob %d\0" % len(content) + content
    return (hashlib.sha256 if _large(name) else hashlib.sha1)(blob).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def handle_any(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        length = self.headers.get("Content-Length")
        if length is None and self.command == "PUT":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(length or 0))
        hub.requests.append((self.command, path))
        if any(part in path for part in hub.refused):
            self.answer(403, {"error": f"refused {self.headers.get('Authorization')}"})
        elif path.startswith("/storage/"):  # whose addresses are signed and need no token
            hub.stored[path.removeprefix("/storage/")] = body
            self.answer(200, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.command == "POST":
            self.post(path, body)
        else:
            self.get(path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def post(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in hub.repos
            hub.repos.setdefault(name, {})
            hub.private.setdefault(name, asked.get("visibility") == "private" or asked.get("private") is True)
            self.answer(409 if there else 200, {"url": f"{hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            self.answer(200 if text.startswith("---\n") else 400, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for x in objects:
                if x["oid"] not in hub.stored:
                    x["actions"] = {"upload": {"href": f"{hub.url}/storage/{x['oid']}", "header": {}}}
            self.answer(200, {"objects": objects, "transfer": "basic"})
        elif "/preupload/" in path:
            held = hub.repos[path.removeprefix("/api/models/").split("/preupload/")[0]]
            files = [
                {
                    "path": x["path"],
                    "uploadMode": "lfs" if _large(x["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(x["path"], held[x["path"]]) if x["path"] in held else None,
                }
                for x in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                else:
                    assert line["key"] == "lfsFile"
                    hub.repos[name][value["path"]] = hub.stored[value["oid"]]
            self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{self.sha}", "commitOid": self.sha})

    @property
    def sha(self) -> str:
        return f"{len(self.server.commits):040x}"

    def get(self, path: str) -> None:
        hub = self.server
        name, _, file = path.removeprefix("/").partition("/resolve/")
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            if rest and name in hub.repos:
                files = [{"rfilename": f} for f in hub.repos[name]]
                self.answer(200, {"id": name, "modelId": name, "sha": self.sha, "siblings": files})
                return
        file = file.partition("/")[2]
        content = hub.repos.get(name, {}).get(file)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=self.sha)
        else:
            self.answer(200, content, ETag=f'"{_oid(file, content)}"', X_Repo_Commit=self.sha)
