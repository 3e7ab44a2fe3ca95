"""Turns quantized tensors into numbers with ggml's own code; runs inside the child process."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.llama import ggml_base

CHUNK = 1 << 20  # numbers at once, a multiple of every type's block
F32 = 0


class Traits(ctypes.Structure):
    """The beginning of ``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def differences(_llama_cpp: Any, pairs: Sequence[Sequence[dict[str, Any]]]) -> list[float | None]:
    """Return the largest difference of each pair of tensors; None of types that hold no such numbers.

    A tensor is ``{"path", "start", "type", "numbers"}``; both of a pair have as many numbers.
    """
    base = ggml_base()
    base.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    return [_largest(base, *pair) for pair in pairs]


def _largest(base: ctypes.CDLL, one: dict[str, Any], other: dict[str, Any]) -> float | None:
    traits = [base.ggml_get_type_traits(tensor["type"]).contents for tensor in (one, other)]
    if any(not found.to_float and found.type_name != b"f32" for found in traits):
        return None
    largest = 0.0
    for first in range(0, one["numbers"], CHUNK):
        count = min(CHUNK, one["numbers"] - first)
        ours, theirs = (
            _numbers(found, tensor, first, count) for found, tensor in zip(traits, (one, other), strict=True)
        )
        largest = max(largest, float(np.abs(ours - theirs).max()))
    return largest


def _numbers(traits: Traits, tensor: dict[str, Any], first: int, count: int) -> npt.NDArray[np.float32]:
    size = count // traits.block * traits.block_bytes
    start = tensor["start"] + first // traits.block * traits.block_bytes
    data = np.fromfile(tensor["path"], np.uint8, size, offset=start)
    if tensor["type"] == F32:
        return data.view("<f4")
    made = np.empty(count, np.float32)
    traits.to_float(data.ctypes.data, made.ctypes.data, count)
    return made
