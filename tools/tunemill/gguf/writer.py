"""Writes small GGUF files: the self-check's model and importance matrices.

Models are converted by llama.cpp's own scripts; this is for what is made of arrays here.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunemill.files import atomic_write

Metadata = Mapping[str, bool | int | float | str | Sequence[str] | Sequence[float] | Sequence[int]]
KINDS = {"<f4": 0, "<f2": 1}


def write_gguf(path: Path, metadata: Metadata, tensors: Mapping[str, Any]) -> None:
    """Write a GGUF of version 3 with float16 and float32 arrays as F16 and F32."""
    arrays = {name: np.asarray(array, _stored(array)) for name, array in tensors.items()}
    with atomic_write(path) as target:
        target.write(b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(metadata)))
        for key, value in metadata.items():
            target.write(_text(key) + _value(value))
        offset = 0
        for name, array in arrays.items():
            kind = KINDS[array.dtype.str]
            shape = struct.pack(f"<I{array.ndim}Q", array.ndim, *reversed(array.shape))
            target.write(_text(name) + shape + struct.pack("<IQ", kind, offset))
            offset += array.nbytes + -array.nbytes % 32
        for array in arrays.values():
            target.write(b"\0" * (-target.tell() % 32) + array.tobytes())


def _stored(array: Any) -> str:
    return "<f2" if array.dtype == np.float16 else "<f4"


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Encode a value with its type: bool, uint32, float32, text, or an array of int32, float32 or text."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int | float):
        return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    code, kind = (5, "i") if isinstance(value[0], int) else (6, "f")
    return struct.pack(f"<IIQ{len(value)}{kind}", 9, code, len(value), *value)
