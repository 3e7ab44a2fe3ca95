"""Figures of merit of answers that are one label of a set.

A row without an answer counts as wrong everywhere: it lowers recall and accuracy, and is a column of
its own in the confusion matrix. Averages over classes run over those that occur in gold or
predictions, as in scikit-learn. Distances between levels are those of rows with an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tunemill.evaluate.bootstrap import Bootstrap, Floats, Measure, ratio
from tunemill.evaluate.figures import Classification, Confusion, PerClass
from tunemill.evaluate.predictions import Predictions

NO_ANSWER = "\0no answer"  # no label can be equal to it
TOP = (2, 3, 5)
LEVELS = 8  # columns that ``_distances`` adds


def counts(predictions: Predictions) -> Floats:
    """Return ``(rows, figures)``: what ``estimates`` needs the sums of."""
    return label_counts(places(predictions, "golds"), places(predictions, "answers"), predictions)


def places(predictions: Predictions, column: str) -> npt.NDArray[np.intp]:
    """Return ``(rows,)`` numbers of the labels in ``golds`` or ``answers``, -1 for none."""
    numbers: dict[str | None, int] = {label: number for number, label in enumerate(predictions.labels)}
    return np.array([numbers.get(label, -1) for label in getattr(predictions, column)], dtype=np.intp)


def label_counts(golds: npt.NDArray[np.intp], answers: npt.NDArray[np.intp], given: Predictions) -> Floats:
    """Return hits, golds and answers of every label, and one; of ordered ones the distances too."""
    width = np.arange(len(given.labels))
    gold, answer = golds[:, None] == width, answers[:, None] == width
    columns = [gold & answer, gold, answer, np.ones((len(golds), 1))]
    if given.task.ordered:
        columns.append(_distances(golds, answers))
    return np.concatenate(columns, axis=1, dtype=np.float64)


def estimates(sums: Floats, labels: int, ordered: bool) -> dict[str, Floats]:
    """Compute every figure from ``(resamples, figures)`` sums of ``counts``; NaN where undefined."""
    hits, golds, answers = (sums[:, n * labels : (n + 1) * labels] for n in range(3))
    rows = sums[:, 3 * labels]
    f1 = ratio(2 * hits, golds + answers, 0)
    agreed, chance = ratio(hits.sum(axis=1), rows), ratio((golds * answers).sum(axis=1), rows**2)
    found = {
        "accuracy": agreed,
        "macro_f1": f1.sum(axis=1) / np.maximum((golds + answers > 0).sum(axis=1), 1),
        "weighted_f1": ratio((f1 * golds).sum(axis=1), rows),
        "balanced_accuracy": ratio(hits, golds, 0).sum(axis=1) / np.maximum((golds > 0).sum(axis=1), 1),
        "cohen_kappa": ratio(agreed - chance, 1 - chance),
    }
    return found | (_graded(sums[:, -LEVELS:]) if ordered else {})


def measures(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Measure]:
    """Return every figure, of the rows and of their resamples."""
    counted = counts(predictions)
    arguments = len(predictions.labels), predictions.task.ordered
    whole = estimates(counted.sum(axis=0, keepdims=True), *arguments)
    resampled = estimates(bootstrap.sums(counted), *arguments)
    return {name: Measure(float(value[0]), resampled[name]) for name, value in whole.items()}


def classification(
    predictions: Predictions, measured: Mapping[str, Measure], bootstrap: Bootstrap
) -> Classification:
    """Judge label predictions; ``measured`` is what ``measures`` returned for them."""
    from sklearn.metrics import confusion_matrix, f1_score

    golds = list(predictions.golds)
    answers = [answer if answer is not None else NO_ANSWER for answer in predictions.answers]
    labels = list(predictions.labels)
    seen = [label for label in labels if label in {*golds, *answers}]
    matrix = confusion_matrix(golds, answers, labels=[*labels, NO_ANSWER])[:-1]
    return Classification(
        rows=len(golds),
        errors=answers.count(NO_ANSWER),
        accuracy=bootstrap.of(measured["accuracy"]),
        macro_f1=bootstrap.of(measured["macro_f1"]),
        balanced_accuracy=bootstrap.of(measured["balanced_accuracy"]),
        micro_f1=float(f1_score(golds, answers, labels=seen, average="micro", zero_division=0)),
        weighted_f1=bootstrap.of(measured["weighted_f1"]),
        top=_top(predictions),
        per_class=_per_class(predictions, golds, answers),
        matrix=tuple(tuple(int(count) for count in row) for row in matrix),
    )


def confusions(predictions: Predictions) -> list[Confusion]:
    """Return what was taken for what, the most frequent first, then by the labels' order."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for row, (gold, answer) in enumerate(zip(predictions.golds, predictions.answers, strict=True)):
        if answer is not None and gold != answer:
            pairs.setdefault((gold, answer), []).append(row)
    return ranked(pairs, predictions, Counter(predictions.golds))


def ranked(
    pairs: Mapping[tuple[str, str], list[int]], predictions: Predictions, support: Mapping[str, int]
) -> list[Confusion]:
    """Order pairs of gold and predicted label by how many rows they have."""
    order = {label: place for place, label in enumerate(predictions.labels)}
    by_count = sorted(pairs, key=lambda pair: (-len(pairs[pair]), order[pair[0]], order[pair[1]]))
    return [
        Confusion(gold, seen, len(rows), len(rows) / support[gold], tuple(rows))
        for gold, seen in by_count
        for rows in [pairs[gold, seen]]
    ]


def _per_class(predictions: Predictions, golds: list[str], answers: list[str]) -> tuple[PerClass, ...]:
    from sklearn.metrics import precision_recall_fscore_support

    labels, predicted = list(predictions.labels), Counter(answers)
    each = precision_recall_fscore_support(golds, answers, labels=labels, zero_division=0)
    return tuple(
        PerClass(label, float(p), float(r), float(f), int(s), predicted[label])
        for label, p, r, f, s in zip(labels, *each, strict=True)
    )


def _distances(golds: npt.NDArray[np.intp], answers: npt.NDArray[np.intp]) -> Floats:
    """Return of rows with an answer: one, |d|, d, d², gold, answer, gold², answer², in levels."""
    there = answers >= 0
    gap = answers - golds
    columns = [np.ones_like(gap), np.abs(gap), gap, gap**2, golds, answers, golds**2, answers**2]
    return np.where(there[:, None], np.stack(columns, axis=1), 0).astype(np.float64)


def _graded(sums: Floats) -> dict[str, Floats]:
    """Compute mean distances, and Cohen's kappa with quadratic weights (Cohen 1968)."""
    rows, absolute, signed, squared, gold, answer, gold2, answer2 = sums.T
    by_chance = gold2 + answer2 - 2 * ratio(gold * answer, rows, 0)
    return {
        "mean_absolute_error": ratio(absolute, rows),
        "bias": ratio(signed, rows),
        "quadratic_kappa": 1 - ratio(squared, by_chance),
    }


def _top(predictions: Predictions) -> dict[int, float]:
    if predictions.probabilities is None:
        return {}
    gold, shares = places(predictions, "golds"), predictions.probabilities
    ahead = (shares > shares[np.arange(len(gold)), gold][:, None]).sum(axis=1)
    ahead[[answer is None for answer in predictions.answers]] = len(predictions.labels)
    return {k: float((ahead < k).mean()) for k in TOP if k < len(predictions.labels)}
