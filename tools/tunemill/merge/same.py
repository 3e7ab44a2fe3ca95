"""Tells whether an adapter does the same to two tensors that share their numbers in the base."""

from __future__ import annotations

from itertools import starmap
from pathlib import Path

import numpy as np

from tunemill.merge.change import Change, Pair, Stored, Tokens
from tunemill.merge.numbers import Floats
from tunemill.merge.source import read_whole
from tunemill.weights import Tensor

COMPARED = 16 << 20  # bytes compared at once


def same_change(own: Change, head: Change) -> bool:
    """Return whether input and output embeddings, of equal numbers before, are equal afterwards too."""
    if own.magnitude or head.magnitude or len(own.pairs) != len(head.pairs) or own.weights != head.weights:
        return False
    if (own.tokens is None) != (head.tokens is None):
        return False
    if own.tokens and head.tokens and not _same_tokens(own.tokens, head.tokens):
        return False
    wholes = same_stored(own.whole, head.whole)
    return wholes and all(starmap(_same_product, zip(own.pairs, head.pairs, strict=True)))


def _same_tokens(own: Tokens, head: Tokens) -> bool:
    return own.indices == head.indices and same_stored(own.rows, head.rows)


def same_stored(one: Stored | None, other: Stored | None) -> bool:
    """Return whether two tensors are the same bytes, or neither is there."""
    if one is None or other is None:
        return one is other
    return same_bytes(one.path, one.tensor, other.path, other.tensor)


def same_bytes(path: Path, tensor: Tensor, other_path: Path, other: Tensor) -> bool:
    """Return whether two tensors are of one type and shape and the same bytes."""
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    with path.open("rb") as one, other_path.open("rb") as two:
        one.seek(tensor.start)
        two.seek(other.start)
        sizes = (min(COMPARED, tensor.size - offset) for offset in range(0, tensor.size, COMPARED))
        return all(one.read(size) == two.read(size) for size in sizes)


def _same_product(own: Pair, head: Pair) -> bool:
    """The two are each other's transpose: an embedding's factors have their places swapped."""
    if own.scale != head.scale or own.a.shape != head.b.shape[::-1] or own.b.shape != head.a.shape[::-1]:
        return False
    own_a, own_b, head_a, head_b = (_read(half) for half in (own.a, own.b, head.a, head.b))
    return bool(np.array_equal(own_a.T, head_b) and np.array_equal(own_b.T, head_a))


def _read(stored: Stored) -> Floats:
    with stored.path.open("rb") as file:
        return read_whole(file.fileno(), stored.tensor)
