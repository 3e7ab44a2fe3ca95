"""One blob on its way into the cache: a sparse file, a record of finished ranges, and a lock.

A range is recorded after its bytes were written, so a killed pull goes on where it stopped; after a power
cut the record may promise more than the disk kept, which the hash of the whole finds out. The lock makes
a second process wait for the first instead of fetching the same blob twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tunemill.errors import TransientError
from tunemill.files import CHUNK, disk_errors, fsync_directory
from tunemill.progress import Task
from tunemill.store.backend import Backend, Entry
from tunemill.store.manifest import File

VERIFIED = 1_000_000_000  # seconds; a cached file with this time was hashed and not written to since
ATTEMPTS = 4  # requests for one range; each goes on where the last one broke off
PAUSE_SECONDS = 0.25  # before the second attempt, doubled for each further one


class Partial:
    """``<folder>/<hex>`` and its record ``<hex>.done``; made by ``open_partial``."""

    def __init__(self, path: Path, descriptor: int, file: File, part_size: int) -> None:
        self.path, self._descriptor, self._file, self._part_size = path, descriptor, file, part_size
        self._record = path.with_name(f"{path.name}.done")
        self._parts = -(-file.size // part_size)
        self._done = self._read_record()

    @property
    def resumed(self) -> bool:
        """Whether an earlier attempt left ranges that will not be fetched again."""
        return bool(self._done)

    def fill(self, backend: Backend, entry: Entry, workers: int, task: Task) -> str:
        """Fetch the ranges that are not there yet and return the hex sha256 of the whole file.

        Hashing follows the ranges in order while later ones travel.
        """
        whole = hashlib.sha256()
        pool = ThreadPoolExecutor(workers, "pull")
        try:
            fetched = [pool.submit(self._fetch, backend, entry, n, task) for n in range(self._parts)]
            for number, future in enumerate(fetched):
                future.result()
                self._hash(number, whole)
        finally:
            pool.shutdown(cancel_futures=True)
        return whole.hexdigest()

    def restart(self) -> None:
        """Forget every range."""
        self._record.unlink(missing_ok=True)
        os.ftruncate(self._descriptor, 0)
        self._done = set()

    def keep(self, target: Path) -> None:
        """Give the verified file its place in the cache, read-only and durable."""
        with disk_errors(self.path):
            os.fchmod(self._descriptor, 0o444)
            os.utime(self._descriptor, (VERIFIED, VERIFIED))
            os.fsync(self._descriptor)
            self.path.rename(target)
        fsync_directory(target.parent)
        self._record.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file and its record."""
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _range(self, number: int) -> tuple[int, int]:
        start = number * self._part_size
        return start, min(start + self._part_size, self._file.size)

    def _fetch(self, backend: Backend, entry: Entry, number: int, task: Task) -> None:
        offset, end = self._range(number)
        if number in self._done:
            task.advance(end - offset)
            return
        with disk_errors(self.path):
            for attempt in range(ATTEMPTS):
                try:
                    for piece in backend.read(entry, offset, end - offset):
                        _write(self._descriptor, piece, offset)
                        offset += len(piece)
                        task.advance(len(piece))
                    break
                except TransientError:
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(PAUSE_SECONDS * 2**attempt)
            with self._record.open("ab", buffering=0) as record:
                record.write(f"{self._part_size} {number}\n".encode())

    def _hash(self, number: int, whole: hashlib._Hash) -> None:
        offset, end = self._range(number)
        while offset < end:
            data = os.pread(self._descriptor, min(CHUNK, end - offset), offset)
            if not data:
                return  # shorter than its record says: the digest will differ
            whole.update(data)
            offset += len(data)

    def _read_record(self) -> set[int]:
        try:
            lines = self._record.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return set()
        size = str(self._part_size)
        words = [line.split() for line in lines if line.endswith("\n")]
        return {int(each[1]) for each in words if len(each) == 2 and each[0] == size and each[1].isdigit()}


@contextmanager
def open_partial(folder: Path, file: File, part_size: int) -> Iterator[Partial]:
    """Open or create a blob's partial file and hold its lock, waiting while another process has it."""
    path = folder / file.digest
    with disk_errors(path):
        descriptor = _locked(path)
    try:
        yield Partial(path, descriptor, file, part_size)
    finally:
        os.close(descriptor)


def discard_orphans(folder: Path) -> None:
    """Remove records whose file a pull moved into the cache just before it was killed."""
    for record in folder.glob("*.done"):
        if not record.with_suffix("").exists():
            record.unlink(missing_ok=True)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its last owner moved it into the cache while we waited
        os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
