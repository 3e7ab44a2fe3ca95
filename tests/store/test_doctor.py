"""Doctor passes servers that keep the protocol and names what each of the others breaks.

The bad ones are real servers: moto behind a layer that checks bodies, as moto does not, and breaks the
one promise that a test names.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from tunemill.errors import ConfigurationError, DeniedError
from tunemill.store import doctor, keys
from tunemill.store.doctor import examine, refuse_unfit
from tunemill.store.s3 import S3Backend

STALE_SECONDS = 1.0
Reply = tuple[str, list[tuple[str, str]], bytes]


class Server:
    """Moto, with bodies checked against their checksums, and one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.made: set[str] = set()
        self.missed: dict[str, float] = {}
        self.listed: dict[str, tuple[float, Reply]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        status, headers, content = self.answer(environ, body)
        start_response(status, headers)
        return [content]

    def answer(self, environ: dict[str, Any], body: bytes) -> Reply:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.fault != "checks no body" and not body_matches(environ, body):
            return refusal("400 Bad Request", "BadDigest")
        if self.fault == "ignores conditions":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        refused = {"read only": "PUT", "keeps everything": "DELETE"}.get(self.fault)
        if method == refused and "/probes/" in path:
            return refusal("403 Forbidden", "AccessDenied")
        special = {"loses races": self.race, "remembers misses": self.stale, "lists late": self.late}
        return special.get(self.fault, lambda *_: None)(environ, method, path) or self.forward(environ)

    def race(self, environ: dict[str, Any], method: str, path: str) -> Reply | None:
        """Look first and write then, as Swift's s3api does."""
        if method != "PUT" or environ.pop("HTTP_IF_NONE_MATCH", None) is None:
            return None
        if path in self.made:
            return refusal("412 Precondition Failed", "PreconditionFailed")
        time.sleep(0.05)
        self.made.add(path)
        return None

    def stale(self, environ: dict[str, Any], method: str, path: str) -> Reply | None:
        """Go on saying for a while that an object is not there, as a cache in front may."""
        if method not in ("GET", "HEAD") or "probes" not in path:
            return None
        if time.monotonic() - self.missed.get(path, -STALE_SECONDS) < STALE_SECONDS:
            return refusal("404 Not Found", "NoSuchKey")
        reply = self.forward(environ)
        if reply[0].startswith("404"):
            self.missed[path] = time.monotonic()
        return reply

    def late(self, environ: dict[str, Any], method: str, path: str) -> Reply | None:
        """Answer a listing with an earlier one for a while."""
        query = environ["QUERY_STRING"]
        if method != "GET" or "list-type" not in query:
            return None
        when, old = self.listed.get(path + query, (0.0, None))
        if old is not None and time.monotonic() - when < STALE_SECONDS:
            return old
        reply = self.forward(environ)
        self.listed[path + query] = time.monotonic(), reply
        return reply

    def forward(self, environ: dict[str, Any]) -> Reply:
        started: list[Any] = []
        chunks = self.moto(environ, lambda status, headers, *_: started.extend((status, headers)))
        return started[0], list(started[1]), b"".join(chunks)


def body_matches(environ: dict[str, Any], body: bytes) -> bool:
    sums = {
        "HTTP_CONTENT_MD5": hashlib.md5(body).digest(),
        "HTTP_X_AMZ_CHECKSUM_SHA256": hashlib.sha256(body).digest(),
        "HTTP_X_AMZ_CHECKSUM_CRC32": binascii.crc32(body).to_bytes(4, "big"),
    }
    return all(base64.b64decode(environ[name]) == value for name, value in sums.items() if name in environ)


def refusal(status: str, code: str) -> Reply:
    content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))], content


class LateHandler(MotoRequestHandler):
    """Sends a Date that is an hour ahead."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + 3600, usegmt=True)


@pytest.fixture
def faulty(moto: S3Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], S3Backend]]:
    """Return a function that opens a fresh bucket on a server with a fault."""
    servers = []
    monkeypatch.setattr(doctor, "ROUNDS", 4)  # these servers lose every race; the real one gets all rounds

    def start(fault: str) -> S3Backend:
        handler = LateHandler if fault == "wrong clock" else MotoRequestHandler
        server = make_server("127.0.0.1", 0, Server(fault), threaded=True, request_handler=handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        return S3Backend(moto.bucket, "fault")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def failed(findings: list[doctor.Finding]) -> set[str]:
    return {finding.check for finding in findings if finding.state == "failed"}


def probes(backend: Any) -> list[str]:
    return [entry.key for entry in backend.list(keys.PROBES)]


def test_a_directory_is_fit(directory_store, progress):
    findings = examine(directory_store.backend, progress)
    refuse_unfit(directory_store.url, findings)
    assert {finding.state for finding in findings} == {"ok"}
    assert probes(directory_store.backend) == []
    assert list(directory_store.backend.unfinished()) == []


def test_a_server_that_keeps_its_promises_is_fit(faulty, progress):
    backend = faulty("none")
    findings = examine(backend, progress)
    refuse_unfit(backend.url, findings)
    notes = {finding.check for finding in findings if finding.state == "note"}
    assert notes == {"lifecycle rule", "strangers"}, "moto lets everyone in"
    assert probes(backend) == []


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        pytest.param("ignores conditions", {"create only", "race"}, id="ignores If-None-Match"),
        pytest.param("loses races", {"race"}, id="loses races"),
        pytest.param("remembers misses", {"read after write"}, id="remembers misses"),
        pytest.param("lists late", {"list after write"}, id="lists late"),
        pytest.param("checks no body", {"damaged part", "damaged object"}, id="checks no body"),
        pytest.param("wrong clock", {"clock"}, id="wrong clock"),
    ],
)
def test_a_broken_promise_is_named(faulty, progress, fault, broken):
    backend = faulty(fault)
    findings = examine(backend, progress)
    assert failed(findings) == broken
    with pytest.raises(ConfigurationError) as caught:
        refuse_unfit(backend.url, findings)
    assert caught.value.exit_code == 78
    assert all(name in str(caught.value) for name in broken)
    assert "\n" not in str(caught.value)


def test_credentials_that_may_not_write_are_denied(faulty, progress):
    with pytest.raises(DeniedError) as caught:
        examine(faulty("read only"), progress)
    assert caught.value.exit_code == 77


def test_credentials_that_may_not_delete_are_noted(faulty, progress):
    backend = faulty("keeps everything")
    findings = examine(backend, progress)
    refuse_unfit(backend.url, findings)
    (found,) = [finding for finding in findings if finding.check == "right to delete"]
    assert found.state == "note"
    assert "gc needs other credentials" in found.detail


def test_a_lifecycle_rule_is_found(faulty, progress):
    backend = faulty("none")
    rule = {
        "ID": "uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": "fault/"},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 8},
    }
    backend.client.put_bucket_lifecycle_configuration(
        Bucket=backend.bucket, LifecycleConfiguration={"Rules": [rule]}
    )
    (found,) = [each for each in examine(backend, progress) if each.check == "lifecycle rule"]
    assert (found.state, found.detail) == ("ok", "removes abandoned uploads after 8 days")


def test_the_real_server_is_fit(backend, progress, request):
    if request.node.callspec.params["backend"] == "moto":
        pytest.skip("moto compares no checksums; that doctor says so is another test")
    findings = examine(backend, progress)
    refuse_unfit(backend.url, findings)
    assert not [each for each in findings if each.state == "note" and each.check != "lifecycle rule"]
    assert probes(backend) == []


def test_a_clock_of_objects_that_disagrees_is_refused(directory_store, progress, monkeypatch):
    late = datetime.now(UTC) + timedelta(hours=1)
    monkeypatch.setattr(directory_store.backend, "now", lambda: late)
    assert failed(examine(directory_store.backend, progress)) == {"clock"}
