"""Publishing: from files on disk to an artifact under its tags and branch.

The order is the invariant: lease, blobs, manifest, references. Each step leaves a store in which nothing
half-done is visible, and a rerun after a kill sends again at most one part per worker. The bytes sent are
those that were hashed: every part is compared with the digest of the first reading.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tunemill.errors import BadDataError, ConflictError, IntegrityError, TransientError
from tunemill.files import CHUNK
from tunemill.progress import Progress, Task
from tunemill.store import keys
from tunemill.store.backend import Backend, Data, Transfer, Upload
from tunemill.store.lease import check_lease, drop_lease, wait_for_collections, write_lease
from tunemill.store.manifest import (
    LARGEST_FILE,
    Draft,
    File,
    build_config,
    build_manifest,
    check_draft,
    content_digest,
)
from tunemill.store.names import check_name, check_paths, check_tag
from tunemill.store.provenance import STATEMENT_PATH, encode_statement
from tunemill.store.reference import create_reference, ensure, new_reference, newest, read_reference

ADVANCES = 100  # races for the next number of a branch before giving up; each has one winner


@dataclass(frozen=True)
class Source:
    """A file to publish, as it was when it was hashed."""

    path: Path
    file: File
    parts: tuple[bytes, ...]
    """sha256 of each part."""


@dataclass(frozen=True)
class Package:
    """Everything that is about to be stored for one draft."""

    draft: Draft
    sources: tuple[Source, ...]
    statement: bytes
    config: bytes
    manifest: bytes

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the manifest."""
        return f"sha256:{_hex(self.manifest)}"

    @property
    def content(self) -> str:
        """The content digest of the files."""
        return content_digest(self.draft.kind, [source.file for source in self.sources])

    @property
    def digests(self) -> list[str]:
        """Hex digests of all that a publish relies on."""
        small = [_hex(self.statement), _hex(self.config), _hex(self.manifest)]
        return small + [source.file.digest for source in self.sources]


def prepare(draft: Draft, transfer: Transfer, progress: Progress) -> Package:
    """Check and hash a draft's files and build its statement, configuration and manifest.

    Raises:
        UsageError: the name or a tag is malformed.
        BadDataError: a path or file may not be stored, or there are none.
    """
    check_name(draft.name)  # before gigabytes are hashed
    for tag in draft.tags:
        check_tag(tag)
    sources = tuple(_hash_all(draft.directory, transfer, progress))
    files = [source.file for source in sources]
    check_draft(draft, files)
    statement = encode_statement(draft.provenance, [(file.path, file.digest) for file in files])
    described = File(STATEMENT_PATH, _hex(statement), len(statement))
    config = build_config(draft, files, described)
    return Package(draft, sources, statement, config, build_manifest(draft, files, described, config))


def upload_package(backend: Backend, package: Package, transfer: Transfer, progress: Progress) -> None:
    """Store every blob that is missing, then the manifest; nothing refers to them yet.

    Raises:
        BadDataError: a file changed since it was hashed.
    """
    ensure(backend, keys.blob(_hex(package.statement)), package.statement)
    ensure(backend, keys.blob(_hex(package.config)), package.config)
    distinct = {source.file.digest: source for source in package.sources}
    with ThreadPoolExecutor(transfer.workers, "publish") as workers:
        present = list(workers.map(lambda source: _is_there(backend, source.file), distinct.values()))
    missing = [source for source, there in zip(distinct.values(), present, strict=True) if not there]
    total = sum(source.file.size for source in missing)
    with progress.task(f"publish {package.draft.name}", total, "B") as task:
        _send_small([source for source in missing if len(source.parts) <= 1], backend, transfer, task)
        for source in missing:
            if len(source.parts) > 1:
                _send_large(source, backend, transfer, task)
    ensure(backend, keys.manifest(_hex(package.manifest)), package.manifest)


def publish(backend: Backend, package: Package, transfer: Transfer, progress: Progress) -> None:
    """Store a package under a lease; committing it is up to ``commit_tag`` and ``advance``."""
    lease = write_lease(backend, package.digests)
    try:
        wait_for_collections(backend, package.digests, progress)
        upload_package(backend, package, transfer, progress)
        check_lease(backend, lease)
        digest, size = package.digest, len(package.manifest)
        for tag in package.draft.tags:
            commit_tag(backend, package.draft.name, tag, digest, size)
        advance(backend, package.draft.name, digest, size)
    except ConflictError:
        drop_lease(backend, lease)
        raise
    # After any other failure the lease stays: it keeps what was sent for the rerun.
    drop_lease(backend, lease)


def commit_tag(backend: Backend, name: str, tag: str, digest: str, size: int) -> None:
    """Create a tag, or find that it names this manifest already.

    Raises:
        ConflictError: it names another one.
    """
    held = create_reference(backend, keys.tag(name, tag), new_reference(digest, size))
    if held.digest != digest:
        raise ConflictError(
            f"{name}:{tag} is {held.digest[:19]} already and a tag never changes: use another tag"
        )


def advance(backend: Backend, name: str, digest: str, size: int) -> None:
    """Make a manifest the newest of its branch; nothing happens when it is.

    Raises:
        ConflictError: other writers took a hundred numbers meanwhile.
    """
    for _ in range(ADVANCES):
        last = newest(backend, name)
        if last is not None and last[1].digest == digest:
            return
        sequence = last[0] + 1 if last else 1
        ours = new_reference(digest, size, sequence, last[1].digest if last else None)
        if create_reference(backend, keys.branch(name, sequence), ours) == ours:
            return
    raise ConflictError(f"other writers kept taking the next number of {name}: run it again")


def find_tagged(backend: Backend, draft: Draft) -> str | None:
    """Return the manifest digest that the first existing tag of a draft names, or None."""
    for tag in draft.tags:
        held = read_reference(backend, keys.tag(draft.name, tag))
        if held is not None:
            return held.digest
    return None


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    if not directory.is_dir():
        raise BadDataError(f"there is no directory {directory} to publish")
    for folder, folders, names in os.walk(directory):
        folders.sort()
        for name in [*names, *folders]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            relative = path.relative_to(directory).as_posix()
            if stat.S_ISREG(mode):
                yield relative, path
            elif not stat.S_ISDIR(mode):
                raise BadDataError(f"'{relative}' in {directory} is a link or no regular file: copy the file")


def _hash_all(directory: Path, transfer: Transfer, progress: Progress) -> Iterator[Source]:
    found = sorted(_walk(directory))
    check_paths([relative for relative, _ in found] + [STATEMENT_PATH])
    sizes = [_size(path) for _, path in found]
    with ThreadPoolExecutor(1, "hash") as second, progress.task("hash", sum(sizes), "B") as task:
        for (relative, path), size in zip(found, sizes, strict=True):
            yield _hash(relative, path, transfer.part_size(size), second, task)


def _size(path: Path) -> int:
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise BadDataError(f"{path} has {size} bytes, more than {LARGEST_FILE}: split it into shards")
    return size


def _hash(relative: str, path: Path, part_size: int, second: ThreadPoolExecutor, task: Task) -> Source:
    whole, parts, size = hashlib.sha256(), [], 0
    part, left = hashlib.sha256(), part_size
    with path.open("rb") as source:
        while data := source.read(min(CHUNK, left)):
            updated = second.submit(part.update, data)  # hashing frees the interpreter: two cores, two hashes
            whole.update(data)
            updated.result()
            size, left = size + len(data), left - len(data)
            task.advance(len(data))
            if left == 0:
                parts.append(part.digest())
                part, left = hashlib.sha256(), part_size
    if left < part_size:
        parts.append(part.digest())
    return Source(path, File(relative, whole.hexdigest(), size), tuple(parts))


def _is_there(backend: Backend, file: File) -> bool:
    entry = backend.head(keys.blob(file.digest))
    if entry is not None and entry.size != file.size:
        raise IntegrityError(
            f"blob {file.digest[:12]} in {backend.url} has {entry.size} bytes instead of {file.size}: "
            "the store is damaged, run 'tunemill store verify'"
        )
    return entry is not None


def _send_small(sources: Sequence[Source], backend: Backend, transfer: Transfer, task: Task) -> None:
    def send(source: Source) -> None:
        data = source.path.read_bytes()
        if _hex(data) != source.file.digest:
            raise _changed(source)
        ensure(backend, keys.blob(source.file.digest), data)
        task.advance(len(data))

    with ThreadPoolExecutor(transfer.workers, "publish") as workers:
        list(workers.map(send, sources))


def _send_large(source: Source, backend: Backend, transfer: Transfer, task: Task) -> None:
    size = source.file.size
    part_size = transfer.part_size(size)
    key = keys.blob(source.file.digest)
    # One buffer per worker: buffers of this size that come and go leave malloc holding several of each.
    kept = threading.local()
    with closing(backend.upload(key, size, part_size)) as upload:

        def send(number: int) -> None:
            if not hasattr(kept, "buffer"):
                kept.buffer = bytearray(part_size)
            data = _read_part(source.path, (number - 1) * part_size, kept.buffer)
            _send_part(upload, number, data, source)
            task.advance(len(data))

        workers = ThreadPoolExecutor(transfer.workers_for(size), "publish")
        try:
            list(workers.map(send, range(1, len(source.parts) + 1)))
        finally:
            workers.shutdown(cancel_futures=True)
        upload.complete()
    # Some servers ignore the condition on completing, and a reply may be lost: what is there counts.
    if not _is_there(backend, source.file):
        raise TransientError(f"{source.path} did not arrive in {backend.url}: run the same command again")


def _read_part(path: Path, offset: int, buffer: bytearray) -> Data:
    """Fill the buffer from a file and return it, or a shorter copy at the file's end."""
    with path.open("rb") as source:
        source.seek(offset)
        filled = source.readinto(buffer)
    return buffer if filled == len(buffer) else bytes(memoryview(buffer)[:filled])


def _send_part(upload: Upload, number: int, data: Data, source: Source) -> None:
    sha256 = source.parts[number - 1]
    if _digest(data) != sha256:
        raise _changed(source)
    if not upload.holds(number, data, sha256):
        upload.send(number, data, sha256)


def _changed(source: Source) -> BadDataError:
    return BadDataError(f"{source.path} changed while it was being published: publish it when it is finished")


def _digest(data: Data) -> bytes:
    return hashlib.sha256(data).digest()


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
