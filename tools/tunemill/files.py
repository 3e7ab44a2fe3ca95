"""Writing and hashing local files so that a kill at any moment leaves no half-written one.

Every file Tunemill makes visible goes through ``atomic_write``: write
beside the destination, fsync, rename, fsync the directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tunemill.errors import BadDataError, TransientError

CHUNK = 1 << 20  # bytes read at once while hashing; larger gains nothing measurable
MAX_JSON = 16 << 20  # bytes; in memory JSON can be 20 times as large
MAX_TOKENIZER = 48 << 20  # bytes; tokenizers in use have up to 34 MB


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, reading ``CHUNK`` bytes at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    """Flush a directory entry, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at ``path`` whole when the block ends, or not at all.

    Raises:
        TransientError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with disk_errors(path), os.fdopen(descriptor, "wb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes 0600; artifacts are for the group to read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as target:
        target.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys and a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_object(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object of at most ``limit`` bytes from a file that may hold anything.

    Raises:
        BadDataError: it is missing, too large, malformed, or no object.
    """
    try:
        with path.open("rb") as source:
            text = source.read(limit + 1)
        value = json.loads(text) if len(text) <= limit else None
    except (OSError, ValueError, RecursionError) as error:
        raise BadDataError(f"{path} cannot be read: {str(error)[:200]}") from error
    if len(text) > limit:
        raise BadDataError(f"{path} is larger than {limit >> 20} MiB: it is no model's")
    if not isinstance(value, dict):
        raise BadDataError(f"{path} holds no JSON object")
    return value


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or quota into one clear error about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TransientError(
                f"no space left for {path}: free some space and run the same command again"
            ) from error
        raise


def need_space(directory: Path, size: int) -> None:
    """Check before long work that ``size`` bytes fit under ``directory``.

    Raises:
        TransientError: fewer bytes are free.
    """
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise TransientError(
            f"{directory} needs {size / 1e9:.1f} GB and has {free / 1e9:.1f} GB free: "
            "free some space and run the same command again"
        )
