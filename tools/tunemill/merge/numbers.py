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


def to_float32(stored: NDArray[Any], dtype: str) -> Floats:
    """Return stored numbers as float32, exactly."""
    if dtype == "BF16":
        wide = stored.astype("<u4")
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: Floats, dtype: str) -> NDArray[Any]:
    """Round float32 numbers to a stored type. ``values`` may be overwritten.

    Raises:
        BadDataError: a number is too large for the type.
    """
    if dtype == "BF16":
        return _to_bfloat16(values)
    try:
        with np.errstate(over="raise"):
            return values.astype(STORED[dtype])
    except FloatingPointError as error:
        raise BadDataError(f"a merged weight is too large for {dtype}") from error


def _to_bfloat16(values: Floats) -> NDArray[Any]:
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd  # a NaN that an add makes has its low bits clear, so this cannot wrap it round
    bits >>= 16
    return bits.astype("<u2")
