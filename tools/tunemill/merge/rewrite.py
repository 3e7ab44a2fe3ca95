"""Writes one merged shard: changed rows are computed, all other bytes are copied by the kernel.

Worker threads read and compute blocks of rows ahead; one thread writes, in the file's order. Two that
write into one file wait for each other in the kernel and undo its read-ahead and delayed allocation:
measured on ext4, twice the time. Memory is bounded by ``AHEAD`` blocks plus one matrix's low-rank
factors, whatever the model's size.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunemill.errors import BadDataError
from tunemill.files import disk_errors
from tunemill.merge.change import Change
from tunemill.merge.combine import Combination
from tunemill.merge.four_bit import BLOCK as FOUR_BIT_BLOCK
from tunemill.merge.gain import Gain, read_gain
from tunemill.merge.numbers import Floats, Space, from_float32
from tunemill.merge.plan import Place, Shard
from tunemill.merge.source import Adapters, read_some

BLOCK = 1 << 16  # numbers computed at once: 0.7 MB with all that is made of them stays near a core, and
# writes of 128 kB take a third of the system's time that those of 512 kB do (ext4, full page cache)
COPY = 32 << 20  # bytes copied at once: enough for the kernel, short enough to stop and to show
AHEAD = 6  # blocks computed before they are written: more would leave the cache before they are
NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""Some file systems, networks' above all, refuse to copy ranges; reading and writing always works."""


@dataclass(frozen=True)
class Files:
    """What is open: the base's shard, the adapters' tensors, the output."""

    base: int
    adapters: Adapters
    output: int
    combination: Combination | None
    """How several adapters are made one."""


@dataclass(frozen=True)
class Copy:
    """Bytes that stay as they are."""

    start: int
    target: int
    size: int


@dataclass(frozen=True)
class Block:
    """Some rows of a changed tensor."""

    place: Place
    change: Change
    gain: Gain
    """Of the whole tensor."""
    scales: tuple[Floats, Floats] | None
    """Of the whole tensor's blocks of 4 bits, where training held it so."""
    row: int
    end: int
    columns: int


@dataclass(frozen=True)
class Computed:
    """A block as it is to be stored, in memory that is used again once it is written."""

    block: Block
    stored: NDArray[Any]
    space: Space


def write_shard(
    shard: Shard,
    adapters: Iterable[Path],
    target: Path,
    pool: Executor,
    advance: Callable[[int], None],
    combination: Combination | None = None,
) -> None:
    """Write one shard of the merged model to ``target``.

    Raises:
        BadDataError: the adapter holds numbers that are not finite, or too large for the base's type.
        TransientError: the disk is full.
    """
    with ExitStack() as stack:
        stack.enter_context(disk_errors(target))
        opened = {path: stack.enter_context(path.open("rb")) for path in adapters}
        base = stack.enter_context(shard.source.open("rb"))
        output = stack.enter_context(target.open("xb"))
        factors = Adapters({path: file.fileno() for path, file in opened.items()})
        files = Files(base.fileno(), factors, output.fileno(), combination)
        _reserve(files.output, shard.size)
        advance(_write(files.output, shard.header, 0))
        _run(_steps(shard, files), files, pool, advance)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and its blocks where the system can: then ext4 writes in a third of the time.

    Called through ctypes because ``os.posix_fallocate`` writes every block where a file system, such
    as a network's, cannot reserve.
    """
    if sys.platform == "linux":
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        failed = fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))
        if failed and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.ftruncate(descriptor, size)


def _run(steps: Iterator[Copy | Block], files: Files, pool: Executor, advance: Callable[[int], None]) -> None:
    begun: deque[Copy | Future[Computed]] = deque()
    free: LifoQueue[Space] = LifoQueue()  # the last written is still in the cache
    try:
        for step in steps:
            begun.append(step if isinstance(step, Copy) else pool.submit(_compute, step, files, free))
            while sum(isinstance(entry, Future) for entry in begun) > AHEAD:
                advance(_finish(begun.popleft(), files, free))
        while begun:
            advance(_finish(begun.popleft(), files, free))
    finally:
        # The files are closed next: nobody may read from a reused descriptor.
        wait([future for future in begun if isinstance(future, Future)])


def _finish(step: Copy | Future[Computed], files: Files, free: LifoQueue[Space]) -> int:
    """Write the next bytes of the file and return how many they were."""
    if isinstance(step, Copy):
        copy_range(files.base, files.output, step.start, step.target, step.size)
        return step.size
    computed = step.result()
    block, stored = computed.block, computed.stored
    offset = block.place.start + block.row * block.columns * stored.itemsize
    written = _write(files.output, stored.view(np.uint8).data, offset)
    free.put(computed.space)
    return written


def _steps(shard: Shard, files: Files) -> Iterator[Copy | Block]:
    """Yield what to do in the order of the output's bytes."""
    start = target = size = 0  # of neighbouring tensors that are copied together
    for place in shard.places:
        if place.change is None and start + size == place.source.start:
            size += place.source.size
            continue
        yield from _copies(start, target, size)
        start, target, size = place.source.start, place.start, place.source.size
        if place.change is not None:
            yield from _blocks(place, place.change, files)
            start, target, size = start + size, target + place.size, 0
    yield from _copies(start, target, size)


def _copies(start: int, target: int, size: int) -> Iterator[Copy]:
    for offset in range(0, size, COPY):
        yield Copy(start + offset, target + offset, min(COPY, size - offset))


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


def _blocks(place: Place, change: Change, files: Files) -> Iterator[Block]:
    rows = place.shape[0] if place.shape else 1
    columns = prod(place.shape[1:])
    scales = place.four_bit.scales(files.base, place.source) if place.four_bit else None

    def before() -> Iterator[tuple[int, Floats]]:
        for row, end in _ranges(rows, columns):
            block = Block(place, change, Gain(), scales, row, end, columns)
            yield row, _read(block, files, Space((end - row) * columns)).reshape(-1, columns)

    gain = read_gain(change, rows, files.adapters, files.combination, before)
    for row, end in _ranges(rows, columns):
        yield Block(place, change, gain, scales, row, end, columns)


def _ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(1, columns))
    if columns % FOUR_BIT_BLOCK:
        step += -step % FOUR_BIT_BLOCK  # so that no block of 4 bits is cut
    for row in range(0, rows, step):
        yield row, min(rows, row + step)


def _compute(block: Block, files: Files, free: LifoQueue[Space]) -> Computed:
    shape = (block.end - block.row, block.columns)
    space = _space(prod(shape), free)
    values = _read(block, files, space)
    product = space.product[: values.size]
    block.gain.apply(values.reshape(shape), product.reshape(shape), block.row)
    dtype = block.place.source.dtype
    stored = space.stored(dtype, values.size)
    from_float32(values, dtype, product, stored)
    return Computed(block, stored, space)


def _read(block: Block, files: Files, space: Space) -> Floats:
    """Read a block's numbers before the change, into ``space``."""
    place, whole = block.place, block.change.whole
    descriptor, tensor = files.base, place.source
    if whole is not None:
        descriptor, tensor = files.adapters.descriptor(whole.path), whole.tensor
    first, count = block.row * block.columns, (block.end - block.row) * block.columns
    values = space.values[:count]
    read_some(descriptor, tensor, first, space.stored(tensor.dtype, count), values)
    if place.four_bit and block.scales:
        place.four_bit.apply(values, first, block.scales, space)
    return values


def _space(count: int, free: LifoQueue[Space]) -> Space:
    """Take memory for ``count`` numbers, used before where there is some."""
    with suppress(Empty):
        space = free.get_nowait()
        if space.values.size >= count:
            return space
    return Space(max(count, BLOCK))


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done
