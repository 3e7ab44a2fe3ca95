"""Export: an artifact as an OCI image layout, for tools and registries that know nothing of this store.

Blobs are copied as they are, so digests stay the same and any OCI tool can push the folder on.
Format: OCI image layout 1.0.0 (``oci-layout``, ``index.json``, ``blobs/sha256``).
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunemill.errors import IntegrityError, UsageError
from tunemill.files import atomic_write, disk_errors, fsync_directory, need_space, write_json
from tunemill.progress import Progress, Task
from tunemill.store import keys
from tunemill.store.backend import Backend
from tunemill.store.manifest import ARTIFACT_TYPE, LARGEST_MANIFEST, MANIFEST_TYPE, Artifact, Descriptor
from tunemill.store.store import Store

LAYOUT_VERSION = "1.0.0"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
REFERENCE_NAME = "org.opencontainers.image.ref.name"


def export(store: Store, artifact: Artifact, tag: str, destination: Path, progress: Progress) -> None:
    """Write an artifact to ``destination``, a new folder that appears whole; ``tag`` names it inside.

    Raises:
        UsageError: the destination exists.
        IntegrityError: a blob is missing or has other bytes than its digest says.
        TransientError: the disk is too small.
    """
    if destination.exists() or destination.is_symlink():
        raise UsageError(f"{destination} exists already: remove it or export to another place")
    manifest = store.manifest(artifact)
    blobs = {blob.digest: blob for blob in manifest.blobs}
    total = sum(blob.size for blob in blobs.values())
    need_space(destination.absolute().parent, total)
    with _appearing(destination.absolute()) as folder, progress.task("export", total, "B") as task:
        for blob in blobs.values():
            _copy(store.backend, blob, folder / "blobs" / "sha256" / blob.hex, task)
        data = _manifest(store.backend, artifact)
        with atomic_write(folder / "blobs" / "sha256" / artifact.digest.removeprefix("sha256:")) as target:
            target.write(data)
        write_json(folder / "index.json", _index(artifact, len(data), tag))
        write_json(folder / "oci-layout", {"imageLayoutVersion": LAYOUT_VERSION})


@contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``destination`` when the block ends well."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        with disk_errors(destination):
            yield folder
        folder.chmod(0o755)
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    fsync_directory(destination.parent)


def _copy(backend: Backend, blob: Descriptor, path: Path, task: Task) -> None:
    entry = backend.head(keys.blob(blob.hex))
    if entry is None or entry.size != blob.size:
        raise _damaged(backend, blob)
    whole = hashlib.sha256()
    with atomic_write(path) as target:
        for piece in backend.read(entry, 0, entry.size):
            whole.update(piece)
            target.write(piece)
            task.advance(len(piece))
        if whole.hexdigest() != blob.hex:
            raise _damaged(backend, blob)


def _manifest(backend: Backend, artifact: Artifact) -> bytes:
    """Return a manifest's bytes; ``Store.manifest`` has just checked them against the digest."""
    data = backend.get(keys.manifest(artifact.digest.removeprefix("sha256:")), LARGEST_MANIFEST)
    if data is None or f"sha256:{hashlib.sha256(data).hexdigest()}" != artifact.digest:
        raise IntegrityError(f"manifest {artifact.digest} in {backend.url} changed while it was exported")
    return data


def _index(artifact: Artifact, size: int, tag: str) -> dict[str, Any]:
    descriptor = {
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "digest": artifact.digest,
        "size": size,
        "annotations": {REFERENCE_NAME: tag},
    }
    return {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [descriptor]}


def _damaged(backend: Backend, blob: Descriptor) -> IntegrityError:
    return IntegrityError(
        f"blob {blob.digest} in {backend.url} is missing or damaged: 'tunemill store verify' says where"
    )
