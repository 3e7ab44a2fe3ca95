"""Figures of merit of answers that are a set of labels.

A row without an answer counts as an empty set. Averages over labels run over those that occur in
gold or predictions. Exact match is scikit-learn's subset accuracy, Jaccard its average over samples;
any overlap is the share of rows where a true label is among those predicted, the figure of studies
whose texts have several topics of which any will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tunemill.evaluate.bootstrap import Bootstrap, Floats, Measure, ratio
from tunemill.evaluate.figures import Confusion, PerClass, SeveralLabels
from tunemill.evaluate.metrics import ranked
from tunemill.evaluate.predictions import Predictions, answer_sets, gold_sets

Flags = npt.NDArray[np.bool_]


def flags(predictions: Predictions) -> tuple[Flags, Flags]:
    """Return ``(rows, labels)`` gold and predicted memberships."""
    return memberships(predictions, gold_sets(predictions)), memberships(
        predictions, answer_sets(predictions)
    )


def memberships(predictions: Predictions, sets: Sequence[Sequence[str]]) -> Flags:
    """Return ``(rows, labels)``: whether each label is in each row's set."""
    places = {label: place for place, label in enumerate(predictions.labels)}
    found = np.zeros((len(predictions), len(places)), dtype=bool)
    for row, labels in enumerate(sets):
        found[row, [places[label] for label in labels]] = True
    return found


def measures(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Measure]:
    """Return every figure, of the rows and of their resamples."""
    gold, answer = flags(predictions)
    common, union = (gold & answer).sum(axis=1), (gold | answer).sum(axis=1)
    rows = [(gold == answer).all(axis=1), common > 0, common / np.maximum(union, 1), np.ones(len(gold))]
    counted = np.concatenate([np.stack(rows, axis=1), gold & answer, gold, answer], axis=1, dtype=np.float64)
    whole = _estimates(counted.sum(axis=0, keepdims=True), len(predictions.labels))
    resampled = _estimates(bootstrap.sums(counted), len(predictions.labels))
    return {name: Measure(float(value[0]), resampled[name]) for name, value in whole.items()}


def several_labels(
    predictions: Predictions, measured: Mapping[str, Measure], bootstrap: Bootstrap
) -> SeveralLabels:
    """Judge predictions of several labels; ``measured`` is what ``measures`` returned for them."""
    from sklearn.metrics import f1_score

    gold, answer = flags(predictions)
    return SeveralLabels(
        rows=len(predictions),
        errors=sum(one is None for one in predictions.answers),
        **{name: bootstrap.of(measure) for name, measure in measured.items()},
        weighted_f1=float(f1_score(gold, answer, average="weighted", zero_division=0)),
        gold_size=float(gold.sum(axis=1).mean()),
        predicted_size=float(answer.sum(axis=1).mean()),
        per_class=_per_class(predictions, gold, answer),
    )


def confusions(predictions: Predictions) -> list[Confusion]:
    """Return which label was missed where which wrong one was predicted, the most frequent pair first."""
    golds = gold_sets(predictions)
    pairs: dict[tuple[str, str], list[int]] = {}
    for row, (gold, answer) in enumerate(zip(golds, answer_sets(predictions), strict=True)):
        for missed in (label for label in gold if label not in answer):
            for wrong in (label for label in answer if label not in gold):
                pairs.setdefault((missed, wrong), []).append(row)
    return ranked(pairs, predictions, Counter(label for labels in golds for label in labels))


def _estimates(sums: Floats, labels: int) -> dict[str, Floats]:
    exact, overlap, jaccard, rows = sums[:, :4].T
    hits, golds, answers = (sums[:, 4 + n * labels : 4 + (n + 1) * labels] for n in range(3))
    both = golds + answers
    f1 = ratio(2 * hits, both, 0)
    return {
        "exact_match": exact / rows,
        "any_overlap": overlap / rows,
        "jaccard": jaccard / rows,
        "micro_f1": 2 * hits.sum(axis=1) / both.sum(axis=1),
        "macro_f1": f1.sum(axis=1) / (both > 0).sum(axis=1),
    }


def _per_class(predictions: Predictions, gold: Flags, answer: Flags) -> tuple[PerClass, ...]:
    from sklearn.metrics import precision_recall_fscore_support

    each = precision_recall_fscore_support(gold, answer, zero_division=0)
    return tuple(
        PerClass(label, float(p), float(r), float(f), int(s), int(n))
        for label, p, r, f, s, n in zip(predictions.labels, *each, answer.sum(axis=0), strict=True)
    )
