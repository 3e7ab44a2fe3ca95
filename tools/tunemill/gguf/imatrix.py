"""The file of an importance matrix, in llama.cpp's format, so that its programs can read ours.

For each matrix of the model it holds how often an input went through it and, for each column, the sum
of the inputs' squares; a mixture of experts has one row for each expert. The quantizer rounds so that
the columns that mattered are met best.

Format: ``tools/imatrix/imatrix.cpp`` in llama.cpp: a GGUF of the type ``imatrix`` with the F32 tensors
``NAME.in_sum2`` of shape (experts, columns) and ``NAME.counts`` of shape (experts, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.gguf.header import GgufHeader, GgufTensor, read_gguf
from tunemill.gguf.writer import Metadata, write_gguf

FILE = "imatrix.gguf"
SUMS, COUNTS = ".in_sum2", ".counts"

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Imatrix:
    """Sums and counts by the name of the tensor whose inputs they are of."""

    sums: Mapping[str, Floats]
    """``(experts, columns)`` sums of squares; one row where there are no experts."""
    counts: Mapping[str, Floats]
    """``(experts,)`` inputs seen."""
    datasets: tuple[str, ...]
    """Where the texts came from."""
    chunks: int
    """Texts seen."""
    chunk_size: int
    """Most tokens of one text."""

    def importance(self) -> dict[str, Floats]:
        """Return the mean of squares of each column; 1 where an expert saw nothing, as llama.cpp has it."""
        return {name: _mean(sums, self.counts[name]) for name, sums in self.sums.items()}

    def unseen(self) -> dict[str, int]:
        """Return how many experts saw nothing, for the tensors where any did."""
        empty = {name: int((counts == 0).sum()) for name, counts in self.counts.items()}
        return {name: number for name, number in empty.items() if number}


def write_imatrix(path: Path, matrix: Imatrix) -> None:
    """Write the file, tensors in the order of their names."""
    tensors: dict[str, Floats] = {}
    for name in sorted(matrix.sums):
        tensors[name + SUMS] = np.asarray(matrix.sums[name], np.float32)
        tensors[name + COUNTS] = np.asarray(matrix.counts[name], np.float32).reshape(-1, 1)
    metadata: Metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    write_gguf(path, metadata, tensors)


def read_imatrix(path: Path) -> Imatrix:
    """Read the file.

    Raises:
        BadDataError: it is damaged, or no importance matrix.
    """
    header = read_gguf(path)
    if header.metadata.get("general.type") != "imatrix":
        raise BadDataError(f"{path.name} is no importance matrix: run imatrix")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    sums, counts = {}, {}
    for name in names:
        if name + COUNTS not in tensors or tensors[name + SUMS].type != "F32":
            raise BadDataError(f"{path.name} is no whole importance matrix: {name} has no counts")
        sums[name] = _read(path, tensors[name + SUMS])
        counts[name] = _read(path, tensors[name + COUNTS]).reshape(-1)
        _check(path, name, sums[name], counts[name])
    return Imatrix(sums, counts, _datasets(header), *(_number(header, key) for key in ("count", "size")))


def _mean(sums: Floats, counts: Floats) -> Floats:
    seen = counts.reshape(-1, 1) > 0
    return np.where(seen, sums / np.where(seen, counts.reshape(-1, 1), 1), 1).astype(np.float32)


def _read(path: Path, tensor: GgufTensor) -> Floats:
    flat = np.fromfile(path, "<f4", count=tensor.size // 4, offset=tensor.start)
    return flat.reshape(-1, tensor.shape[0])


def _check(path: Path, name: str, sums: Floats, counts: Floats) -> None:
    if len(sums) != len(counts) or not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        raise BadDataError(f"{path.name} is damaged: the sums of {name} are of other rows or not finite")


def _datasets(header: GgufHeader) -> tuple[str, ...]:
    found = header.metadata.get("imatrix.datasets", ())
    return tuple(map(str, found)) if isinstance(found, tuple) else ()


def _number(header: GgufHeader, which: str) -> int:
    value = header.metadata.get(f"imatrix.chunk_{which}", 0)
    return value if isinstance(value, int) else 0
