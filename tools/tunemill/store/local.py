"""The directory backend: keys are files below one root.

A new object is written to ``.tmp``, flushed, and given its name by ``link``, which fails when the name
exists: that is the create-only operation, atomic on every local and NFS file system with hard links.
A kill at any moment leaves at most a file in ``.tmp``, which nothing lists and collection removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

from tunemill.errors import ConfigurationError, DeniedError, IntegrityError, TransientError
from tunemill.files import fsync_directory
from tunemill.store.backend import LARGEST_SMALL_OBJECT, Backend, Data, Entry, Unfinished, Upload

PIECE = 1 << 20  # bytes read at once
TEMPORARY = ".tmp"
TOP_LEVEL = {"blobs", "manifests", "attestations", "tags", "branches", "leases", "collections", "probes"}

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_SPACE:
            raise TransientError(f"no space left for {path}: free some space and run it again") from error
        if error.errno in _NO_RIGHT:
            raise DeniedError(f"the store does not let this user write or read {path}: {reason}") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise ConfigurationError(f"the store lost {path} while it was in use: {reason}") from error
        raise TransientError(f"the store failed at {path}: {reason}") from error


class LocalBackend(Backend):
    """A store in the directory ``root``, which has to exist."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = self.root.as_uri()
        self._temporary = self.root / TEMPORARY

    @classmethod
    def create(cls, root: Path) -> LocalBackend:
        """Make the directory of a new store, or open one that exists.

        Raises:
            DeniedError: it may not be made there.
        """
        backend = cls(root)
        backend.make()
        return backend

    def make(self) -> bool:
        """See the base class.

        Raises:
            ConfigurationError: a file has the name.
        """
        if self.root.is_dir():
            return False
        try:
            with _errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
        except (ConfigurationError, TransientError) as error:
            if isinstance(error.__cause__, FileExistsError | NotADirectoryError):
                raise ConfigurationError(
                    f"{self.root} cannot be a store: there is a file of that name; give another --store"
                ) from error
            raise
        return True

    def check(self) -> None:
        """See the base class; any other directory than an empty one or a store is refused."""
        if not self.root.is_dir():
            raise ConfigurationError(
                f"there is no store at {self.root}: give another --store, or make it with "
                "'tunemill store create'"
            )
        with _errors(self.root):
            names = {entry.name for entry in os.scandir(self.root) if not entry.name.startswith(".")}
        strange = names - TOP_LEVEL - {"lost+found"}
        if strange:
            raise ConfigurationError(f"{self.root} is no store: it holds '{min(strange)}'")

    def now(self) -> datetime:
        """See the base class; the clock is that of the file system, which may be another host's."""
        probe = self._new_temporary("clock-")
        with _errors(probe):
            descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                return _time(os.fstat(descriptor))
            finally:
                os.close(descriptor)
                probe.unlink()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See the base class."""
        path = self._path(key)
        temporary = self._new_temporary("put-")
        try:
            with _errors(path):
                descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444)
                with os.fdopen(descriptor, "wb") as target:
                    target.write(data)
                    target.flush()
                    os.fsync(target.fileno())
            return self._name(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, key: str, limit: int = LARGEST_SMALL_OBJECT) -> bytes | None:
        """See the base class."""
        path = self._path(key)
        try:
            with _errors(path), path.open("rb") as source:
                data = source.read(limit + 1)
        except ConfigurationError:
            return None
        if len(data) > limit:
            raise IntegrityError(f"{path} is larger than the {limit} bytes allowed for it")
        return data

    def head(self, key: str) -> Entry | None:
        """See the base class."""
        try:
            return _entry(key, self._path(key).stat())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, entry: Entry, offset: int, length: int) -> Iterator[bytes]:
        """See the base class."""
        path = self._path(entry.key)
        with _errors(path), path.open("rb") as source:
            if _entry(entry.key, os.fstat(source.fileno())).etag != entry.etag:
                raise TransientError(f"{path} was replaced while it was read: run it again")
            source.seek(offset)
            while length > 0:
                piece = source.read(min(PIECE, length))
                if not piece:
                    raise TransientError(f"{path} ended {length} bytes early: run it again")
                length -= len(piece)
                yield piece

    def list(self, prefix: str) -> Iterator[Entry]:
        """See the base class."""
        for name, is_folder in self._children(prefix):
            if is_folder:
                yield from self.list(f"{prefix}{name}/")
            elif (entry := self.head(prefix + name)) is not None:
                yield entry

    def folders(self, prefix: str) -> Iterator[str]:
        """See the base class."""
        for name, is_folder in self._children(prefix):
            if is_folder and next(self.list(f"{prefix}{name}/"), None) is not None:
                yield name

    def delete(self, key: str) -> None:
        """See the base class; folders stay, since removing one could race with a writer."""
        path = self._path(key)
        with _errors(path):
            path.unlink(missing_ok=True)

    def upload(self, key: str, size: int, part_size: int) -> LocalUpload:
        """See the base class."""
        for name in self._temporaries(_upload_prefix(key)):
            upload = LocalUpload.adopt(self, key, self._temporary / name, size, part_size)
            if upload is not None:
                return upload
        return LocalUpload.begin(self, key, self._new_temporary(_upload_prefix(key)), size, part_size)

    def unfinished(self) -> Iterator[Unfinished]:
        """See the base class; small files that a kill left in ``.tmp`` are reported too, with no key."""
        for name in self._temporaries(""):
            try:
                started = _time((self._temporary / name).stat())
            except FileNotFoundError:
                continue
            kind, _, rest = name.partition("-")
            key = unquote(rest.rpartition("-")[0]) if kind == "upload" else ""
            yield Unfinished(key, name, started)

    def abort(self, upload: Unfinished) -> None:
        """See the base class."""
        path = self._temporary / upload.identifier
        with _errors(path):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / key

    def _new_temporary(self, prefix: str) -> Path:
        with _errors(self._temporary):
            if not self.root.is_dir():
                raise ConfigurationError(f"there is no store at {self.root} any more")
            self._temporary.mkdir(exist_ok=True)
        return self._temporary / f"{prefix}{uuid.uuid4().hex}"

    def _temporaries(self, prefix: str) -> Sequence[str]:
        if not self._temporary.is_dir():
            return []
        return sorted(name for name in os.listdir(self._temporary) if name.startswith(prefix))

    def _children(self, prefix: str) -> Sequence[tuple[str, bool]]:
        # A folder sorts as "name/", so that the order is that of whole keys: a-b/x before a/x.
        try:
            with os.scandir(self._path(prefix)) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=lambda child: child[0] + ("/" if child[1] else ""))

    def _name(self, temporary: Path, path: Path) -> bool:
        """Give a finished file its name unless that is taken; True when it was free."""
        with _errors(path):
            self._make_folder(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in _NO_LINKS and os.access(path.parent, os.W_OK):
                    raise ConfigurationError(
                        f"the file system of {self.root} has no hard links, which the store needs: "
                        "use another directory or s3://"
                    ) from error
                raise
            fsync_directory(path.parent)
        return True

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder != self.root:
            self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_directory(folder.parent)


class LocalUpload(Upload):
    """A file in ``.tmp`` that is filled part by part; its lock says that a process is at work on it."""

    def __init__(
        self, backend: LocalBackend, key: str, path: Path, descriptor: int, size: int, part_size: int
    ) -> None:
        self._backend, self._key, self._path = backend, key, path
        self._descriptor, self._size, self._part_size = descriptor, size, part_size
        self._done: set[int] = set()

    @classmethod
    def begin(cls, backend: LocalBackend, key: str, path: Path, size: int, part_size: int) -> LocalUpload:
        """Start an empty upload."""
        with _errors(path):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(backend, key, path, descriptor, size, part_size)

    @classmethod
    def adopt(
        cls, backend: LocalBackend, key: str, path: Path, size: int, part_size: int
    ) -> LocalUpload | None:
        """Take over a killed upload, or return None when its process lives or it has just ended."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = os.fstat(descriptor)
        except OSError:
            os.close(descriptor)
            return None
        # More than one link: its process was killed between giving it its name and removing it here, so
        # these bytes are an object by now and may never be written again.
        if state.st_nlink != 1:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        return cls(backend, key, path, descriptor, size, part_size)

    def holds(self, number: int, data: Data, sha256: bytes) -> bool:
        """See the base class; the part is read back, so no record of it can be wrong."""
        offset = (number - 1) * self._part_size
        with _errors(self._path):
            if os.fstat(self._descriptor).st_size < offset + len(data):
                return False
            found = hashlib.sha256()
            for start in range(offset, offset + len(data), PIECE):
                length = min(PIECE, offset + len(data) - start)
                found.update(os.pread(self._descriptor, length, start))
        if found.digest() != sha256:
            return False
        self._done.add(number)
        return True

    def send(self, number: int, data: Data, sha256: bytes) -> None:
        """See the base class."""
        if hashlib.sha256(data).digest() != sha256:
            raise IntegrityError(f"part {number} of {self._key} has another sha256 than was announced")
        view, offset = memoryview(data), (number - 1) * self._part_size
        with _errors(self._path):
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        self._done.add(number)

    def complete(self) -> bool:
        """See the base class."""
        expected = -(-self._size // self._part_size)
        if self._done != set(range(1, expected + 1)):
            raise TransientError(f"{expected - len(self._done)} parts of {self._key} never arrived")
        with _errors(self._path):
            os.ftruncate(self._descriptor, self._size)
            os.fchmod(self._descriptor, 0o444)
            os.fsync(self._descriptor)
        created = self._backend._name(self._path, self._backend._path(self._key))
        self._path.unlink(missing_ok=True)
        self.close()
        return created

    def close(self) -> None:
        """See the base class."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _upload_prefix(key: str) -> str:
    return f"upload-{quote(key, safe='')}-"


def _entry(key: str, state: os.stat_result) -> Entry:
    etag = f"{state.st_ino:x}-{state.st_size:x}-{state.st_mtime_ns:x}"
    return Entry(key, state.st_size, _time(state), etag)


def _time(state: os.stat_result) -> datetime:
    return datetime.fromtimestamp(state.st_mtime, UTC)
