"""Figures of merit of label predictions, by scikit-learn, with bootstrap intervals.

A row without an answer counts as wrong everywhere: it lowers recall and accuracy, and is a column of
its own in the confusion matrix. Averages over classes run over those that occur in gold or
predictions, as in scikit-learn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunemill.evaluate.predictions import Predictions

NO_ANSWER = "\0no answer"  # no label can be equal to it
TOP = (2, 3, 5)
CELLS = 1 << 22  # weights of one step of the bootstrap: 32 MB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with the range that most bootstrap resamples fall into."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PerClass:
    """One label's figures."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """Rows whose gold label it is."""
    predicted: int
    """Rows it was predicted for."""


@dataclass(frozen=True)
class Confusion:
    """A pair of labels that was taken for each other in one direction."""

    gold: str
    predicted: str
    count: int
    share: float
    """Of the gold label's rows."""


@dataclass(frozen=True)
class Classification:
    """All figures of one set of label predictions."""

    rows: int
    errors: int
    accuracy: Interval
    macro_f1: Interval
    balanced_accuracy: float
    micro_f1: float
    weighted_f1: float
    top: dict[int, float]
    """k to the share of rows whose gold label is among the k most probable."""
    per_class: tuple[PerClass, ...]
    matrix: tuple[tuple[int, ...], ...]
    """Gold (rows) by predicted (columns), in the labels' order; the last column: no answer."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: percentiles over resamples of whole clusters with replacement."""

    rounds: int
    confidence: float
    seed: int
    clusters: npt.NDArray[np.intp]
    """``(rows,)`` cluster numbers from 0; rows of one cluster are drawn together."""

    def interval(self, value: float, resampled: Floats) -> Interval:
        """Put a figure between the percentiles of its ``(rounds,)`` resamples."""
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Interval(value, float(low), float(high))

    def sums(self, counted: Floats) -> Floats:
        """Resample sums over rows: ``(rows, figures)`` to ``(rounds, figures)``."""
        size = int(self.clusters.max()) + 1
        by_cluster = np.zeros((size, counted.shape[1]))
        np.add.at(by_cluster, self.clusters, counted)
        random = np.random.default_rng(self.seed)
        step = max(1, CELLS // size)
        parts = []
        for start in range(0, self.rounds, step):
            rounds = min(step, self.rounds - start)
            parts.append(random.multinomial(size, np.full(size, 1 / size), rounds) @ by_cluster)
        return np.concatenate(parts)


def classification(predictions: Predictions, bootstrap: Bootstrap) -> Classification:
    """Judge label predictions."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    golds = list(predictions.golds)
    answers = [answer if answer is not None else NO_ANSWER for answer in predictions.answers]
    labels = list(predictions.labels)
    each = precision_recall_fscore_support(golds, answers, labels=labels, zero_division=0)
    seen = [label for label in labels if label in set(golds) | set(answers)]
    averages = {
        kind: precision_recall_fscore_support(golds, answers, labels=seen, average=kind, zero_division=0)[2]
        for kind in ("micro", "macro", "weighted")
    }
    counts = Counter(answers)
    matrix = confusion_matrix(golds, answers, labels=[*labels, NO_ANSWER])[:-1]
    accuracy, macro = _resampled(golds, answers, seen, bootstrap)
    right = np.mean([gold == answer for gold, answer in zip(golds, answers, strict=True)])
    return Classification(
        rows=len(golds),
        errors=counts[NO_ANSWER],
        accuracy=bootstrap.interval(float(right), accuracy),
        macro_f1=bootstrap.interval(float(averages["macro"]), macro),
        balanced_accuracy=float(np.mean([each[1][labels.index(label)] for label in seen if label in golds])),
        micro_f1=float(averages["micro"]),
        weighted_f1=float(averages["weighted"]),
        top=_top(predictions),
        per_class=tuple(
            PerClass(label, float(p), float(r), float(f), int(s), counts[label])
            for label, p, r, f, s in zip(labels, *each, strict=True)
        ),
        matrix=tuple(tuple(int(count) for count in row) for row in matrix),
    )


def confusions(predictions: Predictions) -> list[Confusion]:
    """Return what was taken for what, the most frequent first, then by the labels' order."""
    order = {label: place for place, label in enumerate(predictions.labels)}
    support = Counter(predictions.golds)
    pairs = Counter(
        (gold, answer)
        for gold, answer in zip(predictions.golds, predictions.answers, strict=True)
        if answer is not None and gold != answer
    )
    ranked = sorted(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
    return [
        Confusion(gold, seen, pairs[gold, seen], pairs[gold, seen] / support[gold]) for gold, seen in ranked
    ]


def difference(
    golds: Sequence[str], first: Sequence[str | None], second: Sequence[str | None], bootstrap: Bootstrap
) -> Interval:
    """Return first minus second accuracy on the same rows, resampled in pairs."""
    gains = np.array(
        [float(one == gold) - float(two == gold) for gold, one, two in zip(golds, first, second, strict=True)]
    )
    sums = bootstrap.sums(np.stack([gains, np.ones_like(gains)], axis=1))
    return bootstrap.interval(float(gains.mean()), sums[:, 0] / sums[:, 1])


def _resampled(
    golds: Sequence[str], answers: Sequence[str], labels: Sequence[str], bootstrap: Bootstrap
) -> tuple[Floats, Floats]:
    """Return ``(rounds,)`` accuracies and macro-F1s of resamples."""
    gold = np.array(golds)[:, None] == np.array(labels)
    answer = np.array(answers)[:, None] == np.array(labels)
    figures = np.concatenate([gold & answer, gold, answer, np.ones((len(golds), 1), bool)], axis=1)
    sums = bootstrap.sums(figures.astype(np.float64))
    width = len(labels)
    hits, total = sums[:, :width], sums[:, width : 2 * width] + sums[:, 2 * width : 3 * width]
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    present = np.maximum((total > 0).sum(axis=1), 1)
    return hits.sum(axis=1) / sums[:, -1], f1.sum(axis=1) / present


def _top(predictions: Predictions) -> dict[int, float]:
    if predictions.probabilities is None:
        return {}
    places = {label: place for place, label in enumerate(predictions.labels)}
    gold = np.array([places[label] for label in predictions.golds])
    shares = predictions.probabilities
    ahead = (shares > shares[np.arange(len(gold)), gold][:, None]).sum(axis=1)
    ahead[[answer is None for answer in predictions.answers]] = len(places)
    return {k: float((ahead < k).mean()) for k in TOP if k < len(places)}
