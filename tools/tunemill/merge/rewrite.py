"""Writes one merged shard: changed rows are computed, all other bytes are copied by the kernel.

A shard is cut into independent pieces of a few megabytes that worker threads read, compute and
write at their own offsets; NumPy and the system calls release the interpreter lock. Memory is
bounded by ``BLOCK`` per worker plus one matrix's low-rank factors, whatever the model's size.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from math import prod
from pathlib import Path

import numpy as np

from tunemill.errors import BadDataError
from tunemill.files import disk_errors
from tunemill.merge.adapter import Change
from tunemill.merge.numbers import STORED, Floats, from_float32, to_float32
from tunemill.merge.plan import Place, Shard
from tunemill.weights import Tensor

BLOCK = 1 << 18  # numbers computed at once: their 1 MB of float32 stays in a core's cache
COPY = 32 << 20  # bytes copied at once: enough for the kernel, short enough to stop and to show
AHEAD = 8  # pieces queued per call of ``write_shard``, so that factors do not pile up in memory
NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""Some file systems, networks' above all, refuse to copy ranges; reading and writing always works."""

Piece = Callable[[], int]
"""Does one piece of the work and returns how many bytes it wrote."""


def write_shard(
    shard: Shard, adapter: Path, target: Path, pool: Executor, advance: Callable[[int], None]
) -> None:
    """Write one shard of the merged model to ``target``.

    Raises:
        BadDataError: the adapter holds numbers that are not finite, or too large for the base's type.
        TransientError: the disk is full.
    """
    with (
        disk_errors(target),
        shard.source.open("rb") as base,
        adapter.open("rb") as factors,
        target.open("xb") as output,
    ):
        files = Files(base.fileno(), factors.fileno(), output.fileno())
        os.ftruncate(files.output, shard.size)
        _write(files.output, shard.header, 0)
        advance(len(shard.header))
        _run(_pieces(shard, files), pool, advance)


class Files:
    """Open file descriptors: the base's shard, the adapter's tensors, the output."""

    def __init__(self, base: int, adapter: int, output: int) -> None:
        self.base = base
        self.adapter = adapter
        self.output = output


def _run(pieces: Iterator[Piece], pool: Executor, advance: Callable[[int], None]) -> None:
    running: set[Future[int]] = set()
    try:
        for piece in pieces:
            if len(running) >= AHEAD:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    advance(future.result())
            running.add(pool.submit(piece))
        for future in running:
            advance(future.result())
    finally:
        wait(running)  # the files are closed next: nobody may write to a reused descriptor


def _pieces(shard: Shard, files: Files) -> Iterator[Piece]:
    copied: list[tuple[int, int, int]] = []  # source offset, target offset, bytes; neighbours joined
    for place in shard.places:
        if place.change is not None:
            yield from _computed(place, place.change, files)
        elif copied and copied[-1][0] + copied[-1][2] == place.source.start:
            start, target, size = copied[-1]
            copied[-1] = (start, target, size + place.source.size)
        else:
            copied.append((place.source.start, place.start, place.source.size))
    for start, target, size in copied:
        for offset in range(0, size, COPY):
            yield _copy(files, start + offset, target + offset, min(COPY, size - offset))


def _copy(files: Files, start: int, target: int, size: int) -> Piece:
    def run() -> int:
        copy_range(files.base, files.output, start, target, size)
        return size

    return run


def copy_range(source: int, output: int, start: int, target: int, size: int) -> None:
    """Copy bytes between files without passing them through Python where the system can.

    Raises:
        BadDataError: the source is shorter than its header said.
    """
    done = 0
    while done < size:
        count = _copy_some(source, output, start + done, target + done, size - done)
        if not count:
            raise BadDataError("the base was cut short while it was read")
        done += count


def _copy_some(source: int, output: int, start: int, target: int, size: int) -> int:
    if sys.platform == "linux":
        try:
            return os.copy_file_range(source, output, size, start, target)
        except OSError as error:
            if error.errno not in NOT_IN_KERNEL:
                raise
    return _write(output, os.pread(source, min(size, 1 << 20), start), target)


def _computed(place: Place, change: Change, files: Files) -> Iterator[Piece]:
    rows = place.source.shape[0] if place.source.shape else 1
    columns = prod(place.source.shape[1:])
    left, right = _factors(change, files.adapter)
    step = max(1, BLOCK // max(1, columns))
    for row in range(0, rows, step):
        yield _block(place, change, files, (left, right), (row, min(rows, row + step), columns))


def _block(
    place: Place,
    change: Change,
    files: Files,
    factors: tuple[Floats | None, Floats | None],
    area: tuple[int, int, int],
) -> Piece:
    row, end, columns = area

    def run() -> int:
        descriptor, tensor = files.base, place.source
        if change.whole is not None:
            descriptor, tensor = files.adapter, change.whole
        values = _read(descriptor, tensor, row * columns, (end - row) * columns)
        left, right = factors
        if left is not None and right is not None:
            values = values.reshape(end - row, columns)
            values += left[row:end] @ right
        stored = from_float32(values, place.source.dtype)
        offset = place.start + row * columns * stored.itemsize
        return _write(files.output, stored.reshape(-1).view(np.uint8).data, offset)

    return run


def _factors(change: Change, adapter: int) -> tuple[Floats | None, Floats | None]:
    """Return (rows, r) and (r, columns), whose product is what the base's tensor gains."""
    if change.a is None or change.b is None:
        return None, None
    a, b = (_whole(adapter, tensor) for tensor in (change.a, change.b))
    b *= np.float32(change.scale)
    if change.transposed:
        return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    return b, a


def _whole(descriptor: int, tensor: Tensor) -> Floats:
    values = _read(descriptor, tensor, 0, prod(tensor.shape))
    if not np.isfinite(values).all():
        raise BadDataError(
            f"the adapter's {tensor.name} holds numbers that are not finite: training diverged"
        )
    return values.reshape(tensor.shape)


def _read(descriptor: int, tensor: Tensor, first: int, count: int) -> Floats:
    """Read ``count`` numbers of a tensor from its ``first`` on, as float32."""
    stored = STORED[tensor.dtype]
    wanted, offset = count * stored.itemsize, tensor.start + first * stored.itemsize
    data = os.pread(descriptor, wanted, offset)
    while len(data) < wanted:  # one read returns at most 2 GB
        more = os.pread(descriptor, wanted - len(data), offset + len(data))
        if not more:
            raise BadDataError(f"{tensor.name} was cut short while it was read")
        data += more
    return to_float32(np.frombuffer(data, stored), tensor.dtype)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done
