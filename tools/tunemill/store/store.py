"""The store as the rest of the program sees it: find, publish, tag, pull.

Everything that passes between two stages is an artifact in one store. An artifact is visible whole or
not at all; what a tag names never changes; of several writers racing for a name exactly one wins.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tunemill.errors import ConflictError, IntegrityError, UsageError
from tunemill.progress import Progress
from tunemill.store import keys
from tunemill.store.backend import Backend, Transfer
from tunemill.store.lease import drop_lease, wait_for_collections, write_lease
from tunemill.store.local import LocalBackend
from tunemill.store.manifest import (
    LARGEST_MANIFEST,
    Artifact,
    Draft,
    Manifest,
    parse_manifest,
    to_artifact,
)
from tunemill.store.names import Wanted, check_name, check_tag, parse_reference
from tunemill.store.provenance import LARGEST_STATEMENT, Provenance, parse_statement
from tunemill.store.publish import Package, advance, commit_tag, find_tagged, prepare, publish
from tunemill.store.pull import cache_directory, pull
from tunemill.store.reference import Revision, newest, read_reference, revisions


def open_store(url: str, create: bool = False) -> Store:
    """Open ``s3://bucket/prefix``, ``file:///path`` or a plain path.

    ``create`` makes a directory store that does not exist; ``create_store`` makes a bucket too.

    Raises:
        ConfigurationError: the store does not exist, or is no store.
        DeniedError: credentials are missing or refused.
        UsageError: the address is of another scheme.
    """
    backend = _open_backend(url, create)
    backend.check()
    return Store(backend)


def create_store(url: str) -> tuple[Store, bool]:
    """Make the directory or bucket of a store unless it is there, and open it; True when it was made.

    Raises:
        ConfigurationError: it cannot be made, or is something else than a store.
        DeniedError: it belongs to somebody else, or the credentials may not make it.
        UsageError: the address is of another scheme, or no name for a bucket.
    """
    backend = _open_backend(url, create=False)
    made = backend.make()
    backend.check()
    return Store(backend), made


def _open_backend(url: str, create: bool) -> Backend:
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "s3":
        from tunemill.store.s3 import open_bucket  # boto3 takes a third of a second to import

        return open_bucket(rest)
    if separator and scheme != "file":
        raise UsageError(f"'{url}' is no store: expected a directory, file:///path or s3://bucket/prefix")
    parts = urlsplit(url)
    path = Path(unquote(parts.path) if separator else url).expanduser()
    if not url or (separator and (parts.netloc or not path.is_absolute())):
        raise UsageError(f"'{url}' is no store: expected file:///absolute/path")
    return LocalBackend.create(path) if create else LocalBackend(path)


class Store:
    """One store. Methods may be called from several threads."""

    def __init__(self, backend: Backend, transfer: Transfer | None = None, cache: Path | None = None) -> None:
        """Wrap a backend; ``cache`` is where pulled blobs are kept, ``cache_directory()`` by default."""
        self.backend = backend
        self.url = backend.url
        self.transfer = transfer or Transfer()
        self._cache = cache

    def find(self, reference: str) -> Artifact | None:
        """Return the artifact of ``name`` (its newest), ``name:tag`` or ``name@sha256:<hex>``, or None.

        Raises:
            UsageError: the reference is malformed.
            BadDataError: the manifest is malformed, or breaks the rules for paths.
            IntegrityError: a reference names a manifest that is missing or damaged.
        """
        wanted = parse_reference(reference)
        if wanted.digest is not None:
            data = self._read_manifest(wanted.digest)
            artifact = to_artifact(parse_manifest(data, wanted.digest), wanted.digest) if data else None
            return artifact if artifact and artifact.name == wanted.name else None
        digest = self._digest(wanted)
        return self._artifact(wanted.name, digest) if digest else None

    def resolve(self, reference: str) -> Artifact:
        """Return the artifact of a reference.

        Raises:
            UsageError: there is none; the message names near ones.
        """
        artifact = self.find(reference)
        if artifact is None:
            raise UsageError(f"{self.url} has no '{reference}'{self._suggestion(reference)}")
        return artifact

    def manifest(self, artifact: Artifact) -> Manifest:
        """Return the parsed manifest of an artifact: its blobs with types and sizes.

        Raises:
            IntegrityError: it is missing or damaged.
        """
        return self._manifest(artifact.name, artifact.digest)

    def publish(self, draft: Draft, progress: Progress) -> Artifact:
        """Store a draft's files, create its tags, then make it the newest of its name.

        When a tag exists with the same content, the artifact found there is used instead.

        Raises:
            ConflictError: a tag exists with other content; the branch is left as it was.
            BadDataError: a path or file may not be stored.
        """
        package = prepare(draft, self.transfer, progress)
        held = self._held(package)
        if held is None:
            try:
                publish(self.backend, package, self.transfer, progress)
                return to_artifact(parse_manifest(package.manifest, package.digest), package.digest)
            except ConflictError:
                held = self._held(package)
                if held is None:
                    raise
        for tag in draft.tags:
            self._commit(held, tag)
        self.advance(held)
        return held

    def advance(self, artifact: Artifact) -> None:
        """Make an artifact the newest of its name; nothing happens when it is.

        Raises:
            ConflictError: other writers kept winning.
        """
        last = newest(self.backend, artifact.name)
        if last is None or last[1].digest != artifact.digest:
            with self._kept(artifact) as size:
                advance(self.backend, artifact.name, artifact.digest, size)

    def tag(self, reference: str, tag: str) -> None:
        """Give an artifact a further tag of its name, for ever.

        Raises:
            UsageError: the reference does not exist, or the tag is malformed.
            ConflictError: the tag exists with other content.
        """
        artifact = self.resolve(reference)
        with self._kept(artifact):
            self._commit(artifact, check_tag(tag))

    def pull(self, artifact: Artifact, destination: Path, progress: Progress) -> None:
        """Put an artifact's files, read-only, under ``destination``, which appears whole or not at all.

        Raises:
            UsageError: the destination exists.
            IntegrityError: bytes do not have their digest.
            TransientError: the disk is too small, or the network failed; a rerun goes on.
        """
        cache = self._cache or cache_directory()
        pull(self.backend, artifact.files, destination, cache, self.transfer, progress)

    def provenance(self, artifact: Artifact) -> Provenance:
        """Return how an artifact came to be.

        Raises:
            IntegrityError: the statement is missing, damaged or about other files.
            BadDataError: it is malformed.
        """
        manifest = self.manifest(artifact)
        data = self.backend.get(keys.blob(manifest.provenance.hex), LARGEST_STATEMENT)
        if data is None or f"sha256:{hashlib.sha256(data).hexdigest()}" != manifest.provenance.digest:
            raise IntegrityError(
                f"the provenance of {artifact.reference} is missing or damaged in {self.url}"
            )
        return parse_statement(data)

    def history(self, name: str) -> list[Revision]:
        """Return what a name has meant, the newest first; empty when it has no branch."""
        return list(revisions(self.backend, check_name(name)))

    def names(self) -> list[str]:
        """Return every name that has a branch or a tag, sorted."""
        return sorted(
            {
                f"{project}/{kind}"
                for top in (keys.BRANCHES, keys.TAGS)
                for project in self.backend.folders(top)
                for kind in self.backend.folders(f"{top}{project}/")
            }
        )

    def tags(self, name: str) -> list[str]:
        """Return the tags of a name, sorted."""
        prefix = f"{keys.TAGS}{check_name(name)}/"
        return [entry.key.removeprefix(prefix) for entry in self.backend.list(prefix)]

    def _digest(self, wanted: Wanted) -> str | None:
        if wanted.tag is not None:
            held = read_reference(self.backend, keys.tag(wanted.name, wanted.tag))
            return held.digest if held else None
        last = newest(self.backend, wanted.name)
        return last[1].digest if last else None

    def _read_manifest(self, digest: str) -> bytes | None:
        return self.backend.get(keys.manifest(digest.removeprefix("sha256:")), LARGEST_MANIFEST)

    def _need_manifest(self, name: str, digest: str) -> bytes:
        data = self._read_manifest(digest)
        if data is None:
            raise IntegrityError(f"{name} names manifest {digest[:19]}, which {self.url} does not have")
        return data

    def _manifest(self, name: str, digest: str) -> Manifest:
        return parse_manifest(self._need_manifest(name, digest), digest)

    def _artifact(self, name: str, digest: str) -> Artifact:
        artifact = to_artifact(self._manifest(name, digest), digest)
        if artifact.name != name:
            raise IntegrityError(f"{name} in {self.url} names a manifest of {artifact.name}")
        return artifact

    @contextmanager
    def _kept(self, artifact: Artifact) -> Iterator[int]:
        """Keep collection away from an artifact that nothing may name yet; yields its manifest's size.

        Raises:
            IntegrityError: it was collected just now.
        """
        own = artifact.digest.removeprefix("sha256:")
        digests = [own, *(blob.hex for blob in self.manifest(artifact).blobs)]
        lease = write_lease(self.backend, digests)
        try:
            wait_for_collections(self.backend, digests, Progress(quiet=True))
            yield len(self._need_manifest(artifact.name, artifact.digest))
        finally:
            drop_lease(self.backend, lease)

    def _held(self, package: Package) -> Artifact | None:
        """Return what a tag of the draft names already, when that has the same content."""
        digest = find_tagged(self.backend, package.draft)
        if digest is None:
            return None
        held = self._artifact(package.draft.name, digest)
        if held.content != package.content:
            raise ConflictError(
                f"a tag of {package.draft.name} ({', '.join(package.draft.tags)}) names {digest[:19]} "
                "already, with other content, and a tag never changes: use another tag"
            )
        return held

    def _commit(self, artifact: Artifact, tag: str) -> None:
        size = len(self._need_manifest(artifact.name, artifact.digest))
        try:
            commit_tag(self.backend, artifact.name, tag, artifact.digest, size)
        except ConflictError:
            held = self.find(f"{artifact.name}:{tag}")
            if held is None or held.content != artifact.content:
                raise

    def _suggestion(self, reference: str) -> str:
        """Name what exists and looks alike."""
        wanted = parse_reference(reference)
        names = self.names()
        if wanted.name in names and wanted.tag is not None:
            near = difflib.get_close_matches(wanted.tag, self.tags(wanted.name), n=3, cutoff=0.5)
            near = [f"{wanted.name}:{tag}" for tag in near] or [wanted.name]
        elif wanted.name in names:
            near = [wanted.name]
        else:
            near = difflib.get_close_matches(wanted.name, names, n=3, cutoff=0.5)
        if near:
            return f"; did you mean {' or '.join(near)}?"
        return "; 'tunemill store ls' lists what there is"
