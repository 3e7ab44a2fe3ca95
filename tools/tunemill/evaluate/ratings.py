"""Figures of answers that are levels, or that rate one text on several dimensions.

Every dimension is a task of its own with the same levels, so each has its own agreement, chance and
distance; resamples take whole texts, and the same ones for all dimensions.
"""

from __future__ import annotations

import numpy as np

from tunemill.evaluate.bootstrap import Bootstrap, Floats, Measure
from tunemill.evaluate.figures import Rating
from tunemill.evaluate.metrics import counts, estimates
from tunemill.evaluate.predictions import Predictions


def ratings(predictions: Predictions, bootstrap: Bootstrap) -> tuple[Rating, ...]:
    """Return the figures of all rows together, then of each dimension that has rows."""
    counted = counts(predictions)
    named = [name for name in predictions.task.dimensions if name in set(predictions.dimensions)]
    parts: list[tuple[str | None, Floats, Floats]] = [(None, counted.sum(axis=0), bootstrap.sums(counted))]
    if named:
        numbers = np.array([named.index(name) for name in predictions.dimensions], dtype=np.intp)
        whole, resampled = bootstrap.blocks(counted, numbers, len(named))
        parts += [(name, whole[number], resampled[:, number]) for number, name in enumerate(named)]
    return tuple(_rating(name, own, resampled, predictions, bootstrap) for name, own, resampled in parts)


def _rating(
    name: str | None, own: Floats, resampled: Floats, predictions: Predictions, bootstrap: Bootstrap
) -> Rating:
    labels, ordered = len(predictions.labels), predictions.task.ordered
    whole = estimates(own[None], labels, ordered)
    drawn = estimates(resampled, labels, ordered)
    measured = {figure: Measure(float(value[0]), drawn[figure]) for figure, value in whole.items()}
    rows = round(float(own[3 * labels]))
    chosen = {
        field: bootstrap.defined(measured[figure])
        for field, figure in (
            ("cohen_kappa", "cohen_kappa"),
            ("mean_absolute_error", "mean_absolute_error"),
            ("weighted_kappa", "quadratic_kappa"),
            ("bias", "bias"),
        )
        if figure in measured
    }
    return Rating(
        dimension=name,
        rows=rows,
        errors=rows - round(float(own[2 * labels : 3 * labels].sum())),
        accuracy=bootstrap.of(measured["accuracy"]),
        **{"mean_absolute_error": None, "weighted_kappa": None, "bias": None, **chosen},
    )
