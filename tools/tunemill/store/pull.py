"""Pulling: from a manifest to files at a destination that appears whole or not at all.

Blobs travel in ranges into ``<cache>/.partial``, are hashed whole, and only then enter the cache; the
destination is a folder of hard links to it, renamed into place. After a kill the next pull goes on with
the ranges that are complete. No byte reaches a destination unless its sha256 matched the manifest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tunemill.errors import ConfigurationError, ConflictError, DeniedError, IntegrityError, UsageError
from tunemill.files import CHUNK, disk_errors, fsync_directory, need_space, sha256_file
from tunemill.progress import Progress, Task
from tunemill.store import keys
from tunemill.store.backend import Backend, Transfer
from tunemill.store.manifest import File
from tunemill.store.names import check_paths
from tunemill.store.partial import VERIFIED, discard_orphans, open_partial

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def cache_directory() -> Path:
    """Return ``$TUNEMILL_CACHE``, else the platform's cache folder of this user.

    Raises:
        ConfigurationError: this user has no home directory, as any user of a container may.
    """
    given = os.environ.get("TUNEMILL_CACHE")
    if given:
        return Path(given).absolute()
    import platformdirs

    try:
        found = platformdirs.user_cache_path("tunemill")
    except RuntimeError:  # of newer releases; older ones return ~/.cache as it stands
        found = Path("~")
    if not found.is_absolute():
        raise ConfigurationError(
            f"user {os.getuid()} has no home directory for a cache: set TUNEMILL_CACHE to a writable folder"
        )
    return found


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn a cache that cannot be written into one clear error about ``folder``."""
    try:
        with disk_errors(folder):
            yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise ConfigurationError(
            f"{folder} cannot be written ({error.strerror}): set TUNEMILL_CACHE to a writable directory"
        ) from error


def pull(
    backend: Backend,
    files: Sequence[File],
    destination: Path,
    cache: Path,
    transfer: Transfer,
    progress: Progress,
) -> None:
    """Put ``files`` under ``destination``, read-only.

    Raises:
        UsageError: the destination exists.
        ConflictError: another pull into it is at work.
        IntegrityError: a blob is missing or has other bytes than the manifest says.
        TransientError: the disk is too small or the network failed.
    """
    check_paths(file.path for file in files)
    destination = destination.absolute()
    _refuse_existing(destination)
    if not _same_device(cache, destination):
        need_space(destination.parent, sum(file.size for file in files))
    fill_cache(backend, files, cache, transfer, progress)
    with _assembly(destination) as temporary:
        for file in files:
            _place(_cached(cache, file), temporary / file.path)
        for folder, _, _ in os.walk(temporary):
            fsync_directory(Path(folder))
        _refuse_existing(destination)
        temporary.rename(destination)
    fsync_directory(destination.parent)


def check_placed(files: Sequence[File], destination: Path, cache: Path, progress: Progress) -> None:
    """Read and hash what an earlier pull put at ``destination``; nothing there is changed.

    A file with other bytes may share them with the cache, whose copy is hashed before its next use.

    Raises:
        UsageError: it holds other files, or lacks some.
        IntegrityError: a file has other bytes.
    """
    remedy = f"remove {destination} to have it pulled anew, or pull to another place"
    wanted = {file.path: file for file in files}
    found = _found(destination)
    for path in sorted(found ^ wanted.keys()):
        state = "lacks" if path in wanted else "holds a foreign"
        raise UsageError(f"{destination} exists and {state} {path}: {remedy}")
    with progress.task("verify", sum(file.size for file in files), "B") as task:
        for path, file in wanted.items():
            if (destination / path).stat().st_size != file.size or sha256_file(
                destination / path
            ) != file.digest:
                _distrust(_cached(cache, file))
                raise IntegrityError(f"{destination / path} has other bytes than were published: {remedy}")
            task.advance(file.size)


def _found(destination: Path) -> set[str]:
    if not destination.is_dir():
        raise UsageError(f"{destination} is no directory: remove it or pull to another place")
    return {
        path.relative_to(destination).as_posix()
        for path in destination.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _distrust(cached: Path) -> None:
    with suppress(OSError):  # not cached, or of another user: then it is not shared either
        os.utime(cached)


def fill_cache(
    backend: Backend, files: Sequence[File], cache: Path, transfer: Transfer, progress: Progress
) -> None:
    """Bring files into the cache, verified, without placing them anywhere."""
    with cache_errors(cache):
        _fill(backend, {file.digest: file for file in files}.values(), cache, transfer, progress)


def _fill(
    backend: Backend, distinct: Iterable[File], cache: Path, transfer: Transfer, progress: Progress
) -> None:
    missing = [file for file in distinct if not _is_cached(cache, file)]
    total = sum(file.size for file in missing)
    need_space(cache, total - sum(_partial_size(cache, file) for file in missing))
    for folder in (cache / ".partial", cache / "blobs" / "sha256"):
        folder.mkdir(parents=True, exist_ok=True)
    discard_orphans(cache / ".partial")
    small = [file for file in missing if file.size <= transfer.part]
    with progress.task("pull", total, "B") as task:
        with ThreadPoolExecutor(transfer.workers, "pull") as workers:
            list(workers.map(lambda file: _download(backend, file, cache, transfer, task, 1), small))
        for file in missing:
            if file.size > transfer.part:
                _download(backend, file, cache, transfer, task, transfer.workers_for(file.size))


def _cached(cache: Path, file: File) -> Path:
    return cache / "blobs" / "sha256" / file.digest


def _is_cached(cache: Path, file: File) -> bool:
    """Say whether the cache holds the file's bytes; a file touched since it was hashed is hashed again."""
    path = _cached(cache, file)
    try:
        state = path.stat()
    except FileNotFoundError:
        return False
    if state.st_size == file.size:
        if state.st_mtime == VERIFIED:
            return True
        if sha256_file(path) == file.digest:
            os.utime(path, (VERIFIED, VERIFIED))
            return True
    path.unlink(missing_ok=True)
    return False


def _partial_size(cache: Path, file: File) -> int:
    try:
        return (cache / ".partial" / file.digest).stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _download(
    backend: Backend, file: File, cache: Path, transfer: Transfer, task: Task, workers: int
) -> None:
    """Bring one blob into the cache, going on with what an earlier attempt left."""
    entry = backend.head(keys.blob(file.digest))
    if entry is None or entry.size != file.size:
        what = "is missing" if entry is None else f"has {entry.size} bytes instead of {file.size}"
        raise IntegrityError(
            f"blob {file.digest[:12]} of '{file.path}' {what} in {backend.url}: run 'tunemill store verify'"
        )
    with open_partial(cache / ".partial", file, transfer.part_size(file.size)) as partial:
        if _is_cached(cache, file):
            partial.discard()  # another process was faster while we waited for the lock
            return
        resumed = partial.resumed
        whole = partial.fill(backend, entry, workers, task)
        if whole != file.digest and resumed:
            partial.restart()  # a power cut kept less of the earlier attempt than its record says
            whole = partial.fill(backend, entry, workers, task)
        if whole != file.digest:
            partial.discard()
            raise IntegrityError(
                f"blob {file.digest[:12]} of '{file.path}' in {backend.url} has other bytes than its digest "
                "says: the store is damaged, run 'tunemill store verify'"
            )
        partial.keep(_cached(cache, file))


@contextmanager
def _assembly(destination: Path) -> Iterator[Path]:
    """Yield an empty folder beside the destination, locked, and remove what is left of it at the end."""
    temporary = destination.parent / f".{destination.name}.partial"
    try:
        with disk_errors(destination):
            temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeniedError(
            f"{destination} cannot be made ({error.strerror}): pull to another place"
        ) from error
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(f"another process is pulling into {destination}: wait for it") from error
        try:
            for left in os.scandir(temporary):  # of a pull that was killed
                shutil.rmtree(left.path) if left.is_dir(follow_symlinks=False) else Path(left).unlink()
            with disk_errors(destination):
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(descriptor)


def _place(cached: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(cached, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
            raise
        with disk_errors(target), cached.open("rb") as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy, CHUNK)
            os.fchmod(copy.fileno(), 0o444)
            os.fsync(copy.fileno())


def _same_device(cache: Path, destination: Path) -> bool:
    return _device(destination.parent) == _device(cache)


def _device(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def _refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise UsageError(f"{destination} exists already: remove it or pull to another place")
