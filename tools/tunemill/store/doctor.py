"""Proof, on the live store, of everything the protocol relies on.

Servers differ, and one that ignores a condition or loses a race would lose artifacts without a word.
So nothing is believed here: each promise of ``backend.py`` is tried on objects below ``probes/``, by the
same calls that publish and pull make. ``doctor_s3.py`` adds what only a bucket can be asked.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from tunemill.errors import ConfigurationError, DeniedError, IntegrityError
from tunemill.progress import Progress
from tunemill.store import keys
from tunemill.store.backend import Backend

ROUNDS = 20  # of the race: OpenStack Swift lost 15 of 20, so a server that loses races shows it
WRITERS = 8
READ_ROUNDS = 10
CLOCK_TOLERANCE = timedelta(minutes=5)  # S3 refuses signatures older than 15
PART_SIZE = 5 << 20  # bytes; the smallest that S3 takes for any part but the last

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    state: State
    """``note``: the store can be used, but something is worth mending."""
    detail: str


class Probe:
    """A place in the store for one examination, cleaned up after it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._folder = f"{keys.PROBES}{uuid.uuid4().hex}/"
        self._made: list[str] = []

    @property
    def folder(self) -> str:
        """Prefix of this examination's keys."""
        return self._folder

    def key(self, name: str = "") -> str:
        """Return a key that was never used before; its object is removed by ``clean``."""
        key = f"{self._folder}{name or f'{len(self._made):06d}'}"
        self._made.append(key)
        return key

    def clean(self) -> None:
        """Remove everything that was written.

        Raises:
            DeniedError: the credentials may not delete.
        """
        for upload in self.backend.unfinished():
            if upload.key.startswith(self._folder):
                self.backend.abort(upload)
        for key in self._made:
            self.backend.delete(key)


Check = Callable[[Probe], Finding]
"""Raises ``ConfigurationError`` or ``IntegrityError`` saying how a promise was seen broken."""


def examine(backend: Backend, progress: Progress) -> list[Finding]:
    """Try every promise and return one finding for each, failed ones among them.

    Raises:
        DeniedError: the credentials may not read, list or create.
        TransientError: the store could not be reached.
    """
    backend.check()
    probe = Probe(backend)
    checks: list[tuple[str, Check]] = [*COMMON, *_special(backend)]
    findings: list[Finding] = []
    try:
        with progress.task("examining the store", len(checks), "checks") as task:
            for name, check in checks:
                findings.append(_run(name, check, probe))
                task.advance(note=name)
    finally:
        cleaned = _clean(probe)
    return [*findings, cleaned]


def refuse_unfit(url: str, findings: Sequence[Finding]) -> None:
    """Pass a fit store.

    Raises:
        ConfigurationError: naming every promise that does not hold.
    """
    failed = [f"{finding.check} ({finding.detail})" for finding in findings if finding.state == "failed"]
    if failed:
        raise ConfigurationError(f"{url} is not fit to be a store: {'; '.join(failed)}")


def _special(backend: Backend) -> list[tuple[str, Check]]:
    if not backend.url.startswith("s3:"):
        return []
    from tunemill.store.doctor_s3 import CHECKS  # boto3 is imported only for a bucket

    return CHECKS


def _run(name: str, check: Check, probe: Probe) -> Finding:
    try:
        return check(probe)
    except (ConfigurationError, IntegrityError) as error:
        return Finding(name, "failed", str(error))


def _clean(probe: Probe) -> Finding:
    try:
        probe.clean()
    except DeniedError as error:
        return Finding("right to delete", "note", f"none, so gc needs other credentials ({error})")
    return Finding("right to delete", "ok", "granted, as gc needs")


def check_rights(probe: Probe) -> Finding:
    """Whether the credentials may create, read and list, which everything else needs."""
    key = probe.key()
    if not probe.backend.put_if_absent(key, b"rights"):
        raise ConfigurationError("a key never used before is said to exist")
    probe.backend.get(key)
    list(probe.backend.list(probe.folder))
    list(probe.backend.unfinished())
    return Finding("rights", "ok", "may create, read and list")


def check_read_after_write(probe: Probe) -> Finding:
    """Whether an object is read back at once, even where it was looked for just before."""
    for number in range(READ_ROUNDS):
        key, data = probe.key(), secrets.token_bytes(100 + number)
        if probe.backend.get(key) is not None:
            raise ConfigurationError(f"{key} was read before it was written")
        probe.backend.put_if_absent(key, data)
        entry = probe.backend.head(key)
        if entry is None or probe.backend.get(key) != data:
            raise ConfigurationError(
                f"an object was not there when read after it was written, in round {number + 1}"
            )
        if entry.size != len(data):
            raise ConfigurationError(f"{len(data)} bytes were written and {entry.size} are reported")
    return Finding("read after write", "ok", f"{READ_ROUNDS} objects read back at once")


def check_list_after_write(probe: Probe) -> Finding:
    """Whether an object is listed at once, and in the order of keys that branches rely on."""
    made: set[str] = set()
    folder = f"{probe.folder}list/"
    for number in range(READ_ROUNDS, 0, -1):
        key = probe.key(f"list/{number:016x}")
        probe.backend.put_if_absent(key, b"listed")
        made.add(key)
        listed = [entry.key for entry in probe.backend.list(folder)]
        if set(listed) != made:
            raise ConfigurationError(f"{len(made)} objects were written and {len(listed)} are listed")
        if listed != sorted(made):
            raise ConfigurationError("objects are not listed in the order of their keys")
    return Finding("list after write", "ok", f"{len(made)} objects listed at once and in order")


def check_create_only(probe: Probe) -> Finding:
    """Whether a second creation of a key is refused and changes nothing."""
    key = probe.key()
    if not probe.backend.put_if_absent(key, b"first"):
        raise ConfigurationError("a key never used before is said to exist")
    second = probe.backend.put_if_absent(key, b"second")
    if second or probe.backend.get(key) != b"first":
        raise ConfigurationError("If-None-Match is ignored: a second writer overwrote the first")
    return Finding("create only", "ok", "a second creation is refused")


def check_race(probe: Probe) -> Finding:
    """Whether of several concurrent creations of one key exactly one wins, and its bytes stay."""
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(1, ROUNDS + 1):
            _race(probe, pool, number)
    return Finding("race", "ok", f"one winner in each of {ROUNDS} rounds of {WRITERS} writers")


def _race(probe: Probe, pool: ThreadPoolExecutor, number: int) -> None:
    key, start = probe.key(), threading.Barrier(WRITERS)

    def write(writer: int) -> bool:
        start.wait()
        return probe.backend.put_if_absent(key, _mark(writer))

    won = [writer for writer, created in enumerate(pool.map(write, range(WRITERS))) if created]
    if len(won) != 1:
        raise ConfigurationError(
            f"{len(won)} of {WRITERS} concurrent writers were told they won, in round {number}"
        )
    if probe.backend.get(key) != _mark(won[0]):
        raise ConfigurationError(f"the winner's bytes were overwritten by a loser, in round {number}")


def check_parts(probe: Probe) -> Finding:
    """Whether an object sent in parts arrives whole, create-only or at least readable back."""
    key, data = probe.key(), secrets.token_bytes(PART_SIZE + 1)
    _send(probe, key, data)
    _whole(probe, key, data)
    overwritten = _send(probe, key, data)
    _whole(probe, key, data)
    detail = "completing overwrites, so it is read back" if overwritten else "create-only"
    return Finding("upload in parts", "ok", f"{len(data)} bytes in 2 parts, {detail}")


def check_wrong_part(probe: Probe) -> Finding:
    """Whether a part whose bytes are not those announced is refused."""
    upload = probe.backend.upload(probe.key(), 6, PART_SIZE)
    try:
        upload.send(1, b"damage", hashlib.sha256(b"intact").digest())
    except IntegrityError:
        return Finding("damaged part", "ok", "refused")
    finally:
        upload.close()
    raise ConfigurationError("a part with a wrong sha256 was taken: checksums are not compared")


def check_clock(probe: Probe) -> Finding:
    """Whether the store's clock agrees with this host's and with the times it gives to objects."""
    key = probe.key()
    probe.backend.put_if_absent(key, b"clock")
    entry, server, here = probe.backend.head(key), probe.backend.now(), datetime.now(UTC)
    if entry is None:
        raise ConfigurationError("an object was not there when looked up after it was written")
    for what, difference in (("this host's", server - here), ("its own objects'", server - entry.modified)):
        if abs(difference) > CLOCK_TOLERANCE:
            seconds = difference.total_seconds()
            raise ConfigurationError(
                f"the store's clock is {seconds:+.0f} s from {what}: ages cannot be counted"
            )
    return Finding("clock", "ok", f"{abs(server - here).total_seconds():.0f} s from this host's")


def _mark(writer: int) -> bytes:
    return f"writer {writer}".encode()


def _send(probe: Probe, key: str, data: bytes) -> bool:
    upload = probe.backend.upload(key, len(data), PART_SIZE)
    try:
        for number, start in enumerate(range(0, len(data), PART_SIZE), 1):
            part = data[start : start + PART_SIZE]
            upload.send(number, part, hashlib.sha256(part).digest())
        return upload.complete()
    finally:
        upload.close()


def _whole(probe: Probe, key: str, data: bytes) -> None:
    entry = probe.backend.head(key)
    if entry is None or entry.size != len(data):
        raise ConfigurationError(
            f"of an object sent in parts {entry.size if entry else 0} of {len(data)} bytes are there"
        )
    if b"".join(probe.backend.read(entry, 0, len(data))) != data:
        raise ConfigurationError("an object sent in parts reads back as other bytes")
    middle = b"".join(probe.backend.read(entry, PART_SIZE - 10, 11))
    if middle != data[PART_SIZE - 10 :]:
        raise ConfigurationError("a range of an object reads as other bytes")


COMMON: list[tuple[str, Check]] = [
    ("rights", check_rights),
    ("clock", check_clock),
    ("read after write", check_read_after_write),
    ("list after write", check_list_after_write),
    ("create only", check_create_only),
    ("race", check_race),
    ("upload in parts", check_parts),
    ("damaged part", check_wrong_part),
]
