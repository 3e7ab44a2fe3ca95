"""Arithmetic on stored weights: float32 in between, rounded once to the type on disk.

NumPy knows no bfloat16, and torch would cost a second of start and a third of a gigabyte, so the
sixteen upper bits of a float32 are cut and rounded here. Round to nearest, ties to even, as IEEE
754 and torch do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunemill.errors import BadDataError

Floats = NDArray[np.float32]
STORED: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""NumPy's type for the stored bytes; a BF16 is seen as its sixteen bits."""


class Space:
    """Memory for one block of ``size`` numbers, used again for every block of a thread.

    New arrays for each block would be given back to the system and faulted in again each time, which
    costs more than the arithmetic.
    """

    def __init__(self, size: int) -> None:
        self.values: Floats = np.empty(size, np.float32)
        self.product: Floats = np.empty(size, np.float32)
        self._stored = np.empty(4 * size, np.uint8)

    def stored(self, dtype: str, count: int) -> NDArray[Any]:
        """Return room for ``count`` numbers as they are on disk."""
        kind = STORED[dtype]
        return self._stored[: count * kind.itemsize].view(kind)


def to_float32(stored: NDArray[Any], dtype: str, result: Floats) -> None:
    """Write stored numbers to ``result`` as float32, exactly."""
    if dtype != "BF16":
        np.copyto(result, stored)
        return
    bits = result.view(np.uint32)
    np.copyto(bits, stored)
    bits <<= 16


def from_float32(values: Floats, dtype: str, spare: Floats, result: NDArray[Any]) -> None:
    """Round float32 numbers to a stored type; ``values`` and ``spare``, of equal size, are overwritten.

    Raises:
        BadDataError: a number is too large for the type.
    """
    if dtype == "BF16":
        _to_bfloat16(values, spare, result)
        return
    try:
        with np.errstate(over="raise"):
            np.copyto(result, values, casting="same_kind")
    except FloatingPointError as error:
        raise BadDataError(f"a merged weight is too large for {dtype}") from error


def _to_bfloat16(values: Floats, spare: Floats, result: NDArray[Any]) -> None:
    bits, odd = values.view(np.uint32), spare.view(np.uint32)
    np.right_shift(bits, 16, out=odd)
    odd &= 1
    odd += 0x7FFF
    bits += odd  # a NaN that an add makes has its low bits clear, so this cannot wrap it round
    bits >>= 16
    np.copyto(result, bits, casting="unsafe")  # the upper half is zero now
