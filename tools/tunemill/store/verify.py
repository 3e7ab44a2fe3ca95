"""Verification: every byte of an artifact and of all it was made from is read and hashed again.

Names each broken link: which artifact, which of its files, and what is wrong with it. Nothing is changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tunemill.errors import BadDataError, IntegrityError
from tunemill.progress import Progress, Task
from tunemill.store import keys
from tunemill.store.backend import Backend
from tunemill.store.manifest import FILE_PATH, Descriptor, Manifest
from tunemill.store.store import Store

WORKERS = 4  # hashing one stream fills a core


@dataclass(frozen=True)
class Broken:
    """One link that does not hold."""

    artifact: str
    """``name@sha256:<hex>``."""
    part: str
    """Path of a file, or ``manifest``, ``configuration``, ``input <role>``."""
    problem: str


@dataclass(frozen=True)
class Verdict:
    """What a verification read and found."""

    artifacts: tuple[str, ...]
    """References, in the order they were read."""
    blobs: int
    size: int
    """Bytes that were read; blobs that artifacts share are read once."""
    broken: tuple[Broken, ...]


@dataclass(frozen=True)
class _Part:
    artifact: str
    path: str
    blob: Descriptor


def verify(store: Store, references: list[str], progress: Progress) -> Verdict:
    """Read and hash all of ``references`` and of their lineage.

    Raises:
        UsageError: a reference does not exist.
    """
    broken: list[Broken] = []
    manifests = dict(_walk(store, references, broken))
    parts = _parts(manifests)
    total = sum(part.blob.size for part in parts)
    with progress.task("verify", total, "B") as task, ThreadPoolExecutor(WORKERS, "verify") as pool:
        problems = list(pool.map(lambda part: _problem(store.backend, part.blob, task), parts))
    for part, problem in zip(parts, problems, strict=True):
        if problem:
            broken.append(Broken(part.artifact, part.path, problem))
    return Verdict(tuple(manifests), len(parts), total, tuple(broken))


def verify_names(store: Store) -> list[str]:
    """Return a reference for everything a store shows: all tags, and all steps of all branches."""
    found = []
    for name in store.names():
        found += [f"{name}@{revision.digest}" for revision in store.history(name)]
        found += [f"{name}:{tag}" for tag in store.tags(name)]
    return found


def refuse_broken(verdict: Verdict) -> None:
    """Pass a verdict without broken links.

    Raises:
        IntegrityError: naming the first of them.
    """
    if verdict.broken:
        first = verdict.broken[0]
        more = f" (and {len(verdict.broken) - 1} more)" if len(verdict.broken) > 1 else ""
        raise IntegrityError(f"{first.artifact}: {first.part} {first.problem}{more}")


def _walk(store: Store, references: list[str], broken: list[Broken]) -> Iterator[tuple[str, Manifest]]:
    """Yield every manifest of the lineage once, and note the links that lead nowhere."""
    waiting = [(reference, "", "") for reference in references]
    seen: set[str] = set()
    while waiting:
        wanted, maker, role = waiting.pop(0)
        try:
            artifact = store.find(wanted) if maker else store.resolve(wanted)
            if artifact is None:
                broken.append(Broken(maker, f"input {role}", f"is not in the store: {wanted}"))
                continue
            if artifact.reference in seen:
                continue
            seen.add(artifact.reference)
            yield artifact.reference, store.manifest(artifact)
        except BadDataError as error:  # IntegrityError is one too
            broken.append(Broken(wanted, "manifest", str(error)))
            continue
        try:
            inputs = store.provenance(artifact).inputs
        except BadDataError as error:
            broken.append(Broken(artifact.reference, "provenance", str(error)))
            continue
        waiting += [(value, artifact.reference, key) for key, value in sorted(inputs.items())]


def _parts(manifests: dict[str, Manifest]) -> list[_Part]:
    parts: dict[str, _Part] = {}
    for reference, manifest in manifests.items():
        for blob in manifest.blobs:
            path = blob.annotations.get(FILE_PATH, "configuration")
            parts.setdefault(blob.digest, _Part(reference, path, blob))
    return list(parts.values())


def _problem(backend: Backend, blob: Descriptor, task: Task) -> str:
    """Return what is wrong with a blob, or nothing."""
    entry = backend.head(keys.blob(blob.hex))
    if entry is None:
        return f"is missing: there is no blob {blob.digest}"
    if entry.size != blob.size:
        return f"has {entry.size} bytes instead of {blob.size}"
    whole = hashlib.sha256()
    for piece in backend.read(entry, 0, entry.size):
        whole.update(piece)
        task.advance(len(piece))
    if whole.hexdigest() != blob.hex:
        return f"has sha256 {whole.hexdigest()} instead of {blob.hex}"
    return ""
