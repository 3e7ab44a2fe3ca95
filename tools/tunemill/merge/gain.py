"""What a changed tensor's rows gain, with all of the adapter's numbers read.

A low-rank product is never made whole: its two factors are small, and each block of rows takes its own
part of them. Only DoRA's lengths over columns, where the base holds a matrix transposed, need a pass
over the tensor before the first block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tunemill.errors import BadDataError
from tunemill.merge.change import Change, Pair
from tunemill.merge.combine import Combination, combined
from tunemill.merge.numbers import Floats
from tunemill.merge.source import Adapters

Blocks = Callable[[], Iterator[tuple[int, Floats]]]
"""The base's numbers, a block of rows at a time: the first row, and (rows, columns)."""


@dataclass(frozen=True)
class Gain:
    """Everything but the base's own numbers."""

    factors: tuple[Floats, Floats] | None = None
    """(rows, r) and (r, columns), scaled."""
    added: Floats | None = None
    """(rows, 1)"""
    row_lengths: Floats | None = None
    """DoRA's m for each row: (rows)"""
    column_factors: Floats | None = None
    """DoRA's m over the length of each column: (columns)"""
    token_indices: Floats | None = None
    token_rows: Floats | None = None

    def apply(self, values: Floats, product: Floats, row: int) -> None:
        """Change a block (rows, columns) that begins with ``row``, using ``product``.

        Raises:
            BadDataError: a row that DoRA is to give a length has none.
        """
        end = row + len(values)
        if self.factors is not None:
            left, right = self.factors
            np.matmul(left[row:end], right, out=product)
            values += product
        if self.added is not None:
            values += self.added[row:end]
        if self.row_lengths is not None:
            lengths = np.sqrt(np.einsum("ij,ij->i", values, values))
            values *= _ratio(self.row_lengths[row:end], lengths)[:, None]
        if self.column_factors is not None:
            values *= self.column_factors
        if self.token_indices is not None and self.token_rows is not None:
            here = (self.token_indices >= row) & (self.token_indices < end)
            values[self.token_indices[here] - row] = self.token_rows[here]


def read_gain(
    change: Change, rows: int, adapters: Adapters, combination: Combination | None, base: Blocks
) -> Gain:
    """Read what a change of a tensor with so many rows needs.

    Raises:
        BadDataError: the adapter holds numbers that are not finite, or DoRA finds a column of no length.
    """
    factors = _factors(change, rows, adapters, combination)
    lengths = adapters.whole(change.magnitude).reshape(-1) if change.magnitude else None
    over_columns = lengths is not None and change.pairs[0].transposed
    added = adapters.whole(change.added) * np.float32(change.added_scale) if change.added else None
    return Gain(
        factors=factors,
        added=added.reshape(-1, 1) if added is not None else None,
        row_lengths=None if over_columns else lengths,
        column_factors=_column_factors(lengths, factors, base)
        if lengths is not None and over_columns
        else None,
        token_indices=np.array(change.tokens.indices, np.int64) if change.tokens else None,
        token_rows=adapters.whole(change.tokens.rows) if change.tokens else None,
    )


def _factors(
    change: Change, rows: int, adapters: Adapters, combination: Combination | None
) -> tuple[Floats, Floats] | None:
    if not change.pairs:
        return None
    if combination is not None:
        a, b = combined(change, combination, adapters)
    else:
        pair = change.pairs[0]
        a, b = _read(pair, change, rows, adapters)
        b = b * np.float32(pair.scale)
    if change.pairs[0].transposed:
        return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    return np.ascontiguousarray(b), np.ascontiguousarray(a)


def _read(pair: Pair, change: Change, rows: int, adapters: Adapters) -> tuple[Floats, Floats]:
    """Return (r, in) and (out, r): a convolution's kernel counts as input, as in its tensor's rows."""
    stacked = pair.experts > 1
    a, b = (adapters.whole(half, keep=stacked) for half in (pair.a, pair.b))
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if change.slice is None:
        return a, b
    rank, first = len(a) // pair.experts, change.slice.first
    part = slice(change.slice.expert * rank, (change.slice.expert + 1) * rank)
    return a[part], b[first : first + rows, change.slice.expert :: pair.experts]


def _column_factors(lengths: Floats, factors: tuple[Floats, Floats] | None, base: Blocks) -> Floats:
    squares = np.zeros(len(lengths), np.float64)
    for row, values in base():
        changed = values if factors is None else values + factors[0][row : row + len(values)] @ factors[1]
        squares += np.einsum("ij,ij->j", changed, changed, dtype=np.float64)
    return _ratio(lengths, np.sqrt(squares).astype(np.float32))


def _ratio(wanted: Floats, lengths: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = wanted / lengths
    if not np.isfinite(ratio).all():
        raise BadDataError("the adapter uses DoRA on a row of the base that is zero, or diverged in training")
    return ratio
