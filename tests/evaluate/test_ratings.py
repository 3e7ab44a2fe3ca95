"""Figures of levels and dimensions, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, mean_absolute_error

from tunemill.evaluate.bootstrap import Bootstrap, clusters_of
from tunemill.evaluate.metrics import measures
from tunemill.evaluate.predictions import Predictions
from tunemill.evaluate.ratings import ratings
from tunemill.task import Task

LEVELS = ("low", "medium", "high")
DIMENSIONS = ("hope", "trust", "never asked")


def rated(texts: int = 60, ordered: bool = True) -> Predictions:
    """Return two rows for each text; every tenth has no answer."""
    random = np.random.default_rng(5)
    golds = random.integers(0, 3, 2 * texts)
    answers = np.clip(golds + random.choice([-1, 0, 0, 0, 1, 2], 2 * texts), 0, 2)
    items = [f"text {row // 2}" for row in range(2 * texts)]
    dimensions = [DIMENSIONS[row % 2] for row in range(2 * texts)]
    missing = [row % 10 == 9 for row in range(2 * texts)]
    return Predictions(
        Task("label", LEVELS, ordered=ordered, dimensions=DIMENSIONS),
        tuple(f"{item}/{dimension}" for item, dimension in zip(items, dimensions, strict=True)),
        tuple(items),
        tuple(LEVELS[gold] for gold in golds),
        tuple(None if lost else LEVELS[one] for one, lost in zip(answers, missing, strict=True)),
        tuple("too long" if lost else None for lost in missing),
        items=tuple(items),
        dimensions=tuple(dimensions),
    )


def by_text(given: Predictions) -> Bootstrap:
    return Bootstrap(400, 0.95, 1, clusters_of(given.items))


def test_each_dimension_has_the_figures_of_its_own_rows() -> None:
    given = rated()
    found = ratings(given, by_text(given))
    assert [one.dimension for one in found] == [None, "hope", "trust"]
    for one in found:
        rows = [n for n in range(len(given)) if one.dimension in (None, given.dimensions[n])]
        there = [n for n in rows if given.answers[n] is not None]
        gold = [LEVELS.index(given.golds[n]) for n in there]
        answer = [LEVELS.index(given.answers[n]) for n in there]
        assert (one.rows, one.errors) == (len(rows), len(rows) - len(there))
        assert one.accuracy.value == pytest.approx(np.sum(np.equal(gold, answer)) / len(rows))
        assert one.mean_absolute_error.value == pytest.approx(mean_absolute_error(gold, answer))
        assert one.bias.value == pytest.approx(np.mean(np.subtract(answer, gold)))
        assert one.weighted_kappa.value == pytest.approx(cohen_kappa_score(gold, answer, weights="quadratic"))
        everyone = [str(given.answers[n]) for n in rows]
        assert one.cohen_kappa.value == pytest.approx(
            cohen_kappa_score([given.golds[n] for n in rows], everyone)
        )
        for interval in (one.accuracy, one.mean_absolute_error, one.weighted_kappa, one.cohen_kappa):
            assert interval.low < interval.value < interval.high


def test_intervals_are_those_of_the_dimension_judged_alone() -> None:
    given = rated()
    whole = ratings(given, by_text(given))[1]
    rows = range(0, len(given), 2)
    alone = Predictions(
        Task("label", LEVELS, ordered=True),
        *(
            tuple(getattr(given, name)[n] for n in rows)
            for name in ("ids", "texts", "golds", "answers", "errors")
        ),
    )
    bootstrap = Bootstrap(400, 0.95, 1, np.arange(len(alone)))
    measured = measures(alone, bootstrap)
    assert whole.mean_absolute_error == bootstrap.of(measured["mean_absolute_error"])
    assert whole.weighted_kappa.low == pytest.approx(bootstrap.of(measured["quadratic_kappa"]).low)


def test_labels_without_an_order_have_no_distances() -> None:
    given = rated(ordered=False)
    assert {one.mean_absolute_error for one in ratings(given, by_text(given))} == {None}
    assert ratings(given, by_text(given))[0].cohen_kappa is not None


def test_kappa_of_one_label_alone_is_undefined() -> None:
    names = tuple(f"{n}" for n in range(9))
    given = Predictions(
        Task("label", LEVELS, ordered=True), names, names, ("low",) * 9, ("low",) * 9, (None,) * 9
    )
    found = ratings(given, Bootstrap(100, 0.95, 1, np.arange(9)))[0]
    assert (found.cohen_kappa, found.weighted_kappa) == (None, None)
    assert found.mean_absolute_error.value == 0
