"""Reliability curves and scores of probabilities, against scikit-learn and a value by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from statsmodels.stats.proportion import proportion_confint

from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.calibration import calibration
from tunemill.evaluate.predictions import Predictions
from tunemill.task import Task

LABELS = ("b", "c", "a")  # not in the order of their names, in which scikit-learn wants columns


def given(rows: int = 300) -> Predictions:
    random = np.random.default_rng(4)
    shares = random.dirichlet(np.ones(3), rows)
    golds = [LABELS[random.choice(3, p=row)] for row in shares]
    names = tuple(str(n) for n in range(rows))
    answers = [LABELS[row.argmax()] for row in shares]
    shares[0] = 0
    return Predictions(
        Task("label", LABELS),
        names,
        names,
        tuple(golds),
        (None, *answers[1:]),
        ("too long", *(None,) * (rows - 1)),
        shares,
    )


def alone(rows: int) -> Bootstrap:
    return Bootstrap(500, 0.95, 1, np.arange(rows))


def test_curve_and_scores_are_scikit_learns_over_rows_with_an_answer() -> None:
    predictions = given()
    found = calibration(predictions, alone(300))
    shares = predictions.probabilities[1:]
    golds = predictions.golds[1:]
    right = [gold == answer for gold, answer in zip(golds, predictions.answers[1:], strict=True)]
    accuracies, confidences = calibration_curve(right, shares.max(axis=1), n_bins=10)
    assert [one.accuracy.value for one in found.bins] == pytest.approx(list(accuracies))
    assert [one.confidence for one in found.bins] == pytest.approx(list(confidences))
    assert sum(one.rows for one in found.bins) == found.rows == 299
    gaps = [one.rows * abs(one.accuracy.value - one.confidence) for one in found.bins]
    assert found.expected_calibration_error.value == pytest.approx(sum(gaps) / 299)
    by_name = shares[:, [2, 0, 1]]
    assert found.brier_score == pytest.approx(brier_score_loss(golds, by_name, labels=list("abc")))
    assert found.log_loss == pytest.approx(log_loss(golds, by_name, labels=list("abc")))


def test_error_of_four_answers_by_hand() -> None:
    shares = np.array([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [0.3, 0.7]])
    names = tuple("1234")
    predictions = Predictions(
        Task("label", ("x", "y")), names, names, tuple("xyyy"), tuple("xxyy"), (None,) * 4, shares
    )
    found = calibration(predictions, alone(4))
    # 0.9 is closed above: it lies in the bin under 0.95's, with right 1, 0, 1, 1 of bins of one row each
    assert [(round(one.low, 1), one.rows) for one in found.bins] == [(0.5, 1), (0.6, 1), (0.8, 1), (0.9, 1)]
    assert found.expected_calibration_error.value == pytest.approx((0.1 + 0.95 + 0.4 + 0.3) / 4)
    low, high = proportion_confint(1, 1, method="wilson")
    assert (found.bins[0].accuracy.low, found.bins[0].accuracy.high) == pytest.approx((low, high))


def test_of_several_labels_every_one_is_a_point() -> None:
    golds, names = (("b",), ("b", "a"), ("c",)), tuple("123")
    shares = np.array([[0.8, 0.1, 0.1], [0.6, 0.2, 0.7], [0.1, 0.9, 0.3]])
    predictions = Predictions(
        Task("labels", LABELS, 2),
        names,
        names,
        ("b", "b; a", "c"),
        ("b", "b; a", "c"),
        (None,) * 3,
        shares,
        golds,
        golds,
    )
    found = calibration(predictions, alone(3))
    truth = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]])
    assert (found.what, found.rows, found.log_loss) == ("label", 9, None)
    assert found.brier_score == pytest.approx(brier_score_loss(truth.ravel(), shares.ravel()))
    assert found.bins[0].rows == 3


def test_without_probabilities_there_is_nothing_to_judge() -> None:
    predictions = Predictions(Task("label", LABELS), ("1",), ("",), ("a",), ("a",), (None,))
    assert calibration(predictions, alone(1)) is None
