"""Whether probabilities mean what they say: reliability curve, calibration error, Brier score.

One point is an answer with the probability it was given or, where a text may have several labels, a
label of a row with the probability that it is among them. Bins have equal width and are closed
above (Guo et al. 2017, arXiv 1706.04599). Rows without an answer have no probability and are left out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tunemill.evaluate.bootstrap import Bootstrap, Floats, ratio
from tunemill.evaluate.figures import Bin, Calibration, Interval
from tunemill.evaluate.metrics import places
from tunemill.evaluate.predictions import Predictions
from tunemill.evaluate.several import flags

BINS = 10

Flags = npt.NDArray[np.bool_]


def calibration(predictions: Predictions, bootstrap: Bootstrap) -> Calibration | None:
    """Judge the probabilities; None when there are none."""
    shares = predictions.probabilities
    there = np.array([answer is not None for answer in predictions.answers])
    if shares is None or not there.any():
        return None
    several = predictions.task.form == "labels"
    given, right = (shares, flags(predictions)[0]) if several else _answers(predictions, shares)
    numbers = np.clip(np.ceil(given * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = _gaps(given, right, numbers, there)
    points = there.sum() * given.shape[1]
    value = float(np.abs(gaps.sum(axis=0)).sum() / points)
    sums = bootstrap.sums(np.concatenate([gaps, there[:, None] * given.shape[1]], axis=1, dtype=np.float64))
    resampled = ratio(np.abs(sums[:, :-1]).sum(axis=1), sums[:, -1])
    brier, loss = _losses(predictions, shares, there)
    return Calibration(
        what="label" if several else "answer",
        rows=int(points),
        expected_calibration_error=bootstrap.interval(value, resampled),
        brier_score=brier,
        log_loss=loss,
        most_pruned=predictions.most_pruned,
        bins=_bins(given[there], right[there], numbers[there], bootstrap.confidence),
    )


def _answers(predictions: Predictions, shares: Floats) -> tuple[Floats, Flags]:
    """Return ``(rows, 1)`` probabilities of the answers, and whether they are right."""
    answers, golds = places(predictions, "answers"), places(predictions, "golds")
    return np.take_along_axis(shares, answers[:, None], axis=1), (answers == golds)[:, None]


def _gaps(given: Floats, right: Flags, numbers: npt.NDArray[np.int64], there: Flags) -> Floats:
    """Return ``(rows, bins)`` sums of probability minus truth; a bin's total is its rows times its gap."""
    gaps = np.zeros((len(given), BINS))
    rows = np.broadcast_to(np.arange(len(given))[:, None], given.shape)
    np.add.at(gaps, (rows, numbers), given - right)
    return gaps * there[:, None]


def _bins(given: Floats, right: Flags, numbers: npt.NDArray[np.int64], confidence: float) -> tuple[Bin, ...]:
    found = []
    for number in range(BINS):
        inside = numbers == number
        if count := int(inside.sum()):
            hits = int(right[inside].sum())
            edges = number / BINS, (number + 1) / BINS
            found.append(Bin(*edges, count, float(given[inside].mean()), _wilson(hits, count, confidence)))
    return tuple(found)


def _wilson(hits: int, count: int, confidence: float) -> Interval:
    from scipy.stats import binomtest

    found = binomtest(hits, count).proportion_ci(confidence, method="wilson")
    return Interval(hits / count, float(found.low), float(found.high))


def _losses(predictions: Predictions, shares: Floats, there: Flags) -> tuple[float, float | None]:
    """Return the Brier score and, of single labels, the log loss."""
    from sklearn.metrics import brier_score_loss, log_loss

    if predictions.task.form == "labels":
        return float(((flags(predictions)[0][there] - shares[there]) ** 2).mean()), None
    order = np.argsort(predictions.labels)  # scikit-learn takes the columns in the labels' order by name
    golds = [gold for gold, one in zip(predictions.golds, there, strict=True) if one]
    arguments = (golds, shares[there][:, order])
    labels = sorted(predictions.labels)
    brier = brier_score_loss(*arguments, labels=labels, scale_by_half=False)
    return float(brier), float(log_loss(*arguments, labels=labels))
