"""Garbage collection: removes what nothing names any more, and never what a publish relies on.

Marked is whatever a tag, a step of a branch or a young lease names, every young manifest, and all that is
reached from there: manifests, their blobs, and the inputs their provenance names. A candidate is unmarked
and older than the grace period by the server's clock. ``plan`` only reads. ``sweep`` announces its
candidates, waits, marks again and deletes what is still unmarked (``lease.py`` tells why no publish can be
hurt). Killed at any moment it leaves nothing but candidates for the next run: references go before
manifests before blobs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from tunemill.errors import BadDataError, TransientError
from tunemill.progress import Progress
from tunemill.store import keys
from tunemill.store.backend import Backend, Entry, Unfinished
from tunemill.store.lease import COLLECTION_LIFE, LEASE_LIFE, announce, leases, withdraw
from tunemill.store.manifest import LARGEST_MANIFEST, parse_manifest
from tunemill.store.provenance import LARGEST_STATEMENT, parse_statement
from tunemill.store.reference import read_reference

GRACE = timedelta(days=7)
SETTLE_SECONDS = 2.0  # the protocol needs no wait on a store that doctor found fit; this is a margin
BATCH = 10_000  # digests announced at once; an announcement holds 15,000
WORKERS = 16
NAMELESS_GRACE = timedelta(hours=1)  # of files a directory store writes small objects by, for a moment each
DELETE_WITHIN = COLLECTION_LIFE / 2  # publishers trust the whole life, so a late request still fits in it


@dataclass(frozen=True)
class Plan:
    """What a collection would remove, or has removed."""

    superseded: tuple[Entry, ...]
    """Old steps of checkpoint branches; the newest step of a branch always stays."""
    objects: tuple[Entry, ...]
    """Attestations, manifests and blobs, in the order of their deletion."""
    uploads: tuple[Unfinished, ...]
    """Abandoned uploads."""
    leftovers: tuple[Entry, ...]
    """Leases, announcements and probes of processes that died."""

    @property
    def size(self) -> int:
        """Bytes of all objects; parts of abandoned uploads come on top."""
        return sum(entry.size for entry in self.objects)


@dataclass(frozen=True)
class Node:
    """What one manifest leads to."""

    kind: str
    blobs: frozenset[str]
    """Hex digests."""
    inputs: frozenset[str]
    """Hex digests of the manifests it was made from."""


class Graph:
    """The manifests of a store, each read once however often it is marked."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._nodes: dict[str, Node] = {}

    def node(self, digest: str) -> Node | None:
        """Return what the manifest with this hex digest leads to, or None when it is not there.

        Raises:
            BadDataError: it is damaged, or its provenance is.
        """
        if digest not in self._nodes:
            data = self._backend.get(keys.manifest(digest), LARGEST_MANIFEST)
            if data is None:
                return None
            self._nodes[digest] = self._read(data, digest)
        return self._nodes[digest]

    def reach(self, roots: Iterable[str]) -> set[str]:
        """Return the hex digests of every manifest and blob reached from manifests ``roots``.

        Inputs that are not in this store are passed over: there is nothing of theirs to protect.
        """
        reached: set[str] = set()
        frontier = set(roots)
        with ThreadPoolExecutor(WORKERS) as pool:
            while frontier:
                reached |= frontier
                found = [node for node in pool.map(self.node, sorted(frontier)) if node]
                reached |= {blob for node in found for blob in node.blobs}
                frontier = {digest for node in found for digest in node.inputs} - reached
        return reached

    def _read(self, data: bytes, digest: str) -> Node:
        manifest = parse_manifest(data, f"sha256:{digest}")
        statement = self._backend.get(keys.blob(manifest.provenance.hex), LARGEST_STATEMENT)
        if statement is None:
            raise _damaged(self._backend, f"the provenance of manifest {digest[:12]}")
        inputs = parse_statement(statement).inputs.values()
        return Node(
            manifest.annotations.kind,
            frozenset(blob.hex for blob in manifest.blobs),
            frozenset(reference.rpartition("@sha256:")[2] for reference in inputs),
        )


@dataclass(frozen=True)
class Named:
    """All references of a store."""

    roots: frozenset[str]
    """Hex digests of the manifests that stay."""
    superseded: tuple[Entry, ...]
    """Steps of checkpoint branches that may go."""


def plan(backend: Backend, grace: timedelta, progress: Progress) -> Plan:
    """Return what a collection would remove now; nothing is changed.

    Raises:
        BadDataError: a reference names a manifest that is missing or damaged; such a store is not
            collected, so that nothing that a repair needs is lost.
    """
    return _plan(backend, Graph(backend), grace, progress)


def sweep(
    backend: Backend, grace: timedelta, progress: Progress, settle_seconds: float = SETTLE_SECONDS
) -> Plan:
    """Remove what nothing names, and return what was removed.

    Raises:
        BadDataError: as for ``plan``.
        DeniedError: the credentials may not delete.
    """
    _check_right(backend)
    graph = Graph(backend)
    found = _plan(backend, graph, grace, progress)
    for entry in found.superseded:
        backend.delete(entry.key)
    removed: list[Entry] = []
    for start in range(0, len(found.objects), BATCH):
        batch = found.objects[start : start + BATCH]
        removed += _sweep_batch(backend, graph, batch, grace, settle_seconds)
    live = _leased(backend)
    uploads = tuple(upload for upload in found.uploads if _digest(upload.key) not in live)
    for upload in uploads:
        backend.abort(upload)
    for entry in found.leftovers:
        backend.delete(entry.key)
    return Plan(found.superseded, tuple(removed), uploads, found.leftovers)


def _plan(backend: Backend, graph: Graph, grace: timedelta, progress: Progress) -> Plan:
    now = backend.now()
    leased, named, marked = _mark(backend, graph, now - grace)
    objects: list[Entry] = []
    with progress.task("looking through the store", unit="objects") as task:
        for prefix in (keys.ATTESTATIONS, keys.MANIFESTS, keys.BLOBS):
            for entry in backend.list(prefix):
                task.advance()
                if now - entry.modified > grace and _digest(entry.key) not in marked:
                    objects.append(entry)
    uploads = tuple(
        upload
        for upload in backend.unfinished()
        if now - upload.started > _upload_grace(upload, grace) and _digest(upload.key) not in leased
    )
    return Plan(named.superseded, tuple(objects), uploads, tuple(_leftovers(backend, now, grace)))


def _upload_grace(upload: Unfinished, grace: timedelta) -> timedelta:
    """No lease names what has no key, so its age alone has to tell that its writer is gone."""
    return grace if upload.key else max(grace, NAMELESS_GRACE)


def _sweep_batch(
    backend: Backend, graph: Graph, batch: Sequence[Entry], grace: timedelta, settle_seconds: float
) -> list[Entry]:
    started = time.monotonic()  # before the announcement's own time, so it errs to the safe side
    collection = announce(backend, {_digest(entry.key) for entry in batch})
    try:
        time.sleep(settle_seconds)
        marked = _mark(backend, graph, backend.now() - grace)[2]
        doomed = [entry for entry in batch if _digest(entry.key) not in marked]
        _delete(backend, doomed, started + DELETE_WITHIN.total_seconds())
    finally:
        withdraw(backend, collection)  # or publishers of the same files would wait for an hour
    return doomed


def _delete(backend: Backend, doomed: Sequence[Entry], deadline: float) -> None:
    def delete(entry: Entry) -> None:
        if time.monotonic() > deadline:
            raise TransientError("collecting took too long and stopped before its end: run it again")
        backend.delete(entry.key)

    with ThreadPoolExecutor(WORKERS) as pool:
        for _, group in groupby(doomed, key=lambda entry: entry.key.partition("/")[0]):
            list(pool.map(delete, list(group)))  # one kind at a time keeps the order of deletion


def _check_right(backend: Backend) -> None:
    """Find out before anything is announced, since an announcement could not be withdrawn either."""
    backend.delete(f"{keys.PROBES}{uuid.uuid4().hex}/000000")


def _mark(backend: Backend, graph: Graph, before: datetime) -> tuple[set[str], Named, set[str]]:
    """Return the leased digests, the references, and all marked digests.

    Leases are read first: a publish creates its reference before it drops its lease, so one that
    ends in between is seen by its reference.
    """
    leased = _leased(backend)
    named = _references(backend, graph, before)
    # A manifest that stays for its youth keeps its blobs: found by its digest, it has to be whole.
    young = {_digest(entry.key) for entry in backend.list(keys.MANIFESTS) if entry.modified >= before}
    return leased, named, leased | graph.reach(named.roots | young)


def _leased(backend: Backend) -> set[str]:
    return {digest for lease in leases(backend) for digest in lease.digests}


def _references(backend: Backend, graph: Graph, before: datetime) -> Named:
    roots: set[str] = set()
    superseded: list[Entry] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        tags = list(backend.list(keys.TAGS))
        roots.update(_digests(backend, pool, tags))
        branches = groupby(backend.list(keys.BRANCHES), key=lambda entry: entry.key.rpartition("/")[0])
        for _, steps in branches:
            entries = list(steps)
            kept = _kept_steps(backend, graph, entries, before)
            roots.update(_digests(backend, pool, kept))
            superseded += [entry for entry in entries if entry not in kept]
    for digest in roots:
        if graph.node(digest) is None:
            raise _damaged(backend, f"manifest {digest[:12]}, which a reference names,")
    return Named(frozenset(roots), tuple(superseded))


def _kept_steps(backend: Backend, graph: Graph, entries: list[Entry], before: datetime) -> list[Entry]:
    """Return the steps of one branch that stay: all, but of checkpoints the newest and the young."""
    if len(entries) == 1:
        return entries
    newest = read_reference(backend, entries[0].key)
    node = graph.node(newest.digest.removeprefix("sha256:")) if newest else None
    if node is None or node.kind != "checkpoint":
        return entries
    return entries[:1] + [entry for entry in entries[1:] if entry.modified >= before]


def _digests(backend: Backend, pool: ThreadPoolExecutor, entries: list[Entry]) -> Iterator[str]:
    """Yield the manifests' hex digests; a reference that another collection just removed has none."""
    for reference in pool.map(lambda entry: read_reference(backend, entry.key), entries):
        if reference is not None:
            yield reference.digest.removeprefix("sha256:")


def _leftovers(backend: Backend, now: datetime, grace: timedelta) -> Iterator[Entry]:
    lives = {keys.LEASES: LEASE_LIFE, keys.COLLECTIONS: COLLECTION_LIFE, keys.PROBES: grace}
    for prefix, life in lives.items():
        for entry in backend.list(prefix):
            if now - entry.modified > life:
                yield entry


def _digest(key: str) -> str:
    """Return the hex digest that decides over a key: an attestation goes with its manifest."""
    if key.startswith(keys.ATTESTATIONS):
        return key.removeprefix(keys.ATTESTATIONS).partition("/")[0]
    return key.rpartition("/")[2]


def _damaged(backend: Backend, what: str) -> BadDataError:
    return BadDataError(
        f"{what} is missing in {backend.url}: nothing was deleted; 'tunemill store verify' names the damage"
    )
