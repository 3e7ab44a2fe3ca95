"""How common each label is in a corpus, corrected for what the judged rows show of the model's errors.

Counting predictions is biased: a label that others are often taken for is counted too often. With the
shares of predictions given each gold label, known from the judged rows, the counted shares are those
of a mixture whose weights are the prevalences:

- one label of the set: the weights from 0 to 1, with sum 1, that reproduce the counted shares best in
  least squares (the confusion-matrix method: Buonaccorsi 2010, chapter 3; Forman 2008 calls it
  adjusted counting). Rows without an answer are one more thing that can be observed;
- several labels: each on its own, by sensitivity and specificity (Rogan and Gladen 1978).

Intervals resample the judged rows and the corpus independently of each other. What is assumed is that
given the true label the model errs in the corpus as it does on the judged rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tunemill.evaluate.bootstrap import Bootstrap, Floats, Measure, clusters_of, ratio
from tunemill.evaluate.figures import Interval, Prevalence, Prevalences
from tunemill.evaluate.metrics import places
from tunemill.evaluate.predictions import Predictions, answer_sets, gold_sets
from tunemill.evaluate.several import flags, memberships

MATRIX, ROGAN_GLADEN = "confusion-matrix", "rogan-gladen"
SUM_WEIGHT = 1e3  # how much heavier than one share it weighs that prevalences sum to 1


def prevalences(predictions: Predictions, bootstrap: Bootstrap, corpus: Predictions | None) -> Prevalences:
    """Count every label, of every dimension, in the corpus where there is one, else in the judged rows."""
    several = predictions.task.form == "labels"
    gold = bootstrap.blocks(_observed(predictions, "golds"), *_dimensions(predictions))[0]
    counted = predictions if corpus is None else corpus
    observed, resampled = _bootstrap_of(corpus, bootstrap).blocks(
        _observed(counted, "answers"), *_dimensions(counted)
    )
    shares, drawn = _shares(observed), _shares(resampled)
    corrected = None
    if corpus is not None:
        corrected = (_rogan_gladen if several else _unmixed)(predictions, bootstrap, shares, drawn)

    def interval(block: int, label: int, value: Floats, resampled: Floats) -> Interval | None:
        return bootstrap.defined(Measure(float(value[block, label]), resampled[:, block, label]))

    found = [
        Prevalence(
            name,
            dimension,
            float(_shares(gold)[block, label]),
            bootstrap.interval(float(shares[block, label]), drawn[:, block, label]),
            corrected and interval(block, label, *corrected),
        )
        for block, dimension in enumerate(predictions.task.dimensions or (None,))
        for label, name in enumerate(predictions.labels)
        if gold[block, -1] and observed[block, -1]
    ]
    method = ROGAN_GLADEN if several else MATRIX
    return Prevalences(len(counted), corpus is not None, method, tuple(found))


def rogan_gladen(counted: Floats, sensitivity: Floats, specificity: Floats) -> Floats:
    """Return prevalences from shares counted as positive; NaN where the predictions tell nothing."""
    power = sensitivity + specificity - 1
    return np.clip(ratio(counted + specificity - 1, power), 0, 1)


def unmix(observed: Floats, given_gold: Floats) -> Floats:
    """Return the ``(labels,)`` weights, summing to 1, whose mixture is closest to what was observed.

    ``observed`` are ``(answers,)`` shares, ``given_gold`` ``(labels, answers)`` those of each gold label.
    """
    from scipy.optimize import nnls

    labels = len(given_gold)
    system = np.vstack([given_gold.T, np.full((1, labels), SUM_WEIGHT)])
    weights, _ = nnls(system, np.append(observed, SUM_WEIGHT))
    mixed: Floats = weights / weights.sum()
    return mixed


def _observed(predictions: Predictions, column: str) -> Floats:
    """Return ``(rows, kinds + 1)``: what each row shows, and one.

    Kinds are the labels and, where a row shows exactly one, that it shows none.
    """
    ones = np.ones((len(predictions), 1))
    if predictions.task.form == "labels":
        sets = gold_sets(predictions) if column == "golds" else answer_sets(predictions)
        return np.concatenate([memberships(predictions, sets), ones], axis=1)
    kinds = len(predictions.labels) + 1
    shown = np.eye(kinds)[places(predictions, column)]  # -1, no answer, is the last kind
    return np.concatenate([shown, ones], axis=1)


def _dimensions(predictions: Predictions) -> tuple[npt.NDArray[np.intp], int]:
    """Return ``(rows,)`` numbers of the rows' dimensions, and how many; one where there are none."""
    numbers = {name: number for number, name in enumerate(predictions.task.dimensions)}
    if not numbers:
        return np.zeros(len(predictions), dtype=np.intp), 1
    return np.array([numbers[name] for name in predictions.dimensions], dtype=np.intp), len(numbers)


def _bootstrap_of(corpus: Predictions | None, bootstrap: Bootstrap) -> Bootstrap:
    """Return a corpus's own resamples, of whole texts; they have nothing to do with the judged rows'."""
    if corpus is None:
        return bootstrap
    return replace(bootstrap, seed=bootstrap.seed + 1, clusters=clusters_of(corpus.items or corpus.ids))


def _shares(sums: Floats) -> Floats:
    return ratio(sums[..., :-1], sums[..., -1:])


def _unmixed(
    predictions: Predictions, bootstrap: Bootstrap, shares: Floats, drawn: Floats
) -> tuple[Floats, Floats]:
    """Return ``(dimensions, labels)`` corrected shares, and ``(rounds, dimensions, labels)``."""
    (dimensions, count), labels = _dimensions(predictions), len(predictions.labels)
    answers = places(predictions, "answers") % (labels + 1)
    cells = (dimensions * labels + places(predictions, "golds")) * (labels + 1) + answers
    shape = count, labels, labels + 1

    def solved(weights: npt.NDArray[np.int64] | None, observed: Floats) -> Floats:
        joint = np.bincount(cells, weights, minlength=math.prod(shape)).reshape(shape).astype(np.float64)
        return np.stack([_solved(*both) for both in zip(joint, observed, strict=True)])

    rounds = (weights[bootstrap.clusters] for some in bootstrap.draws() for weights in some)
    resampled = [solved(weights, observed) for weights, observed in zip(rounds, drawn, strict=True)]
    return solved(None, shares), np.stack(resampled)


def _solved(joint: Floats, observed: Floats) -> Floats:
    """Unmix one dimension; a label that no judged row has is taken as counted."""
    if np.isnan(observed).any():
        return np.full(len(joint), np.nan)
    rows = joint.sum(axis=1, keepdims=True)
    given_gold = np.divide(joint, rows, out=np.eye(*joint.shape), where=rows > 0)
    return unmix(observed, given_gold)


def _rogan_gladen(
    predictions: Predictions, bootstrap: Bootstrap, shares: Floats, drawn: Floats
) -> tuple[Floats, Floats]:
    """Return ``(1, labels)`` corrected shares, and ``(rounds, 1, labels)``."""
    gold, answer = flags(predictions)
    counted = np.concatenate([gold & answer, ~gold & ~answer, gold, ~gold], axis=1, dtype=np.float64)
    dimensions = _dimensions(predictions)
    whole, resampled = bootstrap.blocks(counted, *dimensions)

    def corrected(sums: Floats, observed: Floats) -> Floats:
        right, left, positive, negative = np.split(sums, 4, axis=-1)
        return rogan_gladen(observed, ratio(right, positive), ratio(left, negative))

    return corrected(whole, shares), corrected(resampled, drawn)
