"""Reads numbers of tensors as float32, through memory that the caller brings or new."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunemill.errors import BadDataError
from tunemill.merge.change import Stored
from tunemill.merge.numbers import STORED, Floats, to_float32
from tunemill.weights import Tensor


class Adapters:
    """The adapters' files, open for reading.

    The factor read last is kept: a mixture's experts stack theirs in one tensor and read it in turn.
    """

    KEPT = 8

    def __init__(self, descriptors: Mapping[Path, int]) -> None:
        self._descriptors = descriptors
        self._kept: dict[Stored, Floats] = {}

    def descriptor(self, path: Path) -> int:
        """Return the open file."""
        return self._descriptors[path]

    def whole(self, stored: Stored, keep: bool = False) -> Floats:
        """Return all numbers of a tensor, which nobody may change where they are to be kept.

        Raises:
            BadDataError: one is not finite, or the file was cut short.
        """
        if stored in self._kept:
            return self._kept[stored]
        values = read_whole(self.descriptor(stored.path), stored.tensor)
        if not np.isfinite(values).all():
            raise BadDataError(
                f"the adapter's {stored.tensor.name} holds numbers that are not finite: training diverged"
            )
        if keep:
            while len(self._kept) >= self.KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[stored] = values
        return values


def read_whole(descriptor: int, tensor: Tensor) -> Floats:
    """Return all numbers of a tensor in its shape."""
    count = prod(tensor.shape)
    values = np.empty(count, np.float32)
    read_some(descriptor, tensor, 0, np.empty(count, STORED[tensor.dtype]), values)
    return values.reshape(tensor.shape)


def read_some(descriptor: int, tensor: Tensor, first: int, stored: NDArray[Any], values: Floats) -> None:
    """Read numbers of a tensor from its ``first`` on, through ``stored``, as float32."""
    read_bytes(descriptor, tensor, tensor.start + first * stored.itemsize, stored.view(np.uint8).data)
    to_float32(stored, tensor.dtype, values)


def read_bytes(descriptor: int, tensor: Tensor, offset: int, room: memoryview) -> None:
    """Fill ``room`` with a file's bytes from ``offset`` on."""
    done = 0
    while done < len(room):  # one read returns at most 2 GB
        count = os.preadv(descriptor, [room[done:]], offset + done)
        if not count:
            raise BadDataError(f"{tensor.name} was cut short while it was read")
        done += count
