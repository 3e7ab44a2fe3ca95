"""Reads a GGUF header without trusting it, and proves that the file is whole.

llama.cpp's own reader trusts lengths up to a gigabyte. This one bounds every count and length before
it allocates, computes where each tensor must lie, and accepts only a file that ends there. It keeps
short values and skips long arrays (a vocabulary is only walked over).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from tunemill.errors import BadDataError
from tunemill.gguf.types import BLOCKS, file_type_name

MAX_TENSORS = 1 << 17  # the largest mixture-of-experts models have a few thousand
MAX_KEYS = 1 << 14
MAX_NAME = 64  # GGML_MAX_NAME, its final zero byte included
MAX_KEY = 1 << 10
MAX_STRING = 1 << 22  # the longest legitimate value is a chat template of some 10 kB
MAX_ARRAY = 1 << 22  # a vocabulary has up to 300,000 entries, its merges about as many
MAX_ELEMENTS = 1 << 23  # over all arrays; walking them takes about 2 s
MAX_DIMENSIONS = 4
KEPT = 64  # array entries kept; longer arrays are reported by their length
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Long:
    """An array that was walked over but not kept."""

    length: int


Value = Scalar | tuple[Scalar, ...] | Long


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's description."""

    name: str
    type: str
    shape: tuple[int, ...]
    """llama.cpp's order: the first is the length of a row."""
    start: int
    """Offset of its first byte from the beginning of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF says it holds; proved to fit the file's size."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]
    size: int
    """Bytes of the whole file."""
    tensors_start: int
    """Offset of the first tensor's description, where the metadata end."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def file_type(self) -> str:
        """The whole file's type, such as ``Q4_K_M``."""
        number = self.metadata.get("general.file_type", -1)
        return file_type_name(number) if isinstance(number, int) else "unknown"

    def types(self) -> dict[str, int]:
        """Return how many tensors there are of each type."""
        return dict(sorted(Counter(tensor.type for tensor in self.tensors).items()))


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        BadDataError: it is cut short, damaged, or not a GGUF.
    """
    try:
        with path.open("rb") as source:
            return _Reader(path, source).header()
    except OSError as error:
        raise BadDataError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Position and budget while walking over one header."""

    def __init__(self, path: Path, source: BinaryIO) -> None:
        self._path = path
        self._source = source
        self._size = path.stat().st_size
        self._elements = MAX_ELEMENTS

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise self._bad("it does not begin with GGUF")
        version = int(self._number("I"))
        if version not in (2, 3):
            raise self._bad(f"its version is {version}, not 2 or 3 (or it is big-endian)")
        tensors = self._count(MAX_TENSORS, "tensors")
        keys = self._count(MAX_KEYS, "keys")
        metadata = self._metadata(keys)
        described = self._source.tell()
        found = [self._tensor() for _ in range(tensors)]
        return GgufHeader(self._path, version, metadata, self._placed(found, metadata), self._size, described)

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self._text(MAX_KEY)
            if not key or key in metadata:
                raise self._bad(f"the key {key[:80]!r} is empty or occurs twice")
            metadata[key] = self._value(int(self._number("I")))
        return metadata

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._text(MAX_STRING)
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise self._bad(f"it has a value of the unknown type {kind}")
        return self._number(SCALARS[kind])

    def _array(self) -> Value:
        kind = int(self._number("I"))
        length = self._count(MAX_ARRAY, "array entries")
        self._elements -= length
        if self._elements < 0:
            raise self._bad(f"its arrays have more than {MAX_ELEMENTS} entries")
        if kind != STRING and kind not in SCALARS:
            raise self._bad(f"it has an array of the type {kind}")
        if length <= KEPT:
            read = self._string if kind == STRING else self._scalar(SCALARS[kind])
            return tuple(read() for _ in range(length))
        if kind == STRING:
            for _ in range(length):
                self._skip(self._count(MAX_STRING, "characters"))
        else:
            self._skip(length * struct.calcsize("<" + SCALARS[kind]))
        return Long(length)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._text(MAX_NAME - 1)
        dimensions = int(self._number("I"))
        if not name or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._bad(f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._count(1 << 40, "rows") for _ in range(dimensions))
        kind = int(self._number("I"))
        if kind not in BLOCKS:
            raise self._bad(f"the tensor {name!r} is of the unknown type {kind}")
        return name, kind, shape, int(self._number("Q"))

    def _placed(
        self, found: list[tuple[str, int, tuple[int, ...], int]], metadata: Mapping[str, Value]
    ) -> tuple[GgufTensor, ...]:
        """Check that the tensors lie one after the other, and that the file ends with the last."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._bad(f"its alignment is {str(alignment)[:40]}")
        described = self._source.tell()
        begin = described + -described % alignment
        offset, end, names, placed = 0, begin, set(), []
        for name, kind, shape, said in found:
            type_name, numbers, size = BLOCKS[kind]
            if name in names or said != offset or shape[0] % numbers:
                raise self._bad(f"the tensor {name!r} occurs twice, overlaps another, or has an odd width")
            names.add(name)
            end = begin + offset + prod(shape) // numbers * size
            placed.append(GgufTensor(name, type_name, shape, begin + offset, end - begin - offset))
            offset = end - begin + -(end - begin) % alignment
        least = end if found else described  # a vocabulary alone is not padded
        if not least <= self._size <= max(end, begin + offset):
            raise self._bad(f"it has {self._size} bytes, but its header describes {end}")
        return tuple(placed)

    def _count(self, limit: int, what: str) -> int:
        number = int(self._number("Q"))
        if number > limit:
            raise self._bad(f"it claims {number} {what}, above the limit of {limit}")
        return number

    def _scalar(self, code: str) -> Callable[[], Scalar]:
        return lambda: self._number(code)

    def _number(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _string(self) -> str:
        return self._text(MAX_STRING)

    def _text(self, limit: int) -> str:
        data = self._take(self._count(limit, "characters"))
        return data.decode("utf-8", "replace")  # vocabularies hold pieces of characters

    def _take(self, count: int) -> bytes:
        data = self._source.read(count)
        if len(data) < count:
            raise self._bad("it is cut short in its header")
        return data

    def _skip(self, count: int) -> None:
        position = self._source.seek(count, 1)
        if position > self._size:
            raise self._bad("it is cut short in its header")

    def _bad(self, what: str) -> BadDataError:
        return BadDataError(f"{self._path} is not a whole GGUF file: {what}")
