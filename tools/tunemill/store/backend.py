"""The contract of a place that holds a store's keys: a directory or an S3 bucket.

The whole protocol rests on one conditional operation, create-only, because servers differ in every
other one. A backend knows keys and bytes; names, manifests and references are decided above it.
Every backend passes the one conformance suite, ``tests/store/test_backend.py``.

Errors are the same from every backend: ``DeniedError`` when credentials are missing, refused or lack
a right; ``TransientError`` when the network, the server or a full disk failed and a retry may help, in
which case a write may or may not have happened; ``ConfigurationError`` when the store does not exist
or does not speak the protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

LARGEST_SMALL_OBJECT = 1 << 20  # bytes; references, leases and manifests are read whole
MEMORY = 128 << 20  # bytes of parts in flight at once; half of what a transfer may use in all
MOST_PARTS = 10_000  # S3's limit for one upload

Data = bytes | bytearray
"""A part: parts are read into buffers that are used again, so an upload keeps none of them."""


@dataclass(frozen=True)
class Transfer:
    """How large objects are cut up and how many pieces travel at once."""

    part: int = 16 << 20
    """Bytes; an object up to this size is sent by one request. At least 5 MiB for S3."""
    workers: int = 4
    """Four keep a loopback RGW busy on two cores; more gained nothing there."""

    def part_size(self, size: int) -> int:
        """Return the part size for an object of ``size`` bytes: grown so that 10,000 parts suffice."""
        return max(self.part, -(-size // MOST_PARTS))

    def workers_for(self, size: int) -> int:
        """Return how many parts of such an object fit into ``MEMORY`` at once, at least one."""
        return max(1, min(self.workers, MEMORY // self.part_size(size)))


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    key: str
    size: int
    """Bytes."""
    modified: datetime
    """When it was written, by the server's clock, with time zone."""
    etag: str
    """Changes when the object is replaced; compared, never interpreted."""


@dataclass(frozen=True)
class Unfinished:
    """Parts of an upload that was neither completed nor aborted."""

    key: str
    identifier: str
    started: datetime
    """By the server's clock, with time zone."""


class Upload(ABC):
    """A large object being sent in parts; the object appears whole on ``complete``.

    Parts may be sent from several threads. A killed upload keeps its parts: the next ``upload`` of the
    same key finds them. Every part but the last has the same size.
    """

    @abstractmethod
    def holds(self, number: int, data: Data, sha256: bytes) -> bool:
        """Say whether part ``number`` (from 1) is already there with exactly these bytes.

        True only when the backend has compared the content, so a part that was cut off is sent again.
        """

    @abstractmethod
    def send(self, number: int, data: Data, sha256: bytes) -> None:
        """Send part ``number`` (from 1), whose digest is ``sha256``; sending it again replaces it.

        Raises:
            IntegrityError: the bytes that arrived have another digest.
        """

    @abstractmethod
    def complete(self) -> bool:
        """Make the object visible, create-only; True when this call created it.

        False means the key exists already or the server cannot tell: read it back. Parts that were never
        sent make it fail, not appear short.
        """

    @abstractmethod
    def close(self) -> None:
        """Release local resources and keep the parts sent so far. Safe to call twice."""


class Backend(ABC):
    """Keys and bytes. Methods may be called from several threads.

    Laws: a key that was created is seen by every later ``head``, ``get`` and ``list`` (read-after-write
    and list-after-write); of several concurrent creations of one key exactly one returns True; an object
    is visible whole or not at all.
    """

    url: str
    """The address the store was opened by, without credentials."""
    endpoint: str = ""
    """Address of the server, where there is one."""

    @abstractmethod
    def check(self) -> None:
        """Make sure that the store is there and may be listed.

        Raises:
            ConfigurationError: it does not exist, or does not speak the protocol.
            DeniedError: credentials are missing or refused.
        """

    @abstractmethod
    def make(self) -> bool:
        """Make the directory or bucket unless it is there; True when this call made it.

        Raises:
            DeniedError: it belongs to somebody else, or the credentials may not make it.
        """

    @abstractmethod
    def now(self) -> datetime:
        """Return the server's clock, at best to the second; ages are counted by it alone."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create a small object whole; True when this call created it.

        False means that the key exists, which a repeated request after a lost reply also reports: read it
        back before concluding that another writer won. Durable on return.

        Raises:
            TransientError: it may or may not have been created.
        """

    @abstractmethod
    def get(self, key: str, limit: int = LARGEST_SMALL_OBJECT) -> bytes | None:
        """Return a small object whole, or None when there is none.

        Raises:
            IntegrityError: it is larger than ``limit`` bytes; no more than that is read.
        """

    @abstractmethod
    def head(self, key: str) -> Entry | None:
        """Return size, age and etag of an object, or None when there is none."""

    @abstractmethod
    def read(self, entry: Entry, offset: int, length: int) -> Iterator[bytes]:
        """Yield ``length`` bytes from ``offset`` in pieces of at most 1 MiB.

        Raises:
            TransientError: the object was replaced since ``entry`` was read, or the stream ended early.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield objects whose key starts with ``prefix``, which ends in ``/``, in order of their keys.

        Lazy: taking only the first costs one request.
        """

    @abstractmethod
    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the distinct next segments below ``prefix`` (which ends in ``/``) that hold further keys."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error. Only collection and leases do this."""

    @abstractmethod
    def upload(self, key: str, size: int, part_size: int) -> Upload:
        """Begin sending a large object in parts, or go on with an unfinished upload of the same key.

        ``size`` and ``part_size`` are in bytes and the same for every attempt at one key; a part is at
        least 5 MiB except the last one, as S3 requires.
        """

    @abstractmethod
    def unfinished(self) -> Iterator[Unfinished]:
        """Yield uploads that were begun and neither completed nor aborted, including abandoned ones."""

    @abstractmethod
    def abort(self, upload: Unfinished) -> None:
        """Drop the parts of an abandoned upload; one that is gone is no error."""
