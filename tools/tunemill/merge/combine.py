"""Several adapters made one, as PEFT's ``add_weighted_adapter`` defines it.

The methods work on the factors A and B, each for itself, so what they give is an adapter of the same
rank and no sum of the products; ``cat`` and ``svd`` are exact in that respect. With w_i the weight of
adapter i times its own scale, A counts sign(w_i) sqrt|w_i| and B counts sqrt|w_i|.

TIES: Yadav et al. 2023, arXiv:2306.01708. DARE: Yu et al. 2023, arXiv:2311.03099. PEFT draws DARE's masks
from torch's generator; here they come from ``dare_seed`` and the tensor's name, so that a merge can be
repeated and does not depend on threads or on the order of the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, prod, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunemill.merge.change import Change, Stored
from tunemill.merge.config import PRUNING, CombinationType
from tunemill.merge.numbers import Floats
from tunemill.merge.source import Adapters

SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True)
class Combination:
    """How adapters are combined, in PEFT's words."""

    combination_type: CombinationType
    density: float = 1.0
    """Share of a factor's numbers that stay."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    svd_rank: int | None = None
    """Rank of the result of ``svd``."""
    seed: int = 0
    """Of DARE's masks."""


def combined(change: Change, how: Combination, adapters: Adapters) -> tuple[Floats, Floats]:
    """Return A (r, in) and B (out, r) of the combination; the scales are in them."""
    pairs = change.pairs
    weights = [weight * pair.scale for weight, pair in zip(change.weights, pairs, strict=True)]
    a_halves, b_halves = ([_matrix(half, adapters) for half in halves] for halves in (
        [pair.a for pair in pairs], [pair.b for pair in pairs]
    ))  # fmt: skip
    if how.combination_type in ("cat", "svd"):
        a = np.concatenate(
            [half * np.float32(weight) for half, weight in zip(a_halves, weights, strict=True)]
        )
        b = np.concatenate(b_halves, axis=1)
        return (a, b) if how.combination_type == "cat" else _truncated(a, b, how.svd_rank or 0)
    roots = [sqrt(abs(weight)) for weight in weights]
    signed = [copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    return (
        _mixed(a_halves, signed, [_key(pair.a, place) for place, pair in enumerate(pairs)], how),
        _mixed(b_halves, roots, [_key(pair.b, place) for place, pair in enumerate(pairs)], how),
    )


def _matrix(stored: Stored, adapters: Adapters) -> Floats:
    return adapters.whole(stored).reshape(stored.shape[0], -1)


def _key(stored: Stored, place: int) -> str:
    return f"{place} {stored.tensor.name}"


def _mixed(
    halves: Sequence[Floats], weights: Sequence[float], keys: Sequence[str], how: Combination
) -> Floats:
    kept = np.stack([_pruned(half, key, how) for half, key in zip(halves, keys, strict=True)])
    weighted = kept * np.array(weights, np.float32)[:, None, None]
    if "ties" not in how.combination_type:
        total: Floats = weighted.sum(axis=0)
        return total
    agree = _majority(kept, how.majority_sign_method)
    mean: Floats = (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), np.float32(1))
    return mean.astype(np.float32)


def _pruned(half: Floats, key: str, how: Combination) -> Floats:
    if how.combination_type not in PRUNING or how.density >= 1:
        return half
    if how.combination_type.startswith("dare"):
        mask = dare_mask(half.shape, how.density, how.seed, key)
        return (half * mask) / np.float32(how.density)
    return half * _largest(half, int(how.density * half.size))


def dare_mask(shape: Sequence[int], density: float, seed: int, key: str) -> NDArray[np.bool_]:
    """Return which numbers stay: each with probability ``density``, by PCG64 seeded with seed and key."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return generator.random(prod(shape)).reshape(shape) < density


def _largest(half: Floats, count: int) -> NDArray[np.bool_]:
    """Mark the ``count`` numbers of largest magnitude; of equal ones the first."""
    mask = np.zeros(half.size, np.bool_)
    if count:
        mask[np.argsort(-np.abs(half).reshape(-1), kind="stable")[:count]] = True
    return mask.reshape(half.shape)


def _majority(kept: Floats, method: str) -> NDArray[np.bool_]:
    """Mark the numbers whose sign most of the weight, or most of the adapters, have; zeros never."""
    sign = np.sign(kept)
    elected = np.where((kept if method == "total" else sign).sum(axis=0) >= 0, 1, -1)
    agree: NDArray[np.bool_] = sign == elected
    return agree


def _truncated(a: Floats, b: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return the factors of the best approximation of B A by ``rank``, without making B A.

    B A = Q_b (R_b R_a^T) Q_a^T has the singular values of the small matrix in the middle.
    """
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    left, values, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    first = slice(0, rank)
    return (
        (right[first] @ q_a.T).astype(np.float32),
        ((q_b @ left[:, first]) * values[first]).astype(np.float32),
    )
