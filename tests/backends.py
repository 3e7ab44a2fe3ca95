"""The backends under test: a directory, moto's server, and the real S3 server when one is named.

Fixtures for ``tests/store`` and ``tests/faults``; each folder's ``conftest.py`` names those it uses.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from moto.s3 import models
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from tunemill.progress import Progress
from tunemill.store import Draft, Provenance, Store
from tunemill.store.backend import Backend, Transfer
from tunemill.store.local import LocalBackend
from tunemill.store.s3 import S3Backend

BACKENDS = [
    pytest.param("directory", id="directory"),
    pytest.param("moto", id="moto"),
    pytest.param("real", id="real", marks=pytest.mark.s3),
]
MIB = 1 << 20
SMALL_PART = 256 << 10  # bytes; moto and directories take it
SMALL = Transfer(part=5 * MIB, workers=2)  # the smallest part S3 allows


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request hides the failure
    models.S3_UPLOAD_PART_MIN_SIZE = SMALL_PART  # moto's own setting; it is slow with real parts
    write_one_at_a_time()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def write_one_at_a_time() -> None:
    """Make conditional writes whole: moto looks whether an object is there, and writes it, in two steps."""
    put, lock = S3Response.put_object, threading.Lock()

    def put_alone(self: S3Response) -> object:
        with lock:
            return put(self)

    S3Response.put_object = put_alone


@contextlib.contextmanager
def s3_environment(endpoint: str, key: str, secret: str) -> Iterator[None]:
    """Point boto3 at one server, away from this machine's own AWS settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        yield


@contextlib.contextmanager
def open_environment(kind: str, request: pytest.FixtureRequest) -> Iterator[None]:
    if kind == "moto":
        with s3_environment(request.getfixturevalue("moto_endpoint"), "anyone", "anything"):
            yield
    else:
        endpoint = os.environ.get("TUNEMILL_TEST_S3")
        if not endpoint:
            pytest.skip("TUNEMILL_TEST_S3 names no real S3 server; `make test-s3` starts one")
        with s3_environment(endpoint, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]):
            yield


def new_bucket(prefix: str = "some/prefix") -> S3Backend:
    backend = S3Backend(f"tunemill-{uuid.uuid4().hex[:16]}", prefix)
    backend.client.create_bucket(Bucket=backend.bucket)  # making another client would take 0.3 s
    return backend


@pytest.fixture
def moto(request: pytest.FixtureRequest) -> Iterator[S3Backend]:
    """A store in a fresh bucket on moto's server; the environment points there."""
    with open_environment("moto", request):
        yield new_bucket()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """An empty store of each kind."""
    if request.param == "directory":
        yield LocalBackend.create(tmp_path / "store")
        return
    with open_environment(request.param, request):
        yield new_bucket()


@pytest.fixture
def store(backend: Backend, tmp_path: Path) -> Store:
    return Store(backend, SMALL, tmp_path / "cache")


@pytest.fixture
def directory_store(tmp_path: Path) -> Store:
    return Store(LocalBackend.create(tmp_path / "store"), SMALL, tmp_path / "cache")


@pytest.fixture
def progress() -> Progress:
    return Progress(quiet=True)


def provenance(**changes: object) -> Provenance:
    values: dict[str, object] = {
        "stage": "train",
        "tool_version": "0.1.0",
        "config": {"seed": 42, "learning_rate": 2e-4, "target_modules": ["q_proj"], "chat_template": None},
        "origins": {"seed": "default", "learning_rate": "flag"},
        "inputs": {"base": f"base/tiny@sha256:{'1' * 64}", "data": f"tiny-stdlib/data@sha256:{'2' * 64}"},
        "host": {"cpu": "x86_64", "cores": 2},
        "action_key": "ab" * 32,
        "image": None,
        "llama_cpp": None,
        "started": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        "finished": datetime(2026, 1, 2, 3, 5, 5, tzinfo=UTC),
    }
    return Provenance(**{**values, **changes})  # type: ignore[arg-type]


MakeDraft = Callable[..., Draft]


@pytest.fixture
def make_draft(tmp_path: Path) -> MakeDraft:
    """Write files, given as path to bytes, and return a draft of them."""

    def make(files: dict[str, bytes], name: str = "tiny-stdlib/adapter", **options: object) -> Draft:
        folder = tmp_path / f"draft-{uuid.uuid4().hex[:8]}"
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        folder.mkdir(exist_ok=True)
        values: dict[str, object] = {"kind": "adapter", "facts": {"loss": 0.5}, "provenance": provenance()}
        return Draft(name=name, directory=folder, **{**values, **options})  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_provenance() -> Callable[..., Provenance]:
    return provenance
