"""Publishes or pulls in child processes that are killed at spread points; run by ``test_kill.py``.

    python killed.py publish|pull STORE FOLDER PART EVENTS MOMENTS

Every child kills itself with SIGKILL at its n-th event: an audit event of the interpreter (a file
opened, linked, renamed or removed, bytes handed to a socket) or one of ``COUNTED`` below; a write
is torn in its middle. ``MOMENTS`` more children are killed from outside after a part of the usual time.
Then the store and the folder are checked, and the same work is run again to its end. Prints one JSON
object. Children are forked from this process, which has imported everything and opened no socket.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunemill.progress import Progress
from tunemill.store import Draft, Provenance, Store
from tunemill.store import partial as partial_module
from tunemill.store.backend import Backend, Transfer
from tunemill.store.local import LocalBackend, LocalUpload
from tunemill.store.manifest import content_digest
from tunemill.store.provenance import encode_statement
from tunemill.store.s3 import S3Upload, open_bucket

AUDITED = {
    *("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"),
    *("os.utime", "os.scandir", "http.client.send"),
}
# Besides, the moment between sending a request and reading its reply.
COUNTED = ("fsync", "ftruncate", "fchmod", "close")  # no audit events of the interpreter
WORKERS = 2
QUIET = Progress(quiet=True)


def open_backend(url: str) -> Backend:
    if url.startswith("s3://"):
        return open_bucket(url.removeprefix("s3://"))
    return LocalBackend(Path(url))


class Killer:
    """Ends this process at its n-th event; with ``at`` 0 it only counts."""

    def __init__(self, at: int) -> None:
        self._at, self._count = at, itertools.count(1)
        self.seen = 0

    def event(self) -> bool:
        number = next(self._count)  # threads count too: nothing but this line may decide
        self.seen = max(self.seen, number)
        return number == self._at

    def install(self) -> None:
        def hook(name: str, _: Any) -> None:
            if name in AUDITED and self.event():
                die()

        sys.addaudithook(hook)
        for name in COUNTED:
            setattr(os, name, self._counted(getattr(os, name)))
        http.client.HTTPResponse.begin = self._counted(http.client.HTTPResponse.begin)  # type: ignore[method-assign]
        os.pwrite = self._torn(os.pwrite)  # type: ignore[assignment]

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self.event():
                die()
            return function(*arguments)

        return call

    def _torn(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: Any, offset: int) -> int:
            if self.event():
                function(descriptor, data[: len(data) // 2], offset)
                die()
            return function(descriptor, data, offset)

        return call


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def log_transfers(log: Path) -> None:
    """Append a byte to ``log`` for every part or range that begins to travel."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with log.open("ab", buffering=0) as target:
                target.write(b".")
            return function(*arguments)

        return call

    for upload in (LocalUpload, S3Upload):
        upload.send = note(upload.send)  # type: ignore[method-assign]
    reader = type(BACKEND)
    reader.read = note(reader.read)  # type: ignore[method-assign]


def in_child(work: Callable[[], None], moment: float | None = None) -> tuple[int, float]:
    """Run ``work`` in a forked child; return its wait status and how long it took."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    if moment is not None:
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status, time.monotonic() - started


def large_size() -> int:
    """Bytes of the large file: more parts than workers, unless the server wants large parts."""
    return UPLOAD.part * (5 if UPLOAD.part < 1 << 20 else 2) + 100_000


def make_provenance(number: int) -> Provenance:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return Provenance("train", "0.1.0", {"number": number}, {}, {}, {}, "ab", None, None, now, now)


def make_draft(folder: Path, number: int) -> Draft:
    """Files that no other number has: one of several parts, one small, one empty."""
    source = folder / f"draft-{number}"
    source.mkdir()
    noise = random.Random(number)
    (source / "model.safetensors").write_bytes(noise.randbytes(large_size()))
    (source / "config.json").write_bytes(noise.randbytes(50_000))
    (source / "README.md").write_bytes(b"")
    made = make_provenance(number)
    return Draft(f"killed/number-{number}", "adapter", source, {}, made, ("v1", "v2"))


def same_files(first: Path, second: Path) -> bool:
    def listing(root: Path) -> list[tuple[str, str]]:
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return [
            (path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
            for path in paths
        ]

    return listing(first) == listing(second)


class Publishing:
    """One draft per point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, number: int) -> None:
        self.draft = make_draft(self.folder, number)

    def work(self) -> None:
        Store(BACKEND, UPLOAD).publish(self.draft, QUIET)

    def check(self, finished: bool) -> None:
        """Whatever is visible is whole; what is finished is visible under both tags and the branch."""
        store, pulled = Store(BACKEND, UPLOAD, self.folder / "cache"), set[str]()
        for suffix in (":v1", ":v2", ""):
            found = store.find(self.draft.name + suffix)
            assert found is not None or not finished, f"{self.draft.name}{suffix} is missing"
            if found is None or found.digest in pulled:
                continue
            pulled.add(found.digest)
            assert found.content == content_digest(found.kind, found.files)
            target = self.folder / "checked" / f"{found.digest[7:]}-{finished}"
            store.pull(found, target, QUIET)
            assert same_files(target, self.draft.directory), f"{self.draft.name}{suffix} differs"
            assert store.provenance(found) == self.draft.provenance

    @property
    def parts(self) -> int:
        return -(-large_size() // UPLOAD.part)


class Pulling:
    """One published artifact; a new cache and destination per point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.draft = make_draft(folder, 0)
        status, _ = in_child(lambda: check(Store(BACKEND, UPLOAD).publish(self.draft, QUIET) is not None))
        assert status == 0
        self.parts = -(-large_size() // DOWNLOAD.part) + 2  # and two small files

    def prepare(self, number: int) -> None:
        self.cache, self.target = self.folder / f"cache-{number}", self.folder / f"target-{number}" / "in"

    def work(self) -> None:
        store = Store(BACKEND, DOWNLOAD, self.cache)
        store.pull(store.resolve(self.draft.name), self.target, QUIET)

    def check(self, finished: bool) -> None:
        """The destination is whole or absent, and the cache holds nothing but verified files."""
        assert self.target.exists() or not finished
        if self.target.exists():
            assert same_files(self.target, self.draft.directory)
        for path in (self.cache / "blobs/sha256").glob("*"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        if finished:
            assert [path.name for path in self.target.parent.iterdir()] == [self.target.name]
            assert list((self.cache / ".partial").iterdir()) == []


def check(condition: bool) -> None:
    assert condition


def points(events: int, wanted: int, moments: int, seconds: float) -> Iterator[tuple[int, float | None]]:
    """Yield (event, None) spread over all events, then (0, seconds) spread over the usual time."""
    for number in range(wanted):
        yield 1 + number * events // wanted, None
    for number in range(moments):
        yield 0, 0.8 * seconds * (number + 0.5) / moments


def main(kind: str, folder: Path, wanted: int, moments: int) -> dict[str, int]:
    case = Publishing(folder) if kind == "publish" else Pulling(folder)
    case.prepare(1000)
    assert in_child(case.work)[0] == 0  # makes the folders that only a first publish makes
    case.prepare(1001)
    tally = folder / "events"

    def count() -> None:
        killer = Killer(0)
        killer.install()
        case.work()
        tally.write_text(str(killer.seen))

    status, seconds = in_child(count)
    assert status == 0
    events = int(tally.read_text())
    facts = {"events": events, "points": 0, "killed": 0, "visible": 0, "most_resent": 0}
    for number, (event, moment) in enumerate(points(events, wanted, moments, seconds), 1):
        log = folder / f"log-{number}"

        def attempt(event: int = event, log: Path = log) -> None:
            log_transfers(log)
            Killer(event).install()
            case.work()

        case.prepare(number)
        status, _ = in_child(attempt, moment)
        assert status in (0, signal.SIGKILL), f"point {number}: ended with {status}"
        facts["points"] += 1
        facts["killed"] += status == signal.SIGKILL
        assert in_child(lambda: case.check(False))[0] == 0, f"point {number} (event {event}): visible in part"
        if isinstance(case, Pulling) and case.target.exists():
            facts["visible"] += 1  # killed after the rename: done, and a rerun would refuse to overwrite it
            continue
        assert in_child(lambda attempt=attempt: attempt(0))[0] == 0, f"point {number}: the rerun failed"
        assert in_child(lambda: case.check(True))[0] == 0, f"point {number}: the rerun did not complete"
        facts["most_resent"] = max(facts["most_resent"], log.stat().st_size - case.parts)
    return facts


if __name__ == "__main__":
    encode_statement(make_provenance(0), [("warm", "0" * 64)])  # imports protobuf before anything is counted
    partial_module.PAUSE_SECONDS = 0.01
    BACKEND = open_backend(sys.argv[2])
    UPLOAD = Transfer(part=int(sys.argv[4]), workers=WORKERS)
    DOWNLOAD = Transfer(part=large_size() // 20, workers=WORKERS)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[3]), int(sys.argv[5]), int(sys.argv[6]))))
