"""As much of the Hugging Face Hub as a download needs, on a real socket.

Repositories are directories on disk at one commit. What the Hub answers for gated, private and
missing ones is copied in status and ``X-Error-Code``, which is all its client looks at.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1 << 10
"""From this size on the server calls a file an LFS one, with its sha256."""


@dataclass
class Hub:
    """A running server and what it was asked."""

    repositories: dict[str, Path] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)
    """Repository to the token that opens it."""
    damaged: set[str] = field(default_factory=set)
    """Files that are sent with a flipped last byte."""
    failing: int = 0
    """Status to answer everything with, or 0."""
    authorizations: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""
    commit: str = COMMIT


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.paths.append(self.path)
        hub.authorizations.append(self.headers.get("Authorization", ""))
        if hub.failing:
            return self.refuse(hub.failing, "")
        path = self.path.split("?")[0]
        match = re.fullmatch(
            r"/(?:api/(?:models|datasets)/([\w-]+/[\w-]+)/(revision|tree)/([\w.-]+)"
            r"|(?:datasets/)?([\w-]+/[\w-]+)/resolve/([\w.-]+)/(.+))",
            path,
        )
        if match is None:
            return self.refuse(404, "")
        name = match[1] or match[4]
        if name not in hub.repositories:
            return self.refuse(401, "RepoNotFound")
        if (match[3] or match[5]) not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        token = hub.gated.get(name)
        listing = match[2] == "revision"  # the Hub shows what a gated repository is, not its files
        if token and self.headers.get("Authorization") != f"Bearer {token}" and not listing:
            return self.refuse(403, "GatedRepo")
        directory = hub.repositories[name]
        if match[2] == "revision":
            return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
        if match[2] == "tree":
            return self.answer(
                json.dumps([entry(directory, file) for file in sorted(directory.rglob("*"))]).encode()
            )
        return self.send_file(directory / match[6])

    def send_file(self, file: Path) -> None:
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        if file.name in self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, end = 0, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(data[start:end], headers, 206 if wanted else 200)

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"{}", {"X-Error-Code": code, "X-Error-Message": code} if code else {}, status)

    def answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entry(directory: Path, file: Path) -> dict[str, Any]:
    path = file.relative_to(directory).as_posix()
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": "0" * 40}
    data = file.read_bytes()
    found = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) >= LARGE:
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


def start() -> tuple[Hub, ThreadingHTTPServer]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    return hub, server
