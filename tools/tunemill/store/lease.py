"""Leases and collections: how a publish and a garbage collection keep out of each other's way.

A publisher first writes a lease naming every digest it relies on, then looks which collections are
announced, and only then trusts a blob that is already there. A collector first announces the digests it
is about to delete, waits, and then reads all references and leases again before it deletes what is still
unnamed. Whichever came first, one sees the other: a lease written before the second reading saves
its blobs, and one written after it finds the announcement. Ages are counted by the server's clock.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunemill.errors import BadDataError, ConfigurationError, DeniedError, TransientError
from tunemill.progress import Progress
from tunemill.store import keys
from tunemill.store.backend import Backend
from tunemill.store.reference import ensure

LEASE_LIFE = timedelta(days=7)  # an older lease protects nothing; the longest publish has to fit
LEASE_MARGIN = timedelta(hours=1)  # a publish stops committing this long before its lease ends
COLLECTION_LIFE = timedelta(hours=1)  # a collector deletes nothing later than this after announcing
LARGEST_LEASE = 1 << 20  # bytes
POLL_SECONDS = 0.5


class Digests(BaseModel):
    """The content of a lease or a collection: sha256 digests as 64 hex digits."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    digests: list[str] = Field(max_length=15_000)


@dataclass(frozen=True)
class Claim:
    """A lease or collection as found in the store."""

    identifier: str
    digests: frozenset[str]
    """Hex digests."""
    written: datetime
    """By the server's clock."""


def write_lease(backend: Backend, digests: Iterable[str]) -> Claim:
    """Record that a publish relies on these hex digests."""
    return _write(backend, keys.lease, digests)


def drop_lease(backend: Backend, lease: Claim) -> None:
    """Remove a lease; one that may not or cannot be removed simply grows old."""
    with contextlib.suppress(DeniedError, TransientError):
        backend.delete(keys.lease(lease.identifier))


def leases(backend: Backend) -> Iterator[Claim]:
    """Yield every lease younger than ``LEASE_LIFE``."""
    return _claims(backend, keys.LEASES, LEASE_LIFE)


def announce(backend: Backend, digests: Iterable[str]) -> Claim:
    """Record, before waiting and marking again, which hex digests a collection is about to delete.

    The caller may delete them until ``COLLECTION_LIFE`` after ``written`` and calls ``withdraw`` then.
    """
    return _write(backend, keys.collection, digests)


def withdraw(backend: Backend, collection: Claim) -> None:
    """Remove the announcement of a collection that has ended."""
    backend.delete(keys.collection(collection.identifier))


def collections(backend: Backend) -> Iterator[Claim]:
    """Yield every announced collection younger than ``COLLECTION_LIFE``."""
    return _claims(backend, keys.COLLECTIONS, COLLECTION_LIFE)


def wait_for_collections(backend: Backend, digests: Iterable[str], progress: Progress) -> None:
    """Return when no announced collection may delete any of these digests any more.

    The caller has written its lease before, so a collection that begins later spares them.
    """
    wanted, told = frozenset(digests), False
    while any(wanted & collection.digests for collection in collections(backend)):
        if not told:
            progress.say("waiting for a garbage collection that is about to delete some of these files")
            told = True
        time.sleep(POLL_SECONDS)


def check_lease(backend: Backend, lease: Claim) -> None:
    """Make sure before a commit that the lease still protects what it names.

    Raises:
        TransientError: the publish took longer than a lease lives, or the lease was removed.
    """
    entry = backend.head(keys.lease(lease.identifier))
    if entry is None or backend.now() - entry.modified > LEASE_LIFE - LEASE_MARGIN:
        raise TransientError(
            "the publish took longer than its lease protects its files: run the same command again"
        )


def _write(backend: Backend, key: Callable[[str], str], digests: Iterable[str]) -> Claim:
    named = sorted(set(digests))
    identifier = uuid.uuid4().hex
    data = Digests(digests=named).model_dump_json().encode()
    ensure(backend, key(identifier), data)
    entry = backend.head(key(identifier))
    if entry is None:
        raise ConfigurationError(
            f"{backend.url} does not show what was just written: run 'tunemill store doctor'"
        )
    return Claim(identifier, frozenset(named), entry.modified)


def _claims(backend: Backend, prefix: str, life: timedelta) -> Iterator[Claim]:
    entries = list(backend.list(prefix))
    now = backend.now() if entries else None
    for entry in entries:
        if now is None or now - entry.modified > life:
            continue
        data = backend.get(entry.key, LARGEST_LEASE)
        if data is None:
            continue  # dropped since it was listed
        try:
            digests = Digests.model_validate_json(data).digests
        except ValidationError as error:
            raise BadDataError(f"{entry.key} in {backend.url} is malformed: remove it") from error
        yield Claim(entry.key.removeprefix(prefix), frozenset(digests), entry.modified)
