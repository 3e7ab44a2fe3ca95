"""References: the small create-only objects that make an artifact visible under a tag or branch.

Creating one is the commit of a publish. A reference is never replaced, so a tag means the same for
ever and a branch keeps its whole history. After any doubtful reply the key is read back and the write
id decides whether it was ours: nothing is ever guessed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunemill.errors import BadDataError, ConfigurationError, IntegrityError, TransientError
from tunemill.store import keys
from tunemill.store.backend import Backend

LARGEST_REFERENCE = 4096  # bytes
ATTEMPTS = 3  # creations while the outcome stays unknown, each read back; the S3 client repeats each too


class Reference(BaseModel):
    """The content of a tag or of one step of a branch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """Of the manifest."""
    size: int = Field(ge=1)
    """Bytes of the manifest."""
    sequence: int = Field(ge=0)
    """Position in the branch, from 1; 0 in a tag."""
    previous: str | None = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """The manifest the branch pointed to before."""
    write_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Random; tells a writer whether the reference it reads back is its own."""

    def encode(self) -> bytes:
        """Return the bytes stored."""
        return self.model_dump_json().encode()


@dataclass(frozen=True)
class Revision:
    """One step of a branch's history."""

    sequence: int
    digest: str
    """``sha256:<hex>`` of the manifest."""
    previous: str | None
    created: datetime
    """By the server's clock."""


def new_reference(digest: str, size: int, sequence: int = 0, previous: str | None = None) -> Reference:
    """Return a reference with a write id of its own."""
    return Reference(
        digest=digest, size=size, sequence=sequence, previous=previous, write_id=uuid.uuid4().hex
    )


def read_reference(backend: Backend, key: str) -> Reference | None:
    """Read and check a reference, or return None when the key is absent.

    Raises:
        BadDataError: it is malformed or larger than 4 KiB.
    """
    data = backend.get(key, LARGEST_REFERENCE)
    if data is None:
        return None
    try:
        return Reference.model_validate_json(data)
    except ValidationError as error:
        raise BadDataError(
            f"reference {key} in {backend.url} is malformed: {error.errors()[0]['msg']}"
        ) from error


def ensure(backend: Backend, key: str, data: bytes) -> None:
    """Create a small object whose key can hold nothing but these bytes, or find it there.

    Raises:
        TransientError: the outcome stayed unknown.
        IntegrityError: the key holds something of another size.
    """
    lost: TransientError | None = None
    for _ in range(ATTEMPTS):
        try:
            if backend.put_if_absent(key, data):
                return
            lost = None
        except TransientError as error:
            lost = error
        entry = backend.head(key)
        if entry is not None and entry.size != len(data):
            raise IntegrityError(
                f"{backend.url}/{key} has {entry.size} bytes instead of {len(data)}: the store is damaged"
            )
        if entry is not None:
            return
    raise lost or _contradiction(backend, key)


def create_reference(backend: Backend, key: str, reference: Reference) -> Reference:
    """Create a reference and return what the key holds now: ours, or the one that was first.

    Raises:
        TransientError: the outcome stayed unknown; the same command again will find out.
        ConfigurationError: the store says that the key exists and then that it does not.
    """
    data = reference.encode()
    lost: TransientError | None = None
    for _ in range(ATTEMPTS):
        try:
            if backend.put_if_absent(key, data):
                return reference
            lost = None
        except TransientError as error:
            lost = error
        found = read_reference(backend, key)
        if found is not None:
            return found
    raise lost or _contradiction(backend, key)


def _contradiction(backend: Backend, key: str) -> ConfigurationError:
    return ConfigurationError(
        f"{backend.url} refuses to create {key} although it does not exist: run 'tunemill store doctor'"
    )


def newest(backend: Backend, name: str) -> tuple[int, Reference] | None:
    """Return sequence number and reference of a branch's newest step, or None when it has none."""
    for entry in backend.list(f"{keys.BRANCHES}{name}/"):
        reference = read_reference(backend, entry.key)
        if reference is not None:
            return _checked(entry.key, reference)
    return None


def revisions(backend: Backend, name: str) -> Iterator[Revision]:
    """Yield a branch's steps, the newest first."""
    for entry in backend.list(f"{keys.BRANCHES}{name}/"):
        reference = read_reference(backend, entry.key)
        if reference is not None:
            sequence, _ = _checked(entry.key, reference)
            yield Revision(sequence, reference.digest, reference.previous, entry.modified)


def _checked(key: str, reference: Reference) -> tuple[int, Reference]:
    sequence = keys.sequence(key)
    if reference.sequence != sequence:
        raise BadDataError(f"reference {key} says it is number {reference.sequence}")
    return sequence, reference
