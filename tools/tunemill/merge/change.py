"""What adapters do to one tensor of the base, before any number is read.

Low rank: W' = W + s B A with s = alpha / r (Hu et al. 2021, arXiv:2106.09685), or alpha / sqrt(r)
(rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). DoRA (Liu et al. 2024, arXiv:2402.09353) then gives each
output the length m that training found: W'_i = m_i (W + s B A)_i / |(W + s B A)_i|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunemill.weights import Tensor


@dataclass(frozen=True)
class Stored:
    """A tensor of an adapter."""

    path: Path
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.tensor.shape


@dataclass(frozen=True)
class Pair:
    """The two factors of a low-rank product."""

    a: Stored
    """(experts r, in); of a convolution (r, in, kernel ...)"""
    b: Stored
    """(out, r experts), an expert's columns ``experts`` apart; of a convolution (out, r, 1 ...)"""
    scale: float
    transposed: bool = False
    """The base holds (in, out): GPT-2's Conv1D, and embeddings."""
    experts: int = 1
    """How many matrices of a mixture of experts are stacked in each factor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What the product's shape is, one expert's for experts."""
        product = (self.b.shape[0], *self.a.shape[1:])
        return product[::-1] if self.transposed else product


@dataclass(frozen=True)
class Slice:
    """The part of a stacked product that one tensor of the checkpoint gains."""

    expert: int
    first: int
    """Row of the expert's product with which the tensor begins."""


@dataclass(frozen=True)
class Tokens:
    """Rows that were trained alone."""

    indices: tuple[int, ...]
    rows: Stored
    """(indices, columns)"""


@dataclass(frozen=True)
class Change:
    """All that is done to one tensor, in this order."""

    whole: Stored | None = None
    """Taken instead of the base's tensor."""
    pairs: tuple[Pair, ...] = ()
    """Of one adapter each."""
    weights: tuple[float, ...] = (1.0,)
    """What each adapter counts."""
    slice: Slice | None = None
    magnitude: Stored | None = None
    """DoRA's m: (out), whatever dimensions of one it has besides."""
    added: Stored | None = None
    """The bias of B, which a layer's bias gains ``added_scale`` times."""
    added_scale: float = 0.0
    tokens: Tokens | None = None

    def sources(self) -> Sequence[Stored]:
        """Return the adapters' tensors that are read."""
        factors = [half for pair in self.pairs for half in (pair.a, pair.b)]
        tokens = [self.tokens.rows] if self.tokens else []
        return [*filter(None, (self.whole, self.magnitude, self.added)), *factors, *tokens]
