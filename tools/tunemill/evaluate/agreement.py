"""Agreement beyond chance: Cohen's kappa of two coders, Krippendorff's alpha of all of them.

The model is one coder among others. Kappa is that of the rows both coded (Cohen 1960, with quadratic
weights where labels are ordered: Cohen 1968). Alpha takes every row with two answers at least
(Krippendorff 2019, chapter 12), ordinal where labels are ordered; its value is the library's. Alpha
is a function of the coincidence matrix, which is a sum over rows, so resamples need no more than sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import numpy.typing as npt

from tunemill.evaluate.bootstrap import Bootstrap, Floats, Measure, ratio
from tunemill.evaluate.figures import Agreement, Interval, Pair
from tunemill.evaluate.metrics import estimates, label_counts, places
from tunemill.evaluate.predictions import Predictions

MODEL, GOLD = "model", "gold"

Codes = npt.NDArray[np.intp]


def agreement(predictions: Predictions, bootstrap: Bootstrap) -> Agreement:
    """Judge the predictions as one coder among those there are."""
    model, gold = places(predictions, "answers"), places(predictions, "golds")
    coders = _coded(predictions)
    level = "ordinal" if predictions.task.ordered else "nominal"
    everyone = {MODEL: model, **(coders or {GOLD: gold})}
    return Agreement(
        level_of_measurement=level,
        pairs=tuple(_pairs(predictions, {MODEL: model, GOLD: gold}, coders, bootstrap)),
        alpha=_alpha(everyone, len(predictions.labels), level, bootstrap),
        coders_alpha=_alpha(coders, len(predictions.labels), level, bootstrap) if len(coders) > 1 else None,
    )


def value_counts(coded: Mapping[str, Codes], labels: int) -> Floats:
    """Return ``(rows, labels)``: how many coders gave each label."""
    counted = np.zeros((len(next(iter(coded.values()))), labels))
    for codes in coded.values():
        there = np.flatnonzero(codes >= 0)
        counted[there, codes[there]] += 1
    return counted


def alphas(sums: Floats, labels: int, level: str) -> Floats:
    """Compute alpha from ``(resamples, figures)`` sums of ``coincidences``; NaN where undefined."""
    marginals = sums[:, :labels]
    pairable = marginals.sum(axis=1)
    if level == "nominal":
        observed, expected = sums[:, labels], pairable**2 - (marginals**2).sum(axis=1)
    else:
        matrices = sums[:, labels:].reshape(-1, labels, labels)
        distances = _ordinal(marginals)
        observed = (matrices * distances).sum(axis=(1, 2))
        expected = np.einsum("rc,rk,rck->r", marginals, marginals, distances)
    found: Floats = 1 - ratio(observed * (pairable - 1), expected)
    return found


def coincidences(counted: Floats, level: str) -> Floats:
    """Return ``(rows, figures)``: each row's part of the marginals, and of what alpha observes.

    For nominal labels that is the number of disagreeing pairs, for ordinal ones the whole matrix, whose
    distances depend on the marginals of all rows.
    """
    coders = counted.sum(axis=1, keepdims=True)
    pairable = np.where(coders > 1, counted, 0)
    others = np.maximum(coders - 1, 1)
    if level == "nominal":
        disagreeing = pairable.sum(axis=1, keepdims=True) ** 2 - (pairable**2).sum(axis=1, keepdims=True)
        return np.concatenate([pairable, disagreeing / others], axis=1)
    matrices = pairable[:, :, None] * pairable[:, None, :]
    diagonal = np.arange(counted.shape[1])
    matrices[:, diagonal, diagonal] -= pairable
    return np.concatenate([pairable, (matrices / others[:, :, None]).reshape(len(counted), -1)], axis=1)


def _alpha(coded: Mapping[str, Codes], labels: int, level: str, bootstrap: Bootstrap) -> Interval | None:
    import krippendorff

    counted = value_counts(coded, labels)
    there = counted[counted.sum(axis=1) > 1]
    if np.count_nonzero(there.sum(axis=0)) < 2:  # one label alone: agreement by chance is certain
        return None
    value = krippendorff.alpha(
        value_counts=there.astype(int), value_domain=list(range(labels)), level_of_measurement=level
    )
    resampled = alphas(bootstrap.sums(coincidences(counted, level)), labels, level)
    return bootstrap.of(Measure(float(value), resampled))


def _ordinal(marginals: Floats) -> Floats:
    """Return ``(resamples, labels, labels)`` squared distances: how many answers lie between two levels."""
    below = np.cumsum(marginals, axis=1) - marginals / 2  # up to the middle of each level
    distances: Floats = (below[:, :, None] - below[:, None, :]) ** 2
    return distances


def _coded(predictions: Predictions) -> dict[str, Codes]:
    numbers: dict[str | None, int] = {label: number for number, label in enumerate(predictions.labels)}
    return {
        name: np.array([numbers.get(answer, -1) for answer in answers], dtype=np.intp)
        for name, answers in predictions.coders.items()
    }


def _pairs(
    predictions: Predictions, main: Mapping[str, Codes], coders: Mapping[str, Codes], bootstrap: Bootstrap
) -> Iterator[Pair]:
    """Yield every pair that has coded a row in common."""
    everyone = {**main, **coders}
    names = [(MODEL, other) for other in (GOLD, *coders)] + list(combinations(coders, 2))
    for first, second in names:
        codes = everyone[first], everyone[second]
        if ((codes[0] >= 0) & (codes[1] >= 0)).any():
            yield _pair(predictions, (first, second), codes, bootstrap)


def _pair(
    predictions: Predictions, names: tuple[str, str], codes: tuple[Codes, Codes], bootstrap: Bootstrap
) -> Pair:
    """Compare two coders over the rows that both coded; resamples are those of all rows."""
    both = (codes[0] >= 0) & (codes[1] >= 0)
    counted = label_counts(codes[1], codes[0], predictions) * both[:, None]
    arguments = len(predictions.labels), predictions.task.ordered
    resampled = estimates(bootstrap.sums(counted), *arguments)
    whole = estimates(counted.sum(axis=0, keepdims=True), *arguments)
    measured = {name: Measure(float(value[0]), resampled[name]) for name, value in whole.items()}
    return Pair(
        *names,
        rows=int(both.sum()),
        accuracy=bootstrap.of(measured["accuracy"]),
        cohen_kappa=bootstrap.defined(measured["cohen_kappa"]),
        weighted_kappa=bootstrap.defined(measured["quadratic_kappa"]) if predictions.task.ordered else None,
    )
