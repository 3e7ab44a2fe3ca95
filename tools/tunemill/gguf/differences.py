"""Which tensors of two GGUF models differ, and by how much once they are numbers again."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemill.gguf.header import GgufTensor
from tunemill.gguf.parts import read_parts
from tunemill.gguf.types import tensor_number

if TYPE_CHECKING:
    from tunemill.gguf.library import Library

CHUNK = 4 << 20  # bytes compared at once


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both."""

    name: str
    first: str | None
    """Its type; None where the model lacks it."""
    second: str | None
    largest: float | None
    """Largest difference of two of its numbers; None where they cannot be compared."""


@dataclass(frozen=True)
class Compared:
    """What comparing two models found."""

    tensors: int
    """How many there are in either."""
    differing: tuple[TensorDifference, ...]

    @property
    def worst(self) -> TensorDifference | None:
        """The tensor with the largest difference."""
        known = [each for each in self.differing if each.largest is not None]
        return max(known, key=lambda each: each.largest or 0.0, default=None)


def compare_models(first: Path, second: Path, library: Library | None) -> Compared:
    """Compare all tensors of two models, each named by the file that loads it.

    Without a ``library``, which dequantizes, only bytes are compared.

    Raises:
        BadDataError: a model is damaged.
    """
    left, right = _placed(first), _placed(second)
    names = sorted(left.keys() | right.keys())
    differing = [name for name in names if name not in left or name not in right]
    pairs = [name for name in names if name not in differing and _differ(left[name], right[name])]
    alike = [name for name in pairs if left[name][1].shape == right[name][1].shape]
    requests = [[_request(*left[name]), _request(*right[name])] for name in alike]
    largest = library.differences(requests).value if library and requests else [None] * len(alike)
    measured = dict(zip(alike, largest, strict=True))
    return Compared(
        len(names),
        tuple(
            TensorDifference(name, _type(left, name), _type(right, name), measured.get(name))
            for name in sorted([*differing, *pairs])
        ),
    )


Placed = tuple[Path, GgufTensor]


def _placed(first: Path) -> dict[str, Placed]:
    return {tensor.name: (header.path, tensor) for header in read_parts(first) for tensor in header.tensors}


def _type(placed: dict[str, Placed], name: str) -> str | None:
    return placed[name][1].type if name in placed else None


def _differ(left: Placed, right: Placed) -> bool:
    (first, one), (second, other) = left, right
    if (one.type, one.shape, one.size) != (other.type, other.shape, other.size):
        return True
    with first.open("rb") as ours, second.open("rb") as theirs:
        ours.seek(one.start)
        theirs.seek(other.start)
        sizes = (min(CHUNK, one.size - start) for start in range(0, one.size, CHUNK))
        return any(ours.read(size) != theirs.read(size) for size in sizes)


def _request(path: Path, tensor: GgufTensor) -> dict[str, Any]:
    return {
        "path": str(path),
        "start": tensor.start,
        "type": tensor_number(tensor.type),
        "numbers": prod(tensor.shape),
    }
