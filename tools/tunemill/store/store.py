"""The store as the rest of the program sees it: find, publish, tag, pull.

Everything that passes between two stages is an artifact in one store. An artifact is visible whole or
not at all; what a tag names never changes; of several writers racing for a name exactly one wins.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.store import keys
from tunemill.store.backend import Backend
from tunemill.store.manifest import Artifact, Draft, Manifest
from tunemill.store.names import check_name, check_tag, parse_reference
from tunemill.store.provenance import Provenance
from tunemill.store.reference import Revision


def open_store(url: str, create: bool = False) -> Store:
    """Open ``s3://bucket/prefix``, ``file:///path`` or a plain path.

    ``create`` makes a directory store that does not exist; a bucket is never made.

    Raises:
        ConfigurationError: the store does not exist, or is no store.
        DeniedError: credentials are missing or refused.
        UsageError: the address is of another scheme.
    """
    raise NotImplementedError


class Store:
    """One store. Methods may be called from several threads."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.url = backend.url

    def find(self, reference: str) -> Artifact | None:
        """Return the artifact of ``name`` (its newest), ``name:tag`` or ``name@sha256:<hex>``, or None."""
        raise NotImplementedError

    def resolve(self, reference: str) -> Artifact:
        """Return the artifact of a reference.

        Raises:
            UsageError: there is none; the message names near ones.
        """
        raise NotImplementedError

    def manifest(self, artifact: Artifact) -> Manifest:
        """Return the parsed manifest of an artifact: its blobs with types and sizes."""
        raise NotImplementedError

    def publish(self, draft: Draft, progress: Progress) -> Artifact:
        """Store a draft's files, create its tags, then make it the newest of its name.

        When a tag exists with the same content the artifact found there is returned instead.

        Raises:
            ConflictError: a tag exists with other content.
            BadDataError: a path or file may not be stored.
        """
        raise NotImplementedError

    def advance(self, artifact: Artifact) -> None:
        """Make an artifact the newest of its name; nothing happens when it is."""
        raise NotImplementedError

    def tag(self, reference: str, tag: str) -> None:
        """Give an artifact a further tag of its name, for ever.

        Raises:
            ConflictError: the tag exists with other content.
        """
        raise NotImplementedError

    def pull(self, artifact: Artifact, destination: Path, progress: Progress) -> None:
        """Put an artifact's files, read-only, under ``destination``, which appears whole or not at all.

        Raises:
            UsageError: the destination exists.
            IntegrityError: bytes do not have their digest.
            TransientError: the disk is too small, or the network failed; a rerun goes on.
        """
        raise NotImplementedError

    def provenance(self, artifact: Artifact) -> Provenance:
        """Return how an artifact came to be."""
        raise NotImplementedError

    def history(self, name: str) -> list[Revision]:
        """Return what a name has meant, the newest first."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Return every name that has a branch or a tag, sorted."""
        raise NotImplementedError

    def tags(self, name: str) -> list[str]:
        """Return the tags of a name, sorted."""
        raise NotImplementedError
