"""A server that is only starting, or being started again, is waited for, and not for ever."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from backends import MakeDraft, s3_environment
from tunemill.errors import TransientError
from tunemill.progress import Progress
from tunemill.store import Store, create_store, open_store, s3_patience


@pytest.fixture
def port() -> int:
    """Nothing listens on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(port: int) -> Iterator[None]:
    with s3_environment(f"http://127.0.0.1:{port}", "anyone", "anything"):
        yield


def start(port: int) -> ThreadedMotoServer:
    """Start a server; what an earlier one of this process stored is there again."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server


@pytest.mark.usefixtures("environment")
def test_a_server_that_starts_late_is_waited_for(port: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tunemill")
    servers: list[ThreadedMotoServer] = []
    timer = threading.Timer(2.5, lambda: servers.append(start(port)))
    timer.start()
    begun = time.monotonic()
    create_store("s3://some-bucket")
    assert time.monotonic() - begun > 2
    timer.join()
    said = [record.getMessage() for record in caplog.records if record.name == "tunemill"]
    assert said == [
        f"s3://some-bucket: nothing answers at http://127.0.0.1:{port} (connection refused); trying for 60 s",
        "s3://some-bucket: the server answers again",
    ]
    servers[0].stop()


@pytest.mark.usefixtures("environment")
def test_a_restart_in_the_middle_is_survived(port: int, make_draft: MakeDraft, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    server = start(port)
    store = Store(create_store("s3://other-bucket")[0].backend, cache=tmp_path / "cache")
    artifact = store.publish(make_draft({"model.safetensors": data}), Progress(quiet=True))
    server.stop()
    servers: list[ThreadedMotoServer] = []
    timer = threading.Timer(2.0, lambda: servers.append(start(port)))
    timer.start()
    store.pull(artifact, tmp_path / "out", Progress(quiet=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    timer.join()
    servers[0].stop()


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        pytest.param("http://127.0.0.1:9", r"127\.0\.0\.1:9 \(connection refused\)", id="refused"),
        pytest.param("http://nowhere.invalid", "the name 'nowhere.invalid' is not known", id="unknown name"),
    ],
)
def test_in_the_end_it_is_an_error(monkeypatch: pytest.MonkeyPatch, endpoint: str, reason: str) -> None:
    monkeypatch.setattr(s3_patience, "WAIT_SECONDS", 2.0)
    begun = time.monotonic()
    with s3_environment(endpoint, "a", "b"), pytest.raises(TransientError, match=reason) as caught:
        open_store("s3://some-bucket")
    assert 2 <= time.monotonic() - begun < 20
    assert "start the server or correct AWS_ENDPOINT_URL" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_threads_share_one_wait(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(s3_patience, "WAIT_SECONDS", 2.0)
    with s3_environment("http://127.0.0.1:9", "a", "b"):
        from tunemill.store.s3 import open_bucket

        backend = open_bucket("some-bucket")
        begun = time.monotonic()
        threads = [threading.Thread(target=_fail, args=(backend,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert time.monotonic() - begun < 15
    assert caplog.text.count("nothing answers") == 1


def _fail(backend: object) -> None:
    with pytest.raises(TransientError):
        backend.head("leases/a")  # type: ignore[attr-defined]


def test_sigterm_ends_the_wait(environment: None, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tunemill.cli", "store", "ls", "--store", "s3://some-bucket"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "trying for 60 s" in process.stderr.readline()
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert time.monotonic() - begun < 5
