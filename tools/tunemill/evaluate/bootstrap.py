"""Intervals by resampling: percentiles over resamples of whole clusters with replacement.

Every figure here is a function of sums over rows. So a resample draws how often each cluster is
taken, once, and the sums of all figures follow from one product of matrices. Draws depend on the
seed and the number of clusters alone: two sets of predictions on the same rows meet the same
resamples, which is what makes their difference a paired one (Efron and Tibshirani 1993).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunemill.evaluate.figures import Interval

NOTHING = 1e-12  # what rounding may leave of a sum that is 0
CELLS = 1 << 22  # weights of one step of the bootstrap: 32 MB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A figure of the rows as they are, and of every resample."""

    value: float
    resampled: Floats
    """``(rounds,)``; NaN where a resample does not define it."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    rounds: int
    confidence: float
    seed: int
    clusters: npt.NDArray[np.intp]
    """``(rows,)`` cluster numbers from 0; rows of one cluster are drawn together."""

    @property
    def size(self) -> int:
        """Return the number of clusters."""
        return int(self.clusters.max()) + 1

    def interval(self, value: float, resampled: Floats) -> Interval:
        """Put a figure between the percentiles of those of its ``(rounds,)`` resamples that define it."""
        tail = (1 - self.confidence) / 2
        low, high = np.nanquantile(resampled, [tail, 1 - tail])
        return Interval(value, float(low), float(high))

    def of(self, measure: Measure) -> Interval:
        """Return a measure's interval."""
        return self.interval(measure.value, measure.resampled)

    def defined(self, measure: Measure) -> Interval | None:
        """Return a measure's interval, or None where the rows do not define it."""
        return None if np.isnan(measure.value) else self.of(measure)

    def sums(self, counted: Floats) -> Floats:
        """Resample sums over rows: ``(rows, figures)`` to ``(rounds, figures)``."""
        by_cluster = np.zeros((self.size, counted.shape[1]))
        np.add.at(by_cluster, self.clusters, counted)
        return self.resample(by_cluster)

    def blocks(self, counted: Floats, numbers: npt.NDArray[np.intp], count: int) -> tuple[Floats, Floats]:
        """Sum rows by the number of the block each belongs to, as they are and resampled.

        ``counted`` is ``(rows, figures)``, ``numbers`` ``(rows,)`` from 0 to ``count`` - 1. Returns
        ``(count, figures)`` and ``(rounds, count, figures)``; all blocks meet the same resamples.
        """
        width = counted.shape[1]
        by_cluster = np.zeros((self.size, count, width))
        np.add.at(by_cluster, (self.clusters, numbers), counted)
        resampled = self.resample(by_cluster.reshape(self.size, count * width))
        return by_cluster.sum(axis=0), resampled.reshape(-1, count, width)

    def resample(self, by_cluster: Floats) -> Floats:
        """Resample sums over clusters: ``(clusters, figures)`` to ``(rounds, figures)``."""
        return np.concatenate([weights @ by_cluster for weights in self.draws()])

    def draws(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield ``(some rounds, clusters)``: how often each cluster is taken, until all rounds are there."""
        size, random = self.size, np.random.default_rng(self.seed)
        step = max(1, CELLS // size)
        for start in range(0, self.rounds, step):
            rounds = min(step, self.rounds - start)
            # Drawn one by one: ten times as fast as numpy's multinomial with as many categories as draws.
            taken = random.integers(0, size, (rounds, size)) + size * np.arange(rounds)[:, None]
            yield np.bincount(taken.ravel(), minlength=rounds * size).reshape(rounds, size)


def ratio(above: Floats, below: Floats, otherwise: float = np.nan) -> Floats:
    """Divide where there is something to divide by; a resample may hold none of a rare kind of row."""
    above, below = np.broadcast_arrays(above, below)
    found = np.full(above.shape, otherwise, dtype=np.float64)
    np.divide(above, below, out=found, where=below > NOTHING)
    return found


def clusters_of(keys: Sequence[Hashable]) -> npt.NDArray[np.intp]:
    """Number rows by their keys, from 0 in the order of appearance: equal keys, equal numbers."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.intp)
